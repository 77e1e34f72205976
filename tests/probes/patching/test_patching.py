"""Patching against TransformerLens' own sweep, planted gaps, and what must be refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from transformer_lens import patching as peer

import lensclust as lc
from probes.patching.patching import patch
from tests.tiny import D_VOCAB, hf_model

MODELS = {name: lc.load(hf_model(name)) for name in ("gpt2", "llama")}
MODELS["native"] = lc.load("native:sif-small")
N = 5


def pairs(n: int = N, *, seed: int = 0, lengths: tuple[int, int] = (9, 9)):
    rng = np.random.default_rng(seed)
    found = []
    for length, own in zip(lengths, (range(3, 3 + n), range(30, 30 + n)), strict=True):
        ids = rng.integers(3, D_VOCAB, (n, length)).tolist()
        found.append(
            lc.Prompts.from_token_lists(
                ids,
                pd.DataFrame({"pair": range(n)}),
                answers=[[token, 1] for token in own],
                spans={"input": [(1, 3)] * n},
            )
        )
    return found


def logit_difference(base, source):
    own, other = (torch.tensor([a[0] for a in p.answers]) for p in (base, source))
    rows = torch.arange(len(base))
    return lambda logits: logits[rows, -1, other] - logits[rows, -1, own]


@pytest.mark.parametrize("name", MODELS)
def test_every_position_equals_the_sweep_of_transformerlens(name):
    model = MODELS[name]
    base, source = pairs()
    found = patch(model, base, source, ["resid", "head"], at="every")
    _, donors = model.run_with_cache(source.tokens)
    metric = logit_difference(base, source)
    options = {"reduce": "none", "baseline": True}
    for kind, sweep in (
        ("resid", peer.get_act_patch_resid_pre),
        ("head", peer.get_act_patch_attn_head_out_by_pos),
    ):
        theirs = sweep(model, base.tokens, donors, metric, **options)
        effect = theirs.effect().numpy()
        low, high = theirs.bootstrap_ci(of_effect=True)
        p = theirs.permutation_pvalue().numpy()
        axes = [axis for axis in ("layer", "pos", "head") if axis in theirs.axis_names]
        rows = found.frame[found.frame["kind"] == kind]
        rows = rows[rows["layer"] < model.cfg.n_layers]
        index = tuple(
            rows["position" if axis == "pos" else axis].astype(int).to_numpy() for axis in axes
        )
        effects = found.effects.sel(
            site=rows["site"].to_xarray(), position=rows["position"].to_xarray()
        )
        np.testing.assert_allclose(effects.values, effect[index], atol=1e-5)
        np.testing.assert_allclose(rows["value"], effect[index].mean(-1), atol=1e-5)
        np.testing.assert_allclose(rows["ci_low"], low.numpy()[index], atol=1e-5)
        np.testing.assert_allclose(rows["ci_high"], high.numpy()[index], atol=1e-5)
        # An effect of rounding alone has no sign to permute.
        clear = np.abs(effect[index]).min(-1) > 1e-4
        assert clear.sum() > 10
        np.testing.assert_allclose(rows["p"][clear], p[index][clear], atol=1e-6)


@pytest.mark.parametrize("metric", ["logit_difference", "probability"])
@pytest.mark.parametrize("name", MODELS)
def test_the_last_state_carries_the_whole_gap_whatever_the_lengths(name, metric):
    model = MODELS[name]
    base, source = pairs(lengths=(6, 11))
    found = patch(model, base, source, "resid", metric=metric, at=["answer", "input_end"])
    frame = found.frame.set_index(["site", "position"])
    last = f"resid {model.cfg.n_layers}"
    assert frame.loc[(last, "answer"), "normalized"] == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(
        found.effects.sel(site=last, position="answer"),
        found.source_baseline - found.baseline,
        atol=1e-5,
    )
    # The last layer's state at an earlier token is read by nothing.
    assert frame.loc[(last, "input_end"), "value"] == pytest.approx(0, abs=1e-5)
    assert found.best("resid", position="answer") == lc.Site("resid", model.cfg.n_layers) or (
        frame["value"].max() > frame.loc[(last, "answer"), "value"]
    )


def test_a_prompt_patched_into_itself_changes_nothing():
    base, source = pairs()
    same = replace(source, tokens=base.tokens, lengths=base.lengths)
    found = patch(MODELS["llama"], base, same, ["resid", "z", "mlp_out"])
    np.testing.assert_allclose(found.effects, 0, atol=1e-5)
    assert found.frame["normalized"].isna().all()


def test_shorter_pairs_have_no_later_positions():
    base, source = pairs()
    lengths = torch.tensor([9, 4, 6, 9, 2])
    base, source = (replace(p, lengths=lengths) for p in (base, source))
    found = patch(MODELS["native"], base, source, "resid 2", at="every")
    held = np.arange(9) < lengths.numpy()[:, None]
    np.testing.assert_array_equal(found.effects.notnull().values[0].T, held)
    assert found.frame["n"].tolist() == held.sum(0).tolist()
    alone = patch(MODELS["native"], base.take([1]), source.take([1]), "resid 2", at="every")
    np.testing.assert_allclose(found.effects[:, :4, 1], alone.effects[:, :, 0], atol=1e-5)


def test_a_metric_of_ones_own_sees_the_pair_of_each_row():
    base, source = pairs()
    found = patch(MODELS["gpt2"], base, source, "resid", metric=lambda logits, rows: rows.float())
    assert found.baseline.values.tolist() == list(range(N))
    assert (found.effects == 0).all()


def test_accuracy_is_that_of_the_sources_answer():
    base, source = pairs()
    model = MODELS["gpt2"]
    with torch.no_grad():
        guesses = model(source.tokens)[:, -1].argmax(-1)
    source = replace(source, answers=tuple((int(token),) for token in guesses))
    found = patch(model, base, source, ["resid 3", "head"], metric="accuracy")
    assert (found.source_baseline == 1).all()
    assert found.frame["value"].iloc[0] == 1 - float(found.baseline.mean())


def test_results_show_themselves():
    base, source = pairs()
    found = patch(MODELS["gpt2"], base, source, ["resid", "head"], at=["answer", "input_end"])
    assert "largest effect on logit_difference" in repr(found)
    assert "<table" in found._repr_html_()
    assert found.plot().to_dict()
    result = found.to_patching_result()
    np.testing.assert_allclose(result.effect().mean(-1), found.frame["value"], atol=1e-9)
    assert len(result.to_dataframe()) == len(found.frame) * N
    with pytest.raises(lc.InputError, match="no site of kind 'mlp_out'"):
        found.best("mlp_out")


def test_wrong_input_is_one_clear_line():
    model, (base, source) = MODELS["llama"], pairs()
    _, longer = pairs(lengths=(9, 10))
    bare = replace(source, answers=None)
    same = replace(source, answers=(base.answers or ())[:2] + (source.answers or ())[2:])
    for args, options, message in [
        ((base, source.take([0])), {}, "5 base prompts and 1 sources given, expected pairs"),
        ((base, longer), {"at": "every"}, "in pair 0 the base has 9 tokens and the source 10"),
        ((base, source), {"sites": "head 9.1"}, "site 'head 9.1' does not exist"),
        ((base, source), {"at": "middle"}, "position 'middle' does not exist"),
        ((base, source), {"at": []}, "positions must be given"),
        ((base, bare), {}, "the source prompts need answers"),
        ((base, same), {}, "same first token in 2 of 5 pairs"),
        ((base, source), {"metric": "joy"}, "metric 'joy' is not known"),
        ((base, source), {"resamples": 0}, "resamples=0"),
        ((base, source), {"metric": lambda x, _: x}, "expected a number a row"),
        ((base, source), {"metric": lambda x, _: x[:, 0] * torch.nan}, "not a number in 5 places"),
    ]:
        with pytest.raises(lc.InputError, match=message):
            patch(model, *args, **{"sites": "resid", **options})
    with pytest.raises(lc.InputError, match=r"patch: .* is in training mode"):
        patch(lc.load(hf_model("gpt2")).train(), base, source, "resid")
