"""Two-dimensional maps of states over layers and training steps.

Two principal components of every layer (and training step), each aligned to the one before by an
orthogonal map (Procrustes: rotations and reflections, which keep distances), so that points do not
jump where only the axes change. UMAP instead shows neighbourhoods and no distances.

A map is no measure: two components may hide existing clusters, and UMAP may show clusters that do
not exist. Use the score beside a panel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float
from scipy.linalg import orthogonal_procrustes
from sklearn.decomposition import PCA

from lensclust import figures
from lensclust.activations import dataset_sites, site_values
from lensclust.arguments import checked_arguments, pairs
from lensclust.errors import InputError
from lensclust.figures import Shown
from lensclust.report.views import ClusterView

METHODS = ("pca", "umap")


@dataclass(frozen=True, repr=False)
class ClusterMap(Shown):
    """Prompts as points, by training step and layer.

    Attributes:
        points: coordinates ``(step, layer, prompt, axis)`` with the labels of the prompts;
            ``explained (step, layer)`` is the share of the variance they hold, NaN for UMAP.
        method: ``pca`` or ``umap``.
    """

    points: xr.Dataset
    method: str

    @property
    def frame(self) -> pd.DataFrame:
        """One row per point: ``step, layer, x, y, explained`` and the labels of the prompt."""
        points = self.points["xy"].to_dataset("axis").assign(explained=self.points["explained"])
        return points.to_dataframe(["step", "layer", "prompt"]).reset_index()

    def plot(self, color: str = "task") -> figures.Picture:
        """The last step, one panel per layer."""
        last = self.frame["step"] == self.points["step"].values[-1]
        axes = "Two principal components" if self.method == "pca" else "UMAP"
        return figures.scatter(
            self.frame[last],
            color=color,
            title=f"States by layer, coloured by {color}",
            caption=f"{axes} of each layer.",
        )

    def view(
        self,
        *,
        labels: Sequence[str],
        title: str,
        caption: str,
        scores: pd.DataFrame | None = None,
        score_name: str = "ARI",
        text: str = "text",
    ) -> ClusterView:
        """The map for a page, with sliders for layer and step: `ClusterView.from_frame`."""
        return ClusterView.from_frame(
            self.frame,
            labels=labels,
            title=title,
            caption=caption,
            scores=scores,
            score_name=score_name,
            text=text,
        )

    def __repr__(self) -> str:
        sizes = self.points.sizes
        return (
            f"ClusterMap({self.method}: {sizes['prompt']} prompts, {sizes['layer']} layers, "
            f"{sizes['step']} steps)"
        )


@checked_arguments
def cluster_map(
    acts: xr.Dataset | Iterable[tuple[int, xr.Dataset]],
    *,
    position: str | None = None,
    method: str = "pca",
    seed: int = 0,
) -> ClusterMap:
    """Map prompts' residual streams in two dimensions at every layer and training step.

    Args:
        acts: from `lensclust.extract`, with ``resid``; or pairs of a training step and such a
            dataset of the same prompts, as from a series of checkpoints.
        position: which read position, where there are several.
        method: ``pca``, each panel aligned to the one before by orthogonal Procrustes; or
            ``umap`` (extra `umap`), initialised from those components.
        seed: of UMAP.

    Raises:
        InputError: if there is no residual stream, datasets hold other prompts or layers, there
            are fewer than three prompts, the method is not known, or UMAP is not installed.

    >>> import lensclust as lc
    >>> prompts = lc.tasks.sif().where(split="new_string")
    >>> acts = lc.extract(lc.load("native:sif-small"), prompts, "resid", progress=False)
    >>> found = cluster_map(acts)
    >>> found.points.xy.dims, found.points.sizes["layer"]
    (('step', 'layer', 'prompt', 'axis'), 7)
    """
    if method not in METHODS:
        raise InputError(f"cluster_map: method {method!r} is not known, only {list(METHODS)}")
    series: list[tuple[int, xr.Dataset]] = (
        [(0, acts)]
        if isinstance(acts, xr.Dataset)
        else list(pairs("cluster_map", acts, "its activations"))
    )
    if not series:
        raise InputError("cluster_map: no activations given")
    first = series[0][1]
    sites = dataset_sites(first, "resid")
    if first.sizes["prompt"] < 3:
        raise InputError(f"cluster_map: {first.sizes['prompt']} prompts, expected at least 3")
    reduce = plane_of if method == "pca" else partial(_neighbourhoods, seed=seed)
    points, explained = [], []
    before: Float[np.ndarray, "prompt 2"] | None = None
    for step, dataset in series:
        if dataset_sites(dataset, "resid") != sites or dataset.sizes["prompt"] != len(first.prompt):
            raise InputError(
                f"cluster_map: step {step} holds {dict(dataset.sizes)}, expected the prompts and "
                f"layers of step {series[0][0]}: {dict(first.sizes)}"
            )
        values = (site_values(dataset, site, position=position) for site in sites)
        found, shares = zip(*map(reduce, values), strict=True)
        turned = _turned(found, before)
        # The first layer of the next step is aligned to the first of this one.
        before = turned[0]
        points.append(turned)
        explained.append(shares)
    axes = ("step", "layer", "prompt")
    labels = {name: each for name, each in first.coords.items() if each.dims == ("prompt",)}
    return ClusterMap(
        xr.Dataset(
            {
                "xy": ((*axes, "axis"), np.array(points)),
                "explained": (axes[:2], np.array(explained)),
            },
            {
                **labels,
                "step": [step for step, _ in series],
                "layer": [site.layer for site in sites],
                "axis": ["x", "y"],
            },
        ),
        method,
    )


def _turned(
    panels: Sequence[Float[np.ndarray, "prompt 2"]], before: Float[np.ndarray, "prompt 2"] | None
) -> list[Float[np.ndarray, "prompt 2"]]:
    """Align each panel to the one before."""
    found = []
    for points in panels:
        before = points if before is None else turned_onto(points, before)
        found.append(before)
    return found


def plane_of(values: Float[np.ndarray, "prompt d"]) -> tuple[Float[np.ndarray, "prompt 2"], float]:
    """Two principal components, and their share of the variance."""
    values = np.asarray(values, dtype=np.float64)
    if np.ptp(values, axis=0).max() == 0:
        return np.zeros((len(values), 2)), 1.0
    fitted = PCA(2, svd_solver="full")
    points = fitted.fit_transform(values)
    return points, float(fitted.explained_variance_ratio_.sum())


def turned_onto(
    points: Float[np.ndarray, "prompt 2"], reference: Float[np.ndarray, "prompt 2"]
) -> Float[np.ndarray, "prompt 2"]:
    """Align points to others by the best rotation or reflection (orthogonal Procrustes).

    >>> square = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    >>> bool(np.allclose(turned_onto(square[:, ::-1], square), square))
    True
    """
    turn, _ = orthogonal_procrustes(points, reference)
    return points @ turn


def _neighbourhoods(
    values: Float[np.ndarray, "prompt d"], *, seed: int
) -> tuple[Float[np.ndarray, "prompt 2"], float]:
    """UMAP, initialised from two principal components; no share of variance."""
    try:
        import umap
    except ImportError as error:
        raise InputError(
            "cluster_map: UMAP is not installed: pip install 'lensclust[umap]'"
        ) from error
    start, _ = plane_of(values)
    size = float(np.abs(start).max())
    fitted = umap.UMAP(
        n_neighbors=min(15, len(values) - 1),
        init=10 * start / size if size > 0 else "random",  # type: ignore[arg-type]
        random_state=seed,
        n_jobs=1,
    )
    return np.asarray(fitted.fit_transform(values), dtype=np.float64), float("nan")
