"""Attribution against directional derivatives, and where the first order is exact."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import lensclust as lc
from lensclust.activations.dataset import select
from lensclust.inference.readouts import answers
from lensclust.models.native import native_config
from lensclust.models.sites import resolve
from probes.patching.attribution import rank
from probes.patching.patching import patch
from probes.patching.replay import replay
from tests.probes.patching.test_patching import MODELS, pairs


@pytest.mark.parametrize("at", ["answer", "input_end"])
@pytest.mark.parametrize("name", MODELS)
def test_attributed_effects_are_the_slope_towards_the_source(name, at):
    model, (base, source) = MODELS[name], pairs(lengths=(7, 10))
    base = replace(base, lengths=torch.tensor([7, 5, 7, 6, 4]))
    sites = resolve(model, ["resid", "head", "attn_out", "mlp_out"])
    metric = lambda logits, rows: logits.double()[:, 7] - logits.double()[:, 8]  # noqa: E731
    found = rank(model, base, source, sites, at=at, metric=metric, m=1)
    here, there = (lc.extract(model, p, sites, at=at) for p in (base, source))
    step = 0.02
    edits = [
        (site, torch.from_numpy(a + sign * step * (select(there, site).values - a)))
        for sign in (1, -1)
        for site in sites
        for a in [select(here, site).values]
    ]
    ahead, behind = replay(model, base, edits, metric, at=at).mean(1).numpy().reshape(2, -1)
    slope = (ahead - behind) / (2 * step)
    attributed = found.frame.set_index("site").loc[[str(s) for s in sites], "attributed"]
    np.testing.assert_allclose(attributed, slope, atol=0.02 * np.abs(slope).max())


def test_the_first_order_is_exact_where_the_model_is_linear():
    fields = {"n_layers": 1, "attn_only": True, "normalization_type": None}
    model = lc.load(native_config("sif-small", **fields))
    base, source = pairs(20)
    found = rank(model, base, source, "head", m=4)
    np.testing.assert_allclose(found.frame["attributed"], found.frame["exact"], atol=1e-4)
    assert found.correlation["pearson"].min() == pytest.approx(1, abs=1e-4)
    assert found.correlation["spearman"].min() == pytest.approx(1)


def test_top_and_random_sites_get_their_exact_effects():
    model, (base, source) = MODELS["gpt2"], pairs(seed=1)
    everything = patch(model, base, source, ["head", "mlp_out"]).frame.set_index("site")
    found = rank(model, base, source, ["head", "mlp_out"], m=4)
    top = found.frame["chosen"].isin(["top", "both"])
    assert found.frame.index[top].tolist() == [0, 1, 2, 3]
    assert found.frame["attributed"].abs().is_monotonic_decreasing
    measured = found.frame[found.frame["chosen"] != "none"]
    assert measured["chosen"].isin(["random", "both"]).sum() == 4
    np.testing.assert_allclose(
        measured["exact"], everything.loc[measured["site"], "value"], atol=1e-5
    )
    assert found.frame.loc[found.frame["chosen"] == "none", "exact"].isna().all()
    drawn = [
        tuple(f.loc[f["chosen"].isin(["random", "both"]), "site"])
        for f in (rank(model, base, source, "head", m=3, seed=s).frame for s in range(4))
    ]
    assert len(set(drawn)) > 1
    assert "Pearson" in repr(found)
    assert "<table" in found._repr_html_()


def test_nothing_is_left_on_the_model():
    model, (base, source) = MODELS["llama"], pairs()
    rank(model, base, source, "head", m=1)
    assert all(weight.grad is None for weight in model.parameters())
    plain = answers(model, base, lambda logits, rows: logits)
    assert not plain.requires_grad
    points = {id(point): point for point in model.hook_dict.values()}.values()
    assert not any(point.fwd_hooks or point.bwd_hooks for point in points)


def test_wrong_input_is_one_clear_line():
    model, (base, source) = MODELS["llama"], pairs()
    for options, message in [
        ({"metric": "accuracy"}, "'accuracy' has no gradient"),
        ({"m": 0}, "m=0, expected at least 1"),
        ({"sites": "head 7.7"}, "site 'head 7.7' does not exist"),
        ({"at": "middle"}, "position 'middle' does not exist"),
    ]:
        with pytest.raises(lc.InputError, match=message):
            rank(model, base, source, **{"sites": "head", **options})
