"""The store: what is on disk equals what is in memory, whatever happened on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
import zarr

import lensclust as lc
from lensclust.activations.store import attributes as store_notes, writing as store
from tests.tiny import hf_model


@pytest.fixture(scope="module")
def model():
    return lc.load("native:sif-small")


def some_prompts(n: int, seed: int = 0, *, vocabulary: int = 99) -> lc.Prompts:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, vocabulary, rng.integers(2, 12)).tolist() for _ in range(n)]
    # Labels of growing length: a fixed-width string would cut those appended later.
    rows = pd.DataFrame({"task": ["t" * (1 + seed + i % 4) for i in range(n)], "n": range(n)})
    return lc.Prompts.from_token_lists(ids, rows)


def test_store_equals_memory_and_is_read_lazily(model, tmp_path):
    prompts = some_prompts(23)
    memory = lc.extract(model, prompts, ["resid", "head"], shard=5)
    disk = lc.extract(model, prompts, ["resid", "head"], store=tmp_path / "a.zarr", shard=5)
    assert not disk.resid.variable._in_memory
    xr.testing.assert_identical(disk.load(), memory)
    assert all(disk[name].dtype == memory[name].dtype for name in memory.coords)
    assert not [p for p in tmp_path.iterdir() if p.name != "a.zarr"]
    xr.testing.assert_identical(store.open_activations(tmp_path / "a.zarr").load(), memory)


def test_appending_equals_one_pass(model, tmp_path):
    first, second = some_prompts(13), some_prompts(9, seed=3)
    lc.extract(model, first, ["resid", "head"], store=tmp_path / "a", shard=5)
    both = lc.extract(model, second, ["resid", "head"], store=tmp_path / "a", append=True)
    expected = [lc.extract(model, p, ["resid", "head"]) for p in (first, second)]
    for name in ("resid", "z", "task", "n"):
        apart = np.concatenate([e[name].values for e in expected])
        if apart.dtype.kind == "f":
            np.testing.assert_allclose(both[name], apart, rtol=1e-4, atol=1e-5)
        else:
            np.testing.assert_array_equal(both[name], apart)
    assert store.verify(tmp_path / "a").size == 0


@pytest.mark.slow
def test_resume_after_a_kill_ends_like_an_undisturbed_run(model, tmp_path):
    program = """
        import sys, time
        import lensclust as lc
        from lensclust.activations import reader as shard_reading
        from tests.lensclust.activations.test_store import some_prompts
        read = shard_reading.BatchReader.read
        def slowly(self, *arguments):
            time.sleep(0.2)
            return read(self, *arguments)
        shard_reading.BatchReader.read = slowly
        model = lc.load("native:sif-small")
        lc.extract(model, some_prompts(60), ["resid"], store=sys.argv[1], shard=4)
    """
    path = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(path)],
        cwd=Path(__file__).parents[3],
    )
    deadline = time.time() + 60
    while _written(path) < 8 and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = _written(path)
    assert 0 < done < 60
    with pytest.raises(lc.InputError, match=r"interrupted; finish it with resume=True"):
        lc.extract(model, some_prompts(60), ["resid"], store=path)
    with pytest.raises(lc.InputError, match=r"holds \d+ of 60 prompts"):
        store.open_activations(path)
    with pytest.raises(lc.InputError, match="other prompts than these"):
        lc.extract(model, some_prompts(60, seed=1), ["resid"], store=path, resume=True)
    resumed = lc.extract(model, some_prompts(60), ["resid"], store=path, resume=True)
    undisturbed = lc.extract(model, some_prompts(60), ["resid"], store=tmp_path / "b", shard=4)
    xr.testing.assert_identical(resumed.load(), undisturbed.load())
    assert store.verify(path).size == 0


def test_shards_of_shared_prefixes_come_back_with_the_same_bits(tmp_path):
    """A resumed process shares what a shard's own prompts have in common, and nothing else."""
    shots = [[3 + (7 * i + k) % 50 for k in range(40)] for i in range(2)]
    ids = [[*shots[i % 2], 3 + i % 50, 5] for i in range(40)]
    prompts = lc.Prompts.from_token_lists(ids, pd.DataFrame({"n": range(40)}))
    model, options = lc.load(hf_model("llama")), {"store": tmp_path / "a", "shard": 16}
    plan = lc.plan_prefixes(model, prompts, shard=16)
    assert plan.sharing == 40
    whole = lc.extract(model, prompts, ["resid", "head"], **options).copy(deep=True).load()
    (tmp_path / "a" / store_notes.DONE / "1").unlink()
    store_notes.note(zarr.open_group(str(tmp_path / "a"), mode="r+"), written=0)
    fresh = lc.load(hf_model("llama"))
    resumed = lc.extract(fresh, prompts, ["resid", "head"], resume=True, **options)
    assert resumed.resid.values.tobytes() == whole.resid.values.tobytes()
    xr.testing.assert_identical(resumed.load(), whole)


def test_finished_store_is_not_read_again(model, tmp_path, monkeypatch):
    prompts = some_prompts(8)
    lc.extract(model, prompts, "resid 3", store=tmp_path / "a")
    before = _mtimes(tmp_path / "a")
    lc.extract(model, prompts, "resid 3", store=tmp_path / "a", resume=True)
    touched = {p for p, t in _mtimes(tmp_path / "a").items() if before.get(p) != t}
    assert not any(p.parts[0] == "resid" and p.name[0].isdigit() for p in touched)


def test_refuses_what_does_not_belong(model, tmp_path):
    path = tmp_path / "a"
    lc.extract(model, some_prompts(6), "resid", store=path)
    other = lc.load("native:sif-small", seed=1)
    with pytest.raises(lc.InputError, match="holds weights"):
        lc.extract(other, some_prompts(6), "resid", store=path)
    with pytest.raises(lc.InputError, match="holds sites 'resid', these are 'head'"):
        lc.extract(model, some_prompts(6), "head", store=path)
    with pytest.raises(lc.InputError, match=r"holds layer 0, 1, .*, asked for 2; read the same"):
        lc.extract(model, some_prompts(6), "resid 2", store=path)
    with pytest.raises(lc.InputError, match="holds dtype 'float32', these are 'float16'"):
        lc.extract(model, some_prompts(6), "resid", store=path, dtype="float16")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep me")
    with pytest.raises(lc.InputError, match="not a folder of activations"):
        lc.extract(model, some_prompts(6), "resid", store=tmp_path / "notes")
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep me"
    assert store.open_activations(path).sizes["prompt"] == 6


def test_labels_of_another_kind_are_refused_before_anything_is_written(model, tmp_path):
    first = some_prompts(6)
    lc.extract(model, first, "resid 2", store=tmp_path / "a")
    for values, here in (([0.5] * 6, "float64"), (["text"] * 6, "text")):
        other = replace(some_prompts(6, seed=1), rows=first.rows.assign(n=values))
        with pytest.raises(lc.InputError, match=f"holds label 'n' as int64, .* as {here}; "):
            lc.extract(model, other, "resid 2", store=tmp_path / "a")
    assert lc.open_activations(tmp_path / "a").sizes["prompt"] == 6


def test_running_a_script_again_adds_nothing(model, tmp_path):
    options: Any = {"resume": True, "append": True}
    found = []
    for _ in range(2):
        for prompts in (some_prompts(7), some_prompts(5, seed=2)):
            acts = lc.extract(model, prompts, "resid 2", store=tmp_path / "a", **options)
            found.append(acts)
    assert found[-1].sizes["prompt"] == 12


def test_prompts_come_once_into_a_store(model, tmp_path):
    """The same, some of the same, in another order: no call adds them, and none is lost."""
    path, first = tmp_path / "a", some_prompts(9)
    lc.extract(model, first, "resid 2", store=path)
    with pytest.raises(lc.InputError, match=r"is finished and holds 9 of these 9 prompts"):
        lc.extract(model, first, "resid 2", store=path)
    with pytest.raises(lc.InputError, match=r"holds 9 of these 9"):
        lc.extract(model, first.take([*range(8, -1, -1)]), "resid 2", store=path, append=True)
    with pytest.raises(lc.InputError, match=r"holds other prompts than these .* append=True"):
        lc.extract(model, some_prompts(4, seed=2), "resid 2", store=path, resume=True)
    lc.extract(model, some_prompts(4, seed=2), "resid 2", store=path, append=True)
    with pytest.raises(lc.InputError, match=r"holds 2 of these 2 prompts"):
        lc.extract(model, some_prompts(4, seed=2).take([3, 1]), "resid 2", store=path, append=True)
    assert store.verify(path).size == 0
    assert lc.open_activations(path).sizes["prompt"] == 13


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_resumed_store_gives_the_prompts_that_were_asked_for(model, tmp_path, interrupted):
    """Or none: neither call of several gets what another call added, unless it appends itself."""
    parts = [some_prompts(5), some_prompts(4, seed=1), some_prompts(3, seed=2)]
    options = {"store": tmp_path / "a", "progress": False, "shard": 2}
    for prompts in parts:
        lc.extract(model, prompts, "resid 2", append=True, **options)
    if interrupted:
        group: Any = zarr.open_group(str(tmp_path / "a"), mode="r+")
        group[store_notes.DONE][9:] = 0
        store_notes.note(group, written=9)
    advice = "finish it with .* and append=True" if interrupted else "open it with open_activations"
    for prompts, more in zip(parts, (7, 8, 9), strict=True):
        with pytest.raises(lc.InputError, match=f"holds {more} more prompts .*; {advice}"):
            lc.extract(model, prompts, "resid 2", resume=True, **options)
    with pytest.raises(lc.InputError, match=r"interrupted|open it with open_activations$"):
        lc.extract(model, parts[0].take([1, 0]), "resid 2", resume=not interrupted, **options)
    both = lc.extract(model, parts[2], "resid 2", resume=True, append=True, **options)
    whole = [lc.extract(model, prompts, "resid 2", progress=False) for prompts in parts]
    expected = np.concatenate([part.resid.values for part in whole])
    np.testing.assert_allclose(both.resid.values, expected, rtol=1e-4, atol=1e-5)


def test_a_store_of_other_places_or_labels_is_refused_in_plain_words(model, tmp_path):
    first = some_prompts(4)
    first = replace(first, spans={"s": torch.tensor([[0, 1]] * 4)})
    options = {"store": tmp_path / "a", "progress": False, "append": True}
    lc.extract(model, first, "resid 2", **options)
    other = replace(first, rows=first.rows.assign(task="new"))
    with pytest.raises(lc.InputError, match="holds position answer, asked for s_start; read the"):
        lc.extract(model, other, "resid 2", at="s_start", **options)
    for rows, said in (
        (other.rows.assign(more=1), r"no label 'more', these have; leave it out, or write"),
        (other.rows[["task"]], r"holds n, which these prompts and sites do not have; give"),
        (other.rows.assign(n=True), r"label 'n' as int64, .* as True or False; give it alike"),
    ):
        with pytest.raises(lc.InputError, match=said):
            lc.extract(model, replace(other, rows=rows), "resid 2", **options)


def _stretched(network: Any) -> None:
    network.model.rotary_emb.inv_freq *= 0.5


def _rescaled(network: Any) -> None:
    network.model.layers[1].self_attn.scaling *= 2


def _less_precise(network: Any) -> None:
    network.model.norm.variance_epsilon = 0.1


def _uncapped(network: Any) -> None:
    network.config.final_logit_softcapping = None


@pytest.mark.parametrize(
    ("name", "change"),
    [("llama", _stretched), ("qwen2", _rescaled), ("llama", _less_precise), ("gemma2", _uncapped)],
)
def test_the_same_weights_in_another_network_are_another_model(tmp_path, name, change):
    prompts = lc.Prompts.from_token_lists([[5, 6, 7], [8, 9]], pd.DataFrame({"task": ["a", "b"]}))
    lc.extract(lc.load(hf_model(name)), prompts, "resid", store=tmp_path / "a", resume=True)
    lc.extract(lc.load(hf_model(name)), prompts, "resid", store=tmp_path / "a", resume=True)
    network = hf_model(name)
    change(network)
    with pytest.raises(lc.InputError, match="holds settings"):
        lc.extract(lc.load(network), prompts, "resid", store=tmp_path / "a", resume=True)


@pytest.mark.parametrize("interrupted", [False, True])
def test_other_spans_or_answers_are_other_prompts(model, tmp_path, interrupted):
    rows = pd.DataFrame({"task": list("ababab")})
    kinds = [
        {"spans": {"s": [(0, 2)] * 6}},
        {"spans": {"s": [(0, 5)] * 6}},
        {"spans": {"s": [(0, 2)] * 6}, "answers": [7] * 6},
    ]
    made = [lc.Prompts.from_token_lists([[5, 6, 7, 8, 9, 10]] * 6, rows, **each) for each in kinds]
    options = {"at": "s_end", "store": tmp_path / "a", "progress": False}
    lc.extract(model, made[0], "resid 2", **options)
    if interrupted:
        (tmp_path / "a" / store_notes.DONE / "0").unlink()
        store_notes.note(zarr.open_group(str(tmp_path / "a"), mode="r+"), written=0)
    for other in made[1:]:
        with pytest.raises(lc.InputError, match=r"other prompts than these .* spans or answers"):
            lc.extract(model, other, "resid 2", resume=True, **options)
    resumed = lc.extract(model, made[0], "resid 2", resume=True, **options)
    fresh = lc.extract(model, made[0], "resid 2", at="s_end", progress=False)
    np.testing.assert_array_equal(resumed.resid.values, fresh.resid.values)


def test_a_store_of_an_earlier_version_is_read_and_left_alone(model, tmp_path):
    """Without the prompts' keys, and with a tokenizer's fingerprint of one part."""
    path = tmp_path / "a"
    written = lc.extract(model, some_prompts(6), "resid 2", store=path).load()
    shutil.rmtree(path / store_notes.ROW_KEYS)
    group = zarr.open_group(str(path), mode="r+")
    assert store_notes.ROW_KEYS not in group
    store_notes.note(group, layout=store_notes.layout_digest(dict(group.arrays()), written))
    xr.testing.assert_identical(lc.open_activations(path).load(), written)
    options: Any
    for options in ({}, {"resume": True}, {"append": True}):
        with pytest.raises(lc.InputError, match="written by an earlier version"):
            lc.extract(model, some_prompts(6), "resid 2", store=path, **options)
    xr.testing.assert_identical(lc.open_activations(path).load(), written)


@pytest.mark.parametrize("name", ["resid", "z", "attn_out", "layer", "prompt", "head_frame"])
def test_labels_that_are_called_like_a_variable_are_refused(model, name):
    prompts = some_prompts(3)
    prompts = replace(prompts, rows=prompts.rows.assign(**{name: "x"}))
    with pytest.raises(lc.InputError, match=f"label '{name}' of the rows is the name of"):
        lc.extract(model, prompts, "resid 2")


def test_a_store_that_grew_only_in_part_is_unfinished(model, tmp_path):
    lc.extract(model, some_prompts(6), "resid 2", store=tmp_path / "a")
    group: Any = zarr.open_group(str(tmp_path / "a"), mode="r+")
    batches = [*json.loads(str(group.attrs["batches"])), [4, "prompts", "labels"]]
    store_notes.note(group, batches=json.dumps(batches))
    for _ in range(2):
        with pytest.raises(lc.InputError, match="holds 6 of 10 prompts"):
            lc.open_activations(tmp_path / "a")
        with pytest.raises(lc.InputError, match="holds 6 of 10 prompts"):
            store.verify(tmp_path / "a")
        values = group["resid"]
        values.resize((10, *values.shape[1:]))  # a kill between two arrays


def test_missing_labels_read_the_same_from_memory_and_disk(model, tmp_path):
    prompts = some_prompts(2)
    labels: Any = ["u", None]
    prompts = replace(prompts, rows=prompts.rows.assign(x=labels))
    memory = lc.extract(model, prompts, "resid 2")
    disk = lc.extract(model, prompts, "resid 2", store=tmp_path / "a")
    assert memory.x.values.tolist() == disk.x.values.tolist() == ["u", ""]


def test_rot_on_disk_is_found(model, tmp_path):
    lc.extract(model, some_prompts(20), "resid", store=tmp_path / "a", shard=6)
    chunk = tmp_path / "a" / "resid" / "2.0.2.0"
    content = chunk.read_bytes()
    chunk.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    assert store.verify(tmp_path / "a").tolist() == [*range(12, 18)]
    chunk.unlink()
    assert store.verify(tmp_path / "a").tolist() == [*range(12, 18)]


def test_missing_store(tmp_path):
    with pytest.raises(lc.InputError, match="not a folder of activations"):
        store.open_activations(tmp_path / "nothing")


def _written(path: Path) -> int:
    try:
        group: Any = zarr.open_group(str(path), mode="r")
        done = np.asarray(group[store_notes.DONE][:])
        return int(done.sum())
    except Exception:  # the store may be half laid out when we look
        return 0


def _mtimes(folder: Path) -> dict[Path, float]:
    files = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    return {file.relative_to(folder): file.stat().st_mtime_ns for file in files}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own figures")
def test_memory_does_not_grow_with_the_prompts(tmp_path):
    """Ten times as many prompts, whose activations would be a third of all memory."""
    program = """
        import sys
        from pathlib import Path
        import lensclust as lc
        import pandas as pd
        n, out = int(sys.argv[1]), Path(sys.argv[2])
        ids = [[i % 90, i % 7, 1][: 2 + i % 2] for i in range(n)]
        rows = pd.DataFrame({"task": [i % 5 for i in range(n)]})
        prompts = lc.Prompts.from_token_lists(ids, rows)
        model = lc.load("native:sif-small", device="cpu")
        sites = ["resid", "head", "mlp_out", "attn_out"]
        acts = lc.extract(model, prompts, sites, store=out, progress=False, share_prefixes=False)
        status = Path("/proc/self/status").read_text()
        print(int(status.partition("VmHWM:")[2].split()[0]) / 1024, acts.nbytes / 2**20)
    """
    peaks = {}
    for n in (5_000, 50_000):
        command = [sys.executable, "-c", textwrap.dedent(program), str(n), str(tmp_path / str(n))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[n], stored = map(float, done.stdout.split())
    print(peaks, stored)
    assert stored > 0.2 * peaks[50_000]
    assert peaks[50_000] <= 1.05 * peaks[5_000]


@pytest.mark.parametrize("when", ["written", "resumed", "appended to"])
def test_states_that_hooks_edit_do_not_mix_with_others(model, tmp_path, when):
    def doubled(value, hook):
        return 2 * value

    def read(n: int, seed: int = 0, *, hooked: bool):
        hooks = [("blocks.1.hook_mlp_out", doubled)] if hooked else []
        with model.hooks(fwd_hooks=hooks):
            where = {"store": tmp_path / "a", "resume": True, "append": True}
            return lc.extract(model, some_prompts(n, seed), "resid", progress=False, **where)

    plain = lc.extract(model, some_prompts(5), "resid", progress=False)
    first = read(5, hooked=when == "written")
    assert first.resid.equals(plain.resid) == (when != "written")
    seed = int(when == "appended to")
    with pytest.raises(lc.InputError, match=r"a: .* while hooks .*blocks\.1\.hook_mlp_out"):
        read(5, seed, hooked=when != "written")


def _hooked(network: Any) -> None:
    network.model.layers[0].register_forward_hook(lambda _m, _a, out: 2 * out)


def _fed(network: Any) -> None:
    network.model.layers[1].mlp.register_forward_pre_hook(lambda _m, given: (2 * given[0],))


def _replaced(network: Any) -> None:
    part = network.model.layers[1].mlp
    part.forward = lambda states: 2 * type(part).forward(part, states)


@pytest.mark.parametrize("change", [_hooked, _fed, _replaced])
@pytest.mark.parametrize("first", ["changed", "plain"])
def test_a_network_with_code_put_on_it_is_another_model(tmp_path, change, first):
    """Its weights and settings are the same."""
    plain, changed = hf_model("qwen2"), hf_model("qwen2")
    change(changed)
    few, more = (some_prompts(n, n, vocabulary=60) for n in (6, 3))
    order = [plain, changed] if first == "plain" else [changed, plain]
    read = []
    for number, network in enumerate(order):
        model = lc.load(network)
        read.append(lc.extract(model, few, "resid", progress=False))
        where = {"store": tmp_path / "a", "append": True, "resume": True, "progress": False}
        if number == 0:
            lc.extract(model, few, "resid", **where)
            continue
        for prompts in (few, more):
            with pytest.raises(lc.InputError, match=r"while hooks .*model\.layers\.\d"):
                lc.extract(model, prompts, "resid", **where)
    assert read[0].attrs["weights"] == read[1].attrs["weights"]
    assert not np.allclose(read[0].resid, read[1].resid)


def test_a_store_of_another_precision_is_not_resumed(model, tmp_path):
    options = {"store": tmp_path / "a", "resume": True, "progress": False}
    with torch.autocast("cpu", torch.bfloat16):
        lc.extract(model, some_prompts(5), "resid", **options)
    with pytest.raises(lc.InputError, match="holds settings"):
        lc.extract(model, some_prompts(5), "resid", **options)
