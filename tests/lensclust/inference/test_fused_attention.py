"""Fused attention gives what the plain way gives, and nothing of it stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lensclust as lc
from lensclust.inference.fused_attention import fused_attention
from lensclust.inference.partial_forwards import scored_logits
from tests.tiny import hf_model

FUSED = ("gpt2", "llama", "neox", "opt", "qwen2")


def tokens_of(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 60, (3, 11), generator=torch.Generator().manual_seed(seed))


def seen(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What hooks were given, the logits, and the gradient of one of them at the embedding."""
    kept: dict[str, torch.Tensor] = {}

    def keeper(name: str) -> Any:
        return lambda value, hook: kept.update({name: value})

    names = [
        f"blocks.{block}.{point}"
        for block in range(model.cfg.n_layers)
        for point in ("hook_resid_pre", "attn.hook_z", "hook_mlp_out")
    ]
    with model.hooks(fwd_hooks=[(name, keeper(name)) for name in names]):
        logits = model.original_model(tokens, use_cache=False).logits
    start = kept["blocks.0.hook_resid_pre"]
    (slope,) = torch.autograd.grad(logits[:, -1, 5].sum(), start)
    return {**kept, "logits": logits, "slope": slope}


@pytest.mark.parametrize("name", FUSED)
def test_hooks_logits_and_gradients_are_those_of_the_plain_way(name: str) -> None:
    model, tokens = lc.load(hf_model(name)), tokens_of()
    plain = seen(model, tokens)
    with fused_attention(model, 11) as fused:
        assert fused
        found = seen(model, tokens)
    assert found.keys() == plain.keys()
    for point, value in plain.items():
        torch.testing.assert_close(found[point], value, rtol=1e-4, atol=1e-5, msg=point)


@pytest.mark.parametrize("name", FUSED)
def test_no_pattern_is_made_inside_and_all_is_as_before_after_it(name: str) -> None:
    model: Any = lc.load(hf_model(name))
    tokens = tokens_of()
    patterns: list[str] = []
    pattern = model.blocks[0].attn.hook_pattern

    def state() -> tuple[object, ...]:
        parts = {name: id(part) for name, part in model.named_modules()}
        forwards = [block.attn.__dict__.get("forward") for block in model.blocks]
        return parts, forwards, model.original_model.config._attn_implementation

    def use(error: type[BaseException] | None) -> None:
        with fused_attention(model, 11) as fused:
            # Heard, though it was not there at the door: nothing reaches it inside.
            handle = pattern.register_forward_hook(lambda *_: patterns.append("made"))
            model.original_model(tokens)
            handle.remove()
            assert fused
            assert patterns == []
            if error:
                raise error

    before = state()
    use(None)
    assert state() == before
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            use(error)
        assert state() == before
    pattern.register_forward_hook(lambda *_: patterns.append("made"))
    model.original_model(tokens)
    assert patterns == ["made"]


@pytest.mark.parametrize("name", ["gemma2", "native"])
def test_models_without_such_code_go_the_plain_way(name: str) -> None:
    model = lc.load("native:sif-small" if name == "native" else hf_model(name))
    with fused_attention(model, 11) as fused:
        assert not fused


@pytest.mark.parametrize(
    "point", ["hook_pattern", "hook_attn_scores", "hook_q", "hook_v", "hook_out"]
)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_who_listens_to_attention_is_heard(name: str, point: str) -> None:
    model, tokens = lc.load(hf_model(name)), tokens_of()

    def nothing(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.zeros_like(value)

    plain = model(tokens)
    with model.hooks(fwd_hooks=[(f"blocks.1.attn.{point}", nothing)]):
        cut = model(tokens)
        with fused_attention(model, 11) as fused:
            assert not fused
            torch.testing.assert_close(model(tokens), cut)
    assert not torch.allclose(plain, cut)
    with fused_attention(model, 11) as fused:
        assert fused


def test_code_that_gives_something_else_is_not_used() -> None:
    model = lc.load(hf_model("llama"))
    original = model.blocks[1].attn.original_component
    own = original.forward
    original.forward = lambda *args, **named: (2 * own(*args, **named)[0], None)
    with fused_attention(model, 11) as fused:
        assert not fused


def test_code_that_goes_wrong_in_long_sequences_only_is_used_for_short_ones() -> None:
    """A window that the model's own code ignores bites beyond its length alone."""
    model: Any = lc.load(hf_model("llama"))
    original = model.blocks[1].attn.original_component
    own = original.forward

    def wrong(hidden_states: torch.Tensor, *args: Any, **named: Any) -> Any:
        out, *rest = own(hidden_states, *args, **named)
        return out * torch.where(torch.arange(out.shape[1]) < 40, 1.0, 0.5)[:, None], *rest

    original.forward = wrong
    for longest, expected in ((30, True), (60, False), (40, True), (41, False)):
        with fused_attention(model, longest) as fused:
            assert fused == expected, longest


@pytest.mark.parametrize("mixing", [False, True])
def test_an_mlp_that_looks_at_other_tokens_is_run_whole(mixing: bool) -> None:
    """One that adds a little of the token before, which a first token alone does not show."""
    model: Any = lc.load(hf_model("gpt2"))
    mlp = model.blocks[-1].mlp
    own = mlp.original_component.forward
    if mixing:
        mlp.original_component.forward = lambda states: own(
            states + 0.01 * states.roll(1, dims=1).cumsum(1)
        )
    tokens = tokens_of()
    scored = torch.zeros(tokens.shape, dtype=torch.bool)
    scored[:, [3, 10]] = True
    with torch.no_grad():
        torch.testing.assert_close(
            scored_logits(model, tokens, scored), model(tokens)[scored], rtol=1e-4, atol=1e-5
        )
