"""Linear regression: points on two lines, and one more point to predict.

Slopes and intercepts are fully crossed, and those of queries are never in demonstrations. A
model's output is parsed as a number (`decoded`), or counted as none.

Type of task from Yousefi et al. 2023 (arXiv 2310.00313). Wording and numbers are ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.prompts import Prompts
from lensclust.tasks.in_context.demonstrations import in_random_order
from lensclust.tasks.in_context.questions import (
    UNNAMED,
    Piece,
    Question,
    chosen_names,
    few_shot,
    filled,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASK = "linear_regression"
SLOPES = tuple(n for n in range(-9, 10) if n)
INTERCEPTS = tuple(range(-9, 10))
PLACES = tuple(range(10))
NAMES = ("A", "B")
TEMPLATES = {
    "points": "{lines}\nThe next point on line {name} is ({x},",
    "lines": "{lines}\nFor x = {x}, line {name} has y =",
}
_NUMBER = re.compile(r"[-+−]?\d+(?:\.\d+|/\d+)?")


@checked_arguments
def linear_regression(
    tokenizer: PreTrainedTokenizerBase,
    *,
    slopes: int = 6,
    intercepts: int = 6,
    points: int = 3,
    distractors: int = 1,
    shots: int | Sequence[int] = (0, 4),
    templates: Sequence[str] | None = None,
    shuffled: bool = False,
    seed: int = 0,
    chat: bool = False,
) -> Prompts:
    """Prompts that list points ``(x, y)`` with ``y = slope * x + intercept`` and ask for one more.

    Slopes and intercepts are fully crossed. The distractor is a line with another slope and
    intercept; the order of the lines is random. All numbers are whole.

    Args:
        tokenizer: a fast tokenizer (spans need character offsets).
        slopes, intercepts: number of those in queries, of the 18 and 19 from -9 to 9 (no slope is
            0); the others are for demonstrations.
        points: number of points of each line, 2 to 9, with different x from 0 to 9.
        distractors: 1 for another line beside that of the query, or 0.
        shots: numbers of demonstrations before the query.
        templates: wordings (``points``, ``lines``); all by default.
        shuffled: permute the answers of the demonstrations.
        seed: of the split into queries and demonstrations, of points, distractors, order, draws.
        chat: wrap each prompt in the tokenizer's chat template.

    Returns:
        Prompts as those of `few_shot`, with further rows ``slope``, ``intercept``, ``x``, ``y``
        (numbers), ``distractor_y`` (of the other line at the same x; NaN without) and ``place``
        (of the relevant line, from 0); and spans ``relevant`` and, with a distractor,
        ``irrelevant``: the points of one line each.

    Raises:
        InputError: if a size is out of range, a template is not in the set, or as `few_shot`.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    >>> prompts = linear_regression(tokenizer, templates=["lines"], shots=0)
    >>> print(prompts.text(0), prompts.rows["output"][0])
    Line A: (7, -56), (8, -63), (3, -28)
    Line B: (8, -54), (0, -6), (4, -30)
    For x = 2, line A has y = -21
    """
    _check(slopes, intercepts, points, distractors)
    wordings = chosen_names(templates, TEMPLATES, kind="template", task=TASK)
    generator = np.random.default_rng([seed, 3])
    rising, starting = in_random_order(SLOPES, seed), in_random_order(INTERCEPTS, seed)
    sides = [
        (rising[:slopes], starting[:intercepts]),
        (rising[slopes:], starting[intercepts:]),
    ]
    asked, shown = (
        [
            _question(drawing, wording)
            for drawing in _drawings(*side, points, distractors, generator)
            for wording in wordings
        ]
        for side in sides
    )
    return few_shot(
        asked, shown, tokenizer, task=TASK, shots=shots, shuffled=shuffled, seed=seed, chat=chat
    )


def decoded(answers: Sequence[str]) -> Float[np.ndarray, " answer"]:
    """The number at the start of each answer's first line, NaN if there is none.

    Decimals and fractions are read; words before the number are not.

    >>> decoded([" 12)", " -3.5\\n7", " 1/4", "about 3", ""]).tolist()
    [12.0, -3.5, 0.25, nan, nan]
    """
    return np.array([_number(answer) for answer in answers])


@dataclass(frozen=True)
class Line:
    """A line and the x values of its given points."""

    slope: int
    intercept: int
    given: tuple[int, ...]

    def at(self, x: int) -> int:
        return self.slope * x + self.intercept

    @property
    def text(self) -> str:
        return ", ".join(f"({x}, {self.at(x)})" for x in self.given)


@dataclass(frozen=True)
class Drawing:
    """Lines, that of the query first; the x of the query; and the order of the lines."""

    lines: tuple[Line, ...]
    x: int
    order: tuple[int, ...]


def _drawings(
    slopes: list[int],
    intercepts: list[int],
    points: int,
    distractors: int,
    generator: np.random.Generator,
) -> list[Drawing]:
    """Every slope with every intercept, each with its distractor line."""
    found = []
    for slope, intercept in product(slopes, intercepts):
        x, *given = generator.permutation(PLACES).tolist()
        lines = [Line(slope, intercept, tuple(given[:points]))]
        for _ in range(distractors):
            own = generator.permutation([place for place in PLACES if place != x]).tolist()
            other_slope = int(generator.choice([value for value in slopes if value != slope]))
            other = int(generator.choice([value for value in intercepts if value != intercept]))
            lines.append(Line(other_slope, other, tuple(own[:points])))
        order = generator.permutation(distractors + 1).tolist()
        found.append(Drawing(tuple(lines), x, tuple(order)))
    return found


def _question(drawing: Drawing, template: str) -> Question:
    """A drawing in one wording; lines are lettered in the order of the text."""
    own, *others = drawing.lines
    labels = ("relevant", "irrelevant")
    shown: list[Piece] = []
    for letter, place in zip(NAMES, drawing.order, strict=False):
        shown += [(UNNAMED, "\n")] if shown else []
        shown += [(UNNAMED, f"Line {letter}: "), (labels[place], drawing.lines[place].text)]
    place = drawing.order.index(0)
    fields = {
        "lines": shown,
        "name": [(UNNAMED, NAMES[place])],
        "x": [(UNNAMED, str(drawing.x))],
    }
    y = own.at(drawing.x)
    return Question(
        item=f"{own.slope}x{own.intercept:+}",
        template=template,
        pieces=filled(TEMPLATES[template], fields),
        answer=f"{y})" if template == "points" else f"{y}",
        labels={
            "slope": own.slope,
            "intercept": own.intercept,
            "x": drawing.x,
            "y": y,
            "distractor_y": float(others[0].at(drawing.x)) if others else float("nan"),
            "place": place,
        },
    )


def _check(slopes: int, intercepts: int, points: int, distractors: int) -> None:
    if distractors not in (0, 1):
        raise InputError(f"{TASK}: distractors={distractors}, expected 0 or 1")
    sizes = {
        "slopes": (slopes, len(SLOPES)),
        "intercepts": (intercepts, len(INTERCEPTS)),
    }
    for what, (number, most) in sizes.items():
        least = distractors + 1
        if not least <= number <= most - least:
            raise InputError(
                f"{TASK}: {what}={number} with distractors={distractors}, expected {least} to "
                f"{most - least}"
            )
    if not 2 <= points <= len(PLACES) - 1:
        raise InputError(f"{TASK}: points={points}, expected 2 to {len(PLACES) - 1}")


def _number(answer: str) -> float:
    found = _NUMBER.match(answer.lstrip(" "))
    try:
        return float(Fraction(found[0].replace("−", "-"))) if found else float("nan")
    except ZeroDivisionError:
        return float("nan")
