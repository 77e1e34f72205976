"""The ``lensclust`` command; unusable arguments give a one-line error.

Heavy modules are imported only when a command needs them, so that ``--help`` is fast.
"""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from dataclasses import make_dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lensclust import own_packages
from lensclust.cli.claim_table import print_claims
from lensclust.cli.options import (
    DoctorOptions,
    ExtractOptions,
    NoOptions,
    ReportOptions,
    RunOptions,
    ServeOptions,
)
from lensclust.errors import InputError, shown
from lensclust.processes import Terminated, interruptible

DONE, FAILED, UNUSABLE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the ``lensclust`` command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    own_packages.put_first()
    # loky replaces a worker that uses much memory, and warns as if it had failed.
    warnings.filterwarnings("ignore", message="A worker stopped while some jobs")
    try:
        with interruptible():
            return _dispatch(given)
    except InputError as error:
        return _end(UNUSABLE, str(error))
    except OSError as error:
        place = "" if error.filename is None else f": {os.fsdecode(error.filename)}"
        # An invalid path is the user's input.
        unusable = error.errno in (errno.ENAMETOOLONG, errno.ELOOP)
        return _end(UNUSABLE if unusable else FAILED, f"{error.strerror or error}{place}")
    except KeyboardInterrupt as error:
        then = "; continue with --resume" if given[0] in ("run", "extract") else ""
        number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        return _end(128 + number, f"interrupted{then}")


def _end(status: int, said: str) -> int:
    print(f"lensclust: {shown(said)}", file=sys.stderr)
    return status


def _dispatch(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help"):
        print(_usage())
        return DONE if given else UNUSABLE
    command, rest = given[0], given[1:]
    if command not in COMMANDS:
        raise InputError(f"command {command!r} is not known: expected one of {', '.join(COMMANDS)}")
    return COMMANDS[command][0](rest)


def _studies(given: list[str]) -> int:
    _parse(NoOptions, given, "studies")
    table = Table(box=None, pad_edge=False)
    for column in ("study", "what it shows", "after", "presets"):
        table.add_column(column, overflow="fold", no_wrap=column == "study")
    for name, study in sorted(_load_studies().items()):
        presets = "\n".join(f"{p}: {study.cost.get(p, '?')}" for p in study.presets)
        table.add_row(*map(Text, (name, study.title, study.paper, presets)))
    Console().print(table)
    return DONE


def _run(given: list[str]) -> int:
    studies = _load_studies()
    if not given or given[0] in ("-h", "--help"):
        lines = [f"  {name:22} {study.title}" for name, study in studies.items()]
        print("\n".join(["usage: lensclust run STUDY [--preset NAME] [options]", "", *lines, "",
                         "lensclust run STUDY --help explains each option; lensclust studies says "
                         "what a preset costs."]))  # fmt: skip
        return DONE if given else UNUSABLE
    name, rest = given[0], given[1:]
    if name not in studies:
        raise InputError(f"study {name!r} is not known: expected one of {', '.join(studies)}")
    options, study = _run_options(studies[name], rest)
    preset = options.preset
    out = options.out or Path("runs") / f"{name}-{preset}"
    with _sweeps(options.engine):
        findings = study.execute(
            out.absolute() if options.engine == "ray" else out,
            preset=preset,
            seeds=options.seeds,
            resume=options.resume,
            jobs=options.jobs,
            progress=not options.quiet,
        )
    print_claims(findings.claims, Console())
    for note in findings.notes:
        print(f"note: {note}")
    print(f"page: {shown(out / 'report.html')}")
    return DONE


def _run_options(study: Any, given: list[str]) -> tuple[RunOptions, Any]:
    """Options of the run, and the study with the given fields."""
    preset, command = _preset(given, study), _command(study)
    # The preset sets the defaults, so it must be known before the options are read.
    default = command(RunOptions(preset=preset), study(**study.presets[preset]))
    kind = tyro.conf.OmitArgPrefixes[command]
    parsed: Any = _parse(kind, given, f"run {study.name()}", default=default)
    return parsed.options, parsed.study


def _report(given: list[str]) -> int:
    from lensclust.report import write_page

    options = _parse(ReportOptions, given, "report")
    print(f"page: {shown(write_page(options.runs, options.out))}")
    return DONE


def _serve(given: list[str]) -> int:
    from lensclust.runs import HOST, served

    options = _parse(ServeOptions, given, "serve")
    with served(options.run, options.port) as server:
        print(f"serving: http://{HOST}:{server.server_address[1]}/ (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return DONE


def _extract(given: list[str]) -> int:
    options = _parse(ExtractOptions, given, "extract")
    import torch

    import lensclust as lc
    from lensclust.models import found_device
    from lensclust.runs import require_place
    from lensclust.storage import as_place

    place = as_place(options.out)
    if isinstance(place, Path):
        require_place(place)
    elif place.protocol == "memory":
        raise InputError(f"extract: --out {options.out} is in memory, expected a folder or URL")
    loading: dict[str, Any] = {
        "device": None if options.device is None else found_device(options.device),
        "dtype": options.model_dtype and getattr(torch, options.model_dtype),
    }
    model: Any = lc.load(options.model, progress=not options.quiet, **loading)
    prompts = lc.tasks.from_name(options.tasks, model.tokenizer)
    arguments: dict[str, Any] = {"at": options.at, "batch_tokens": options.batch_tokens}
    arguments |= {"share_prefixes": options.share_prefixes, "dtype": options.dtype}
    arguments |= {"store": place, "resume": options.resume, "append": options.append}
    arguments |= {"progress": not options.quiet}
    if options.engine == "ray":
        del model  # each worker loads the model
        arguments |= {"workers": options.workers, "threads": options.threads, "loading": loading}
        acts = lc.extract_with_ray(options.model, prompts, options.sites, **arguments)
    else:
        acts = lc.extract(model, prompts, options.sites, **arguments)
    sizes = ", ".join(f"{name} {tuple(acts[name].shape)}" for name in acts)
    print(f"store: {shown(options.out)} ({acts.sizes['prompt']} prompts; {sizes})")
    return DONE


def _completion(given: list[str]) -> int:
    from lensclust.cli.completion import SHELLS, completion

    if given in ([], ["-h"], ["--help"]):
        print(f"usage: lensclust completion {'|'.join(SHELLS)}\n\nIn ~/.bashrc or ~/.zshrc:\n"
              '  eval "$(lensclust completion bash)"')  # fmt: skip
        return DONE if given else UNUSABLE
    print(completion(" ".join(given), OPTIONS, _load_studies()), end="")
    return DONE


def _doctor(given: list[str]) -> int:
    options = _parse(DoctorOptions, given, "doctor")
    from lensclust.cli.doctor import examine

    if options.json:
        print(json.dumps(examine(options.model), indent=2, ensure_ascii=False))
        return DONE
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, state in examine(options.model).items():
        table.add_row(*map(Text, (name, state)))  # plain text: "[peft]" is not markup
    Console().print(table)
    return DONE


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "studies": (_studies, "what there is, which paper, what it costs"),
    "run": (_run, "run a study: lensclust run STUDY [--preset smoke|default|paper] ..."),
    "report": (_report, "one page over one or several run directories"),
    "serve": (_serve, "show a run in the browser while it works (this machine only)"),
    "extract": (_extract, "read activations into a zarr store"),
    "doctor": (_doctor, "versions, devices, and what a model really supports"),
    "completion": (_completion, "completion for bash or zsh"),
}
OPTIONS: dict[str, Any] = {
    "studies": None,
    "run": RunOptions,
    "report": ReportOptions,
    "serve": ServeOptions,
    "extract": ExtractOptions,
    "doctor": DoctorOptions,
    "completion": None,
}


def _parse(kind: Any, given: list[str], command: str, **keywords: Any) -> Any:
    """Parse options from command-line arguments.

    Raises:
        InputError: tyro's message, without the frame around it.
    """
    box, columns = io.StringIO(), os.environ.get("COLUMNS")
    if not {"-h", "--help"} & {*given}:
        os.environ["COLUMNS"] = "100000"  # no line breaks
    try:
        with redirect_stderr(box):
            return tyro.cli(kind, args=given, prog=f"lensclust {command}", **keywords)
    except SystemExit as end:
        if not end.code:
            raise
    finally:
        os.environ.pop("COLUMNS", None)
        if columns is not None:
            os.environ["COLUMNS"] = columns
    # The message: a title, and lines up to the next one without words.
    rows = [row.strip(" │") for row in box.getvalue().splitlines()[1:]]
    text = "\n".join(row if row.strip("╰╯─-") else "" for row in rows).strip()
    reason = text.partition("\n\n")[0].split("\n")
    raise InputError(f"{command}: {' '.join(reason)} (lensclust {command} --help says more)")


def _usage() -> str:
    lines = [f"  {name:11} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lensclust COMMAND [options]",
            "",
            "Where, when and how a causal language model holds the identity of its task.",
            "",
            *lines,
            "",
            "lensclust COMMAND --help says more.",
        ]
    )


def _load_studies() -> dict[str, Any]:
    """All studies of installed packages; those that cannot be loaded are reported and skipped.

    Raises:
        InputError: if none can be loaded.
    """
    studies, failures = {}, []
    for point in sorted(entry_points(group="lensclust.studies"), key=lambda point: point.name):
        try:
            studies[point.name] = point.load()
        except Exception as error:  # a third-party package may raise anything
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            failures.append(f"study {point.name!r} ({point.value}) cannot be loaded: {said}")
    if not studies:
        reason = failures[0] if failures else "none is installed: pip install lensclust"
        raise InputError(f"no study can be loaded: {reason}")
    for failure in failures:
        print(f"lensclust: {failure}", file=sys.stderr)
    return studies


def _sweeps(engine: str) -> AbstractContextManager[None]:
    """Context that selects where sweeps run."""
    if engine == "local":
        return nullcontext()
    from lensclust.parallel import sweeps_on_ray

    return sweeps_on_ray()


def _preset(given: list[str], study: Any) -> str:
    """The preset in the options, before they are parsed."""
    named = RunOptions.preset
    for index, word in enumerate(given):
        if word == "--preset" and index + 1 < len(given):
            named = given[index + 1]
        elif word.startswith("--preset="):
            named = word.partition("=")[2]
    if named not in study.presets:
        raise InputError(
            f"preset {named!r} is not known: {study.name()} has {', '.join(study.presets)}"
        )
    return named


def _command(study: Any) -> Any:
    """The options of a run and the fields of its study, as one flat set."""
    return make_dataclass(
        "Run",
        [("options", RunOptions), ("study", study)],
        frozen=True,
        namespace={"__doc__": study.__doc__},
    )


if __name__ == "__main__":
    raise SystemExit(main())
