"""Options of each command: names, defaults and help texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lensclust.tasks.names import spelt_names


@dataclass(frozen=True)
class RunOptions:
    """How to run a study.

    Attributes:
        preset: smoke (seconds), default (minutes on two cores) or paper (for a GPU).
        seeds: number of independent repetitions; default that of the study.
        out: run directory; default runs/STUDY-PRESET.
        resume: continue a run that was interrupted.
        jobs: worker processes; -1 uses all cores.
        engine: local (processes on this machine) or ray (seeds, checkpoints and sites on all
            nodes of a Ray cluster; the run directory must be on a shared file system).
        quiet: no progress bars.
    """

    preset: str = "default"
    seeds: int | None = None
    out: Path | None = None
    resume: bool = False
    jobs: int = -1
    engine: Literal["local", "ray"] = "local"
    quiet: bool = False


@dataclass(frozen=True)
class ReportOptions:
    """One page over one or several run directories.

    Attributes:
        runs: run directories.
        out: the page; default report.html in the only directory.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    out: Path | None = None


@dataclass(frozen=True)
class ServeOptions:
    """Show a run in the browser while it works, on this machine only; its page at the end.

    Attributes:
        run: a run directory, finished or not.
        port: port to listen on; 0 for any free one.
    """

    run: Annotated[Path, tyro.conf.Positional]
    port: int = 8765


@dataclass(frozen=True)
class ExtractOptions:
    """Read activations of a model on a task set into a zarr store.

    Attributes:
        model: anything `lensclust.load` takes: native:sif-small, smollm2-135m-instruct, a
            directory, a hub id, a GGUF file, a checkpoint.
        out: the store's folder, or its URL such as s3://bucket/a.
        sites: sites to read: resid, head, attn_out, mlp_out, or single ones such as "resid 5".
        at: read positions: answer, instruction_end, ...
        batch_tokens: upper bound of a batch's size, padding included; default by device.
        share_prefixes: compute common prefixes of prompts once.
        dtype: numpy type of the stored activations.
        device: where the model runs, such as cuda:1; default an accelerator if there is one.
        model_dtype: of the model's weights; default float32, or that of a checkpoint.
        resume: continue a store that was interrupted.
        append: add these prompts to a finished store; refused if it holds one of them.
        engine: local (this process) or ray (replicas of the model on all nodes of a Ray cluster,
            one GPU each if there are GPUs; the store must be on a shared file system).
        workers: replicas of the model (ray); default as many as there is room for.
        threads: CPU threads of a replica (ray); default those of this process.
        quiet: no progress bars.
    """

    model: str
    tasks: Annotated[str, tyro.conf.arg(help=f"One of {', '.join(spelt_names())}.")]
    out: str
    sites: tuple[str, ...] = ("resid", "head")
    at: tuple[str, ...] = ("answer",)
    batch_tokens: int | None = None
    share_prefixes: bool = True
    dtype: Literal["float16", "float32", "float64"] = "float32"
    device: str | None = None
    model_dtype: Literal["bfloat16", "float16", "float32", "float64"] | None = None
    resume: bool = False
    append: bool = False
    engine: Literal["local", "ray"] = "local"
    workers: int | None = None
    threads: int | None = None
    quiet: bool = False


@dataclass(frozen=True)
class DoctorOptions:
    """Versions, devices, and what a model really supports.

    Attributes:
        model: a model to examine; anything `lensclust.load` takes.
        json: print JSON.
    """

    model: str | None = None
    json: bool = False


@dataclass(frozen=True)
class NoOptions:
    """List the studies, the paper that each follows, and the cost of each preset."""
