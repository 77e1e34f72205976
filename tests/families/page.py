"""docs/models.md: which feature works for which family, written and read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from tests.families import methods, reading, steering
from tests.families.registry import FAMILIES, unknown
from tests.families.subjects import Subject, Verdict

FEATURES: dict[str, Callable[[Subject], None]] = {
    **reading.FEATURES,
    **methods.FEATURES,
    **steering.FEATURES,
}
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
WORDS = {"right": "yes", "refused": "no", "none": "–"}

_TOP = """# Models

Written by `make models`. Each feature is compared, on a tiny random model of each family, with
plain torch hooks on an unwrapped copy of the Hugging Face network: **yes** where they agree up to
rounding, **no** where the feature is refused in one line (the number leads to the reason), **–**
where the network has nothing of the kind. Nothing else is accepted: no wrong number, no traceback.

"""


def page(found: Mapping[str, Mapping[str, Verdict]]) -> str:
    """The page of a table family -> feature -> verdict."""
    reasons: dict[str, int] = {}
    lines = [_TOP]
    lines += [f"- **{name}**: {_first_line(feature)}" for name, feature in FEATURES.items()]
    lines += ["", f"| family | {' | '.join(FEATURES)} |", f"|---|{'---|' * len(FEATURES)}"]
    for name, verdicts in found.items():
        cells = [_cell(verdicts[feature], reasons) for feature in FEATURES]
        lines.append(f"| {name} ({_type(name)}) | {' | '.join(cells)} |")
    lines += ["", "## Reasons", ""]
    lines += [f"{number}. {reason}" for reason, number in reasons.items()]
    lines += [
        "",
        "## Not supported by TransformerLens",
        "",
        "`lensclust.load` refuses these causal model types of transformers, for which "
        "TransformerLens has no adapter: " + ", ".join(unknown()) + ".",
        "",
    ]
    return "\n".join(lines).replace(f"{_TOP}\n", _TOP)


def cells(verdicts: Mapping[str, Verdict]) -> dict[str, str]:
    """What the page says of one family, without reasons."""
    return {feature: WORDS.get(verdict.kind, "WRONG") for feature, verdict in verdicts.items()}


def documented() -> dict[str, dict[str, str]]:
    """What docs/models.md says: family -> feature -> word."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ]
    names = rows[0][1:]
    return {
        row[0].split()[0]: {
            name: cell.split()[0] for name, cell in zip(names, row[1:], strict=True)
        }
        for row in rows[1:]
    }


def _cell(verdict: Verdict, reasons: dict[str, int]) -> str:
    word = WORDS.get(verdict.kind, "**WRONG**")
    if verdict.kind in ("right", "none"):
        return word
    return f"{word} ({reasons.setdefault(_reason(verdict.reason), len(reasons) + 1)})"


def _reason(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<")


def _type(name: str) -> str:
    return FAMILIES[name].config.removesuffix("Config")


def _first_line(feature: Callable[[Subject], None]) -> str:
    return (feature.__doc__ or "").splitlines()[0]
