"""The claims of a run in the terminal: verdicts, numbers, controls and rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from lensclust.results import Claim

# Colour is always repeated by text.
_LOOKS = {
    "supported": ("✓ supported", "green"),
    "negligible": ("≈ negligible", "cyan"),
    "contradicted": ("✗ contradicted", "red"),
    "inconclusive": ("? inconclusive", "yellow"),
}
# Below this width claims are printed one below the other instead of in columns.
_WIDE = 120


def print_claims(claims: Sequence[Claim], console: Console) -> None:
    """Print claims as a table, or one below the other if the terminal is narrow."""
    tally = Text("  ").join(
        Text(f"{_LOOKS[verdict][0]}: {count}", style=_LOOKS[verdict][1])
        for verdict in _LOOKS
        if (count := sum(claim.verdict == verdict for claim in claims))
    )
    if console.width >= _WIDE:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0))
        table.add_column("verdict", no_wrap=True)
        for column, ratio in (("claim", 4), ("estimate", 2), ("control", 3), ("rule", 2)):
            table.add_column(column, overflow="fold", ratio=ratio)
        for claim in claims:
            table.add_row(
                _verdict(claim),
                Text(claim.statement),
                *map(Text, _numbers(claim)),
                Text(_rule(claim)),
            )
        console.print(table)
    else:
        for claim in claims:
            console.print(Text.assemble(_verdict(claim), "  ", claim.statement))
            estimate, control = _numbers(claim)
            said = Text(f"{estimate}; {control}\n{_rule(claim)}", style="dim")
            console.print(Padding(said, (0, 0, 1, 4)))
    if claims:
        console.print(tally)


def _verdict(claim: Claim) -> Text:
    said, colour = _LOOKS[claim.verdict]
    return Text(said, style=colour)


def _rule(claim: Claim) -> str:
    if claim.q != claim.q:
        return claim.rule
    return f"{claim.rule}; q {claim.q:.2g}{', holds corrected' if claim.holds_corrected else ''}"


def _numbers(claim: Claim) -> tuple[str, str]:
    low, high = claim.ci95
    interval = "one value" if low != low else f"{low:.2f} .. {high:.2f}"
    control = ", ".join(f"{name} {value:.2f}" for name, value in claim.control.items())
    return f"{claim.estimate:.2f} [{interval}]", control or "no control"
