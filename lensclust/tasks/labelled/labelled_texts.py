"""Labelled texts: known sets from a pinned package, others with `datasets`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int

from lensclust.errors import InputError
from lensclust.tasks.labelled.staicc import read_staicc

_GENERAL = "any"


@dataclass(frozen=True, eq=False, repr=False)
class LabelledTexts:
    """Distinct texts with one class each, and templates of prompts.

    Attributes:
        name: of the set.
        texts: without surrounding white space or line breaks, all distinct.
        labels: class number of each text.
        classes: names of the classes.
        words: label word of each class.
        templates: name -> one example, with ``{input}`` and ``{label}``; the first is the default.
        twins: pairs of templates that differ in one character.
    """

    name: str
    texts: tuple[str, ...]
    labels: Int[np.ndarray, " text"]
    classes: tuple[str, ...]
    words: tuple[str, ...]
    templates: Mapping[str, str]
    twins: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        return f"LabelledTexts({self.name!r}: {len(self.texts)} texts, {len(self.classes)} classes)"

    @cached_property
    def halves(self) -> tuple[Int[np.ndarray, " shown"], Int[np.ndarray, " asked"]]:
        """Texts for demonstrations, and texts for queries: a fixed half of each class.

        The split depends only on the texts, not on their order or on any seed.
        """
        order = np.random.default_rng(0).permutation(len(self.texts))
        order = np.array(sorted(range(len(self.texts)), key=self.texts.__getitem__))[order]
        labels = pd.Series(self.labels[order])
        nth = labels.groupby(labels).cumcount().to_numpy()
        size = labels.groupby(labels).transform("size").to_numpy()
        shown = nth < size // 2
        return order[shown], order[~shown]


def data_names() -> list[str]:
    """Names of the sets that need no hub.

    >>> data_names()[:4]
    ['sst2', 'rotten_tomatoes', 'sst5', 'agnews']
    """
    return [name for name in _data() if name != _GENERAL]


def class_names(name: str) -> tuple[str, ...]:
    """The classes of a set that needs no hub.

    >>> class_names("sst2")
    ('negative', 'positive')
    """
    return tuple(_data()[name]["classes"])


def labelled_texts(
    source: Any,
    *,
    subset: str | None = None,
    split: str | None = None,
    text: str = "text",
    label: str = "label",
    progress: bool = True,
) -> LabelledTexts:
    """Read a set of labelled texts.

    White space becomes single spaces; of equal texts the first is kept, or none if their labels
    differ; texts without a label (a negative class number, as in hidden test sets) are dropped.

    Args:
        source: one of `data_names` (a pinned download of 18 MB, once); a hub id or a folder,
            read by `datasets`; a ``datasets.Dataset`` or ``DatasetDict``; a pandas frame.
        subset: configuration of a hub id ("sst2" of "nyu-mll/glue").
        split: one of its splits; all by default.
        text, label: names of the columns.
        progress: show a bar for the download.

    Returns:
        The texts. The words of a known set are single tokens in common tokenizers; those of any
        other are the names of its classes.

    Raises:
        InputError: if there is no such set, split or column, or fewer than two classes.

    >>> frame = pd.DataFrame({"text": ["a  b", "c", "c ", "d"], "label": ["x", "y", "y", "x"]})
    >>> found = labelled_texts(frame)
    >>> found.texts, found.labels.tolist(), found.classes
    (('a b', 'c', 'd'), [0, 1, 0], ('x', 'y'))
    """
    known = isinstance(source, str) and source in data_names()
    if known:
        name, table = source, read_staicc(source, progress=progress)
        content = _data()[name]
        classes, words = tuple(content["classes"]), tuple(content["words"])
    else:
        name = source if isinstance(source, str) else "texts"
        table, named = _table(source, name, subset, split, text, label)
        content = _data()[_GENERAL]
        table, classes = _numbered(table, named)
        words = classes
    if len(classes) < 2:
        raise InputError(f"labelled_texts: {name!r} has the classes {list(classes)}, expected two")
    table = table.assign(text=table["text"].str.split().str.join(" "))
    table = table[table["label"].between(0, len(classes) - 1) & (table["text"] != "")]
    one_label = table.groupby("text")["label"].transform("nunique") == 1
    table = table[one_label].drop_duplicates("text")
    return LabelledTexts(
        name=name,
        texts=tuple(table["text"]),
        labels=table["label"].to_numpy(dtype=np.int64),
        classes=classes,
        words=words,
        templates=content["templates"],
        twins=tuple((a, b) for a, b in content["twins"]),
    )


def _table(
    source: Any, name: str, subset: str | None, split: str | None, text: str, label: str
) -> tuple[pd.DataFrame, list[str] | None]:
    """Columns ``text`` and ``label``, and the names of the classes if the source has them."""
    if isinstance(source, pd.DataFrame):
        parts: list[Any] = [source]
    else:
        parts = _parts(source, subset, split)
    tables, names = [], None
    for part in parts:
        columns = list(part) if isinstance(part, pd.DataFrame) else part.column_names
        for column in (text, label):
            if column not in columns:
                raise InputError(f"labelled_texts: {name!r} has no column {column!r}: {columns}")
        if not isinstance(part, pd.DataFrame):
            names = getattr(part.features[label], "names", names)
            part = part.select_columns([text, label]).to_pandas()
        part = pd.DataFrame({"text": part[text], "label": part[label]}).dropna()
        if not part["text"].map(lambda value: isinstance(value, str)).all():
            raise InputError(f"labelled_texts: column {text!r} of {name!r} holds values, not texts")
        tables.append(part)
    return pd.concat(tables, ignore_index=True), names


def _parts(source: Any, subset: str | None, split: str | None) -> list[Any]:
    """The splits of a dataset that `datasets` reads."""
    import datasets

    try:
        if not isinstance(source, (str, Path)):
            found = source
        elif _is_saved(Path(source)):
            found = datasets.load_from_disk(str(source))
        else:
            found = datasets.load_dataset(str(source), subset)
    except Exception as error:  # the hub, file formats and pyarrow may raise anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(
            f"labelled_texts: cannot read {str(source)!r} ({reason}); "
            f"without the hub there are {', '.join(data_names())}"
        ) from error
    if isinstance(found, datasets.Dataset):
        return [found]
    if not isinstance(found, datasets.DatasetDict):
        raise InputError(
            f"labelled_texts: given a {type(source).__name__}, expected one of "
            f"{', '.join(data_names())}, a hub id, a folder, a Dataset or a frame"
        )
    if split is not None and split not in found:
        raise InputError(f"labelled_texts: {source!r} has no split {split!r}: {list(found)}")
    return list(found.values()) if split is None else [found[split]]


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def _numbered(table: pd.DataFrame, names: list[str] | None) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Replace labels by class numbers; classes are named as given, or by their labels."""
    if names is not None:
        return table, tuple(names)
    values = table["label"]
    if pd.api.types.is_numeric_dtype(values):
        values = values[values >= 0]
    found = sorted(values.unique())
    numbers = {value: number for number, value in enumerate(found)}
    labels = table["label"].map(numbers).fillna(-1).astype(int)
    return table.assign(label=labels), tuple(map(str, found))


@cache
def _data() -> dict[str, Any]:
    return json.loads(
        files("lensclust.tasks.labelled").joinpath("classification.json").read_text("utf-8")
    )
