"""Progress bars for longer work; silent without a terminal or notebook."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

T = TypeVar("T")
# Seconds before a bar appears.
DELAY = 1.0
# One bar at a time: nested work is part of the outer bar.
_SHOWN = threading.Lock()


class _Rate(ProgressColumn):
    """Items per second, or seconds per item if there are fewer than one."""

    def render(self, task: Task) -> Text:
        return Text(rate(task.finished_speed or task.speed), style="progress.data.speed")


def rate(speed: float | None) -> str:
    """Items per second as text.

    >>> rate(None), rate(1234.5), rate(2.5), rate(0.1)
    ('', '1,234/s', '2.5/s', '10 s each')
    """
    if not speed:
        return ""
    if speed < 1:
        return f"{1 / speed:.2g} s each" if speed > 0.01 else f"{1 / speed:,.0f} s each"
    return f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.1f}/s"


@contextmanager
def progress_bar(
    title: str, total: float | int | None, *, enabled: bool = True, transient: bool = True
) -> Iterator[Callable[..., None]]:
    """Yield ``advance(amount=1, note="")``, shown as a bar on standard error after a second.

    Nothing is drawn when ``enabled`` is false, inside another bar, in a worker process, or where
    standard error is neither a terminal nor a notebook, so logs and pipes stay clean.

    >>> with progress_bar("counting", total=3, enabled=False) as advance:
    ...     for _ in range(3):
    ...         advance()
    """
    console = Console(stderr=True)
    watched = console.is_terminal or console.is_jupyter
    at_home = multiprocessing.current_process().name == "MainProcess"
    if not (enabled and watched and at_home and _SHOWN.acquire(blocking=False)):
        yield lambda amount=1, note="": None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    bar = Progress(*columns, console=console, transient=transient)
    task = bar.add_task(title, total=total, note="")
    timer = threading.Timer(DELAY, bar.start)
    timer.daemon = True
    timer.start()

    def advance(amount: float | int = 1, note: str = "") -> None:
        bar.update(task, advance=amount, note=note)

    try:
        yield advance
    finally:
        timer.cancel()
        timer.join()
        bar.stop()
        _SHOWN.release()


def followed(title: str, items: Sequence[T], *, enabled: bool = True) -> Iterator[T]:
    """Yield each item, with a progress bar.

    >>> list(followed("sites", ["resid 0", "resid 1"], enabled=False))
    ['resid 0', 'resid 1']
    """
    with progress_bar(title, len(items), enabled=enabled) as advance:
        for item in items:
            yield item
            advance()


@contextmanager
def no_bars() -> Iterator[None]:
    """Context without progress bars."""
    ours = _SHOWN.acquire(blocking=False)
    try:
        yield
    finally:
        if ours:
            _SHOWN.release()
