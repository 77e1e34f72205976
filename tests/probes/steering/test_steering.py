"""Steering against plain PyTorch hooks on the Hugging Face model; nothing is left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lensclust as lc
from lensclust.models.sites import Site
from probes.steering.interventions import Intervention
from probes.steering.steering import steer
from tests.tiny import D_MODEL, D_VOCAB, N_HEADS, N_LAYERS, hf_model

D_HEAD = D_MODEL // N_HEADS
BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers"}
HEADS = {"gpt2": "attn.c_proj", "llama": "self_attn.o_proj"}


def add(seed: int = 0, size: float = 2.0) -> Intervention:
    """A fixed random vector of its own at each site."""

    def edit_at(site: Site) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda states: states + vector(site, seed, size)

    return Intervention("add", edit_at)


def vector(site: Site, seed: int = 0, size: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * seed + 10 * site.layer + (site.head or 0))
    return size * torch.randn(D_MODEL if site.head is None else D_HEAD, generator=generator)


def some_tokens(rows: int = 4, length: int = 7) -> torch.Tensor:
    return torch.randint(3, D_VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


def plainly_steered(
    name: str, tokens: torch.Tensor, where: torch.Tensor, sites: list[Site]
) -> torch.Tensor:
    """Logits of a Hugging Face model with `add` made by its own modules' hooks.

    ``where``: a mask ``(row, position)`` of the states to change.
    """
    model: Any = hf_model(name)
    blocks = model.get_submodule(BLOCKS[name])
    for site in sites:
        if site.head is None:

            def change_output(_module, _given, out, site=site):
                hidden = out[0] if isinstance(out, tuple) else out
                hidden = hidden + where[..., None] * vector(site)
                return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

            blocks[site.layer - 1].register_forward_hook(change_output)
        else:

            def change_head(_module, given, site=site):
                z = given[0].clone()
                start = (site.head or 0) * D_HEAD
                z[..., start : start + D_HEAD] += where[..., None] * vector(site)
                return (z, *given[1:])

            mixer = blocks[site.layer].get_submodule(HEADS[name])
            mixer.register_forward_pre_hook(change_head)
    with torch.no_grad():
        return model(tokens).logits


def hooks_of(bridge: Any) -> int:
    # A point may have several names.
    points = {id(point): point for point in bridge.hook_dict.values()}
    return sum(len(point.fwd_hooks) for point in points.values())


def mask(tokens: torch.Tensor, positions: torch.Tensor | str) -> torch.Tensor:
    index = torch.arange(tokens.shape[1])[None].expand(tokens.shape)
    if isinstance(positions, str):
        return index >= (0 if positions == "all" else tokens.shape[1] - 1)
    return index == positions[:, None]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("positions", ["last", "all", torch.tensor([0, 6, 3, 2])], ids=str)
@pytest.mark.parametrize(
    "sites",
    [["resid 1"], [f"resid {N_LAYERS}"], ["head 1.2"], ["resid 2", "head 0.1", "head 0.3"]],
    ids=str,
)
def test_steering_is_that_of_plain_hooks(name, positions, sites):
    tokens = some_tokens()
    parsed = [Site.parse(site) for site in sites]
    expected = plainly_steered(name, tokens, mask(tokens, positions), parsed)
    bridge = lc.load(hf_model(name))
    with torch.no_grad(), steer(bridge, add(), at=sites, positions=positions):
        found = bridge(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, bridge(tokens))


def test_a_head_moves_alone():
    bridge, tokens = lc.load(hf_model("llama")), some_tokens()
    hook = "blocks.1.attn.hook_z"
    _, before = bridge.run_with_cache(tokens, names_filter=[hook])
    with steer(bridge, add(), at="head 1.2", positions="all"):
        _, after = bridge.run_with_cache(tokens, names_filter=[hook])
    difference = (after[hook] - before[hook]).abs().amax((0, 1, 3))
    assert difference[[0, 1, 3]].max() == 0
    torch.testing.assert_close(
        after[hook][:, :, 2] - before[hook][:, :, 2],
        vector(Site("head", 1, 2)).expand(*tokens.shape, D_HEAD),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "llama", "native"])
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("during_forward", [False, True])
def test_nothing_is_left_behind(name, error, during_forward):
    bridge = lc.load("native:sif-small" if name == "native" else hf_model(name))
    tokens = some_tokens() % bridge.cfg.d_vocab
    state = copy.deepcopy(bridge.state_dict())
    with torch.no_grad():
        before = bridge(tokens)

    def edit_at(site: Site) -> Callable[[torch.Tensor], torch.Tensor]:
        def edit(states: torch.Tensor) -> torch.Tensor:
            if error is not None and during_forward:
                raise error
            return states + 1

        return edit

    def use() -> None:
        with steer(
            bridge, Intervention("plus one", edit_at), at=["resid 1", "head 0.1"], positions="last"
        ):
            assert hooks_of(bridge) == 2
            assert not torch.equal(bridge(tokens), before)
            if error is not None:
                raise error

    if error is None:
        use()
    else:
        with pytest.raises(error):
            use()
    assert hooks_of(bridge) == 0
    with torch.no_grad():
        assert torch.equal(bridge(tokens), before)
    after = bridge.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in state.items())


def test_contexts_nest_and_leave_what_was_there():
    bridge, tokens = lc.load(hf_model("gpt2")), some_tokens()
    seen: list[torch.Tensor] = []

    def watch(value: torch.Tensor, hook: Any) -> None:
        seen.append(value)

    watched = "blocks.2.hook_resid_pre"
    twice = Intervention("twice", lambda site: lambda states: 2 * states)
    with torch.no_grad(), bridge.hooks(fwd_hooks=[(watched, watch)]):
        bridge(tokens)
        with steer(bridge, add(), at="resid 1", positions="all"):
            once = bridge(tokens)
            with steer(bridge, twice, at="resid 1", positions="all"):
                both = bridge(tokens)
                with pytest.raises(lc.InputError), steer(bridge, add(), at="resid 99"):
                    pass
                torch.testing.assert_close(bridge(tokens), both)
            torch.testing.assert_close(bridge(tokens), once)
        # Whether edits take effect is tried without hooks.
        assert len(seen) == 5
    assert hooks_of(bridge) == 0
    # The inner one sees what the outer one left: 2 (x + v), not 2 x + v.
    in_order = Intervention("in order", lambda site: lambda states: 2 * (states + vector(site)))
    with torch.no_grad(), steer(bridge, in_order, at="resid 1", positions="all"):
        torch.testing.assert_close(bridge(tokens), both)
    assert not torch.allclose(once, both)


def test_right_padding_changes_nothing_when_positions_are_given():
    bridge = lc.load(hf_model("llama"))
    full = some_tokens(3, 9)
    lengths = torch.tensor([4, 9, 6])
    padded = torch.where(torch.arange(9) < lengths[:, None], full, 0)
    with torch.no_grad(), steer(bridge, add(), at="resid 2", positions=lengths - 1):
        together = bridge(padded)[torch.arange(3), lengths - 1]
    for row, length in enumerate(lengths.tolist()):
        with torch.no_grad(), steer(bridge, add(), at="resid 2"):
            alone = bridge(full[row : row + 1, :length])[0, -1]
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BLOCKS)
def test_generation_moves_every_new_token(name):
    bridge: Any = lc.load(hf_model(name))
    tokens = some_tokens(1, 6)
    expected = tokens
    for _ in range(5):
        new = torch.arange(expected.shape[1])[None] >= tokens.shape[1] - 1
        logits = plainly_steered(name, expected, new, [Site("resid", 2)])
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "verbose": False}
    options |= {"stop_at_eos": False, "return_type": "tokens"}
    with steer(bridge, add(), at="resid 2"):
        found = bridge.generate(tokens, **options)
    assert found.tolist() == expected.tolist()
    assert hooks_of(bridge) == 0
    assert bridge.generate(tokens, **options).tolist() != expected.tolist()


def test_what_cannot_be_steered_is_refused():
    bridge = lc.load(hf_model("gpt2"))
    for at, message in (("resid 9", "'resid 9' does not exist"), ([], "none given")):
        with pytest.raises(lc.InputError, match=message), steer(bridge, add(), at=at):
            pass
    with (
        pytest.raises(lc.InputError, match=r"positions='first', expected one of"),
        steer(bridge, add(), at="resid 1", positions="first"),
    ):
        pass
    with (
        pytest.raises(ValueError, match="3 positions given, but a batch of 4 was run"),
        steer(bridge, add(), at="resid 1", positions=torch.tensor([1, 2, 3])),
    ):
        bridge(some_tokens(4))
    with (
        pytest.raises(ValueError, match="a batch of 4 rows was run and no positions were given"),
        steer(bridge, add(), at="resid 1"),
    ):
        bridge(some_tokens(4))
    with (
        pytest.raises(ValueError, match="position 7 given, but a batch of 7 tokens"),
        steer(bridge, add(), at="resid 1", positions=torch.tensor([1, 7])),
    ):
        bridge(some_tokens(2))
    assert hooks_of(bridge) == 0
    with (
        pytest.raises(lc.InputError, match="in training mode") as caught,
        steer(lc.load(hf_model("gpt2")).train(), add(), at="resid 1"),
    ):
        pass
    assert "\n" not in str(caught.value)
