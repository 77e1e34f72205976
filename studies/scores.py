"""Select and summarise tidy frames of scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


def where(frame: pd.DataFrame, **labels: Any) -> pd.DataFrame:
    """The rows with the given labels, a value or a list of values each.

    >>> import pandas as pd
    >>> frame = pd.DataFrame({"metric": ["ari", "ami"], "step": [0, 1]})
    >>> where(frame, metric="ari").index.tolist(), len(where(frame, step=[0, 1]))
    ([0], 2)
    """
    for column, wanted in labels.items():
        values = wanted if isinstance(wanted, list) else [wanted]
        frame = frame.loc[frame[column].isin(values)]
    return frame


def rank_correlations(frame: pd.DataFrame, a: str, b: str, *, by: str) -> pd.Series:
    """Spearman's rho of two columns in each group; 0 where one of them is constant."""
    import pandas as pd

    found = {
        key: rows[a].corr(rows[b], method="spearman")
        if min(rows[a].nunique(), rows[b].nunique()) > 1
        else 0.0
        for key, rows in frame.groupby(by)
    }
    return pd.Series(found)


def plane(points: np.ndarray, **labels: Any) -> pd.DataFrame:
    """Two principal components ``x, y`` of points ``(row, d)``, with label columns."""
    import numpy as np
    import pandas as pd

    centred = points.astype(np.float64) - points.mean(0)
    left, size, _ = np.linalg.svd(centred, full_matrices=False)
    return pd.DataFrame({**labels, "x": left[:, 0] * size[0], "y": left[:, 1] * size[1]})
