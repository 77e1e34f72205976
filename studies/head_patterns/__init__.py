"""How fine-tuning changes the activation patterns of attention heads, by task."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import lensclust as lc
from studies.study import Context, Findings

if TYPE_CHECKING:
    import pandas as pd

from studies.head_patterns.options import Options

NOTES = (
    "Tasks, models and trainings are a reconstruction, and the models are fifty times smaller than "
    "the source's: directions are tested, not its numbers. Sign constraint, intercept, reference "
    "of the change over samples, and the recipe for choosing examples are not known to us.",
    "A pattern uses the gradient of the loss, so it shrinks with the loss, whatever the heads do. "
    "Scores are given for the source's activations ('raw') and for each head's share of the "
    "pattern's sum ('shares'), which a common factor does not change.",
    "Each run of a task has separate batches and test prompts, so that patterns of one task do not "
    "agree because of shared prompts.",
    "Mixes of basic tasks are compared at equal numbers of training prompts; their instructions "
    "are equally long. 'Its own examples' sees the scarce prompts as often as the others see both.",
)
ONE_SEED = "One seed leaves no interval: claims over seeds stay inconclusive."
NO_MODEL = "No pretrained model was run (--pretrained names one)."


class HeadPatterns(Options):
    def check(self) -> None:
        """Raise InputError for options that leave a claim without a measurement."""
        least = {"pretrained_runs": 2, "pretrained_steps": 2, "pretrained_batch": 1, "rank": 0}
        least |= {"measured": 2, "known_moves": 1, "known_maps": 1, "complex_tasks": 1}
        least |= {"controls": 1, "runs": 2, "tuning_steps": 2, "n_checkpoints": 3, "scarce": 2}
        least |= {"mixed": 1, "permutations": 2, "steps": 1, "batch_size": 1, "n_layers": 3}
        least |= {"n_heads": 1}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise lc.InputError(f"{name}={getattr(self, name)}: expected at least {number}")
        if self.pretrained != "none" and self.rank and find_spec("peft") is None:
            raise lc.InputError(
                f"rank={self.rank}: adapters need peft: pip install 'lensclust[peft]', or rank 0"
            )
        if self.pretrained != "none" and self.texts != "none":
            known = lc.tasks.data_names()
            if self.texts not in known:
                raise lc.InputError(f"texts={self.texts!r}: expected one of {', '.join(known)}")
        from lensclust.models import native_config
        from studies.head_patterns.synthetic import prompts_of

        native_config(self.model, n_layers=self.n_layers, n_heads=self.n_heads)
        prompts_of(self, 0)

    def run(self, context: Context) -> Findings:
        """Tune and measure each seed and each task of the pretrained model, then decide claims."""
        items: list[int | str] = list(context.seeds)
        if self.pretrained != "none":
            from studies.head_patterns.pretrained import task_names

            # Downloads happen here, once and visibly, before workers need them.
            lc.load(self.pretrained, progress=context.progress)
            if self.texts != "none":
                lc.tasks.labelled_texts(self.texts, progress=context.progress)
            items = [*task_names(self), *items]
        found = context.sweep(partial(measure, self), items, "part")
        import pandas as pd

        from studies.head_patterns.claims import claims
        from studies.head_patterns.figures import SHOWS, pictures
        from studies.head_patterns.scores import derived

        scores = pd.concat(
            [found["scores"], derived(found["scores"], permutations=self.permutations)],
            ignore_index=True,
        )
        return Findings(
            scores=scores,
            claims=claims(scores),
            figures=pictures(scores),
            shows=SHOWS,
            notes=[
                *NOTES,
                *([ONE_SEED] if len(context.seeds) == 1 else []),
                *([NO_MODEL] if self.pretrained == "none" else []),
            ],
            provenance={"weights": dict(found["weights"].itertuples(index=False))},
        )


def measure(study: Options, item: int | str, folder: Path) -> dict[str, pd.DataFrame]:
    """Measure one seed of the trained models or one pretrained task, in one process."""
    if isinstance(item, int):
        from studies.head_patterns.synthetic import measure_seed

        return measure_seed(study, item, folder)
    from studies.head_patterns.pretrained import measure_task

    return measure_task(study, item)
