"""``python -m tests.families [FAMILY ...]``: try every feature; of all families, write the page.

Prints what is not right. The exit status is the number of cells that are wrong.
"""

from __future__ import annotations

import logging
import sys
import warnings

from tests.families.page import FEATURES, PAGE, page
from tests.families.registry import FAMILIES
from tests.families.subjects import Subject, row


def main(names: list[str]) -> int:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    found, wrong = {}, 0
    for name in names or FAMILIES:
        found[name] = row(Subject.of(name), FEATURES)
        notes: dict[str, list[str]] = {}
        for feature, verdict in found[name].items():
            wrong += not verdict.acceptable
            if verdict.kind != "right":
                reason = verdict.reason.replace("\n", " ")[:300]
                notes.setdefault(f"{verdict.kind}: {reason}", []).append(feature)
        right = sum(verdict.kind == "right" for verdict in found[name].values())
        print(f"{name}: {right} of {len(FEATURES)} right", flush=True)
        for note, features in notes.items():
            print(f"    {', '.join(features)} {note}", flush=True)
    if not names:
        PAGE.write_text(page(found), encoding="utf-8")
        print(f"written to {PAGE}")
    print(f"{wrong} wrong")
    return min(wrong, 99)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
