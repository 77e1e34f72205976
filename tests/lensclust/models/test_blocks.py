"""What blocks hold: heads of other sizes than the configuration's, hybrids, sums that do not hold.

The reference is a plain torch hook on an unwrapped copy. Sizes differ from those of the family
table (tests/families), which holds every family once.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import lensclust as lc
from lensclust.activations.dataset import head_residual
from lensclust.cli.doctor import examine
from lensclust.inference.readouts import answers
from lensclust.models.blocks import blocks_of
from lensclust.models.sites import Site, resolve
from probes.patching.replay import replay
from tests.families.registry import FAMILIES, build
from tests.families.subjects import parts
from tests.tiny import hf_model

IDS = [[5, 9, 30, 7, 12], [40, 3, 8], [11, 11, 25, 60, 2, 9, 44]]


def family(name: str, **fields: Any):
    found = FAMILIES[name]
    return replace(found, fields={**found.fields, **fields})


def both(name: str, **fields: Any):
    """A plain network, and a model of ours around a copy."""
    network = build(family(name, **fields), seed=3)
    return network, lc.load(copy.deepcopy(network))


def some_prompts() -> lc.Prompts:
    return lc.Prompts.from_token_lists(IDS, pd.DataFrame({"task": list("aba")}))


def read(model: Any, sites: Any):
    return lc.extract(model, some_prompts(), sites, progress=False)


@pytest.mark.parametrize(("name", "size"), [("deepseek_v2", 6), ("youtu", 12)])
def test_heads_have_the_size_of_their_values(name: str, size: int) -> None:
    network, model = both(name, v_head_dim=size)
    acts = read(model, "head")
    assert (acts.sizes["head"], acts.sizes["d_head"]) == (4, size)
    plain: list[Any] = [parts(network, FAMILIES[name], ids) for ids in IDS]
    z = np.stack([torch.stack([z[-1] for z in one.z]) for one in plain])
    found = acts.z.squeeze("position").transpose("prompt", "block", "head", "d_head")
    np.testing.assert_allclose(found, z.reshape(found.shape), atol=1e-5)
    added = np.stack([torch.stack([out[-1] for out in one.heads_out]) for one in plain])
    sums = head_residual(acts, model).sum("head").squeeze("position")
    np.testing.assert_allclose(sums.transpose("prompt", "block", "d_model"), added, atol=1e-4)


def test_an_edit_of_a_head_changes_that_head_where_values_have_another_size() -> None:
    network, model = both("deepseek_v3", v_head_dim=12)

    def silenced(_module: Any, given: Any) -> Any:
        z = given[0].unflatten(-1, (4, 12)).clone()
        z[:, -1, 2] = 0
        return (z.flatten(2),)

    network.model.layers[1].self_attn.o_proj.register_forward_pre_hook(silenced)
    expected = torch.stack([network(torch.tensor([ids])).logits[0, -1] for ids in IDS])
    edit = (Site("z", 1, 2), torch.zeros(len(IDS), 12))
    found = replay(model, some_prompts(), [edit], lambda logits, rows: logits, progress=False)
    torch.testing.assert_close(torch.as_tensor(found)[0], expected, atol=1e-4, rtol=1e-4)
    unedited = answers(model, some_prompts(), lambda logits, rows: logits)
    assert (unedited - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "fields"),
    [("opt_350m", {"num_attention_heads": 2, "num_hidden_layers": 3}), ("gpt1", {"n_head": 2})],
)
def test_norms_behind_the_sums_leave_no_middle_state(name: str, fields: dict[str, int]) -> None:
    network, model = both(name, **fields)
    for kind in ("resid_mid", "head"):
        with pytest.raises(lc.InputError, match=f"'{kind}' does not exist in .*a norm follows"):
            read(model, kind)
    acts = read(model, ["resid", "attn_out", "mlp_out"])
    plain: list[Any] = [parts(network, FAMILIES[name], ids) for ids in IDS]
    for found, expected in (
        (acts.resid, [one.resid for one in plain]),
        (acts.attn_out, [one.heads_out for one in plain]),
        (acts.mlp_out, [one.mlp for one in plain]),
    ):
        last = np.stack([torch.stack([state[-1] for state in one]) for one in expected])
        np.testing.assert_allclose(found.squeeze("position"), last, atol=1e-4)


def test_heads_whose_sizes_differ_are_read_block_by_block() -> None:
    network, model = both("gemma4", num_hidden_layers=3, global_head_dim=24)
    assert [block.d_head for block in blocks_of(model)] == [8, 24, 24]
    with pytest.raises(lc.InputError, match=r"heads of different sizes.*0: 8, 1: 24, 2: 24"):
        read(model, "z")
    read_plainly: list[Any] = [parts(network, FAMILIES["gemma4"], ids) for ids in IDS]
    for block, size in ((0, 8), (2, 24)):
        found = read(model, [f"z {block}.{head}" for head in range(4)]).z
        plain = [one.z[block][-1] for one in read_plainly]
        expected = torch.stack(plain).unflatten(-1, (4, size))
        np.testing.assert_allclose(found.squeeze(("position", "block")), expected, atol=1e-5)


def test_blocks_without_attention_have_no_heads() -> None:
    kinds = ["full_attention", "conv", "conv", "full_attention"]
    _, model = both("lfm2", num_hidden_layers=4, layer_types=kinds)
    assert [block.heads for block in blocks_of(model)] == [4, 0, 0, 4]
    acts = read(model, ["head", "resid"])
    assert acts.block.values.tolist() == [0, 3]
    assert acts.layer.values.tolist() == [0, 1, 2, 3, 4]
    for sites, message in (
        ("z 1.0", "'z' in blocks 0, 3 only"),
        (["attn_out", "mlp_out"], "one array cannot hold these sites"),
        (["head 0.0", "mlp_out 1"], "one array cannot hold these sites"),
        ("head 3.4", "heads 0..3"),
    ):
        with pytest.raises(lc.InputError, match=message) as caught:
            read(model, sites)
        assert "\n" not in str(caught.value)


def test_one_block_that_scales_what_its_heads_add_is_refused_and_no_other() -> None:
    model = lc.load(hf_model("llama"))
    scaled = model.blocks[1].attn.o.original_component
    scaled.register_forward_hook(lambda _module, _given, out: 1.01 * out)
    with pytest.raises(lc.InputError, match=r"'head' does not exist .*do not add up"):
        resolve(model, "head")
    assert resolve(model, ["head 0.1", "head 2.3"])
    with pytest.raises(lc.InputError, match=r"'head 1\.0' does not exist"):
        resolve(model, "head 1.0")


@pytest.mark.parametrize("hook", ["hook_attn_out", "hook_mlp_out"])
def test_outputs_that_are_not_what_is_added_are_refused(hook: str) -> None:
    """A factor behind the place that is read, which no configuration tells of."""
    model = lc.load(hf_model("llama"))
    part = model.blocks[2].attn if hook == "hook_attn_out" else model.blocks[2].mlp

    def scaled(_module: Any, _given: Any, out: Any) -> Any:
        return 1.001 * out if isinstance(out, torch.Tensor) else (1.001 * out[0], *out[1:])

    part.register_forward_hook(scaled)
    kind = hook.removeprefix("hook_")
    with pytest.raises(lc.InputError, match=f"'{kind}' does not exist"):
        resolve(model, kind)
    assert resolve(model, [f"{kind} 0", f"{kind} 1", "resid_mid"])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("olmo", torch.float16), ("olmo3", torch.bfloat16), ("flex_olmo", torch.bfloat16)],
)
def test_rotations_in_float32_are_rounded_back(name: str, dtype: torch.dtype) -> None:
    """With and without a cache, forwards and generation, as the plain network computes them."""
    network: Any = build(family(name, num_key_value_heads=4), seed=3)
    plain = network.to(dtype)
    model = lc.load(copy.deepcopy(plain))
    tokens = torch.tensor([IDS[2]])
    with torch.no_grad():
        expected = plain(tokens).logits
        for cache in (True, False):
            found = model.original_model(tokens, use_cache=cache).logits
            assert found.dtype == dtype
            torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
    options: Any = {"max_new_tokens": 3, "do_sample": False, "verbose": False}
    made: list[Any] = [
        model.generate(tokens, **options, stop_at_eos=False, use_past_kv_cache=cache)
        for cache in (True, False)
    ]
    assert made[0].shape == made[1].shape == (1, tokens.shape[1] + 3)


def test_the_doctor_sees_gradients_that_a_norm_would_hide_and_those_that_end() -> None:
    model = lc.load(build(family("gpt_neox", num_hidden_layers=2)))
    assert examine(model)["gradients"] == "reach the residual stream"
    model.blocks[1].original_component.register_forward_hook(
        lambda _module, _given, out: out.detach() if isinstance(out, torch.Tensor) else out
    )
    assert examine(model)["gradients"] != "reach the residual stream"


def test_the_doctor_tries_edits_in_a_block_that_has_attention() -> None:
    _, model = both("lfm2", layer_types=["conv", "conv", "full_attention"])
    report = examine(model)
    assert report["edit attention pattern"] == "takes effect (block 2)"
    assert report["site head"] == report["site z"] == "yes, in blocks 2"
    assert report["site mlp_out"] == "yes"
    assert "(2 blocks without)" in report["model"]
