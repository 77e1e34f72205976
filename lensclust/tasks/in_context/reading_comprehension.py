"""Reading comprehension: who does what, with distractor sentences.

People and activities are fully crossed, so neither predicts the other, and those of queries are
never in demonstrations.

Type of task from Yousefi et al. 2023 (arXiv 2310.00313). The wording is ours.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

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

TASK = "reading_comprehension"


@checked_arguments
def reading_comprehension(
    tokenizer: PreTrainedTokenizerBase,
    *,
    names: int = 8,
    activities: int = 6,
    distractors: int = 1,
    shots: int | Sequence[int] = (0, 4),
    templates: Sequence[str] | None = None,
    shuffled: bool = False,
    seed: int = 0,
    chat: bool = False,
) -> Prompts:
    """Prompts that say what some people are doing, and ask about one of them.

    Names and activities are fully crossed. The relevant sentence is among ``distractors``
    sentences about other names and activities, in random order.

    Args:
        tokenizer: a fast tokenizer (spans need character offsets).
        names, activities: number of those in queries; the others of the 24 and 20 are for
            demonstrations.
        distractors: number of irrelevant sentences.
        shots: numbers of demonstrations before the query.
        templates: wordings (``question``, ``notes``, ``report``); all by default.
        shuffled: permute the answers of the demonstrations.
        seed: of the split into queries and demonstrations, of distractors, order and draws.
        chat: wrap each prompt in the tokenizer's chat template.

    Returns:
        Prompts as those of `few_shot`, with further rows ``name``, ``activity``,
        ``distractor_name``, ``distractor_activity`` (of the first distractor; empty without),
        ``place`` (of the relevant sentence, from 0), and spans ``relevant`` and, with
        distractors, ``irrelevant``, ``irrelevant_2``, ...: one sentence each.

    Raises:
        InputError: if a size is out of range, a template is not in the set, or as `few_shot`.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    >>> prompts = reading_comprehension(tokenizer, templates=["notes"], shots=0)
    >>> print(prompts.text(0), prompts.rows["output"][0])
    Seen today: Simon is writing a letter. Peter is catching fish.
    To sum up, Peter is catching fish
    """
    people = divided(names, activities, distractors, seed, task=TASK)
    wordings = wordings_of(templates, task=TASK)
    asked, shown = (
        [question(scene, wording) for scene in scenes for wording in wordings]
        for scenes in (people.asked, people.shown)
    )
    return few_shot(
        asked, shown, tokenizer, task=TASK, shots=shots, shuffled=shuffled, seed=seed, chat=chat
    )


@dataclass(frozen=True)
class Scene:
    """Names with activities, the relevant one first, and the order of the sentences."""

    people: tuple[tuple[str, str], ...]
    order: tuple[int, ...]

    @property
    def item(self) -> str:
        """Identifier of this scene within a division."""
        return "/".join(self.people[0])


@dataclass(frozen=True)
class Division:
    """Scenes for queries and scenes for demonstrations, with different names and activities."""

    asked: tuple[Scene, ...]
    shown: tuple[Scene, ...]


def divided(names: int, activities: int, distractors: int, seed: int, *, task: str) -> Division:
    """All scenes of ``names`` names and ``activities`` activities, and all scenes of the others.

    Raises:
        InputError: if too few names or activities are left for the distractors on either side;
            starts with ``task``.
    """
    content = data()
    for what, number in {"names": names, "activities": activities}.items():
        least, most = distractors + 1, len(content[what]) - distractors - 1
        if distractors < 0 or not least <= number <= most:
            raise InputError(
                f"{task}: {what}={number} with distractors={distractors}, expected {least} to "
                f"{most} of the {len(content[what])} and distractors from 0"
            )
    orders = [
        in_random_order(content["names"], seed),
        in_random_order(content["activities"], seed),
    ]
    sides = [
        (orders[0][:names], orders[1][:activities]),
        (orders[0][names:], orders[1][activities:]),
    ]
    generator = np.random.default_rng([seed, 3])
    return Division(*(_scenes(*side, distractors, generator) for side in sides))


def wordings_of(templates: Sequence[str] | None, *, task: str) -> list[str]:
    """The chosen templates, in their order.

    Raises:
        InputError: if one is not in the set or there is none; starts with ``task``.
    """
    return chosen_names(templates, data()["templates"], kind="template", task=task)


def question(scene: Scene, template: str, persona: Sequence[Piece] = ()) -> Question:
    """A scene in one wording, after the persona."""
    content = data()
    named = ["relevant", "irrelevant", *(f"irrelevant_{n}" for n in range(2, len(scene.people)))]
    sentences = [
        (label, content["sentence"].format(name=name, activity=activity))
        for label, (name, activity) in zip(named, scene.people, strict=False)
    ]
    story: list[Piece] = []
    for place in scene.order:
        story += [(UNNAMED, " ")] if story else []
        story.append(sentences[place])
    (name, activity), *others = scene.people
    other_name, other_activity = others[0] if others else ("", "")
    fields = {"persona": persona, "story": story, "name": [(UNNAMED, name)]}
    return Question(
        item=scene.item,
        template=template,
        pieces=filled(content["templates"][template], fields),
        answer=activity,
        labels={
            "name": name,
            "activity": activity,
            "distractor_name": other_name,
            "distractor_activity": other_activity,
            "place": scene.order.index(0),
        },
    )


@cache
def data() -> dict[str, Any]:
    """Names, activities and wordings, as shipped."""
    text = (
        files("lensclust.tasks.in_context")
        .joinpath("reading_comprehension.json")
        .read_text("utf-8")
    )
    return json.loads(text)


def _scenes(
    names: list[str], activities: list[str], distractors: int, generator: np.random.Generator
) -> tuple[Scene, ...]:
    """Every name with every activity, each with random distractors."""
    found = []
    for name, activity in product(names, activities):
        other_names = generator.permutation([n for n in names if n != name])
        other_activities = generator.permutation([a for a in activities if a != activity])
        others = zip(other_names[:distractors], other_activities[:distractors], strict=True)
        people = ((name, activity), *((str(n), str(a)) for n, a in others))
        order = generator.permutation(distractors + 1).tolist()
        found.append(Scene(people, tuple(order)))
    return tuple(found)
