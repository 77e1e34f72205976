"""Whether two run directories hold the same numbers: ``python -m tests.compare_runs BEFORE AFTER``.

For changes that should change none: run a study before and after, from the same machine. Claims
are compared field by field but for their texts, scores value by value. Either argument may be a
folder of run directories: those of the same name are compared.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

# What may be said in other words.
TEXTS = {"statement", "control", "rule", "source", "unit"}
# What is measured by a clock.
TIMES = {"seconds"}


def differences(before: Path, after: Path) -> list[str]:
    """What differs between two runs, one line each."""
    return [*_claims(before, after), *_scores(before, after)]


def _claims(before: Path, after: Path) -> list[str]:
    held = [_by_id(folder) for folder in (before, after)]
    found = [
        f"claim {name}: only in one of them" for name in sorted(held[0].keys() ^ held[1].keys())
    ]
    for name in sorted(held[0].keys() & held[1].keys()):
        one, other = held[0][name], held[1][name]
        for key in sorted((one.keys() | other.keys()) - TEXTS):
            if json.dumps(one.get(key)) != json.dumps(other.get(key)):
                found.append(f"claim {name}: {key} {one.get(key)!r} and {other.get(key)!r}")
    return found


def _by_id(folder: Path) -> dict[str, dict[str, Any]]:
    held = json.loads((folder / "claims.json").read_text("utf-8"))
    return {claim["id"]: claim for claim in held}


def _scores(before: Path, after: Path) -> list[str]:
    one, other = (_timeless(pd.read_parquet(path / "scores.parquet")) for path in (before, after))
    if [*one.columns] != [*other.columns] or len(one) != len(other):
        return [f"scores: {one.shape} and {other.shape} rows and columns, or other names"]
    return [
        f"scores: {int((~same).sum())} of {len(same)} values of {name!r} differ"
        for name in one.columns
        if not (same := one[name].eq(other[name]) | (one[name].isna() & other[name].isna())).all()
    ]


def _timeless(scores: pd.DataFrame) -> pd.DataFrame:
    if "metric" not in scores:
        return scores
    return scores[~scores["metric"].isin(TIMES)].reset_index(drop=True)


def main(before: Path, after: Path) -> int:
    runs = [""]
    if not (before / "claims.json").exists():
        runs = sorted({path.parent.name for path in before.glob("*/claims.json")})
    if not runs:
        print(f"no run in {before}: expected a run directory, or a folder of them")
        return 2
    wrong = 0
    if missing := [run for run in runs if not (after / run / "claims.json").exists()]:
        print(f"not finished in {after}: {', '.join(missing)}")
        return 2
    for run in runs:
        found = differences(before / run, after / run)
        print(f"{run or before.name}: {'the same' if not found else f'{len(found)} differences'}")
        print(*(f"  {line}" for line in found[:20]), sep="\n", end="\n" if found else "")
        wrong += bool(found)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
