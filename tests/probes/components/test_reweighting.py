"""Weights are the optimum that independent solvers find, or what the script's loop arrives at."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from hypothesis import given, settings, strategies as st
from jaxtyping import Float, Int
from scipy.optimize import minimize
from torch import nn

from lensclust.errors import InputError
from probes.components.calibration import calibrate, calibrate_many, select_prompt
from probes.components.component_logits import ComponentLogits
from probes.components.decomposition import decompose
from probes.components.labelled_examples import Examples
from probes.components.reweighting import Reweighting, reweight, reweight_many
from probes.components.scripted_fits import scripted_fits
from probes.components.sparse_fits import sparse_fits
from tests.probes.components.test_components import CHOICES, TOKENS, model_of, planted, prompts_of

Features = Float[np.ndarray, "example label weight"]
Targets = Int[np.ndarray, " example"]


def draw(seed: int, n: int = 12, labels: int = 3, weights: int = 10) -> tuple[Features, Targets]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, labels, weights)), rng.permutation(np.arange(n) % labels)


def objective(features: Features, targets: Targets, penalty: float, w: np.ndarray) -> float:
    logits = torch.tensor(features) @ torch.tensor(w, dtype=torch.double)
    loss = nn.functional.cross_entropy(logits, torch.tensor(targets))
    return float(loss) + penalty * float(np.abs(w).sum())


def least(features: Features, targets: Targets, penalty: float, box: bool) -> float:
    """By L-BFGS-B; without a box the weights are split into two that are not negative."""
    size = features.shape[2]
    fold = np.eye(size) if box else np.hstack([np.eye(size), -np.eye(size)])

    def value(x: np.ndarray) -> tuple[float, np.ndarray]:
        w = torch.tensor(x, requires_grad=True)
        logits = torch.tensor(features) @ (torch.tensor(fold) @ w)
        loss = nn.functional.cross_entropy(logits, torch.tensor(targets)) + penalty * w.sum()
        loss.backward()
        assert w.grad is not None
        return float(loss.detach()), w.grad.numpy()

    bounds = [(0, 1 if box else None)] * fold.shape[1]
    options: Any = {"maxiter": 5000, "ftol": 1e-13, "gtol": 1e-9}
    done = minimize(value, np.full(fold.shape[1], 0.5), jac=True, bounds=bounds, options=options)
    return float(done.fun)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), box=st.booleans(), penalty=st.sampled_from([0.003, 0.03, 0.1]))
def test_sparse_fits_reach_the_optimum_and_bound_what_is_missing(
    seed: int, box: bool, penalty: float
) -> None:
    features, targets = draw(seed)
    examples = Examples.of([features], [np.zeros(features.shape[:2])], [targets])
    found = sparse_fits(examples, examples.shares[..., None], torch.tensor([[penalty]]), box=box)
    reached = objective(features, targets, penalty, found.weights[0, :, 0].numpy())
    best = least(features, targets, penalty, box)
    assert -1e-5 <= reached - best <= float(found.gap) + 1e-5
    assert float(found.gap) <= 1e-4
    if box:
        assert float(found.weights.min()) >= 0
        assert float(found.weights.max()) <= 1


def test_a_batch_of_unlike_problems_is_each_by_itself() -> None:
    drawn = [draw(0, 12, 3), draw(1, 7, 2), draw(2, 20, 5)]
    penalties = torch.tensor([[0.01, 0.1]] * 3)

    def fit(problems: list[tuple[Features, Targets]], penalties: torch.Tensor) -> torch.Tensor:
        features, targets = [list(each) for each in zip(*problems, strict=True)]
        examples = Examples.of(features, [np.zeros(f.shape[:2]) for f in features], targets)
        shares = examples.shares[..., None].expand(-1, -1, 2)
        return sparse_fits(examples, shares, penalties, tolerance=1e-6).weights

    together = fit(drawn, penalties)
    for place, each in enumerate(drawn):
        alone = fit([each], penalties[:1])[0]
        assert torch.allclose(together[place], alone, atol=0.02)


def script(
    features: Features, targets: Targets, *, steps: int = 2000
) -> Float[np.ndarray, " weight"]:
    """The schedule of the facts, in plain torch."""
    x, y = torch.tensor(features).float(), torch.tensor(targets)
    w = nn.Parameter(torch.ones(x.shape[2]))
    optimiser = torch.optim.SGD([w], lr=5e-2)
    best, patience = 100.0, 3
    for step in range(steps):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(x @ w.clip(0, 1), y)
        (loss + 1e-2 * w.abs().sum()).backward()
        optimiser.step()
        right = ((x @ w.detach().clip(0, 1)).argmax(1) == y).all()
        if step % 100 == 0 and right:
            break
        if best <= float(loss.detach()):
            patience -= 1
        else:
            best = float(loss.detach())
        if patience == 0:
            break
    return w.detach().clip(0, 1).numpy()


def scripted(problems: list[tuple[Features, Targets]], steps: int = 2000) -> torch.Tensor:
    features, targets = [list(each) for each in zip(*problems, strict=True)]
    examples = Examples.of(features, [np.zeros(f.shape[:2]) for f in features], targets)
    options: dict[str, Any] = {"rate": 0.05, "penalty": 0.01, "clipped": True}
    return scripted_fits(examples, steps=steps, check_first=False, **options).clamp(0, 1)


def test_the_scripts_schedule_is_followed_step_by_step_in_any_batch() -> None:
    problems = [
        draw(seed, n, labels) for seed, (n, labels) in enumerate([(12, 3), (8, 2), (20, 4)])
    ]
    found = scripted(problems, 300)
    for weights, (features, targets) in zip(found, problems, strict=True):
        np.testing.assert_allclose(weights, script(features, targets, steps=300), atol=1e-4)


def test_a_weight_that_nothing_pulls_at_is_zero_at_step_2000_exactly() -> None:
    """Beside many that pull so little, and so slowly less, that the run goes on to its end."""
    features = np.full((1, 2, 20_001), 2e-6)
    features[:, 1], features[:, :, -1] = 0, 0
    idle = [
        float(scripted([(features, np.array([1]))], steps)[0, -1]) for steps in (1000, 1999, 2000)
    ]
    assert idle[0] == pytest.approx(0.5, abs=1e-4)
    assert idle[1] == pytest.approx(5e-4, abs=1e-4)
    assert idle[2] == pytest.approx(0, abs=1e-4)
    assert script(features, np.array([1]))[-1] == pytest.approx(idle[2], abs=1e-6)


def test_the_scripts_flaw_a_model_that_is_right_stays_where_it_was() -> None:
    """All right after one step: the weights have moved by one step's penalty and pull alone."""
    found = reweight(only(planted(), [0]), official=True)
    assert float(found.weights.sel(component="mlp 0")) > 0.9


def only(components: ComponentLogits, knowing: list[int]) -> ComponentLogits:
    """Prompts on which the sum of heads and MLPs is right, as many as there are."""
    writers = components.logits.values[:, 1:7].sum(1).argmax(1)
    return components.take(np.flatnonzero(writers == components.targets)[:20])


def test_planted_good_components_are_kept_and_bad_ones_muted_or_inverted() -> None:
    few, rest = planted().take(range(24)), planted().take(range(24, 400))
    found = reweight(few)
    assert float(found.weights.sel(component="head 0.0")) > 0.9
    assert float(found.weights.sel(component="head 0.1")) < 0.05
    assert found.accuracy(rest) > max(rest.model_accuracy, 0.85)
    assert found.gap < 1e-3
    free = reweight(few, box=False, penalty=0.01)
    assert float(free.weights.sel(component="head 0.1")) < -0.5
    assert free.accuracy(rest) > 0.95
    assert found.frame["chosen"].sum() == 1
    found.plot()


def test_labels_dealt_anew_teach_nothing() -> None:
    components = planted()
    few, rest = components.take(range(24)), components.take(range(24, 400))
    dealt = []
    for seed in range(10):
        shuffled = np.random.default_rng(seed).permutation(few.data["target"].values)
        data = few.data.assign_coords(target=("prompt", shuffled))
        dealt.append(reweight(replace(few, data=data)).accuracy(rest))
    assert np.mean(dealt) < reweight(few).accuracy(rest) - 0.1


def test_many_are_each_by_itself_and_seeds_are_kept() -> None:
    parts = [planted(seed=seed).take(range(20 + seed)) for seed in range(3)]
    for together, each in zip(reweight_many(parts), parts, strict=True):
        alone = reweight(each)
        assert together.penalty == alone.penalty
        np.testing.assert_allclose(together.weights, alone.weights, atol=0.02)
    for together, each in zip(calibrate_many(parts), parts, strict=True):
        np.testing.assert_allclose(together.weights, calibrate(each).weights, atol=1e-5)


def test_calibration_is_the_scripts_loop() -> None:
    """Near the bottom rounding decides which step lowers the loss: weights agree until there."""
    components = planted().take(range(24))
    x = torch.tensor(components.model_logits.values).softmax(1)
    y = torch.tensor(components.targets)
    w = nn.Parameter(torch.ones(2))
    optimiser = torch.optim.SGD([w], lr=5e-2)
    best, patience, losses = 100.0, 3, []
    for step in range(5000):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(x * w, y)
        losses.append(float(loss.detach()))
        if step % 100 == 0 and bool(((x * w).argmax(1) == y).all()):
            break
        loss.backward()
        optimiser.step()
        if best <= losses[-1]:
            patience -= 1
        best = min(best, losses[-1])
        if patience == 0:
            break
    found = torch.tensor(calibrate(components).weights.values)
    reached = float(nn.functional.cross_entropy(x * found, y))
    assert reached == pytest.approx(best, abs=1e-3 * (losses[0] - best))


def test_the_best_prompt_is_selected() -> None:
    found = planted()
    good, worse = (
        replace(found, data=found.data.assign(model_logits=found.logits.isel(component=place)))
        for place in (1, 2)
    )
    assert select_prompt([worse, good]) == 1


def weighing(components: ComponentLogits, seed: int = 0) -> Reweighting:
    names = ("component", "kind", "block", "head")
    coords = {name: components.data[name] for name in names}
    weights = np.random.default_rng(seed).uniform(0, 1, len(components.data["component"]))
    weights[[0, -1]] = 1
    return Reweighting(
        xr.DataArray(weights, dims=("component",), coords=coords), 0.0, 0.0, pd.DataFrame()
    )


def test_direct_paths_give_what_is_predicted_and_a_real_forward_gives_another_thing() -> None:
    model: Any = model_of("llama")
    prompts = prompts_of()
    parts = decompose(model, prompts, CHOICES, progress=False)
    found, last = weighing(parts), prompts.lengths - 1

    @torch.no_grad()
    def answers() -> np.ndarray:
        return model(prompts.tokens)[torch.arange(len(prompts)), last][:, TOKENS].numpy()

    before = answers()
    with found.direct(model):
        direct = answers()
    with found.through(model, positions=last):
        through = answers()
    predicted = found.logits(parts).values
    np.testing.assert_allclose(direct, predicted, rtol=1e-3, atol=1e-4 * np.abs(predicted).max())
    assert np.abs(through - direct).max() > 1e-2
    np.testing.assert_array_equal(answers(), before)


def test_a_real_forward_scales_what_heads_and_mlps_write() -> None:
    """In the last block nothing reads a head but the logits and the block's own MLP."""
    model: Any = model_of("neox")  # parallel blocks: its MLP reads no head of the same block
    prompts = prompts_of()
    parts = decompose(model, prompts, CHOICES, progress=False)
    found = weighing(parts)
    earlier = (found.weights["block"] < model.cfg.n_layers - 1).values
    found = replace(found, weights=found.weights.where(~earlier, 1.0))
    last = prompts.lengths - 1
    written: dict[str, torch.Tensor] = {}
    name = f"blocks.{model.cfg.n_layers - 1}.hook_mlp_out"
    with torch.no_grad():
        _, cache = model.run_with_cache(prompts.tokens, names_filter=name)
        keep = (name, lambda value, hook: written.update(after=value))
        with found.through(model, positions=last), model.hooks(fwd_hooks=[keep]):
            model(prompts.tokens)
    weight = float(found.weights.sel(component=f"mlp {model.cfg.n_layers - 1}"))
    rows = torch.arange(len(prompts))
    assert torch.allclose(written["after"][rows, last], weight * cache[name][rows, last], atol=1e-5)


def test_both_ways_serve_generation() -> None:
    model: Any = model_of("llama")
    found = weighing(decompose(model, prompts_of(), CHOICES, progress=False))
    tokens = prompts_of(3).tokens[:1, :2]
    options: Any = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False}
    before = model.generate(tokens, **options)
    for way in (found.direct, found.through):
        with way(model):
            assert model.generate(tokens, **options).shape == before.shape
    assert torch.equal(model.generate(tokens, **options), before)


def test_bad_input_is_refused_in_one_line() -> None:
    components = planted().take(range(24))
    calls: dict[str, Any] = {
        "1 labelled prompts for 2 labels": lambda: reweight(components.take([0])),
        "no components": lambda: reweight_many([]),
        "its own penalty": lambda: reweight(components, official=True, penalty=0.1),
        "penalty=0": lambda: reweight(components, penalty=0),
        "folds=1": lambda: reweight(components, folds=1),
        "expected at least one problem": lambda: calibrate_many([]),
        "no candidate": lambda: select_prompt([]),
        "for 2 labels": lambda: calibrate(components.take([0])),
    }
    for words, call in calls.items():
        with pytest.raises(InputError) as caught:
            call()
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
