"""Progress bars for work longer than a moment; silent where nobody watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def progress_bar(
    title: str, total: float | int | None, *, enabled: bool = True, transient: bool = True
) -> Iterator[Callable[..., None]]:
    """Yield ``advance(amount=1, note="")``, shown as a bar on standard error.

    Nothing is drawn when ``enabled`` is false or standard error is neither a terminal nor a
    notebook, so logs and pipes stay clean.

    >>> with progress_bar("counting", total=3, enabled=False) as advance:
    ...     for _ in range(3):
    ...         advance()
    """
    console = Console(stderr=True)
    visible = enabled and (console.is_terminal or console.is_jupyter)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=transient, disable=not visible) as bar:
        task = bar.add_task(title, total=total, note="")

        def advance(amount: float | int = 1, note: str = "") -> None:
            bar.update(task, advance=amount, note=note)

        yield advance
