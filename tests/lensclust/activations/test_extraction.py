"""Extraction against Hugging Face's own hidden states and TransformerLens's own cache."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from hypothesis import given, settings, strategies as st

import lensclust as lc
from lensclust.activations.dataset import dataset_sites, select, site_values
from lensclust.models.fingerprints import fingerprint_again
from lensclust.models.sites import Site, additivity_error
from tests.tiny import ARCHITECTURES, D_VOCAB, N_LAYERS, hf_model, tiny_tokenizer

ADDITIVE = [name for name in ARCHITECTURES if name != "gemma2"]


@cache
def loaded(name: str) -> Any:
    """One model for all tests that leave it as it is."""
    return lc.load("native:sif-small" if name == "native" else hf_model(name))


def some_prompts(n: int = 13, *, seed: int = 0, longest: int = 20) -> lc.Prompts:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, D_VOCAB, rng.integers(2, longest)).tolist() for _ in range(n)]
    rows = pd.DataFrame({"task": rng.choice(["a", "b"], n), "n": range(n)})
    return lc.Prompts.from_token_lists(ids, rows, spans={"first": [(0, 1)] * n})


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
def test_residual_stream_equals_hidden_states_of_each_prompt_alone(name, batch_tokens):
    reference, bridge, prompts = hf_model(name), loaded(name), some_prompts()
    acts = lc.extract(bridge, prompts, "resid", batch_tokens=batch_tokens, shard=5)
    assert acts.resid.dims == ("prompt", "position", "layer", "d_model")
    for row in range(len(prompts)):
        ids = prompts.tokens[row, : prompts.lengths[row]][None]
        with torch.no_grad():
            out = reference(ids, output_hidden_states=True)
        # The last hidden state has the final norm applied; the others are the residual stream.
        expected = torch.stack([h[0, -1] for h in out.hidden_states[:-1]]).numpy()
        np.testing.assert_allclose(acts.resid[row, 0, :-1], expected, rtol=1e-4, atol=1e-5)
        last = torch.from_numpy(acts.resid[row, 0, -1].values)[None, None]
        norm = _final_norm(reference, name)
        with torch.no_grad():
            np.testing.assert_allclose(
                norm(last)[0, 0], out.hidden_states[-1][0, -1], rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("name", [*ARCHITECTURES, "native"])
def test_every_site_equals_run_with_cache(name):
    bridge = loaded(name)
    prompts = some_prompts(6)
    kinds = ["resid", "z", "attn_out", "mlp_out"]
    kinds += [] if name == "neox" else ["resid_mid"]
    acts = lc.extract(bridge, prompts, kinds, at=["answer", "first_end"])
    hooks = {
        "z": "blocks.{}.attn.hook_z",
        "attn_out": "blocks.{}.hook_attn_out",
        "mlp_out": "blocks.{}.hook_mlp_out",
        "resid_mid": "blocks.{}.hook_resid_mid",
    }
    for row in range(len(prompts)):
        ids = prompts.tokens[row, : prompts.lengths[row]][None]
        _, cache = bridge.run_with_cache(ids)
        for place, token in (("answer", -1), ("first_end", 0)):
            for kind in kinds[1:]:
                for block in range(bridge.cfg.n_layers):
                    np.testing.assert_allclose(
                        acts[kind].sel(position=place, block=block)[row],
                        cache[hooks[kind].format(block)][0, token],
                        rtol=1e-4,
                        atol=1e-5,
                    )
            for layer in range(bridge.cfg.n_layers):
                np.testing.assert_allclose(
                    acts.resid.sel(position=place, layer=layer)[row],
                    cache[f"blocks.{layer}.hook_resid_pre"][0, token],
                    rtol=1e-4,
                    atol=1e-5,
                )
            np.testing.assert_allclose(
                acts.resid.sel(position=place)[row, -1],
                cache[f"blocks.{bridge.cfg.n_layers - 1}.hook_resid_post"][0, token],
                rtol=1e-4,
                atol=1e-5,
            )


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1000),
    batch_tokens=st.sampled_from([1, 17, 40, 1000]),
    shard=st.integers(1, 20),
    pad=st.integers(0, 5),
)
def test_neither_batching_nor_padding_nor_order_matters(seed, batch_tokens, shard, pad):
    model, prompts = loaded("native"), some_prompts(9, seed=seed, longest=12)
    padded = torch.nn.functional.pad(prompts.tokens, (0, pad), value=7)
    wider = lc.Prompts(padded, prompts.lengths, prompts.rows, pad_id=7)
    plain = lc.extract(model, prompts, ["resid 0", "resid 6", "head 2.1"])
    other = lc.extract(
        model, wider, ["resid 0", "resid 6", "head 2.1"], batch_tokens=batch_tokens, shard=shard
    )
    np.testing.assert_allclose(plain.resid, other.resid, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(plain.z, other.z, rtol=1e-4, atol=1e-5)
    order = np.random.default_rng(seed).permutation(len(prompts))
    shuffled = lc.extract(model, prompts.take(order), ["resid 6"])
    np.testing.assert_allclose(
        shuffled.resid[:, 0, 0], plain.resid.sel(layer=6)[order, 0], rtol=1e-4, atol=1e-5
    )


def test_heads_are_not_multiplied_by_weights_that_they_were_not_read_with():
    network = hf_model("llama")
    model = lc.load(network)
    acts = lc.extract(model, some_prompts(3), "head")
    before = lc.head_residual(acts, model)
    with pytest.raises(lc.InputError, match="were read with weights"):
        lc.head_residual(acts, lc.load(hf_model("llama", seed=1)))
    weight = network.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(lc.InputError, match="were read with weights"):
        lc.head_residual(acts, model)
    lc.head_residual(acts.drop_attrs(), model)  # of nobody knows what
    with torch.no_grad():
        weight.sub_(1)
    lc.head_residual(lc.extract(model, some_prompts(3), "head"), model)
    assert before.sizes["head"] == 4


@pytest.mark.parametrize("attributes", ["override", "drop", "drop_conflicts"])
def test_heads_of_a_joined_dataset_are_multiplied_by_their_own_weights(attributes):
    """Whichever attributes are left of those that were joined."""
    model, other = loaded("llama"), loaded("gpt2")
    parts = [lc.extract(model, some_prompts(4, seed=s), "head", progress=False) for s in (0, 1)]
    theirs = lc.extract(other, some_prompts(4), "head", progress=False)
    joining = {"data_vars": "all", "combine_attrs": attributes}
    found = lc.head_residual(xr.concat(parts, "prompt", **joining), model)
    expected = np.concatenate([lc.head_residual(part, model).values for part in parts])
    np.testing.assert_array_equal(found.values, expected)
    with pytest.raises(lc.InputError, match="heads of several models"):
        lc.head_residual(xr.concat([parts[0], theirs], "prompt", **joining), model)
    with pytest.raises(lc.InputError, match=r"with other W_O|with weights"):
        lc.head_residual(xr.concat([theirs, theirs], "prompt", **joining), model)


@pytest.mark.parametrize("name", ADDITIVE)
def test_head_contributions_add_up_and_frames_keep_their_distances(name):
    bridge, prompts = loaded(name), some_prompts(7)
    acts = lc.extract(bridge, prompts, ["head", "attn_out"])
    contributions = lc.head_residual(acts, bridge)
    assert contributions.dims == ("prompt", "position", "block", "head", "d_model")
    for block in range(N_LAYERS):
        bias = getattr(bridge.blocks[block].attn, "b_O", None)
        bias = 0 if bias is None else bias.detach().numpy()
        np.testing.assert_allclose(
            contributions.sel(block=block).sum("head")[:, 0] + bias,
            acts.attn_out.sel(block=block)[:, 0],
            rtol=1e-3,
            atol=1e-5,
        )
        for head in range(bridge.cfg.n_heads):
            full = contributions.sel(block=block, head=head)[:, 0].values
            small = site_values(acts, Site("head", block, head))
            assert small.shape[1] <= bridge.cfg.d_head
            np.testing.assert_allclose(small @ small.T, full @ full.T, rtol=1e-3, atol=1e-5)


def test_heads_behind_a_norm_are_refused_by_name():
    bridge = loaded("gemma2")
    assert additivity_error(bridge) > 0.1
    with pytest.raises(lc.InputError, match=r"'head' does not exist in .*do not add up"):
        lc.extract(bridge, some_prompts(2), "head")
    assert lc.extract(bridge, some_prompts(2), "z").z.shape[0] == 2


def test_parallel_blocks_have_no_resid_mid():
    bridge = loaded("neox")
    with pytest.raises(lc.InputError, match=r"'resid_mid' does not exist: .* has only resid"):
        lc.extract(bridge, some_prompts(2), "resid_mid")


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ("resid 4", r"'resid 4' does not exist: .*residual layers 0\.\.3, blocks 0\.\.2"),
        ("head 0.4", r"'head 0.4' does not exist: .*heads 0\.\.3"),
        ("head 3", r"'head 3' is not known"),
        ("mlp_out 1.2", r"'mlp_out 1.2' is not known"),
        ("nonsense", r"'nonsense' is not known: expected one of resid"),
        ([], r"none given"),
    ],
)
def test_wrong_sites_are_one_clear_line(sites, message):
    with pytest.raises(lc.InputError, match=message) as caught:
        lc.extract(loaded("gpt2"), some_prompts(2), sites)
    assert "\n" not in str(caught.value)


def test_other_wrong_inputs():
    bridge = loaded("gpt2")
    long = lc.Prompts.from_token_lists([[5] * 65], pd.DataFrame({"task": ["a"]}))
    with pytest.raises(lc.InputError, match=r"prompt 0 has 65 tokens, .* context of 64"):
        lc.extract(bridge, long, "resid")
    foreign = lc.Prompts.from_token_lists([[5, D_VOCAB]], pd.DataFrame({"task": ["a"]}))
    with pytest.raises(lc.InputError, match=rf"token id {D_VOCAB} .* vocabulary of {D_VOCAB}"):
        lc.extract(bridge, foreign, "resid")
    with pytest.raises(lc.InputError, match="position 'nowhere' does not exist"):
        lc.extract(bridge, some_prompts(2), "resid", at="nowhere")
    with pytest.raises(lc.InputError, match="dtype 'int8' is not known"):
        lc.extract(bridge, some_prompts(2), "resid", dtype="int8")
    options: Any
    for options, message in (
        ({"at": []}, "positions must be given and differ"),
        ({"at": ["answer", "answer"]}, "positions must be given and differ"),
        ({"batch_tokens": 0}, "batch_tokens=0, expected at least 1"),
        ({"shard": -1}, "shard=-1, expected at least 1"),
    ):
        with pytest.raises(lc.InputError, match=message):
            lc.extract(bridge, some_prompts(2), "resid", **options)
    place: Any
    for place in (("head", 3), ("bogus", 3), ("resid", 3, 1)):
        with pytest.raises(lc.InputError, match="is not known"):
            Site(*place)
    with pytest.raises(lc.InputError, match="expected at least 0"):
        lc.extract(bridge, some_prompts(2), Site("head", 0, -1))
    with pytest.raises(lc.InputError, match="in training mode"):
        lc.extract(lc.load(hf_model("gpt2")).train(), some_prompts(2), "resid")
    clash = lc.Prompts.from_token_lists([[5]], pd.DataFrame({"layer": [1]}))
    with pytest.raises(lc.InputError, match=r"label 'layer' .* name of an axis"):
        lc.extract(bridge, clash, "resid")


def test_what_does_not_fit_half_precision_is_refused():
    model: Any = hf_model("gpt2")
    with torch.no_grad():
        model.transformer.wte.weight.mul_(1e6)
    bridge = lc.load(model)
    assert np.isfinite(lc.extract(bridge, some_prompts(2), "resid 0").resid).all()
    with pytest.raises(lc.InputError, match="'resid' overflows float16"):
        lc.extract(bridge, some_prompts(2), "resid 0", dtype="float16")


def test_prompts_of_another_tokenizer_are_refused(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    bridge = lc.load(hf_model("llama"), tokenizer=tokenizer)
    rows = pd.DataFrame({"task": ["a"]})
    own = lc.Prompts.from_texts(["w1 w2"], rows, tokenizer)
    assert lc.extract(bridge, own, "resid 0").sizes["prompt"] == 1
    foreign = lc.Prompts.from_token_lists([[5]], rows, tokenizer="another")
    with pytest.raises(lc.InputError, match="made with another tokenizer"):
        lc.extract(bridge, foreign, "resid 0")


def test_single_places_and_labels():
    bridge, prompts = loaded("llama"), some_prompts(5)
    acts = lc.extract(bridge, prompts, ["resid 2", "head 0.3", "head 2.1"], dtype="float16")
    assert acts.layer.values.tolist() == [2]
    assert acts.block.values.tolist() == [0, 2]
    assert acts["head"].values.tolist() == [1, 3]
    assert acts.resid.dtype == np.float16
    assert acts["n"].values.tolist() == [0, 1, 2, 3, 4]
    assert Site("head", 2, 3) in dataset_sites(acts)
    assert select(acts, Site("resid", 2)).shape == (5, 32)
    with pytest.raises(lc.InputError, match="'resid 1' is not in these activations"):
        select(acts, Site("resid", 1))
    whole = lc.extract(bridge, prompts, ["resid", "head"])
    np.testing.assert_allclose(
        acts.z.sel(block=2, head=1).astype("f4"), whole.z.sel(block=2, head=1), atol=2e-3
    )


def test_places_of_different_blocks_fill_their_rectangle():
    bridge, prompts = loaded("gpt2"), some_prompts(5)
    acts = lc.extract(bridge, prompts, ["head 0.3", "attn_out 2"])
    whole = lc.extract(bridge, prompts, ["head", "attn_out"])
    assert acts.block.values.tolist() == [0, 2]
    np.testing.assert_array_equal(acts.attn_out, whole.attn_out.sel(block=[0, 2]))
    np.testing.assert_array_equal(acts.z, whole.z.sel(block=[0, 2], head=[3]))


def test_the_forward_stops_early_and_leaves_no_hook():
    bridge = lc.load(hf_model("gpt2"))
    fired: list[str] = []
    watch = [("blocks.2.hook_resid_pre", lambda value, hook: fired.append(hook.name))]
    with bridge.hooks(fwd_hooks=watch):
        lc.extract(bridge, some_prompts(2), ["resid 1", "head 0.0"])
    # Only the four-token check that heads add up may run the whole model.
    assert len(fired) <= 1
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())


def test_provenance_names_the_weights():
    one, other = lc.load(hf_model("gpt2", seed=0)), lc.load(hf_model("gpt2", seed=1))
    prompts = some_prompts(2)
    attrs = [lc.extract(m, prompts, "resid 0").attrs for m in (one, one, other)]
    assert attrs[0] == attrs[1]
    assert attrs[0]["weights"] != attrs[2]["weights"]
    assert attrs[0]["prompts"] == prompts.digest()


@cache
def edited(dtype: torch.dtype) -> Any:
    return lc.load(hf_model("llama")).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["embed_tokens", "q_proj", "input_layernorm"])
@pytest.mark.parametrize(
    "edit",
    [
        lambda weight: weight.view(-1)[3].mul_(-1),
        lambda weight: weight.copy_(weight.roll(1, 0)),
        lambda weight: weight.copy_(weight.roll(1, -1)),
        lambda weight: weight.normal_(),
    ],
    ids=["one number", "rows permuted", "columns permuted", "all"],
)
def test_no_edit_goes_by_the_remembered_fingerprint(edit, name, dtype):
    bridge = edited(dtype)
    with torch.no_grad():
        for weight in bridge.parameters():
            weight.normal_()  # norms begin as ones, which every permutation leaves alone
    before = fingerprint_again(bridge)
    assert before == fingerprint_again(bridge) == lc.fingerprint(bridge)
    # Edits of `.data` are no business of autograd's, which counts all others.
    edit(next(weight for full, weight in bridge.named_parameters() if name in full).data)
    assert before != fingerprint_again(bridge) == lc.fingerprint(bridge)


def _final_norm(model: torch.nn.Module, name: str) -> torch.nn.Module:
    places = {
        "gpt2": "transformer.ln_f",
        "neox": "gpt_neox.final_layer_norm",
        "opt": "model.decoder.final_layer_norm",
    }
    return model.get_submodule(places.get(name, "model.norm"))
