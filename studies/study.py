"""The base class of studies, and how to run one into a directory.

A study is a frozen dataclass: its fields are its options, `Study.run` turns a `Context` into
`Findings`. Register the class under the entry-point group ``lensclust.studies`` and
``lensclust run NAME`` offers every field as an option.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import lensclust as lc
from lensclust.errors import check_counts
from lensclust.progress import no_bars, progress_bar
from lensclust.results import corrected, shown_by
from lensclust.runs import directory as run_directory
from lensclust.storage import (
    LOCK,
    check_folder,
    digest_of,
    locked,
    publish,
    read_json,
    remove_partial,
    seal_folder,
    staging,
    writing,
)

if TYPE_CHECKING:
    import pandas as pd

    from lensclust.runs import View

# Upper bound of the number of seeds.
MAX_SEEDS = 1_000_000

Frames = Mapping[str, "pd.DataFrame"]


@dataclass(frozen=True)
class Findings:
    """The results of a study.

    Attributes:
        scores: one tidy frame of all measurements.
        claims: claims decided from it.
        figures: file name -> Altair chart.
        shows: which claims a figure shows, as patterns: `lensclust.results.shown_by`.
        views: file name -> interactive view of the page.
        notes: caveats, shown on the page.
        provenance: fingerprints, digests and sizes of models and data.
    """

    scores: pd.DataFrame
    claims: Sequence[lc.Claim]
    figures: Mapping[str, Any]
    shows: Mapping[str, Sequence[str]] = field(default_factory=dict)
    views: Mapping[str, View] = field(default_factory=dict)
    notes: Sequence[str] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """Where and how a study runs.

    Attributes:
        out: the run directory.
        seeds: one independent repetition each.
        jobs: worker processes for independent parts.
        progress: show bars.
    """

    out: Path
    seeds: tuple[int, ...] = (0,)
    jobs: int = -1
    progress: bool = True

    def sweep(
        self, function: Callable[..., Frames], items: Sequence[Any], title: str
    ) -> dict[str, pd.DataFrame]:
        """``function(item, folder)`` for each item, in worker processes; frames concatenated.

        Frames of one name are concatenated over the items that return one.

        The frames of an item are stored in the run directory as soon as it is done, so that a
        resumed run computes only missing items. ``folder`` is separate for each item, for
        checkpoints; it exists again on resume.
        """
        import pandas as pd
        from joblib import delayed

        from lensclust.parallel import in_parallel

        config = self.out / "config.json"
        run = digest_of(read_json(config)) if config.exists() else None
        folders = [self.out / "parts" / f"{title}-{item}" for item in items]
        calls = (
            delayed(_once)(function, item, folder, run=run)
            for item, folder in zip(items, folders, strict=True)
        )
        found: dict[str, list[pd.DataFrame]] = {}
        with progress_bar(title, len(items), enabled=self.progress) as advance:
            for frames in in_parallel(calls, jobs=self.jobs):
                for name, frame in frames.items():
                    found.setdefault(name, []).append(frame)
                advance()
        return {name: pd.concat(parts, ignore_index=True) for name, parts in found.items()}


@dataclass(frozen=True)
class Study:
    """Base of all studies: subclass as a frozen dataclass and write `run`."""

    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}}
    cost: ClassVar[Mapping[str, str]] = {}
    default_seeds: ClassVar[int] = 1

    def run(self, context: Context) -> Findings:
        """Measure, and decide the claims."""
        raise NotImplementedError

    def execute(
        self,
        out: Path,
        *,
        preset: str = "default",
        seeds: int | None = None,
        resume: bool = False,
        jobs: int = -1,
        progress: bool = True,
    ) -> Findings:
        """Run into a directory: claims, scores, figures and the page.

        Args:
            out: a new or empty folder, or with ``resume`` one that holds this run.
            preset: the name under which the fields were chosen, for the record.
            seeds: number of repetitions; default the study's own.

        Raises:
            InputError: if ``out`` holds something else, or another process uses it; nothing is
                written then.
        """
        from lensclust.report import write_page

        check_counts("run", jobs=None if jobs == 0 else abs(jobs))
        if seeds is not None and not 1 <= seeds <= MAX_SEEDS:
            raise lc.InputError(f"seeds: expected at least 1, at most {MAX_SEEDS}, given {seeds}")
        check_counts("run", seeds=seeds)
        numbers = tuple(range(self.default_seeds if seeds is None else seeds))
        if jobs == 0:
            raise lc.InputError("jobs: expected a number of processes, or -1 for all, given 0")
        config = {"study": type(self).name(), "preset": preset, "seeds": len(numbers)}
        config |= {"fields": asdict(self)}
        for knob in fields(self):
            value, kind = getattr(self, knob.name), str(knob.type)
            if isinstance(value, float) and not ("float" in kind and math.isfinite(value)):
                wanted = "a finite number" if "float" in kind else "a whole number"
                raise lc.InputError(f"{knob.name}={value}: expected {wanted}")
        self.check()
        quiet = nullcontext() if progress else no_bars()
        with quiet, run_directory.claimed(out, config, resume=resume):
            findings = self.run(Context(out, numbers, jobs, progress))
            shown = shown_by(findings.claims, findings.figures, findings.shows)
            findings = replace(findings, claims=corrected(shown))
            run_directory.finish(
                out,
                scores=findings.scores,
                claims=findings.claims,
                figures=findings.figures,
                views=findings.views,
                notes=findings.notes,
                provenance=findings.provenance,
            )
            write_page([out])
        return findings

    def check(self) -> None:
        """Raise InputError for unusable fields before anything is written."""

    @classmethod
    def name(cls) -> str:
        """The study's name on the command line: its module's."""
        return cls.__module__.rpartition(".")[2]


@contextmanager
def silenced(logger: str) -> Iterator[None]:
    """Disable a logger inside the block, where the study's notes say the same."""
    named = logging.getLogger(logger)
    before, named.disabled = named.disabled, True
    try:
        yield
    finally:
        named.disabled = before


def check_clusters(k: int, rows: pd.DataFrame, groups: list[str]) -> None:
    """Raise InputError for more clusters than the smallest group of prompts has rows.

    Raises:
        InputError: names ``k`` and the number of rows.
    """
    smallest = int(rows.groupby(groups).size().min())
    if not 2 <= k <= smallest:
        raise lc.InputError(
            f"k={k}: expected 2 to {smallest} clusters, the prompts of one {groups[-1]} to cluster"
        )


def _once(
    function: Callable[..., Frames], item: Any, folder: Path, *, run: str | None = None
) -> Frames:
    """The frames of one item, from disk if this ``run`` already did it."""
    from lensclust.storage import read_frame

    done, what = folder / "frames", f"part {folder}"
    of = {"part": folder.name, "run": run}
    with writing(what):
        folder.mkdir(parents=True, exist_ok=True)
    # Waits: a worker may outlive a killed run and finish an item that a resumed run needs.
    with locked(folder / LOCK, what, wait=True):
        if not done.exists():
            frames = function(item, folder)
            with writing(what):
                remove_partial(folder)
                with staging(folder) as top:
                    unfinished = top / "frames"
                    unfinished.mkdir()
                    for name, frame in frames.items():
                        frame.to_parquet(unfinished / f"{name}.parquet", index=False)
                    seal_folder(unfinished, of)
                    publish(unfinished, done)
    check_folder(done, f"{what}: delete it to have it done again", of=of)
    return {
        path.stem: read_frame(path, what=f"{what}: ") for path in sorted(done.glob("*.parquet"))
    }
