"""The table against one steered forward for every try, and the choice against its rule."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch

import lensclust as lc
from lensclust.activations.dataset import select
from lensclust.models.sites import Site, resolve
from probes.steering.directions import add_direction
from probes.steering.interventions import Intervention
from probes.steering.steering import steer
from probes.steering.tuning import tune
from tests.tiny import D_MODEL, D_VOCAB, N_LAYERS, hf_model


@cache
def model_of(name: str):
    return lc.load(hf_model(name))


def some_prompts(n: int, seed: int) -> lc.Prompts:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, D_VOCAB, rng.integers(4, 10)).tolist() for _ in range(n)]
    spans = {"first": [(1, 2)] * n}
    return lc.Prompts.from_token_lists(ids, pd.DataFrame({"n": range(n)}), spans=spans)


def guesses(model, prompts: lc.Prompts, at: str, move: Intervention | None, site: Site) -> list:
    """The model's next tokens, prompt by prompt."""
    found = []
    for row, length in enumerate(prompts.lengths.tolist()):
        tokens = prompts.tokens[row : row + 1, :length]
        if move is None:
            found.append(int(model(tokens)[0, -1].argmax()))
            continue
        with steer(model, move, at=site, positions=prompts.position(at)[row : row + 1]):
            found.append(int(model(tokens)[0, -1].argmax()))
    return found


@pytest.mark.parametrize("at", ["answer", "first_end"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_rates_equal_one_steered_forward_for_every_try(name: str, at: str) -> None:
    model, prompts = model_of(name), some_prompts(8, 0)
    move = add_direction(np.random.default_rng(1).normal(size=D_MODEL))
    before = guesses(model, prompts, at, None, Site("resid", 0))
    # Half of the prompts should keep their answer, so that neither rate is trivial.
    wanted = [token if row % 2 else 5 for row, token in enumerate(before)]
    found = tune(model, prompts, move, "resid", [0.5, 4.0], wanted=wanted, at=at)
    assert found.baseline == np.mean(np.equal(before, wanted))
    for row in found.frame.itertuples():
        site = Site.parse(str(row.site))
        steered = guesses(model, prompts, at, move.scaled(float(str(row.strength))), site)
        assert row.value == np.mean(np.equal(steered, wanted))
    assert found.frame["value"].nunique() > 1, "every try gave the same: nothing was compared"
    assert before == guesses(model, prompts, at, None, Site("resid", 0))
    length = np.linalg.norm(move.edit_at(Site("resid", 0))(torch.zeros(1, D_MODEL)))
    np.testing.assert_allclose(found.frame["size"], found.frame["strength"] * length, rtol=1e-4)


def test_what_moves_the_answers_is_found_where_and_as_strong_as_it_was_planted() -> None:
    """Prompts take over another's answer only at the last layer, and only by the whole way."""
    model, prompts, donors = model_of("gpt2"), some_prompts(6, 0), some_prompts(6, 1)
    last = Site("resid", N_LAYERS)
    goal = torch.from_numpy(
        select(lc.extract(model, donors, str(last), progress=False), last).values
    )
    wanted = guesses(model, donors, "answer", None, last)

    def make(site: Site, strength: float) -> Intervention:
        at_last = site == last and strength == 1
        return Intervention("pull", lambda _: lambda states: goal if at_last else states)

    found = tune(model, prompts, make, "resid", [0.5, 1, 2], wanted=wanted)
    assert (found.site, found.strength) == (last, 1)
    assert found.frame["value"].max() == 1
    assert found.frame["chosen"].sum() == 1
    others = found.frame[~found.frame["chosen"]]
    assert (others["value"] == found.baseline).all()
    assert (others["size"] == 0).all()
    assert torch.equal(found.intervention.edit_at(last)(goal * 0), goal)


def test_ties_go_to_the_smallest_strength_and_then_to_the_site_given_first() -> None:
    model, prompts = model_of("gpt2"), some_prompts(4, 0)
    nothing = add_direction(np.zeros(D_MODEL))
    sites = ["resid 2", "resid 1", "resid 3"]
    found = tune(model, prompts, nothing, sites, [3, -1, 2], wanted=[5] * 4)
    assert (str(found.site), found.strength) == ("resid 2", -1)
    assert found.frame["site"].drop_duplicates().tolist() == sites
    assert found.prompts == prompts.digest()


def test_an_intervention_is_scaled_as_a_function_would_scale_it() -> None:
    model, prompts = model_of("gpt2"), some_prompts(6, 0)
    move = add_direction(np.random.default_rng(1).normal(size=D_MODEL))
    options = {"sites": "resid", "strengths": [1, 3, 9], "wanted": torch.full((6,), 5)}
    once = tune(model, prompts, move, **options)
    again = tune(model, prompts, lambda site, strength: move.scaled(strength), **options)
    pd.testing.assert_frame_equal(
        once.frame.drop(columns="method"), again.frame.drop(columns="method")
    )


def test_heads_and_layers_show_themselves() -> None:
    model, prompts = model_of("gpt2"), some_prompts(3, 0)
    move = Intervention("silence", lambda site: torch.zeros_like)
    for sites in ("resid", "head", ["resid", "head"]):
        found = tune(model, prompts, move, sites, [0.5, 1], wanted=np.array([5, 6, 7]))
        assert len(found.frame) == 2 * len(resolve(model, sites))
        assert "Wanted answers, silence" in str(found.plot().to_dict())
        assert f"chosen {found.site} at strength {found.strength:g}" in repr(found)
        assert "resid" in found._repr_html_() or "head" in found._repr_html_()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strengths": []}, r"strengths=\[\], expected different"),
        ({"strengths": [1, 1.0]}, "expected different finite numbers"),
        ({"strengths": [float("inf")]}, "expected different finite numbers"),
        ({"wanted": [5, 6]}, r"wanted has shape \(2,\)"),
        ({"wanted": torch.zeros(3)}, "type torch.float32, expected one token id"),
        ({"wanted": [5, 6, D_VOCAB]}, f"outside the vocabulary of {D_VOCAB}"),
        ({"sites": "resid 9"}, "'resid 9' does not exist"),
        ({"at": "nowhere"}, "position 'nowhere' does not exist"),
    ],
)
def test_refused_at_the_door(options: dict, message: str) -> None:
    move = add_direction(np.zeros(D_MODEL))
    asked = {"sites": "resid", "strengths": [1.0], "wanted": [5, 6, 7]} | options
    with pytest.raises(lc.InputError, match=message):
        tune(model_of("gpt2"), some_prompts(3, 0), move, **asked)


def test_states_that_are_not_finite_are_refused() -> None:
    broken = Intervention("broken", lambda site: lambda states: states / 0)
    with pytest.raises(lc.InputError, match="strength 1 at 'resid 0' gave states that are not"):
        tune(model_of("gpt2"), some_prompts(3, 0), broken, "resid", wanted=[5, 6, 7])
