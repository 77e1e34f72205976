"""Probes with their products on a device against numpy; on the CPU it is the same torch code."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from lensclust.errors import InputError
from probes.linear.linear_probe import probe
from probes.similarity.kernel_alignment import cka
from probes.similarity.neighbours import nearest_neighbour
from tests.devices import DEVICES


def activations(rows: int = 84, d: int = 10, *, seed: int = 0) -> xr.Dataset:
    """A task that is planted at one layer, noise at another, and a layer that does not vary."""
    rng = np.random.default_rng(seed)
    task, template = np.arange(rows) % 3, np.arange(rows) // 3 % 7
    states = rng.normal(size=(rows, 1, 3, d)) + 3
    states[:, 0, 1] += rng.normal(size=(3, d))[task]
    states[:, 0, 2] = 1.5
    z = rng.normal(size=(rows, 1, 1, 2, 4)) + rng.normal(size=(3, 1, 1, 2, 4))[task]
    return xr.Dataset(
        {
            "resid": (("prompt", "position", "layer", "d_model"), states.astype(np.float32)),
            "z": (("prompt", "position", "block", "head", "d_head"), z.astype(np.float32)),
            "head_frame": (("block", "head", "d_head", "rank"), rng.normal(size=(1, 2, 4, 4))),
        },
        {"position": ["answer"], "layer": range(3), "block": [0], "head": [0, 1]}
        | {"task": ("prompt", task.astype(str)), "template": ("prompt", template.astype(str))}
        | {"input": ("prompt", rng.integers(0, 5, rows).astype(str))},
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["ridge", "lda", "mass_mean"])
def test_linear_probes_are_those_of_numpy(kind, device, monkeypatch):
    monkeypatch.setattr("probes.linear.site_fits.BATCH_ROWS", 30)
    acts = activations()
    options = {"kind": kind, "permutations": 6, "folds": 4, "jobs": 1}
    expected, found = probe(acts, **options), probe(acts, device=device, **options)
    # Counts of right rows: equal unless two scores tie to rounding.
    numbers = ["value", "null_mean", "null_std", "p", "ci_low", "ci_high"]
    np.testing.assert_allclose(found.frame[numbers], expected.frame[numbers], atol=1e-12)
    for name in expected.directions:
        scale = float(np.abs(expected.directions[name]).max()) or 1.0
        np.testing.assert_allclose(
            found.directions[name], expected.directions[name], atol=1e-9 * scale
        )
    assert list(found.predict(acts, "resid 1")) == list(expected.predict(acts, "resid 1"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("rows", [21, 84])  # through features, and through Gram matrices
def test_cka_is_that_of_numpy(rows, debiased, device):
    acts = activations(rows, 40 if rows == 21 else 10)
    expected, found = cka(acts, debiased=debiased), cka(acts, debiased=debiased, device=device)
    numbers = ["value", "null_mean", "null_std", "p"]
    np.testing.assert_allclose(found.frame[numbers], expected.frame[numbers], rtol=1e-9, atol=1e-12)
    assert found.matrix.isnull().sum() == expected.matrix.isnull().sum() > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [1, 5])
def test_neighbours_are_those_of_numpy(k, device, monkeypatch):
    monkeypatch.setattr("probes.similarity.neighbours.BLOCK", 32)
    acts = activations().drop_isel(layer=2)
    options = {"k": k, "permutations": 5}
    expected, found = (nearest_neighbour(acts, **options, **at) for at in ({}, {"device": device}))
    numbers = ["value", "null_mean", "null_std", "p"]
    np.testing.assert_allclose(found[numbers], expected[numbers], atol=1e-12)


def test_unusable_devices_are_one_line():
    acts = activations(42)
    for sweep in (probe, cka, nearest_neighbour):
        with pytest.raises(InputError, match=r"^device 'abacus'"):
            sweep(acts, device="abacus")
    with pytest.raises(InputError, match="logistic probes are fitted on the CPU"):
        probe(acts, kind="logistic", device="cpu")
    with pytest.raises(InputError, match="holds no values"):
        cka(acts, device="meta")
