"""In whatever order its axes lie, a dataset of activations gives the same numbers.

Held by every public function that takes activations or mean states, on axes that are equally
long where they can be: what goes by place then goes wrong without an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from hypothesis import HealthCheck, given, settings, strategies as st

import lensclust as lc
import probes
from lensclust.activations.dataset import dataset_sites, select, site_values
from probes.steering.gating import only_members, only_near
from tests.tiny import hf_model

N = D = 24  # prompts, and numbers of a state
HEADS, D_HEAD = 2, 8
RESID, HEAD = lc.Site("resid", 1), lc.Site("head", 1, 0)


def activations(seed: int = 0) -> xr.Dataset:
    rng = np.random.default_rng(seed)
    task, word, wording = np.arange(N) % 3, np.arange(N) // 3 % 4, np.arange(N) // 12
    moved = np.eye(3, D)[task][:, None, None]
    states = rng.normal(0, 1, (N, 2, 2, D)) + moved
    z = rng.normal(0, 1, (N, 2, 2, HEADS, D_HEAD)) + moved[..., None, :D_HEAD]
    frames = rng.normal(0, 1, (2, HEADS, D_HEAD, D_HEAD))
    return xr.Dataset(
        {
            "resid": (("prompt", "position", "layer", "d_model"), states.astype("f4")),
            "z": (("prompt", "position", "block", "head", "d_head"), z.astype("f4")),
            "head_frame": (("block", "head", "d_head", "rank"), frames.astype("f4")),
        },
        {
            "layer": [0, 1],
            "block": [0, 1],
            "head": range(HEADS),
            "position": ["first", "last"],
            "task": ("prompt", np.array(list("abc"), dtype=object)[task]),
            "input": ("prompt", [f"i{i}" for i in word]),
            "template": ("prompt", [f"t{i}" for i in wording]),
            "length": ("prompt", rng.integers(3, 9, N)),
        },
    )


ACTS = activations()
OTHER = activations(1).assign_coords(length=ACTS.length)
MEANS = probes.mean_states(ACTS, given="input", position="last")
PROMPTS = lc.Prompts.from_token_lists([[1, 2 + i % 5] for i in range(N)], {"n": range(N)})
STATES = torch.from_numpy(np.random.default_rng(2).normal(size=(5, D)).astype("f4"))
HEAD_SCORES = pd.DataFrame(
    {"block": [0, 0, 1, 1], "head": [0, 1, 0, 1], "value": [1, 2, 4, 3], "metric": "ari"}
)
AT: dict[str, Any] = {"position": "last"}
QUIET: dict[str, Any] = AT | {"progress": False}


def moved(intervention: probes.Intervention) -> list[Any]:
    """What an intervention makes of some states, of the stream and of a head."""
    return [intervention.edit_at(RESID)(STATES), intervention.edit_at(HEAD)(STATES[:, :D_HEAD])]


# What takes activations.
PROBES: dict[str, Callable[[xr.Dataset], Any]] = {
    "cka": lambda a: probes.cka(a, a, **AT).frame,
    "cluster": lambda a: probes.cluster(a, permutations=3, jobs=1, **QUIET).frame,
    "cluster_map": lambda a: [probes.cluster_map(a, **AT).points.xy],
    "dealt": lambda a: probes.dealt(a, given="input")["resid"],
    "decode": lambda a: (
        probes.decode(a, OTHER, target="input", groups="template", folds=2, resamples=9, **AT).frame
    ),
    "erase": lambda a: moved(probes.erase(a, **AT)),
    "erase_random": lambda a: moved(probes.erase_random(a, given="input", **AT)),
    "erase_reassigned": lambda a: moved(probes.erase_reassigned(a, given="input", **AT)),
    "head_residual": lambda a: [
        lc.head_residual(a.assign_attrs(weights=lc.fingerprint(MODEL)), MODEL),
        lc.head_residual(a.assign_attrs(weights=lc.fingerprint(MODEL)), MODEL).values,
    ],
    "head_view": lambda a: probes.head_view(a, HEAD_SCORES, score="metric", **AT).points,
    "hypothesis": lambda a: probes.hypothesis(a, "task"),
    "linear_transport": lambda a: moved(probes.linear_transport(a, "a", "b", **AT)),
    "mean_states": lambda a: probes.mean_states(a, given="input", **AT),
    "membership": lambda a: probes.membership(a, OTHER, **AT),
    "nearest_neighbour": lambda a: probes.nearest_neighbour(a, permutations=3, **QUIET),
    "probe": lambda a: (
        probes.probe(a, control="input", folds=2, permutations=3, jobs=1, **QUIET).frame
    ),
    "rsa": lambda a: probes.rsa(a, "task", nuisance=["length"], permutations=3, **QUIET).frame,
    "silhouettes": lambda a: probes.silhouettes(a, permutations=3, **QUIET),
    "with_nuisances": lambda a: probes.with_nuisances(a, PROMPTS)["resid"],
    # Beside the public names.
    "cluster, centroids": lambda a: (
        probes.cluster(a, permutations=1, jobs=1, given=None, **QUIET).centroids
    ),
    "dataset_sites": lambda a: [str(site) for site in dataset_sites(a)],
    "direction": lambda a: probes.probe(
        a, control=None, folds=2, permutations=0, jobs=1, **QUIET
    ).direction("a", RESID),
    "known": lambda a: probes.membership(OTHER, a, given="input", **AT),
    "only_near": lambda a: moved(only_near(probes.erase(ACTS, **AT), a, "a", "b", **AT)),
    "other side of cka": lambda a: probes.cka(ACTS, a, **AT).frame,
    "predict": lambda a: [
        SWEEP.predict(a, site, position="first").tolist() for site in (RESID, HEAD)
    ],
    "select": lambda a: [select(a, site, position="first") for site in (RESID, HEAD)],
    "site_values": lambda a: [site_values(a, site, position="first") for site in (RESID, HEAD)],
    "with_demonstrations": lambda a: (
        probes.decode(OTHER, a, target="input", groups="template", folds=2, resamples=9, **AT).frame
    ),
}
# What takes mean states.
MOVES: dict[str, Callable[[xr.Dataset], Any]] = {
    "project": lambda c: moved(probes.project(c, "a", "b")),
    "replace": lambda c: moved(probes.replace(c, "b")),
    "shift": lambda c: moved(probes.shift(c, "a", "b")),
    "transport": lambda c: moved(probes.transport(c, "a", "b")),
    "only_members": lambda c: moved(only_members(probes.erase(ACTS, **AT), c, "a", given="input")),
}
MODEL = lc.load(hf_model("llama"))
SWEEP = probes.probe(ACTS, control=None, folds=2, permutations=0, jobs=1, **QUIET)


def public(module: Any) -> set[str]:
    """The public functions that take a dataset."""
    found = set()
    for name in module.__all__:
        function = getattr(module, name)
        # Another name of a function is no other function.
        if inspect.isfunction(function) and function.__name__ == name:
            parameters = inspect.signature(function).parameters.values()
            if any("xr.Dataset" in str(parameter.annotation) for parameter in parameters):
                found.add(name)
    return found


def test_every_public_function_that_takes_activations_is_here() -> None:
    assert (public(probes) | public(lc)) <= PROBES.keys() | MOVES.keys()


def turned(dataset: xr.Dataset) -> st.SearchStrategy[xr.Dataset]:
    """The dataset with the axes of each variable in some order, in memory too or as views."""

    def turn(choices: tuple[dict[str, Any], bool]) -> xr.Dataset:
        orders, copied = choices
        made = dataset.assign({name: dataset[name].transpose(*o) for name, o in orders.items()})
        return made.copy(deep=True) if copied else made

    orders = {str(name): st.permutations(dataset[name].dims) for name in dataset}
    return st.tuples(st.fixed_dictionaries(orders), st.booleans()).map(turn)


def same(found: Any, expected: Any) -> None:
    if isinstance(found, pd.DataFrame):
        pd.testing.assert_frame_equal(found, expected, rtol=1e-5)
    elif isinstance(found, (xr.Dataset, xr.DataArray)):
        parts = expected if isinstance(found, xr.Dataset) else {None: expected}
        for name, part in parts.items():
            own: Any = found if name is None else found[name]
            xr.testing.assert_allclose(own.transpose(*part.dims), part, rtol=1e-5)
    elif isinstance(found, list) and not isinstance(found[0], str):
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif isinstance(found, list):
        assert found == expected
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def hold(call: Callable[[xr.Dataset], Any], dataset: xr.Dataset) -> None:
    expected = call(dataset)

    @settings(
        max_examples=3,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list[Any](HealthCheck),
    )
    @given(turned(dataset))
    def check(given: xr.Dataset) -> None:
        same(call(given), expected)

    check()


@pytest.mark.parametrize("name", PROBES)
def test_axes_of_activations_are_taken_by_name(name: str) -> None:
    hold(PROBES[name], ACTS)


@pytest.mark.parametrize("name", MOVES)
def test_axes_of_mean_states_are_taken_by_name(name: str) -> None:
    hold(MOVES[name], MEANS)


@pytest.mark.parametrize("kept", ["all", "minimal"])
@pytest.mark.parametrize("name", PROBES)
def test_parts_that_xarray_joined_are_activations(name: str, kept: Any) -> None:
    """By default ``xr.concat`` repeats for every prompt what has no axis of prompts."""
    parts = [ACTS.isel(prompt=slice(0, 7)), ACTS.isel(prompt=slice(7, None))]
    joined: Any = xr.concat(parts, "prompt", data_vars=kept)
    same(PROBES[name](joined), PROBES[name](ACTS))


@pytest.mark.parametrize("name", ["cluster", "nearest_neighbour", "probe", "membership"])
def test_heads_of_two_models_are_not_taken_for_one(name: str) -> None:
    joined = xr.concat([ACTS, OTHER], "prompt", data_vars="all")
    with pytest.raises(lc.InputError, match=r"heads of several models .* one model at a time"):
        PROBES[name](joined)
    with pytest.raises(ValueError, match="head_frame"):
        xr.concat([ACTS, OTHER], "prompt", data_vars="minimal", compat="equals")


def test_pooled_activations_are_activations() -> None:
    prompts = lc.Prompts.from_token_lists([[5, 6, 7]] * 4, {"task": list("abab")})
    acts = lc.pooled(MODEL, prompts, ["resid", "head"], span="prompt", progress=False)
    hold(lambda a: probes.mean_states(a), acts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.isel(d_model=0), "no axis 'd_model' any more"),
        (lambda a: a.isel(head=0), "no axis 'head' any more"),
        (lambda a: a.isel(layer=0), "no axis 'layer' any more"),
        (lambda a: a.expand_dims(seed=2), r"have the axes \['seed'\] beside"),
        (lambda a: a.rename(d_model="feature"), "no axis 'd_model' any more"),
    ],
)
@pytest.mark.parametrize("name", ["cluster", "cka", "mean_states", "rsa", "erase"])
def test_other_axes_are_one_line(name: str, change: Any, message: str) -> None:
    with pytest.raises(lc.InputError, match=message) as caught:
        PROBES[name](change(ACTS))
    assert "\n" not in str(caught.value)
