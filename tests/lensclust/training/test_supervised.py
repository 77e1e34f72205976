"""Supervised fine-tuning is a plain loop over its batches, and keeps to what it was told."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import lensclust as lc
from lensclust.models.batching import training_batches
from lensclust.models.sites import Site
from lensclust.parallel import one_thread
from lensclust.training import finetuning as supervised
from lensclust.training.lora import Adapters, Lora
from lensclust.training.state import claimed
from tests.lensclust.training.test_finetuning import (
    LAST,
    bare,
    head_weights,
    load,
    logits_of,
    prompts,
    state_of,
)

MODEL = lc.load("native:sif-small")
LORA = Lora(rank=2, alpha=6, targets=("q", "o", "in"), blocks=(0, 2))
KNOBS: dict[str, Any] = {"steps": 9, "batch_size": 4, "lr": 1e-2, "progress": False}
WAYS: dict[str, dict[str, Any]] = {
    "all": {},
    "last block": {"only": LAST},
    "heads": {"only": ["head 1.2"]},
    "adapters": {"lora": LORA},
}


def tuned(model: Any, **options: Any) -> Any:
    with one_thread():
        return lc.finetune(model, prompts(), **{**KNOBS, **options})


def weights(run: Any) -> dict[int, str]:
    return {step: lc.fingerprint(model) for step, model in run.series()}


# -- the training -------------------------------------------------------------------------


def by_hand(
    logits: Callable[[torch.Tensor], torch.Tensor],
    free: list[torch.Tensor],
    steps: int,
    decay: float,
) -> list[float]:
    """A loop over the same batches, one prompt at a time without padding."""
    asked = prompts()
    assert asked.answers is not None
    _, lengths, _ = asked.with_answers()
    optimizer = torch.optim.AdamW(free, lr=1.0, weight_decay=decay)
    losses = []
    for step, rows in enumerate(islice(training_batches(MODEL, lengths, 4, seed=5), steps)):
        # One step of warmup, then half a turn of the cosine.
        share = 1.0 if step == 0 else (1 + math.cos(math.pi * (step - 1) / (steps - 1))) / 2
        optimizer.param_groups[0]["lr"] = 3e-3 * share
        each = []
        for row in rows.tolist():
            answer = list(asked.answers[row])
            ids = asked.tokens[row, : int(asked.lengths[row])].tolist() + answer
            found = logits(torch.tensor([ids[:-1]]))[0, -len(answer) :]
            each.append(F.cross_entropy(found, torch.tensor(answer), reduction="none"))
        loss = torch.cat(each).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


ORACLE: dict[str, Any] = {"steps": 7, "lr": 3e-3, "warmup": 0.1, "seed": 5}


@pytest.mark.parametrize(("name", "only"), [("native", ""), ("llama", ".2."), ("gpt2", "")])
def test_losses_are_those_of_a_plain_loop(name, only):
    network = bare(name)
    chosen = [p for n, p in network.named_parameters() if only in n]
    expected = by_hand(lambda ids: logits_of(network, ids), chosen, 7, decay=0.1)
    run = tuned(load(name), **ORACLE, weight_decay=0.1, only=LAST if only else None)
    assert expected[0] - expected[-1] > 0.1
    torch.testing.assert_close(
        torch.tensor(run.losses), torch.tensor(expected), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("name", "weight"), [("llama", "model.layers.{}.self_attn.q_proj.weight"),
                         ("native", "layers.{}.attn.q.weight")]
)  # fmt: skip
def test_adapters_are_what_the_formula_says(name, weight):
    lora = Lora(rank=3, alpha=6, targets=["q"])
    run = tuned(load(name), **ORACLE, lora=lora)
    start = Adapters(load(name), lora, seed=5).parameters
    network = bare(name).requires_grad_(False)
    own = dict(network.named_parameters())
    free = {n: p.detach().clone().requires_grad_() for n, p in start.items()}
    blocks = len(free) // 2

    def logits(ids: torch.Tensor) -> torch.Tensor:
        adapted = {
            weight.format(i): own[weight.format(i)]
            + 2 * free[f"blocks.{i}.attn.q.lora_B"] @ free[f"blocks.{i}.attn.q.lora_A"]
            for i in range(blocks)
        }
        out = functional_call(network, adapted, (ids,))
        return getattr(out, "logits", out)

    expected = by_hand(logits, list(free.values()), 7, decay=0.0)
    torch.testing.assert_close(
        torch.tensor(run.losses), torch.tensor(expected), atol=1e-4, rtol=1e-4
    )
    assert run.parameters == sum(p.numel() for p in free.values())


@pytest.mark.parametrize("name", ["native", "llama", "gpt2", "neox"])
def test_merged_adapters_are_adapters_on_for_every_hook(name):
    model, tokens = load(name), torch.arange(3, 15).view(2, 6)
    untuned = model.blocks[2].attn.W_O.detach().clone()
    hooks = ["blocks.0.attn.hook_z", "blocks.2.hook_resid_post"]

    def seen() -> list[torch.Tensor]:
        with torch.no_grad():
            logits, cache = model.run_with_cache(tokens, names_filter=hooks)
        return [logits, *(cache[hook] for hook in hooks)]

    plain = seen()
    before = state_of(model)
    run = tuned(model, lora=LORA)
    with run.at():
        merged = seen()
        # What reads weights sees them: W_O of a head is that of the tuned model.
        assert not torch.equal(model.blocks[2].attn.W_O, untuned)
    with run._tuned.on():
        with_adapters = seen()
    for one, other in zip(merged, with_adapters, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(plain[::2], merged[::2], strict=True))
    assert state_of(model) == before
    assert all(torch.equal(a, b) for a, b in zip(seen(), plain, strict=True))


@pytest.mark.parametrize("name", ["native", "gpt2", "qwen2"])
def test_only_the_slices_of_chosen_heads_move_or_decay(name):
    model = load(name)
    before = {block: head_weights(model, block) for block in range(3)}
    plain = {n: p.detach().clone() for n, p in model.named_parameters()}
    heads = [Site("head", 1, 0), Site("head", 2, 3)]
    run = tuned(model, only=heads, weight_decay=0.5)
    with run.at():
        after = {block: head_weights(model, block) for block in range(3)}
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, plain[n])}
    for block in range(3):
        for part, values in after[block].items():
            grouped = part in "KV" and len(values) < model.cfg.n_heads
            for head in range(len(values)):
                chosen = Site("head", block, head) in heads and not grouped
                assert torch.equal(values[head], before[block][part][head]) != chosen
    assert all("attn" in n or "attention" in n for n in changed)


@pytest.mark.parametrize("way", WAYS)
def test_the_frame_is_what_each_checkpoint_says_prompt_by_prompt(way):
    model, asked = load("llama"), prompts(5, seed=1)
    assert asked.answers is not None
    run = tuned(model, evaluate=asked, checkpoints=3, **WAYS[way])
    assert run.frame["step"].tolist() == [0, 1, 9] == [c.step for c in run.checkpoints]
    assert run.frame["samples"].tolist()[:2] == [0, run.checkpoints[1].samples]
    for (_, row), (step, at) in zip(run.frame.iterrows(), run.series(), strict=True):
        right, loss = [], []
        for i, answer in enumerate(asked.answers):
            ids = torch.tensor([asked.tokens[i, : int(asked.lengths[i])].tolist() + list(answer)])
            with torch.no_grad():
                found = at(ids[:, :-1])[0, -len(answer) :]
            right.append(found.argmax(-1).tolist() == list(answer))
            loss.append(float(F.cross_entropy(found, torch.tensor(answer))))
        assert row["step"] == step
        assert row["accuracy"] == pytest.approx(sum(right) / 5)
        assert row["loss"] == pytest.approx(sum(loss) / 5, rel=1e-4)


def test_it_learns_what_it_is_shown():
    model, asked = load("native"), prompts()
    run = tuned(model, steps=40, evaluate=asked, checkpoints=2)
    assert run.frame["accuracy"].iloc[0] < 0.5
    assert run.frame["accuracy"].iloc[-1] == 1.0


# -- batches ------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, database=None)
@given(st.data())
def test_every_round_holds_every_prompt_once(data):
    n = data.draw(st.integers(1, 120))
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, 9), min_size=n, max_size=n)))
    size, seed = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 9))
    budget = data.draw(st.none() | st.integers(1, 40))
    plan = training_batches(MODEL, lengths, size, budget, seed=seed)
    for _ in range(2):
        seen: list[int] = []
        while len(seen) < n:
            rows = next(plan)
            seen += rows.tolist()
            if budget is None:
                assert len(rows) <= size
            else:
                assert len(rows) == 1 or len(rows) * int(lengths[rows].max()) <= budget
        assert sorted(seen) == list(range(n))


def test_batches_are_alike_in_length_and_follow_the_seed():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 100, (512,), generator=generator)

    def first(seed: int) -> list[list[int]]:
        return [
            rows.tolist() for rows in islice(training_batches(MODEL, lengths, 16, seed=seed), 32)
        ]

    padded = sum(16 * int(lengths[rows].max()) for rows in first(0))
    assert padded < 1.15 * int(lengths.sum()) < 1.15 * 512 * 99 / 1.5
    assert first(0) == first(0) != first(1)
    longest = [int(lengths[rows].max()) for rows in first(0)]
    assert longest != sorted(longest)


# -- the model, and runs that go on -------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_the_model_is_left_as_it_was(way):
    model = load("gpt2")
    frozen_one = next(iter(model.parameters())).requires_grad_(False)
    # transformers keeps hooks of its own from the first reading of a head on.
    lc.extract(model, prompts(), "head 1.2")
    before = state_of(model)
    run = tuned(model, checkpoints=3, **WAYS[way])
    assert state_of(model) == before
    found = weights(run)
    assert found[0] == before["weights"]
    assert len(set(found.values())) == 3
    with pytest.raises(KeyboardInterrupt), run.at():
        raise KeyboardInterrupt
    with run.at(1), pytest.raises(lc.InputError, match="another checkpoint of this run"), run.at():
        pass
    assert state_of(model) == before
    assert not frozen_one.requires_grad


def test_an_exploding_loss_is_one_line_and_leaves_the_weights():
    model = load("native")
    before = state_of(model)
    with pytest.raises(RuntimeError, match=r"finetune: loss is \w+ at step \d") as caught:
        tuned(model, lr=1e30, schedule="constant")
    assert "\n" not in str(caught.value)
    assert state_of(model) == before


@pytest.mark.parametrize("way", WAYS)
def test_a_stopped_run_goes_on_with_the_same_bits(way, tmp_path, monkeypatch):
    model = load("llama")
    options = {**WAYS[way], "evaluate": prompts(4, seed=2), "save_every": 2, "checkpoints": [3]}
    whole = tuned(model, **options)
    loss, done = supervised._loss, []

    def stopping(*args: Any) -> torch.Tensor:
        done.append(0)
        if len(done) == 8:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(supervised, "_loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        tuned(model, **options, out=tmp_path)
    resumed = tuned(model, **options, out=tmp_path, resume=True)
    assert len(done) == 8 + 3  # from step 6, the last whose state was written
    assert weights(resumed) == weights(whole)
    assert resumed.losses == whole.losses
    pd.testing.assert_frame_equal(resumed.frame, whole.frame)
    with pytest.raises(lc.InputError, match="holds a training"):
        tuned(model, **options, out=tmp_path)
    for name, value in {"lr": 1.0, "checkpoints": [4], "seed": 3}.items():
        with pytest.raises(lc.InputError, match=f"was started with {name}="):
            tuned(model, **{**options, name: value}, out=tmp_path, resume=True)
    with pytest.raises(lc.InputError, match="was started with model="):
        tuned(load("qwen2"), **options, out=tmp_path, resume=True)
    held = set(resumed.checkpoints[-1].tensors())
    assert 0 < len(held) < 40
    assert all("lora" in name for name in held) == (way == "adapters")


KILLED = """
import os, signal, sys
import tests.lensclust.training.test_supervised as t

def tune_until(folder, write):
    replace, writes = os.replace, 0
    def dying(half, path):
        nonlocal writes
        writes += 1
        if writes == write:
            os.truncate(half, os.path.getsize(half) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(half, path)
    os.replace = dying
    t.tuned(t.load("native"), lora=t.LORA, checkpoints=3, save_every=3, out=folder)

for write in map(int, sys.argv[2:]):
    child = os.fork()
    if child == 0:
        tune_until(f"{sys.argv[1]}/{write}", write)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills by signal")
def test_killed_in_a_write_and_resumed_it_ends_with_the_same_bits(tmp_path):
    writes, root = (1, 2, 4, 6), Path(__file__).parents[3]
    subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), *map(str, writes)],
        cwd=root,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
    )
    model = load("native")
    options: dict[str, Any] = {"lora": LORA, "checkpoints": 3, "save_every": 3}
    expected = weights(tuned(model, **options))
    for write in writes:
        folder = tmp_path / str(write)
        run = tuned(model, **options, out=folder, resume=True)
        assert weights(run) == expected
        left = {path.name for path in folder.iterdir()}
        assert left == {"training.state", *(c.path.name for c in run.checkpoints if c.path)}


def test_a_folder_in_use_and_damaged_files_are_one_line(tmp_path):
    model = load("native")
    with (
        claimed(tmp_path / "run", caller="test"),
        pytest.raises(lc.InputError, match=r"finetune: .* another process"),
    ):
        tuned(model, out=tmp_path / "run")
    run = tuned(model, lora=LORA, out=tmp_path / "run")
    path = run.checkpoints[-1].path
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    before = state_of(model)
    with pytest.raises(lc.InputError, match="is damaged"), run.at():
        pass
    assert state_of(model) == before
    path.unlink()
    with pytest.raises(lc.InputError, match=r"finetune: .* is missing"):
        tuned(model, lora=LORA, out=tmp_path / "run", resume=True)


# -- bad input ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0, expected at least 1"),
        ({"batch_tokens": 0}, "batch_tokens=0, expected at least 1"),
        ({"lr": float("nan")}, "lr=nan, expected a positive number"),
        ({"schedule": "moon"}, "schedule='moon', expected one of"),
        ({"warmup": 2.0}, "warmup=2.0, expected a share"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"checkpoints": 1}, "checkpoints=1, expected at least 2"),
        ({"checkpoints": [99]}, r"checkpoint at step 99, expected 0\.\.9"),
        ({"resume": True}, "expected the folder"),
        ({"only": "mplx"}, "finetune: only='mplx' matches no name"),
        ({"only": ["head 9.1"]}, "site 'head 9.1' does not exist"),
        ({"only": LAST, "lora": Lora()}, "only and lora given"),
        ({"lora": Lora(rank=0)}, "lora rank=0, expected at least 1"),
        ({"lora": Lora(alpha=0)}, "lora alpha=0"),
        ({"lora": Lora(targets=["q_proj"])}, r"\['q', 'k', 'v', 'o', 'gate', 'in', 'out'\]"),
        ({"lora": Lora(targets=[])}, "expected a list of some of these"),
        ({"lora": Lora(blocks=[3])}, r"lora blocks=\[3\], expected some of 0\.\.2"),
        ({"lora": Lora(blocks=[])}, r"lora blocks=\[\]"),
    ],
)
def test_unusable_knobs_are_one_clear_line(options, message, tmp_path):
    model = load("llama")
    before = state_of(model)
    out = {} if "resume" in options else {"out": tmp_path / "run"}
    with pytest.raises(lc.InputError, match=message) as caught:
        tuned(model, **options, **out)
    assert "\n" not in str(caught.value)
    assert state_of(model) == before
    assert not (tmp_path / "run").exists()


class Int8Linear(nn.Module):
    """A linear map whose weights are eight bits and a scale a row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        levels = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(levels, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight * self.scale).T


@pytest.mark.parametrize("options", [{}, {"lora": Lora()}])
def test_a_quantised_model_is_refused(options):
    network: Any = bare("llama")
    for layer in network.model.layers:
        layer.self_attn.q_proj = Int8Linear(layer.self_attn.q_proj)
    with pytest.raises(lc.InputError, match=r"is quantised: .* holds torch.int8"):
        tuned(lc.load(network), **options)


@pytest.mark.parametrize(
    ("answers", "length", "message"),
    [
        (None, 3, "given some without"),
        ([[4], []], 3, "given some without"),
        ([[4], [99]], 3, "answer id 99 given"),
        ([[4], [4] * 9], 60, "prompt 1 and its answer have 69 tokens"),
    ],
)
def test_unusable_prompts_are_one_clear_line(answers, length, message):
    rows = pd.DataFrame({"task": ["t", "t"]})
    asked = lc.Prompts.from_token_lists([[3] * length] * 2, rows, answers=answers)
    with pytest.raises(lc.InputError, match=message):
        lc.finetune(load("llama"), asked, progress=False)
    with pytest.raises(lc.InputError, match=message):
        lc.finetune(load("llama"), prompts(), evaluate=asked, progress=False)
