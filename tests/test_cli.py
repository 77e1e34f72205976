"""The command: exit status, one-line errors, nothing written where the input is unusable."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from lensclust.cli.claim_table import print_claims
from lensclust.cli.command import main
from lensclust.results.claims import decide
from tests.tiny import hf_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
QUICK = ["--preset", "smoke", "--jobs", "1", "--quiet", "--steps", "8", "--permutations", "3"]
QUICK += ["--n-checkpoints", "2", "--seeds"]

EXTRACT = ["extract", "--model", "native:sif-small", "--tasks", "sif"]


def one_line_error(capsys, arguments: list[str]) -> str:
    status = main(arguments)
    captured = capsys.readouterr()
    assert status == 2, captured.err
    assert captured.err.startswith("lensclust: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def test_help_and_studies(capsys):
    assert main(["--help"]) == 0
    assert "usage: lensclust" in capsys.readouterr().out
    assert main(["studies"]) == 0
    listed = capsys.readouterr().out
    assert "emergence" in listed
    assert "2402.12151" in listed
    assert main([]) == 2


def test_help_imports_neither_torch_nor_transformer_lens():
    program = (
        "import sys; from lensclust.cli import main; main(['--help']); main(['studies']);"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformer_lens', 'pandas')))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


def test_options_of_a_study_explain_every_field():
    shown = subprocess.run(
        [sys.executable, "-m", "lensclust", "run", "emergence", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert shown.returncode == 0
    for word in ("--n-tasks", "tasks to learn", "--resume", "--preset", "--out"):
        assert word in shown.stdout


@pytest.mark.parametrize("point", entry_points(group="lensclust.studies"), ids=lambda p: p.name)
def test_every_field_of_every_study_is_explained(point):
    study = point.load()
    explained = (inspect.getdoc(study) or "").partition("Attributes:")[2]
    for field in dataclasses.fields(study):
        assert re.search(rf"^\s+{field.name}: \w", explained, re.M), field.name
    assert set(study.presets) <= set(study.cost), "what a preset costs"
    assert study.title


def completed(line: str) -> list[str]:
    """What bash offers at the end of a line."""
    program = f"""
        eval "$({sys.executable} -m lensclust completion bash)"
        complete -p lensclust > /dev/null || exit 1
        COMP_WORDS=({line} ''); [[ {shlex.quote(line)} == *' ' ]] || unset 'COMP_WORDS[-1]'
        COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _lensclust
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("lensclust re", ["report"]),
        ("lensclust run em", ["emergence"]),
        ("lensclust run emergence --preset ", ["smoke", "default", "paper"]),
        ("lensclust run emergence --n-t", ["--n-tasks"]),
        ("lensclust run realistic --da", ["--data"]),
        ("lensclust extract --share", ["--share-prefixes"]),
        ("lensclust extract --out ", []),
    ],
)
def test_bash_completes_commands_studies_presets_and_options(line, offered):
    assert completed(line) == offered


def test_a_shell_without_completion_is_one_line(capsys):
    assert "shell 'tcsh', expected one of bash, zsh" in one_line_error(
        capsys, ["completion", "tcsh"]
    )


@pytest.mark.parametrize("width", [40, 80, 160])
def test_claims_are_readable_at_any_width_and_without_colour(width):
    claims = [
        decide(name, f"Statement of {name}, which goes on for quite a while as they do", values,
               source="here", origin="extension", control={"permuted labels": 0.0123}, at_least=0.5)
        for name, values in
        {"yes": [0.9, 0.91], "no": [0.1, 0.11], "one": [0.8]}.items()
    ]  # fmt: skip
    console = Console(width=width, record=True, file=io.StringIO())
    print_claims(claims, console)
    said = console.export_text()
    assert max(map(len, said.splitlines())) <= width
    flat = re.sub(r"\s+", " ", said)
    for part in ("✓ supported", "✗ contradicted", "? inconclusive", "permuted labels", "0.5"):
        assert part in flat
    if width >= 80:
        assert "0.80 [one value]" in flat


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dance"], "command 'dance' is not known"),
        (["run", "nothing"], "study 'nothing' is not known: expected one of alignment, comp"),
        (["run", "emergence", "--preset", "huge"], "preset 'huge' is not known"),
        (["run", "emergence", "--jobs", "0"], "jobs: expected"),
        (
            ["run", "emergence", "--held-out-regexes", "0"],
            "held_out_regexes=0: expected at least 1",
        ),
        (["run", "realistic", "--model", "native:sif-small"], "texts need a tokenizer"),
        (["run", "emergence", "--seeds", "0"], "seeds: expected at least 1"),
        (["run", "emergence", "--seeds", "-3"], "seeds: expected at least 1"),
        (["run", "emergence", "--seeds", "99999999999"], "seeds: expected at least 1"),
        (["run", "emergence", "--seeds", "2.5"], "run emergence: Error parsing --seeds"),
        (["run", "emergence", "--k", "2.5"], "--k"),
        (["run", "emergence", "--lr", "nan"], "lr=nan: expected a finite number"),
        (["run", "emergence", "--nothing", "1"], "Unrecognized options: --nothing"),
        (["run", "emergence", "--engine", "a\x1b[31mb"], r"invalid choice 'a\x1b[31mb'"),
        (["extract", "--model", "m"], "Missing from lensclust extract: --tasks"),
        ([*EXTRACT, "--out", "o", "--batch-tokens", "0"], "batch_tokens=0, expected at least 1"),
        ([*EXTRACT, "--out", "memory://o"], "is in memory, expected a folder or URL"),
        ([*EXTRACT, "--out", "reference://o/a"], "names no place"),
        (["run", "emergence", "--n-tasks", "0"], "n_tasks"),
        (["run", "emergence", "--preset", "smoke", "--k", "99"], "k=99: expected 2 to "),
        (["run", "realistic", "--data", "nowhere"], "no folder 'nowhere/annotations'"),
        (["run", "realistic", "--inputs", "1"], "inputs=1: an interval needs at least 2"),
        (["run", "realistic", "--model", "not/a-model"], "not/a-model"),
        (["extract", "--model", "native:huge", "--tasks", "sif", "--out", "o"], "huge"),
        (["extract", "--model", "native:sif-small", "--tasks", "x", "--out", "o"], "tasks 'x'"),
        ([*EXTRACT, "--device", "nowhere:1", "--out", "o"], "device"),
        ([*EXTRACT, "--device", f"cuda:{torch.cuda.device_count()}", "--out", "o"], "device"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_unusable_arguments(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in one_line_error(capsys, arguments)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_output_below_a_file(capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    place = str(tmp_path / "file" / "run")
    assert "is a file, expected a folder" in one_line_error(
        capsys, ["run", "emergence", "--out", place]
    )
    extract = ["extract", "--model", "native:sif-small", "--tasks", "sif", "--out", place]
    assert "is a file, expected a folder" in one_line_error(capsys, extract)
    assert (tmp_path / "file").read_text() == "mine"


def test_unusable_site_and_long_prompts_leave_no_store(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["extract", "--model", "native:sif-small", "--tasks", "sif", "--out", "o"]
    assert "'resid 9' does not exist" in one_line_error(capsys, [*command, "--sites", "resid 9"])
    model, tokenizer = hf_model("gpt2"), tiny_tokenizer(tmp_path / "tokenizer")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    folder = tmp_path / "data"
    for part, content in {
        "annotations": {"annotations": [" ".join(["w1"] * 80)]},
        "execute": {"examples": {"1": {"input": "w2", "output": "w3"}}},
    }.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "a.json").write_text(json.dumps(content))
    capsys.readouterr()
    long = ["extract", "--model", "model", "--tasks", "instruction_induction:data", "--out", "o"]
    assert "has a context of 64" in one_line_error(capsys, long)
    (tmp_path / "model" / "model.safetensors").unlink()
    assert "model" in one_line_error(capsys, long)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("part", ["annotations", "execute"])
def test_unusable_task_folders(capsys, tmp_path, monkeypatch, part):
    monkeypatch.chdir(tmp_path)
    for name in ("annotations", "execute"):
        (tmp_path / "data" / name).mkdir(parents=True)
    other = {"annotations": "execute", "execute": "annotations"}[part]
    (tmp_path / "data" / other / "a.json").write_text("{}")
    run = ["run", "realistic", "--data", "data", "--out", "o"]
    assert f"no {part}/a.json" in one_line_error(capsys, run)
    (tmp_path / "data" / part / "a.json").write_text('{\n "examples": {')
    (tmp_path / "data" / other / "a.json").write_text('{\n "examples": {')
    assert "line" in one_line_error(capsys, run)
    assert not (tmp_path / "o").exists()


def test_extract_writes_a_store_that_python_opens(capsys, tmp_path):
    import lensclust as lc
    from lensclust.activations.store.reading import open_activations

    out = tmp_path / "acts.zarr"
    command = ["extract", "--model", "native:sif-small", "--tasks", "sif", "--quiet"]
    assert main([*command, "--sites", "resid 3", "--out", str(out)]) == 0
    assert "prompts" in capsys.readouterr().out
    acts = open_activations(out)
    assert acts.resid.sizes["layer"] == 1
    assert acts.attrs["weights"] == lc.fingerprint(lc.load("native:sif-small"))


def test_extract_runs_where_and_in_what_it_is_told(capsys, tmp_path):
    import lensclust as lc

    out, dtype = tmp_path / "acts.zarr", torch.bfloat16
    options = ["--device", "cpu", "--model-dtype", "bfloat16", "--sites", "resid 3", "--quiet"]
    assert main([*EXTRACT, *options, "--out", str(out)]) == 0
    acts = lc.open_activations(out)
    model = lc.load("native:sif-small", device="cpu", dtype=dtype)
    expected = lc.extract(model, lc.tasks.sif(), "resid 3", progress=False)
    assert acts.attrs["weights"] == lc.fingerprint(model)
    np.testing.assert_array_equal(acts.resid, expected.resid)


def test_doctor(capsys):
    assert main(["doctor", "--model", "native:sif-small"]) == 0
    said = capsys.readouterr().out
    assert "takes effect" in said
    assert "torch" in said


def test_doctor_shows_what_looks_like_markup(capsys, tmp_path):
    """As ``pip install 'lensclust[peft]'``: what stands in brackets is no style."""
    hf_model("llama").save_pretrained(tmp_path / "tiny[red]")
    assert main(["doctor", "--model", str(tmp_path / "tiny[red]")]) == 0
    assert "tiny[red]: 3 blocks" in capsys.readouterr().out


def test_the_package_is_the_command():
    for words, status in ((["--help"], 0), ([], 2), (["nothing"], 2)):
        done = subprocess.run(
            [sys.executable, "-m", "lensclust", *words], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == status, done.stderr
        assert ("usage: lensclust COMMAND" in done.stdout) == (words != ["nothing"])


def test_run_ends_with_the_claims_and_the_page_and_is_not_overwritten(capsys, tmp_path):
    out = tmp_path / "run"
    assert main(["run", "emergence", *QUICK, "1", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.rstrip().endswith(str(out / "report.html"))
    assert "inconclusive" in said
    for name in ("config.json", "provenance.json", "scores.parquet", "claims.json", "report.html"):
        assert (out / name).stat().st_size > 0
    claims = json.loads((out / "claims.json").read_text())
    keys = ["id", "statement", "source", "origin", "estimate", "ci95", "control", "rule"]
    keys += ["verdict", "n_seeds", "figures", "unit", "n", "spread", "p", "q", "holds_corrected"]
    assert list(claims[0]) == keys
    before = (out / "claims.json").read_bytes()
    again = ["run", "emergence", *QUICK, "1", "--out", str(out)]
    assert "holds this run already; continue it with --resume" in one_line_error(capsys, again)
    other = ["run", "emergence", *QUICK, "1", "--lr", "0.1", "--out", str(out), "--resume"]
    assert "holds another run (lr 0.004 instead of 0.1)" in one_line_error(capsys, other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    full = ["run", "emergence", *QUICK, "1", "--out", str(tmp_path / "mine")]
    assert "is not empty and holds no run" in one_line_error(capsys, full)
    assert main([*again, "--resume"]) == 0
    assert (out / "claims.json").read_bytes() == before
    assert main(["report", str(out), str(out), "--out", str(tmp_path / "both.html")]) == 0
    assert (tmp_path / "both.html").stat().st_size > 0


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_claims(tmp_path):
    def command(out: Path) -> list[str]:
        program = [sys.executable, "-m", "lensclust", "run", "emergence"]
        return [*program, *QUICK, "2", "--out", str(out), "--resume"]

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        command(killed), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )
    first_seed_is_done = killed / "parts" / "seed-0" / "frames"
    deadline = time.time() + 120
    while not first_seed_is_done.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    assert first_seed_is_done.exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "claims.json").exists()
    for out in (killed, whole):
        done = subprocess.run(command(out), cwd=ROOT, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr
    assert (killed / "claims.json").read_bytes() == (whole / "claims.json").read_bytes()


def test_a_broken_study_of_another_package_leaves_the_others(tmp_path, monkeypatch, capsys):
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lensclust.studies]\nbroken = broken_study:Broken\n")
    (tmp_path / "broken_study.py").write_text("raise RuntimeError('no licence\\nbuy one')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["studies"]) == 0
    captured = capsys.readouterr()
    assert "emergence" in captured.out
    said = "study 'broken' (broken_study:Broken) cannot be loaded: RuntimeError: no licence"
    assert captured.err == f"lensclust: {said}\n"
    assert main(["run", "emergence", "--preset", "huge"]) == 2
    assert main(["run", "broken"]) == 2
    assert "study 'broken' is not known" in capsys.readouterr().err
