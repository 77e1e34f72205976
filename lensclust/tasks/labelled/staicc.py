"""The labelled texts in the package StaICC, for classification without the hub.

StaICC (by Hakaze Cho; the package is Apache-2.0) holds each data set as a pickle of
``[([text], label), ...]``. The wheel is pinned by checksum; its pickles are read once, without
running code, and stored as parquet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from lensclust.errors import InputError
from lensclust.models import Pin, fetch_data
from lensclust.storage import read_frame
from lensclust.tasks.labelled.plain_pickles import read_plain_pickle

_DIGESTS = {
    "sst2": "f0a59696d7e246904c705f5ddacd41f1bc69fcc5a568c8bb5a51f877f6b02fd7",
    "rotten_tomatoes": "7211bc8efab9506a09f6e409a9cfee652953937d0fdac82e5cb61453158993e0",
    "sst5": "bad620ddcceecc755eb02e847c85979c1456409034a61f87491f3f0eeaeb83e5",
    "agnews": "db7c87509aa2958e55c8b3722034af8094083eaa763154eb9fb216d2e239125b",
    "trec": "368eb2b7862b057f892211dcac3124e7b858c9021a96a32bd9d0666ac904d555",
    "subjective": "ae2abcfb4bb4088ba2e361d456f27c0072a8cdcd737d487286157776e5aa3310",
    "financial_phrasebank": "0400683c58512ec5cd38c5df10798d903e754051d30082d7fc1b467f09bd0b2a",
    "tweet_eval_emotion": "9b559793b1cc445a20ae0ac08b1943e55e27549d8a948bf950f91aab6cabf4f3",
    "tweet_eval_hate": "ecc16e8689335dc225230218e87296ba221937d1a073193314a6369b3854a795",
}
PINS = {
    name: Pin(
        package="StaICC",
        version="0.1.1",
        wheel_bytes=17_587_314,
        wheel_sha256="f66c59eb60aeec2ff44fc38020592f6b1e13124a7ca7f1d3f6eaf31747b63a0f",
        member=f"StaICC/cached_dataset/{name}.dataset",
        member_sha256=digest,
    )
    for name, digest in _DIGESTS.items()
}


def read_staicc(name: str, *, progress: bool = False) -> pd.DataFrame:
    """Columns ``text`` and ``label`` (a class number) of one dataset, downloaded if necessary.

    Raises:
        InputError: if there is no network for the first download, or the copy is damaged.
    """
    folder = fetch_data("staicc", list(PINS.values()), convert, progress=progress)
    return read_frame(folder / "texts" / f"{name}.parquet")


def convert(members: Path, made: Path) -> None:
    """Convert every pickle in a folder to parquet.

    Raises:
        InputError: if one is not a list of one text and one label each.
    """
    texts = made / "texts"
    texts.mkdir(parents=True)
    for path in sorted(members.glob("*.dataset")):
        rows = read_plain_pickle(path)
        if not isinstance(rows, list) or not all(map(_is_row, rows)):
            raise InputError(f"{path.name}: expected a list of ([text], label)")
        table = pd.DataFrame(
            {"text": [text for (text,), _ in rows], "label": [label for _, label in rows]}
        )
        table.to_parquet(texts / f"{path.stem}.parquet", index=False)


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, tuple)
        and len(row) == 2
        and isinstance(row[0], list)
        and len(row[0]) == 1
        and isinstance(row[0][0], str)
        and isinstance(row[1], int)
    )
