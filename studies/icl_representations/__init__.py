"""How demonstrations change states and attention, and whether answers depend on it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import lensclust as lc
from studies.study import Context, Findings

if TYPE_CHECKING:
    import pandas as pd

from studies.icl_representations.options import LINES, PERSONA, QUESTIONS, READING, WORDS, Options

NOTES = (
    "Only the abstracts and reviews of the source were available: prompts, pooling, correlations "
    "and statistics are ours, and numbers are not comparable with the source's. Its models are a "
    "hundred to five hundred times larger.",
    "States are those of the last token, which in the last layers nearly encode the answer: "
    "claims give the lower half of the layers beside all layers.",
    "Links between changes are rank correlations over prompts. 'Controlled' partials out "
    "template, condition and lengths; intervals resample items, p permutes whole items and is "
    "corrected over layers by the maximum. A link that is significant without control only is "
    "marked as vanished.",
    "Interval and verdict of a claim are over seeds: other people, activities, lines and "
    "demonstrations, the same model and wordings.",
)
ONE_SEED = "One seed leaves no interval: claims over seeds stay inconclusive."


class ICLRepresentations(Options):
    def check(self) -> None:
        """Raise InputError for options that leave a claim without a measurement."""
        # With two names and two activities, prompt lengths may give away the answer.
        least = {"shots": 2, "names": 3, "activities": 2, "slopes": 2, "intercepts": 2}
        least |= {"persona_names": 2, "persona_activities": 2, "templates": 1}
        least |= {"vector_shots": 2, "top_heads": 1, "layer_stride": 1, "permutations": 2}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise lc.InputError(f"{name}={getattr(self, name)}: expected at least {number}")
        from lensclust.tasks.words import task_names, words

        known = task_names()
        if unknown := [name for name in self.word_tasks if name not in known]:
            raise lc.InputError(f"word_tasks: no task {unknown[0]!r}: there are {', '.join(known)}")
        if len(self.word_tasks) < 3 or len(set(self.word_tasks)) < len(self.word_tasks):
            raise lc.InputError(
                f"word_tasks={self.word_tasks}: expected three or more, all different"
            )
        if len(self.word_shots) < 2 or list(self.word_shots) != sorted(set(self.word_shots)):
            raise lc.InputError(
                f"word_shots={self.word_shots}: expected two rising numbers or more"
            )
        # Half of the words are demonstrations, half queries: to make vectors and to test them.
        half = len(words()) // 2
        if not 3 <= self.word_queries <= half // 2:
            raise lc.InputError(f"word_queries={self.word_queries}: expected 3 to {half // 2}")
        for name, number in {
            "vector_shots": self.vector_shots,
            "word_shots": self.word_shots[-1],
        }.items():
            if number > half:
                raise lc.InputError(f"{name}={number}: expected at most {half}")
        from studies.icl_representations.prompts import check_sizes

        check_sizes(self)

    def run(self, context: Context) -> Findings:
        """Measure questions and word tasks of each seed, then decide the claims."""
        # The download happens here, once and visibly, before workers need it.
        model = lc.load(self.model, progress=context.progress)
        if model.tokenizer is None:
            raise lc.InputError(f"model={self.model!r}: has no tokenizer, needed for questions")
        # The longest first, so that no process is left with it at the end.
        tasks = (READING, LINES, WORDS, PERSONA)
        parts = [f"{task}-{seed}" for seed in context.seeds for task in tasks]
        found = context.sweep(partial(measure, self), parts, "part")
        from studies.icl_representations.claims import claims, vanished
        from studies.icl_representations.figures import SHOWS, pictures

        scores = found["scores"]
        return Findings(
            scores=scores,
            claims=claims(scores),
            figures=pictures(scores),
            shows=SHOWS,
            notes=[*NOTES, *vanished(scores), *([ONE_SEED] if len(context.seeds) == 1 else [])],
            provenance={"weights": dict(found["weights"].itertuples(index=False))},
        )


def measure(study: Options, part: str, folder: Path) -> dict[str, pd.DataFrame]:
    """Measure one task's questions, or the word tasks, of one seed, in one process."""
    import pandas as pd

    from studies.icl_representations.questions import measure_questions
    from studies.icl_representations.words import measure_words

    task, _, seed = part.partition("-")
    model = lc.load(study.model, progress=False)
    if task == WORDS:
        scores = measure_words(study, model, int(seed)).assign(part=WORDS)
    else:
        scores = measure_questions(study, model, task, int(seed)).assign(part=QUESTIONS, task=task)
    scores["seed"] = int(seed)
    weights = pd.DataFrame({"name": [study.model], "fingerprint": [lc.fingerprint(model)]})
    return {"scores": scores, "weights": weights}
