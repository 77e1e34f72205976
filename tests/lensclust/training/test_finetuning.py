"""Fine-tuning is plain training of the bare network, and leaves no bit of it behind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F
from transformer_lens.model_bridge.sources.native import NativeModel

import lensclust as lc
from lensclust.inference.partial_forwards import FrozenBlocks, scored_logits
from lensclust.models.checkpoints import named_weights
from lensclust.models.parameters import parameter_names
from lensclust.models.sites import Site
from lensclust.training.losses import StateLoss, contrast, pull
from lensclust.training.temporary import finetuned
from tests.tiny import ARCHITECTURES, hf_model

LAST = r"\.2\."  # parameters of the third block, in every architecture here


def prompts(n: int = 6, seed: int = 0) -> lc.Prompts:
    """Random prompts of three to seven tokens, with answers of one or two."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, 60, rng.integers(3, 8)).tolist() for _ in range(n)]
    answers = [rng.integers(3, 60, 1 + row % 2).tolist() for row in range(n)]
    return lc.Prompts.from_token_lists(ids, pd.DataFrame({"task": ["t"] * n}), answers=answers)


def load(name: str) -> Any:
    if name == "native":
        return lc.load("native:sif-small", seed=3)
    return lc.load(hf_model(name))


def bare(name: str) -> Any:
    """The same network, never wrapped."""
    if name != "native":
        return hf_model(name)
    model = lc.load("native:sif-small", seed=3)
    network = NativeModel(model.cfg)
    network.load_state_dict({k: v.detach().clone() for k, v in named_weights(model).items()})
    return network


def logits_of(network: Any, tokens: torch.Tensor) -> torch.Tensor:
    out = network(tokens)
    return getattr(out, "logits", out)


def trained_by_hand(network: Any, asked: lc.Prompts, steps: int, lr: float, only: str) -> Any:
    """Cross-entropy of the answers, one prompt at a time without padding; AdamW over all."""
    assert asked.answers is not None
    chosen = [p for name, p in network.named_parameters() if only in name]
    optimizer = torch.optim.AdamW(chosen, lr=lr, weight_decay=0.0)
    for _ in range(steps):
        losses = []
        for row, answer in enumerate(asked.answers):
            ids = asked.tokens[row, : int(asked.lengths[row])].tolist() + list(answer)
            logits = logits_of(network, torch.tensor([ids[:-1]]))[0, -len(answer) :]
            losses.append(F.cross_entropy(logits, torch.tensor(answer), reduction="none"))
        optimizer.zero_grad()
        torch.cat(losses).mean().backward()
        optimizer.step()
    return network


@pytest.mark.parametrize("only", [None, LAST], ids=["all", "last block"])
@pytest.mark.parametrize("name", ["native", "llama", "gpt2", "neox"])
def test_it_is_training_of_the_bare_network(name, only):
    asked, tokens = prompts(), torch.arange(3, 15).view(2, 6)
    part = "" if only is None else ".2."
    by_hand = trained_by_hand(bare(name), asked, steps=4, lr=1e-3, only=part)
    model = load(name)
    start = model(tokens).detach()
    with finetuned(model, asked, steps=4, lr=1e-3, only=only) as done:
        found = model(tokens).detach()
    expected = logits_of(by_hand, tokens).detach()
    assert (expected - start).abs().max() > 0.02
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
    chosen = [p for n, p in by_hand.named_parameters() if part in n and p.grad is not None]
    assert done.parameters == sum(p.numel() for p in chosen)
    assert done.losses[-1][0] < done.losses[0][0]


def state_of(model: Any) -> dict[str, Any]:
    network = model.original_model
    named = dict(model.named_parameters())
    return {
        "weights": lc.fingerprint(model),
        "buffers": [b.clone().tolist() for b in network.buffers()],
        "gradients": [p.grad is None for p in named.values()],
        "free": [p.requires_grad for p in named.values()],
        "training": [module.training for module in network.modules()],
        "hooks": [
            name for name, point in model.hook_dict.items() if point.fwd_hooks or point.bwd_hooks
        ],
        "torch hooks": sum(len(m._forward_hooks) for m in network.modules()),
        "forwards": [name for name, m in network.named_modules() if "forward" in vars(m)],
        "random": torch.random.get_rng_state().tolist(),
    }


def fails(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["native", "llama", "gpt2"])
@pytest.mark.parametrize("way", ["success", "exception", "interrupt", "interrupt in training"])
def test_the_model_is_left_as_it_was(name, way):
    model = load(name)
    frozen_one = next(iter(model.parameters())).requires_grad_(False)
    before, logits = state_of(model), model(torch.arange(4)[None]).detach()
    extra = StateLoss(3, fails) if way == "interrupt in training" else None
    raised = {"exception": RuntimeError, "success": None}.get(way, KeyboardInterrupt)
    with (
        pytest.raises(raised) if raised else nullcontext(),
        finetuned(model, prompts(), steps=2, lr=0.1, only=LAST, extra=extra),
    ):
        assert lc.fingerprint(model) != before["weights"]
        if raised:
            raise raised
    assert state_of(model) == before
    assert not frozen_one.requires_grad
    assert torch.equal(model(torch.arange(4)[None]), logits)


def test_an_exploding_loss_is_an_error_and_leaves_the_weights():
    model = load("native")
    before = state_of(model)
    with (
        pytest.raises(RuntimeError, match="lr=1e\\+20 too large"),
        finetuned(model, prompts(), steps=9, lr=1e20),
    ):
        pass
    assert state_of(model) == before


def head_weights(model: Any, block: int) -> dict[str, torch.Tensor]:
    attention = model.blocks[block].attn
    return {part: getattr(attention, f"W_{part}").detach().clone() for part in "QKVO"}


@pytest.mark.parametrize("name", ["native", *sorted(ARCHITECTURES)])
def test_only_the_chosen_heads_are_trained_or_the_model_is_refused(name):
    model = load(name)
    before = {block: head_weights(model, block) for block in range(3)}
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    heads = [Site("head", 1, 0), Site("head", 1, 3), Site("head", 2, 2)]
    if name == "gemma2":
        refused = pytest.raises(lc.InputError, match="do not add up")
        with refused, finetuned(model, prompts(), only=heads):
            pass
        return
    with finetuned(model, prompts(), steps=3, lr=1e-2, only=heads) as done:
        after = {block: head_weights(model, block) for block in range(3)}
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, weights[n])}
    free = 0
    for block in range(3):
        for part, values in after[block].items():
            grouped = part in "KV" and len(values) < model.cfg.n_heads
            for head in range(len(values)):
                chosen = Site("head", block, head) in heads and not grouped
                assert torch.equal(values[head], before[block][part][head]) != chosen
                free += values[head].numel() if chosen else 0
    assert done.parameters == free
    # Nothing else moved: what changed are attention projections of these two blocks.
    assert all("attn" in n or "attention" in n for n in changed)


def test_a_pull_brings_states_nearer_and_a_contrast_away_too():
    model, asked = load("llama"), prompts(8)
    generator = torch.Generator().manual_seed(0)
    start = torch.from_numpy(lc.extract(model, asked, "resid 2").resid.values[:, 0, 0])
    goal = start + torch.randn(start.shape, generator=generator)
    spread = float(((goal - start) ** 2).sum(1).mean())
    terms = {
        "none": None,
        "pull": StateLoss(2, pull(goal, spread), weight=10),
        "contrast": StateLoss(2, contrast(goal, start, spread), weight=10),
    }
    distance = {}
    for name, extra in terms.items():
        with finetuned(model, asked, steps=12, lr=3e-3, extra=extra):
            now = torch.from_numpy(lc.extract(model, asked, "resid 2").resid.values[:, 0, 0])
        distance[name] = float(((now - goal) ** 2).sum(1).mean()) / spread
    assert distance["pull"] < 0.8 * distance["none"]
    assert distance["contrast"] < 0.9 * distance["none"]


def test_a_loss_sees_the_states_that_extraction_reads():
    model, asked = load("gpt2"), prompts(7)
    expected = lc.extract(model, asked, "resid").resid.values[:, 0]
    for layer, only in ((0, None), (2, r"\.1\."), (3, LAST)):
        seen: dict[int, torch.Tensor] = {}

        def look(states: torch.Tensor, rows: torch.Tensor, seen: Any = seen) -> torch.Tensor:
            seen |= dict(zip(rows.tolist(), states.detach(), strict=True))
            return states.sum() * 0

        if layer == 0:
            # Nothing is trained below the embeddings.
            with (
                pytest.raises(lc.InputError, match="expected layer 1 or above"),
                finetuned(model, asked, steps=1, extra=StateLoss(layer, look)),
            ):
                pass
            continue
        with finetuned(
            model, asked, steps=1, only=only, batch_size=16, extra=StateLoss(layer, look)
        ):
            pass
        found = torch.stack([seen[row] for row in range(len(asked))])
        np.testing.assert_allclose(found, expected[:, layer], atol=1e-5)


def test_losses_equal_their_textbook_forms():
    generator = torch.Generator().manual_seed(1)
    states, goal, away = torch.randn(3, 5, 4, generator=generator)
    goal[2] = float("nan")
    rows, kept = torch.tensor([3, 1, 2]), [0, 1]  # row 2 has no goal
    given, near, far = states[:3], goal[rows], away[rows]
    mse = F.mse_loss(given[kept], near[kept], reduction="none").sum(1).mean() / 2.5
    torch.testing.assert_close(pull(goal, 2.5)(given, rows), mse)
    both = torch.stack(
        [-(torch.cdist(given[kept], p[kept]).diagonal() ** 2) / 2.5 for p in (near, far)]
    )
    expected = F.cross_entropy(both.T, torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(contrast(goal, away, 2.5)(given, rows), expected)
    assert float(pull(goal, 1.0)(states[:1], torch.tensor([2]))) == 0


@pytest.mark.parametrize("name", ["native", *sorted(ARCHITECTURES)])
def test_frozen_blocks_give_what_a_whole_forward_gives(name):
    model, asked = load(name), prompts(5)
    scored = torch.arange(asked.tokens.shape[1]) == (asked.lengths - 1)[:, None]
    with torch.no_grad():
        whole = model(asked.tokens)[scored]
        for n in (1, 2, 3):
            frozen = FrozenBlocks.run(model, asked.tokens, n)
            rows = torch.tensor([4, 0, 2])
            with frozen.reused():
                torch.testing.assert_close(scored_logits(model, asked.tokens, scored), whole)
            with frozen.reused(rows):
                some = scored_logits(model, asked.tokens[rows], scored[rows])
            torch.testing.assert_close(some, whole[rows])
        torch.testing.assert_close(model(asked.tokens)[scored], whole)


@pytest.mark.parametrize("name", ["native", "llama", "gpt2", "neox"])
def test_the_last_mlp_runs_only_where_logits_are_read(name):
    model, asked = load(name), prompts(5)
    scored = torch.arange(asked.tokens.shape[1]) == (asked.lengths - 1)[:, None]
    mlp = model.blocks[-1].mlp
    seen: list[int] = []

    def count(_part: Any, given: Any) -> None:
        seen.append(given[0].shape[:-1].numel())

    with torch.no_grad():
        whole = model(asked.tokens)[scored]
        scored_logits(model, asked.tokens, scored)  # asks whether the MLP sees one token at a time
        handle = mlp.original_component.register_forward_pre_hook(count)
        torch.testing.assert_close(scored_logits(model, asked.tokens, scored), whole)
        assert seen == [5]
        found: list[torch.Tensor] = []
        for hook in (mlp.hook_out, model.blocks[-1].hook_out, model.ln_final.hook_in):
            with model.hooks(fwd_hooks=[(hook.name, lambda value, hook: found.append(value))]):
                scored_logits(model, asked.tokens, scored)
            assert seen.pop() == asked.tokens.numel()
            assert bool((found.pop().abs().sum(-1) > 0).all())
        handle.remove()


def test_an_mlp_that_sees_other_tokens_runs_whole():
    model, asked = load("llama"), prompts(5)
    scored = torch.arange(asked.tokens.shape[1]) == (asked.lengths - 1)[:, None]
    network = model.blocks[-1].mlp.original_component
    own = network.forward
    network.forward = lambda states: own(states + states.cumsum(1))
    with torch.no_grad():
        whole = model(asked.tokens)[scored]
        torch.testing.assert_close(scored_logits(model, asked.tokens, scored), whole)
        torch.testing.assert_close(scored_logits(model, asked.tokens, scored), whole)


def test_batches_go_through_all_prompts_and_follow_the_seed():
    model, asked = load("native"), prompts(9)

    def visits(seed: int) -> list[list[int]]:
        found: list[list[int]] = []

        def look(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            found.append(rows.tolist())
            return states.sum() * 0

        extra = StateLoss(6, look)
        with finetuned(model, asked, steps=6, batch_size=3, extra=extra, seed=seed):
            return found

    one = visits(0)
    assert sorted(chain(*one[:3])) == sorted(chain(*one[3:])) == list(range(9))
    assert one == visits(0) != visits(1)


def test_names():
    model = load("gpt2")
    every = parameter_names(model)
    parts = [parameter_names(model, [block]) for block in range(3)]
    assert all(set(part) <= set(every) for part in parts)
    assert not set(parts[0]) & set(parts[1])
    with finetuned(model, prompts(), steps=1, only=parts[2]) as done:
        assert done.parameters == sum(
            p.numel() for n, p in hf_model("gpt2").named_parameters() if ".h.2." in n
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0, expected at least 1"),
        ({"batch_size": 0}, "batch_size=0, expected at least 1"),
        ({"lr": float("nan")}, "lr=nan, expected a positive number"),
        ({"only": "mplx"}, "only='mplx' matches no name"),
        ({"only": "("}, "is no regular expression"),
        ({"only": []}, "expected names of parameters"),
        ({"only": ["no.such"]}, "no.such"),
        ({"only": ["head 9.1"]}, "site 'head 9.1' does not exist"),
        ({"only": [Site("mlp_out", 1)]}, "mlp_out 1"),
        ({"extra": StateLoss(9, fails)}, "site 'resid 9' does not exist"),
        ({"extra": StateLoss(1, fails), "only": LAST}, "expected layer 3 or above"),
        ({"extra": StateLoss(3, fails, weight=float("nan"))}, "weight=nan"),
        ({"extra": StateLoss(3, fails, at="moon")}, "position 'moon'"),
    ],
)
def test_unusable_knobs_are_one_clear_line(options, message):
    model = load("llama")
    before = state_of(model)
    with (
        pytest.raises(lc.InputError, match=message) as caught,
        finetuned(model, prompts(), **options),
    ):
        pass
    assert "\n" not in str(caught.value)
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: (model.train(), prompts())[1], "is in training mode"),
        (
            lambda model: lc.Prompts.from_token_lists([[3]], pd.DataFrame({"task": ["t"]})),
            "given some without",
        ),
        (
            lambda model: lc.Prompts.from_token_lists(
                [[3] * 99], pd.DataFrame({"task": ["t"]}), answers=[[4]]
            ),
            "context of 64",
        ),
    ],
)
def test_unusable_prompts_are_one_clear_line(
    spoil: Callable[[Any], lc.Prompts], message: str
) -> None:
    model = load("llama")
    asked = spoil(model)
    with pytest.raises(lc.InputError, match=message), finetuned(model, asked):
        pass
