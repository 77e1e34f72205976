"""A call that fails leaves a folder as it found it, whatever lies there."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

import lensclust as lc
from lensclust.cli.command import main
from lensclust.models.native import native_config
from lensclust.report.page import write_page
from lensclust.storage.atomic import LOCK, is_vacant, remove_partial, replacing, staging
from lensclust.training.data import required_sizes
from lensclust.training.pretraining import train
from studies.study import Context, Findings, Study
from tests.faults.work import KNOBS, PROMPTS, SIZES, some_prompts
from tests.lensclust.report.test_report import make_run

POSIX = pytest.mark.skipif(os.name != "posix", reason="links, modes and devices")
CONFIG = native_config("sif-small", **{**SIZES, **required_sizes(PROMPTS)})

# Names that look like ours, and nobody's.
NAMES = st.sampled_from(
    ["a", "movie.partial", ".lock", "x.partial", "figures", "parts", "step.partial", "report.html",
     ".a.partial", ".a.7.partial", "é\n", "0.0.partial", "scores.parquet", ".lensclust.x.partial"]
)  # fmt: skip
MODES = st.sampled_from([0o644, 0o600, 0o755, 0o444])
TREES = st.recursive(
    st.one_of(
        st.tuples(st.just("file"), st.binary(max_size=8), MODES),
        st.tuples(st.just("link"), st.sampled_from(["a", "nowhere", "..", "/"]), MODES),
        st.tuples(st.just("folder"), st.just({}), st.just(0o755)),
    ),
    lambda inner: st.tuples(
        st.just("folder"),
        st.dictionaries(NAMES, inner, max_size=3),
        st.sampled_from([0o755, 0o700]),
    ),
    max_leaves=6,
)
FOLDERS = st.dictionaries(NAMES, TREES, min_size=1, max_size=4)
REPORTED: Any = {
    "movie.partial": ("file", b"a", 0o644),
    "sub": ("folder", {"x.partial": ("folder", {"thesis": ("file", b"a", 0o644)}, 0o755)}, 0o755),
}


def plant(folder: Path, tree: dict[str, Any]) -> None:
    folder.mkdir()
    for name, (kind, content, mode) in tree.items():
        path = folder / name
        if kind == "file":
            path.write_bytes(content)
        elif kind == "link":
            path.symlink_to(content)
            continue
        else:
            plant(path, content)
        path.chmod(mode)


def seen(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Names, kinds, modes and content of all that lies below a folder."""

    def content(path: Path) -> Any:
        if path.is_symlink():
            return os.readlink(path)
        return path.read_bytes() if path.is_file() else None

    return {
        str(path.relative_to(folder)): (stat.S_IFMT(m := path.lstat().st_mode), m, content(path))
        for path in folder.rglob("*")
    }


@dataclass(frozen=True)
class Failing(Study):
    """Fails at once, or in the middle of a part."""

    late: bool = False

    def run(self, context: Context) -> Findings:
        if self.late:
            context.sweep(part, context.seeds, "seed")
        raise RuntimeError("failed")


def part(seed: int, folder: Path) -> Any:
    (folder / "empty").mkdir()
    raise RuntimeError("failed")


def failing_run(out: Path, *, late: bool = False, resume: bool = False) -> None:
    Failing(late=late).execute(out, seeds=2, jobs=1, resume=resume, progress=False)


def failing_train(out: Path, **options: Any) -> None:
    train(CONFIG, PROMPTS, out=out, progress=False, **{**KNOBS, **options})


def failing_finetune(out: Path, model: Any, **options: Any) -> None:
    lc.finetune(model, some_prompts(3), out=out, progress=False, **{"steps": 0, **options})


# What is called on a folder that holds something.
CALLS: dict[str, Callable[[Path, Any], Any]] = {
    "run": lambda out, _: failing_run(out),
    "run that resumes": lambda out, _: failing_run(out, resume=True),
    "run that fails late": lambda out, _: failing_run(out, late=True),
    "extract": lambda out, model: lc.extract(
        model, some_prompts(3), "resid", store=out, progress=False
    ),
    "extract that resumes": lambda out, model: lc.extract(
        model, some_prompts(3), "resid", store=out, resume=True, append=True, progress=False
    ),
    "train": lambda out, _: failing_train(out, steps=0),
    "train that resumes": lambda out, _: failing_train(out, resume=True, lr=float("nan")),
    "train that overflows": lambda out, _: failing_train(out, lr=1e38),
    "finetune": failing_finetune,
    "finetune that resumes": lambda out, model: failing_finetune(out, model, resume=True),
    "report": lambda out, _: write_page([out]),
    "report elsewhere": lambda out, _: write_page([out], out / "page.html"),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return lc.load(native_config("sif-small", **SIZES), device="cpu")


@POSIX
@pytest.mark.parametrize("call", CALLS)
@given(tree=FOLDERS)
@example(tree=REPORTED)
@settings(max_examples=4, deadline=None, suppress_health_check=list[Any](HealthCheck))
def test_a_call_that_fails_leaves_what_was_there(model: Any, call: str, tree: Any) -> None:
    with tempfile.TemporaryDirectory() as top:
        plant(Path(top) / "v", tree)
        before = seen(Path(top))
        with pytest.raises((lc.InputError, RuntimeError)):
            CALLS[call](Path(top) / "v", model)
        after = seen(Path(top))
    assert {name: after.get(name) for name in before} == before
    # What a training did before it overflowed is there to be resumed.
    made = after.keys() - before.keys()
    assert all("/step-" in name or name.endswith("training.state") for name in made), made


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_a_run_that_fails_removes_what_it_made(tmp_path: Path, inside: bool, late: bool) -> None:
    out = tmp_path / "deep" / "v"
    if inside:
        out.mkdir(parents=True, mode=0o700)
    before = seen(tmp_path)
    with pytest.raises(RuntimeError, match="failed"):
        failing_run(out, late=late)
    assert seen(tmp_path) == before


def test_a_run_that_fails_leaves_what_came_meanwhile(tmp_path: Path) -> None:
    class Disturbed(Failing):
        def run(self, context: Context) -> Findings:
            (context.out / "parts").mkdir()
            (context.out / "parts" / "mine").write_text("mine")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Disturbed().execute(tmp_path / "v", progress=False)
    assert (tmp_path / "v" / "parts" / "mine").read_text() == "mine"


def test_only_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    pid = os.fork() if hasattr(os, "fork") else None
    if pid is None:
        pytest.skip("needs a process that is gone")
    if pid == 0:
        try:
            with staging(tmp_path):
                (tmp_path / LOCK).touch()
                os._exit(0)
        finally:
            os._exit(1)
    os.waitpid(pid, 0)
    (left,) = tmp_path.glob("*.partial")
    (left / "half").write_text("ha")
    assert is_vacant(tmp_path), "a run may begin where another was killed before it began"
    with replacing(tmp_path / "mine.txt") as partial:
        partial.write_text("mine")
        others = [tmp_path / "movie.partial", tmp_path / f"{left.name}.partial"]
        for other in others:
            other.write_text("a")
        remove_partial(tmp_path)
        assert not left.exists()
    assert all(path.exists() for path in (tmp_path / "mine.txt", *others))


@POSIX
def test_a_training_keeps_what_is_nobodys(tmp_path: Path) -> None:
    tree: Any = {"b.partial": ("file", b"b", 0o600), ".lock": ("file", b"", 0o644), **REPORTED}
    plant(tmp_path / "t", tree)
    before = seen(tmp_path / "t")
    for _ in range(2):
        failing_train(tmp_path / "t", resume=True)
    after = seen(tmp_path / "t")
    assert {name: after.get(name) for name in before} == before


def test_a_store_keeps_what_lies_beside_and_in_it(tmp_path: Path, model: Any) -> None:
    (tmp_path / ".a.partial").mkdir()
    for place in (".a.partial/thesis", ".a.lock"):
        (tmp_path / place).write_text("mine")
    (tmp_path / "a").mkdir(mode=0o700)
    options: Any = {"store": tmp_path / "a", "append": True, "progress": False}
    for seed in (0, 1):
        lc.extract(model, some_prompts(3, seed), "resid", **options)
        chunk = f"0.0.{'0' * 31}{seed}.partial"
        (tmp_path / "a" / "resid" / "x.partial").write_text("mine")
        (tmp_path / "a" / "resid" / chunk).write_text("half a chunk")
    lc.extract(model, some_prompts(3, 2), "resid", **options)
    assert [p.name for p in (tmp_path / "a" / "resid").glob("*.partial")] == ["x.partial"]
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    assert (tmp_path / ".a.partial" / "thesis").read_text() == "mine"
    assert (tmp_path / ".a.lock").read_text() == "mine"


# -- pages -------------------------------------------------------------------------------------


@POSIX
def test_a_page_is_written_through_links_and_keeps_the_mode(tmp_path: Path) -> None:
    run, real = make_run(tmp_path / "run"), tmp_path / "there" / "real.html"
    real.parent.mkdir()
    real.write_text("old")
    real.chmod(0o640)
    (tmp_path / "link.html").symlink_to("second.html")
    (tmp_path / "second.html").symlink_to(real)
    assert write_page([run], tmp_path / "link.html") == tmp_path / "link.html"
    assert (tmp_path / "link.html").is_symlink()
    assert real.read_text().startswith("<!DOCTYPE html>")
    assert stat.S_IMODE(real.stat().st_mode) == 0o640


@POSIX
def test_a_page_replaces_no_device_and_nothing_it_is_made_of(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    os.mkfifo(tmp_path / "pipe")
    place = socket.socket(socket.AF_UNIX)
    place.bind(str(tmp_path / "socket"))
    os.link(run / "claims.json", tmp_path / "hard")
    (tmp_path / "soft").symlink_to(run / "scores.parquet")
    (tmp_path / "circle").symlink_to("circle")
    before = seen(tmp_path)
    inside = [run / "config.json", run / "notes.json", run / "figures" / "new.svg", run / LOCK]
    inside += [run / ".." / "run" / "scores.parquet", run / "parts"]
    for out in (*(tmp_path / n for n in ("pipe", "socket", "hard", "soft", "circle")), *inside,
                Path("/dev/null"), Path("/dev/full"), Path(""), Path("a\0b")):  # fmt: skip
        with pytest.raises(lc.InputError, match=r"^report") as caught:
            write_page([run], out)
        assert "\n" not in str(caught.value)
    place.close()
    assert seen(tmp_path) == before
    (run / "report.html").symlink_to(tmp_path / "precious")
    with pytest.raises(lc.InputError, match="is a link: name the file"):
        write_page([run])
    assert not (tmp_path / "precious").exists()


# -- doors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "out",
    [".", "", "/", "..", "a/..", "a\0b", "\udcff", "file", "file/below", "s3://b/a", "x" * 300],
)
@pytest.mark.parametrize("command", ["run", "extract", "report"])
def test_an_unusable_output_is_one_line_before_any_work(
    command: str, out: str, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "report":
        make_run(tmp_path / "run")
        if out == "file":  # an old page
            return
    (tmp_path / "file").write_text("mine")
    before = seen(tmp_path)
    monkeypatch.chdir(tmp_path)
    if command == "extract":
        monkeypatch.setattr(lc, "load", lambda *_, **__: pytest.fail("a model is loaded"))
        if out == "s3://b/a":  # a place, and one that cannot be reached
            return
    given = {
        "run": ["run", "emergence", "--preset", "smoke"],
        "extract": ["extract", "--model", "native:sif-small", "--tasks", "sif"],
        "report": ["report", "run"],
    }[command]
    assert main([*given, "--out", out]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said[:-1].isprintable()
    assert seen(tmp_path) == before


def test_a_name_is_shown_on_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "a\x1b[31mb\nc\u202e"
    assert main(["report", str(place)]) == 2
    assert r"a\x1b[31mb\nc\u202e" in capsys.readouterr().err
    for command in ("report", "serve"):
        assert main([command, "y" * 300]) == 2
        assert capsys.readouterr().err.startswith("lensclust: File name too long: yyy")
    with pytest.raises(lc.InputError, match=r"\\x1b") as caught:
        write_page([place])
    assert str(caught.value).isprintable()
