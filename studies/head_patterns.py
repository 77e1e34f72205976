"""What fine-tuning does to attention heads: patterns of activation by task, and their parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import lensclust as lc
from studies.study import Context, Findings, Study

if TYPE_CHECKING:
    import pandas as pd

NOTES = (
    "Tasks, models and trainings are a reconstruction, and the models are fifty times smaller than "
    "the source's: directions are tested, not its numbers. Sign constraint, intercept, reference "
    "of the change over samples, and the recipe for choosing examples are not known to us.",
    "A pattern is measured with the gradient of the loss, so it shrinks as the loss does, whatever "
    "the heads do. Beside the activations as the source has them ('raw') stands each head's share "
    "of the pattern's sum ('shares'), which a common factor leaves as it is.",
    "Each run of a task is tuned with its own batches and measured on its own test prompts, so "
    "that patterns of one task do not agree because they share prompts.",
    "Mixes of basic tasks are compared at equal numbers of training prompts; their instructions "
    "are equally long. 'Its own examples' sees the scarce prompts as often as the others see both.",
)
ONE_SEED = "One seed leaves no interval: claims over seeds stay inconclusive."
NO_MODEL = "No pretrained model was run (--pretrained names one)."

BASIC, COMPLEX, CONTROL = "basic", "complex", "control"


@dataclass(frozen=True)
class HeadPatterns(Study):
    """Tune a model on basic tasks, on tasks composed of them and on controls; compare its heads.

    A model trained here knows moves and maps of short sequences; it is tuned on others, on
    composites of these, and on controls. The attention of a pretrained model is tuned on word
    tasks, arithmetic, and two of each in a row.

    Attributes:
        pretrained: model for the second part, anything `lensclust.load` takes; "none" for no
            such part.
        pretrained_runs: tunings of each of its tasks: its first seeds.
        pretrained_steps: tuning steps.
        pretrained_batch: prompts a step.
        pretrained_lr: learning rate of the attention weights.
        rank: of adapters (LoRA) beside them that are tuned in their place, which need the extra
            ``peft`` and about ten times the learning rate; 0 for none.
        measured: test prompts of each run that its patterns are measured on.
        texts: labelled texts that are a control task, a name as `lensclust.tasks.classification`
            takes; "none" for no such control.
        model: native preset to train.
        n_layers: its blocks.
        n_heads: heads of a block.
        width: symbols of an input.
        n_symbols: different symbols.
        known_moves: moves that the model is trained on before it is tuned.
        known_maps: maps likewise; so are a composite for each of them.
        complex_tasks: composites to tune on, each of a new move and a new map.
        controls: further new moves and maps, parts of none of these.
        steps: steps of the training before.
        batch_size: prompts a step, of all trainings.
        lr: peak learning rate of the training before.
        runs: tunings of each task.
        tuning_steps: steps of each.
        tuning_lr: learning rate of each.
        n_checkpoints: of each tuning, log-spaced, the model before it included.
        scarce: prompts of the complex task that the applications tune on.
        mixed: prompts of basic tasks that they tune on before.
        permutations: draws behind each null.
    """

    title: ClassVar[str] = "patterns of head activation, and what fine-tuning does to them"
    paper: ClassVar[str] = "Zhao et al. 2409.15820 (reconstruction and extension)"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {
            "pretrained": "none",
            "steps": 200,
            "complex_tasks": 1,
            "tuning_steps": 24,
            "n_checkpoints": 4,
            "mixed": 320,
            "permutations": 19,
        },
        "default": {},
        "paper": {
            "pretrained_steps": 200,
            "pretrained_runs": 5,
            "measured": 64,
            "steps": 8000,
            "runs": 3,
            "complex_tasks": 3,
            "tuning_steps": 400,
            "permutations": 999,
        },
    }
    cost: ClassVar[Mapping[str, str]] = {
        "smoke": "a minute",
        "default": "twenty minutes on two cores, after downloads of 93 and 18 MB",
        "paper": "hours on a GPU; --pretrained names a model of the source's size",
    }
    default_seeds: ClassVar[int] = 5

    pretrained: str = "smollm2-135m-instruct"
    pretrained_runs: int = 2
    pretrained_steps: int = 12
    pretrained_batch: int = 8
    pretrained_lr: float = 1e-4
    rank: int = 0
    measured: int = 16
    texts: str = "sst2"
    model: str = "sif-small"
    n_layers: int = 4
    n_heads: int = 8
    width: int = 3
    n_symbols: int = 8
    known_moves: int = 2
    known_maps: int = 3
    complex_tasks: int = 2
    controls: int = 1
    steps: int = 600
    batch_size: int = 64
    lr: float = 4e-3
    runs: int = 2
    tuning_steps: int = 100
    tuning_lr: float = 3e-3
    n_checkpoints: int = 6
    scarce: int = 32
    mixed: int = 1920
    permutations: int = 199

    def check(self) -> None:
        """Refuse what would leave a claim without a measurement."""
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
        from lensclust.native import native_config
        from studies.head_patterns_synthetic import prompts_of

        native_config(self.model, n_layers=self.n_layers, n_heads=self.n_heads)
        prompts_of(self, 0)

    def run(self, context: Context) -> Findings:
        """Tune and measure each seed and each task of the pretrained model, then decide."""
        items: list[int | str] = list(context.seeds)
        if self.pretrained != "none":
            from studies.head_patterns_pretrained import task_names

            # Downloads happen here, once and in sight, before workers ask for them.
            lc.load(self.pretrained, progress=context.progress)
            if self.texts != "none":
                lc.tasks.labelled_texts(self.texts, progress=context.progress)
            items = [*task_names(self), *items]
        found = context.sweep(partial(measure, self), items, "part")
        import pandas as pd

        from studies.head_patterns_figures import SHOWS, pictures
        from studies.head_patterns_findings import claims
        from studies.head_patterns_scores import derived

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


def measure(study: HeadPatterns, item: int | str, folder: Path) -> dict[str, pd.DataFrame]:
    """One seed of the trained models, or one task of the pretrained: the work of one process."""
    if isinstance(item, int):
        from studies.head_patterns_synthetic import measure_seed

        return measure_seed(study, item, folder)
    from studies.head_patterns_pretrained import measure_task

    return measure_task(study, item)
