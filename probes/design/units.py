"""Exchangeable units: which rows may exchange labels under the null, from their columns.

Rows that share a wording (an expression of the synthetic task, an instruction's sentence) are
alike whatever their task, so a null that permutes single rows mistakes recognition of the wording
for the task. Rows of one *unit* stay together, units of one *block* exchange labels, and one
relabelling serves all inputs. Columns are recognised by name:

    wording   the first of ``template``, ``wording``, ``instruction`` that exists, is not the
              label itself and is not constant; an ``instruction`` that only repeats
              ``task/template`` is a name, not a wording
    input     ``input``

    layout                                         unit                     block
    each wording has one label                     wording                  all
    a wording has several labels                   its rows of one label    wording
    and each input has one label                   all linked by either     as above
    no wording, an input has several labels        row                      input
    no wording, each input has one label           input                    all
    neither                                        row                      all

Where some wordings have one label and others several, both rules apply. Where the label is the
wording, units are the values nested in it (its strings), and they exchange labels within their
task. Units that each lie within one condition (``given``) stay in it.

Relabellings that only rename labels give equal scores, so they count once: three tasks with two
wordings each have 6! / 2!³ / 3! = 15. If there are no more than the requested permutations, all
are used and the test is exact. p is never below 1 / their number.

Source: exchangeability blocks, Winkler et al. 2015; counting the data among the relabellings,
Phipson & Smyth 2010.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Int
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.special import gammaln

from lensclust.errors import InputError

WORDINGS = ("template", "wording", "instruction")
INPUT, TASK, ROWS = "input", "task", "rows"
# Exchanged units that differ in size by more than this ratio change label frequencies.
UNEQUAL = 1.5
UNEQUAL_ROWS = "changes how many rows a label has"
# If the smallest possible p is above this, a note is given.
COARSE = 0.05
# Entries of relabellings drawn at once.
ENTRIES = 2**22

Units = str | Sequence[str] | np.ndarray | None


@dataclass(frozen=True)
class Exchange:
    """Units of rows that keep a common label, and blocks within which they exchange labels.

    Attributes:
        unit: of each row; rows of one unit keep a common label.
        label: code of the label of each unit.
        block: of each unit; labels are permuted within blocks.
        place: of each row within its unit, with inputs in the same order in all units.
        wording: of each row; None without such a column.
        exchanged: what exchanges labels, such as ``template`` or ``task within template``.
        by: name of the label.
        remarks: on the rows, one sentence each.
        renamed: whether the score is invariant to renaming labels.
        alike: share of the labellings that only rename the labels of every scored group of rows:
            they tie with the truth for any data.
    """

    unit: Int[np.ndarray, " row"]
    label: Int[np.ndarray, " unit"]
    block: Int[np.ndarray, " unit"]
    place: Int[np.ndarray, " row"]
    wording: Int[np.ndarray, " row"] | None
    exchanged: str
    by: str
    remarks: tuple[str, ...] = ()
    renamed: bool = True
    alike: float = 0.0

    @property
    def log_distinct(self) -> float:
        """Logarithm of the number of relabellings that can give different scores."""
        table = self._table()
        found = float((gammaln(table.sum(1) + 1) - gammaln(table + 1).sum(1)).sum())
        if self.renamed:
            alike = np.unique(table.T, axis=0, return_counts=True)[1]
            found -= float(gammaln(alike + 1).sum())
        return found

    @property
    def moves(self) -> bool:
        """Whether any two labels can be exchanged."""
        return replace(self, renamed=False).log_distinct > 1e-9

    @property
    def coarse(self) -> str:
        """A note if no p can be small, else empty."""
        least = self._least()
        if least <= COARSE:
            return ""
        what = f"{round(1 / least)} distinct relabellings" if least < 1 else "no other labelling"
        return f"{self.by}: {what} by exchanging {self.exchanged}: p cannot be below {least:.2g}"

    @property
    def unequal(self) -> str:
        """A note if relabelling changes label frequencies, else empty."""
        sizes = np.bincount(self.unit)[np.bincount(self.block)[self.block] > 1]
        if not sizes.size or sizes.max() <= UNEQUAL * sizes.min():
            return ""
        rows = f"{sizes.min()} to {sizes.max()} rows"
        return f"{self.by}: exchanging {self.exchanged} of {rows} {UNEQUAL_ROWS}"

    @property
    def notes(self) -> tuple[str, ...]:
        """Caveats of p, one sentence each."""
        return (*self.remarks, *(note for note in (self.coarse, self.unequal) if note))

    def within(self, condition: Int[np.ndarray, " row"]) -> Exchange:
        """The same exchange, restricted to units of one condition."""
        of_unit = condition[np.unique(self.unit, return_index=True)[1]]
        return replace(self, block=_pairs(self.block, of_unit))

    def smallest_p(self, permutations: int) -> float:
        """The smallest p possible with this number of relabellings."""
        return max(1 / (permutations + 1), self._least())

    def labellings(self, permutations: int, *, seed: int) -> Int[np.ndarray, "labelling row"]:
        """Codes of the true labels, then of all relabellings or ``permutations`` random ones."""
        return self._labels(permutations, np.random.default_rng(seed))[:, self.unit]

    def fitted(
        self,
        labellings: Int[np.ndarray, "labelling row"],
        rows: Int[np.ndarray, " kept"],
        *,
        seed: int,
    ) -> Int[np.ndarray, "labelling kept"]:
        """Labellings of a subset of rows, with the true number of units of each label.

        Where not all units have an input, whole relabellings would give it more labels of fewer
        units each, and scores with a floor would differ for that reason alone. Units keep the
        order of their new labels and take the labels present, in order: the same at every input
        with the same units, and unchanged where all units are present.
        """
        units, first, inverse = np.unique(self.unit[rows], return_index=True, return_inverse=True)
        wanted = labellings[:, rows[first]]
        if len(units) == len(self.label):
            return wanted[:, inverse]
        tie = np.random.default_rng(seed).random((len(labellings), len(self.label)))[:, units]
        block, label = self.block[units], self.label[units]
        order = np.argsort(block * (int(self.label.max()) + 1) + wanted + tie, axis=1)
        fitted = np.empty_like(wanted)
        np.put_along_axis(fitted, order, label[np.lexsort((label, block))][None], axis=1)
        fitted[0] = label
        return fitted[:, inverse]

    def orders(self, permutations: int, *, seed: int) -> Int[np.ndarray, "labelling row"]:
        """The same labellings as orders of rows, for row-by-row matrices.

        Row ``i`` is replaced by row ``order[i]``: the one at the same place in the unit whose
        label its unit takes. If that unit has fewer rows, some are repeated.
        """
        rng = np.random.default_rng(seed)
        labels = self._labels(permutations, rng)
        rows = np.lexsort((self.place, self.unit))
        sizes = np.bincount(self.unit)
        starts = np.cumsum(sizes) - sizes
        orders = np.empty((len(labels), len(self.unit)), dtype=np.int64)
        orders[0] = np.arange(len(self.unit))
        for index, wanted in enumerate(labels[1:], start=1):
            # Units of one label share the label but not nuisances: any of them is drawn.
            source = np.empty(len(wanted), dtype=np.int64)
            tie = rng.random((2, len(wanted)))
            source[np.lexsort((tie[0], wanted, self.block))] = np.lexsort(
                (tie[1], self.label, self.block)
            )
            taken = source[self.unit]
            orders[index] = rows[starts[taken] + self.place % sizes[taken]]
        return orders

    def as_units(self) -> Exchange:
        """The same units, each with a separate label."""
        return replace(self, label=np.arange(len(self.label)), renamed=False)

    def _least(self) -> float:
        log = self.log_distinct
        return max(self.alike, 1 / round(np.exp(log)) if log < 30 else float(np.exp(-log)))

    def _labels(
        self, permutations: int, rng: np.random.Generator
    ) -> Int[np.ndarray, "labelling unit"]:
        if self.log_distinct <= np.log(permutations + 1) + 1e-9:
            others = [each for each in self._all() if (each != self._canonical()).any()]
            return np.stack([self.label, *others])
        drawn = np.empty((permutations + 1, len(self.label)), dtype=self.label.dtype)
        drawn[0] = self.label
        step = max(1, ENTRIES // len(self.label))
        here = np.argsort(self.block, kind="stable")
        for start in range(1, permutations + 1, step):
            part = drawn[start : start + step]
            key = rng.random(part.shape) + self.block
            part[:, here] = self.label[np.argsort(key, axis=1)]
        return drawn

    def _table(self) -> Int[np.ndarray, "block label"]:
        shape = int(self.block.max()) + 1, int(self.label.max()) + 1
        table = np.zeros(shape, dtype=np.int64)
        np.add.at(table, (self.block, self.label), 1)
        return table

    def _alike(self) -> Int[np.ndarray, " label"]:
        """Class of each label: labels of one class may exchange names."""
        table = self._table()
        if not self.renamed:
            return np.arange(table.shape[1])
        return np.unique(table.T, axis=0, return_inverse=True)[1].ravel()

    def _canonical(self) -> Int[np.ndarray, " unit"]:
        """The true labels under the names that `_all` gives them."""
        alike, name = self._alike(), {}
        free = {c: iter(np.flatnonzero(alike == c).tolist()) for c in set(alike.tolist())}
        for label in self.label.tolist():
            if label not in name:
                name[label] = next(free[alike[label]])
        return np.array([name[label] for label in self.label.tolist()])

    def _all(self) -> Iterator[Int[np.ndarray, " unit"]]:
        """Every relabelling once; labels of one class first appear in their order."""
        left, alike = self._table(), self._alike()
        chosen = np.empty(len(self.label), dtype=self.label.dtype)
        used = np.zeros(left.shape[1], dtype=bool)

        def fill(unit: int) -> Iterator[np.ndarray]:
            if unit == len(chosen):
                yield chosen.copy()
                return
            block = self.block[unit]
            fresh: set[int] = set()
            for label in np.flatnonzero(left[block]).tolist():
                new = not used[label]
                if new and alike[label] in fresh:
                    continue
                if new:
                    fresh.add(int(alike[label]))
                    used[label] = True
                chosen[unit] = label
                left[block, label] -= 1
                yield from fill(unit + 1)
                left[block, label] += 1
                if new:
                    used[label] = False

        return fill(0)


def row_columns(rows: xr.Dataset | pd.DataFrame) -> dict[str, np.ndarray]:
    """Codes of the columns that define nesting, from activations or a frame of prompts.

    >>> frame = pd.DataFrame({"template": ["a", None, None], "mood": [1, 2, 3]})
    >>> [name.tolist() for name in row_columns(frame).values()]  # unknown ones stand alone
    [[0, 1, 2]]
    """
    found = {}
    for name in (*WORDINGS, INPUT, TASK):
        if isinstance(rows, pd.DataFrame):
            values = rows[name].to_numpy() if name in rows else None
        else:
            known = name in rows.coords and rows[name].dims == ("prompt",)
            values = rows[name].values if known else None
        if values is not None:
            found[name] = _codes(values)
    return found


def exchangeable(
    labels: np.ndarray,
    rows: xr.Dataset | pd.DataFrame,
    *,
    by: str,
    condition: np.ndarray | None = None,
    units: Units = None,
    among: Int[np.ndarray, " kept"] | None = None,
    call: str = "exchangeable",
) -> Exchange:
    """The exchange of labels under the null.

    Args:
        labels: the label of each row.
        rows: activations or a frame with the rows' other columns.
        by: name of the label.
        condition: the value of ``given`` of each row, where rows are scored within it.
        units: the rows that keep a common label, instead of the rule above: a column, several
            (their combinations), one value per row, or ``"rows"`` for single rows.
        among: indices of the scored rows; the others are left out.
        call: function named in error messages.

    Raises:
        InputError: if ``units`` names no column or has not one value per row.

    >>> frame = pd.DataFrame({"task": list("aabb") * 2, "template": list("uvuv") * 2})
    >>> crossed = exchangeable(frame.task.to_numpy(), frame, by="task")
    >>> crossed.exchanged, crossed.labellings(99, seed=0).tolist()
    ('task within template', [[0, 0, 1, 1, 0, 0, 1, 1], [0, 1, 1, 0, 0, 1, 1, 0]])
    >>> crossed.smallest_p(99)
    0.5
    """
    kept = np.arange(len(labels)) if among is None else among
    label = np.unique(labels[kept].astype(str), return_inverse=True)[1].ravel()
    within = np.zeros(len(label), dtype=np.int64) if condition is None else _codes(condition[kept])
    columns = {name: _codes(codes[kept]) for name, codes in row_columns(rows).items()}
    if units is not None:
        name, wording = _named_units(rows, units, len(labels), call)
        wording = None if wording is None else _codes(wording[kept])
        columns = {}
    else:
        name, wording = _wording(columns, by)
    given = columns.get(INPUT) if by != INPUT else None
    if given is not None and given.max() == 0:
        given = None
    notes = []
    if wording is None:
        unit, block, exchanged = _without_wording(label, given, within, condition is not None)
        if units is None:
            notes.append(
                f"{by}: no template, wording or instruction tells rows apart, so single "
                f"{exchanged} trade labels"
            )
    else:
        unit, block, exchanged = _with_wording(label, wording, name, by, within)
        if by in WORDINGS and TASK in columns:
            block = _pairs(block, columns[TASK])
            exchanged += f" within {TASK}"
    # With a single label every input has one label; nothing is exchanged then.
    if wording is not None and given is not None and label.max() > 0 and nested(given, label):
        joined = _linked(unit, given)
        if joined.max() < unit.max():
            unit, exchanged = joined, f"{exchanged} and {INPUT}s"
            # A block must contain whole units.
            block = _linked(block, unit)
    elif wording is not None and given is not None and not _complete(given, label, within):
        notes.append(
            f"{by}: not every value stands with every {INPUT}, so states that know the {INPUT} "
            "alone tell some apart; condition on it"
        )
    of_unit = np.unique(unit, return_index=True)[1]
    order = np.zeros(len(label), dtype=np.int64) if given is None else given
    return Exchange(
        unit=unit,
        label=label[of_unit],
        block=_codes(block[of_unit]),
        place=_places(unit, order),
        wording=wording,
        exchanged=exchanged,
        by=by,
        remarks=tuple(notes),
    )


def _wording(columns: Mapping[str, np.ndarray], by: str) -> tuple[str, np.ndarray | None]:
    """Name and codes of the wording; None without a column of wordings."""
    for name in WORDINGS:
        codes = columns.get(name)
        if name == by or codes is None or codes.max() == 0:
            continue
        if name == "instruction" and {TASK, "template"} <= columns.keys():
            named = _pairs(columns[TASK], columns["template"])
            if by != "template" and (_pairs(named, codes).max() == named.max() == codes.max()):
                continue
        return name, codes
    return "", None


def _with_wording(
    label: np.ndarray, wording: np.ndarray, name: str, by: str, within: np.ndarray
) -> tuple[np.ndarray, np.ndarray, str]:
    unit = _pairs(wording, label)
    crossed = _labels_of(wording, label)[wording] > 1
    # Whole wordings exchange labels with all others, or with those of their only condition.
    alone = within if nested(unit, within) else np.zeros_like(within)
    block = np.where(crossed, wording + 1 + alone.max(), alone)
    said = [name] if not crossed.all() else []
    said += [f"{by} within {name}"] if crossed.any() else []
    return unit, block, " and ".join(said)


def _without_wording(
    label: np.ndarray, given: np.ndarray | None, within: np.ndarray, conditioned: bool
) -> tuple[np.ndarray, np.ndarray, str]:
    rows = np.arange(len(label))
    if given is None:
        return rows, within, ROWS
    crossed = _labels_of(given, label)[given] > 1
    unit = _codes(np.where(crossed, rows, len(rows) + given))
    alone = within if nested(unit, within) else np.zeros_like(within)
    block = np.where(crossed, _pairs(within, given) + 1 + alone.max(), alone)
    said = [ROWS if conditioned else f"{ROWS} within {INPUT}"] if crossed.any() else []
    said += [f"{INPUT}s" if np.bincount(unit).max() > 1 else ROWS] if not crossed.all() else []
    return unit, block, " and ".join(dict.fromkeys(said))


def _named_units(
    rows: xr.Dataset | pd.DataFrame, units: Units, n: int, call: str
) -> tuple[str, np.ndarray | None]:
    if isinstance(units, str):
        units = [units]
    values = list(units) if units is not None else []
    if values == [ROWS]:
        return ROWS, None
    if len(values) < n and all(isinstance(each, str) for each in values):
        columns = list(rows.columns if isinstance(rows, pd.DataFrame) else rows.coords)
        missing = [each for each in values if each not in columns]
        if missing or not values:
            raise InputError(
                f"{call}: units={missing[0] if missing else values!r} is no column of these rows: "
                f"expected some of {columns}, one value a row, or 'rows'"
            )
        codes = np.zeros(n, dtype=np.int64)
        for each in values:
            codes = _pairs(codes, _codes(np.asarray(rows[each])))
        return " and ".join(values), codes
    if len(values) != n:
        raise InputError(f"{call}: units has {len(values)} values for {n} rows, expected one a row")
    return "units", _codes(np.asarray(values))


def _codes(values: np.ndarray) -> Int[np.ndarray, " row"]:
    """Codes of values compared as text; each missing one is a separate value."""
    values = np.asarray(values)
    missing = np.asarray(pd.isna(values))
    codes = np.unique(values.astype(str), return_inverse=True)[1].ravel().astype(np.int64)
    if missing.any():
        codes[missing] = codes.max() + 1 + np.arange(missing.sum())
        codes = np.unique(codes, return_inverse=True)[1].ravel()
    return codes


def _pairs(first: np.ndarray, second: np.ndarray) -> Int[np.ndarray, " row"]:
    """Codes of the combinations of two columns of codes."""
    both = first.astype(np.int64) * (int(second.max()) + 1) + second
    return np.unique(both, return_inverse=True)[1].ravel()


def _labels_of(values: np.ndarray, label: np.ndarray) -> Int[np.ndarray, " value"]:
    """Number of labels that occur with each value."""
    return np.bincount(values[np.unique(_pairs(values, label), return_index=True)[1]])


def nested(fine: np.ndarray, coarse: np.ndarray) -> bool:
    """Whether each value of one column has one value of the other."""
    return int(_pairs(fine, coarse).max()) == int(np.unique(fine).size) - 1


def _linked(first: np.ndarray, second: np.ndarray) -> Int[np.ndarray, " row"]:
    """Connected components of rows that share either value."""
    links = coo_matrix(
        (np.ones(len(first)), (first, first.max() + 1 + second)),
        shape=(first.max() + second.max() + 2,) * 2,
    )
    return _codes(connected_components(links, directed=False)[1][first])


def _complete(given: np.ndarray, label: np.ndarray, within: np.ndarray) -> bool:
    """Whether every label occurs with every input, or each condition has one input."""
    cells = int(_pairs(given, label).max()) + 1
    return nested(within, given) or cells == (int(given.max()) + 1) * (int(label.max()) + 1)


def _places(unit: np.ndarray, order: np.ndarray) -> Int[np.ndarray, " row"]:
    """Rank of each row in its unit, by another column and then by row order."""
    rows = np.lexsort((order, unit))
    sizes = np.bincount(unit)
    place = np.empty(len(unit), dtype=np.int64)
    place[rows] = np.arange(len(unit)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return place
