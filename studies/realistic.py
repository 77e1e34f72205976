"""Does a pretrained language model cluster natural-language instructions by task?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import lensclust as lc
import probes
from studies.frames import where
from studies.study import Context, Findings, Study, check_clusters, silenced

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from studies.realistic_units import Source

FOLDER_INPUTS = 10


@dataclass(frozen=True)
class Realistic(Study):
    """Cluster a pretrained model's states by task, against wording and random weights.

    On the project's own set every input stands under every task, so states are clustered given
    the input. On a folder of instruction_induction inputs differ by task, so prompts are
    clustered in folds that hold each instruction once.

    Attributes:
        model: anything `lensclust.load` takes.
        data: a folder in the layout of instruction_induction; default the project's own set.
        chat: wrap prompts in the model's chat template.
        inputs: inputs of the own set (at most and by default 24), or of each task of a folder
            (by default 10).
        control_inputs: how many of them the random-weights model reads too.
        heads: cluster every head as well as every layer.
        k: clusters; default as many as there are tasks.
        permutations: permuted labellings behind each score.
    """

    title: ClassVar[str] = "task clusters in a pretrained model, against wording and chance"
    paper: ClassVar[str] = "Wu & Varshney 2402.12151 (reconstruction)"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {"inputs": 3, "control_inputs": 2, "heads": False, "permutations": 20},
        "default": {},
        "paper": {"inputs": 24, "control_inputs": 24, "permutations": 1000},
    }
    cost: ClassVar[Mapping[str, str]] = {
        "smoke": "a minute, after a download of 93 MB",
        "default": "five minutes on two cores, after a download of 93 MB",
        "paper": "minutes on a GPU",
    }

    model: str = "smollm2-135m-instruct"
    data: Path | None = None
    chat: bool = False
    inputs: int | None = None
    control_inputs: int = 8
    heads: bool = True
    k: int | None = None
    permutations: int = 100

    def check(self) -> None:
        """Refuse what can be refused before a model is loaded."""
        if self.permutations < 2:
            raise lc.InputError(f"permutations={self.permutations}: expected at least 2")
        for name, value in {"inputs": self.inputs, "control_inputs": self.control_inputs}.items():
            if value is not None and value < 2:
                raise lc.InputError(f"{name}={value}: an interval needs at least 2")
        if self.data is not None:
            from lensclust.tasks.instruction_induction import read_folder

            read_folder(self.data)

    def run(self, context: Context) -> Findings:
        """Read both models, cluster, compare with the wording, decide."""
        import pandas as pd

        from studies.opened_heads import opened_heads, sample_prompts
        from studies.realistic_findings import (
            HELD_OUT,
            HELD_OUT_WORDS,
            MODEL,
            RANDOM,
            SHOWS,
            WORDS,
            Evidence,
            claims,
            notes,
            pictures,
            views,
        )

        model = lc.load(self.model, progress=context.progress)
        prompts = self.prompts(model.tokenizer)
        given = "input" if self.data is None else "fold"
        if self.k is not None:
            check_clusters(self.k, prompts.rows, [given])
        sites = ["resid", "head"] if self.heads else ["resid"]
        own = self.read(model, prompts, sites, context, "activations")
        weights = {"model": own.attrs["weights"]}
        samples = sample_prompts(prompts, given) if self.heads else None
        attention = None if samples is None else probes.sample_attention(model, samples)
        words = probes.bag_of_tokens(prompts)
        measured = [
            self.measure(own, MODEL, given, context),
            self.measure(words, WORDS, given, context),
        ]
        if self.data is None:
            others = self.prompts(model.tokenizer, held_out=True)
            acts = self.read(model, others, ["resid"], context, "held-out")
            measured.append(self.measure(acts, HELD_OUT, given, context))
            measured.append(
                self.measure(probes.bag_of_tokens(others), HELD_OUT_WORDS, given, context)
            )
        del model
        few = prompts.where(**{given: list(prompts.rows[given].unique()[: self.control_inputs])})
        controls = []
        for seed in context.seeds:
            control = lc.load(self.model, random_weights=True, seed=seed, progress=context.progress)
            acts = self.read(control, few, ["resid"], context, f"random-{seed}")
            weights[f"random weights {seed}"] = acts.attrs["weights"]
            measured.append(self.measure(acts, RANDOM, given, context, seed))
            controls.append(acts)
        tables, sources = zip(*measured, strict=True)
        scores = pd.concat(tables, ignore_index=True)
        # Which neighbours are right prompt by prompt, where it is reported.
        read = [own, words, *controls]
        places = [each for each in sources if each.name in (MODEL, WORDS, RANDOM)]
        near = pd.concat([self.neighbours(a, s) for a, s in zip(read, places, strict=True)])
        seen = Evidence(sources, given)
        shown: dict[str, Any] = dict(views(scores, own, given))
        if self.heads:
            shown["heads"] = opened_heads(
                own,
                prompts,
                where(scores, source=MODEL, kind="head", by="task", given=given),
                attention,
                given=given,
                labels=("task", "template", "input"),
                title="The heads, by how well what they add clusters by task",
            )
        return Findings(
            scores=scores,
            claims=claims(scores, seen, near),
            figures=pictures(scores, own, given),
            shows=SHOWS,
            views=shown,
            notes=notes(scores, seen),
            provenance={"weights": weights, "prompts": prompts.digest(), "n": len(prompts)},
        )

    def prompts(self, tokenizer: Any, *, held_out: bool = False) -> lc.Prompts:
        """The task set, with texts and a ``fold`` that holds every instruction once.

        Folds run along the diagonals of instruction and input, so that the prompts of one task
        in one fold differ in both. ``held_out`` asks for the own set's other wordings.
        """
        if self.data is None:
            found = lc.tasks.natural(
                tokenizer, inputs=self.inputs, chat=self.chat, held_out=held_out
            )
        else:
            inputs = FOLDER_INPUTS if self.inputs is None else self.inputs
            found = lc.tasks.instruction_induction(
                self.data, tokenizer, inputs=inputs, chat=self.chat
            )
        rows = found.rows
        nth_input = rows.groupby("instruction").cumcount()
        nth_instruction = rows.groupby("task")["instruction"].transform(lambda s: s.factorize()[0])
        n_inputs = rows.groupby("instruction")["input"].transform("size")
        fold = ((nth_input + nth_instruction) % n_inputs).astype(str)
        return replace(found, rows=rows.assign(fold=fold, text=found.texts))

    def read(
        self, model: Any, prompts: lc.Prompts, sites: list[str], context: Context, name: str
    ) -> xr.Dataset:
        """Activations in the run directory, so that a killed run does not read them again."""
        store = context.out / f"{name}.zarr"
        return lc.extract(
            model, prompts, sites, store=store, resume=True, progress=context.progress
        ).load()

    def measure(
        self, acts: xr.Dataset, source: str, given: str, context: Context, seed: int = 0
    ) -> tuple[pd.DataFrame, Source]:
        """Scores of one source of states, and by group with the partitions behind them."""
        import pandas as pd

        from studies.realistic_units import Source

        options: dict[str, Any] = {
            "permutations": self.permutations,
            "seed": seed,
            "jobs": context.jobs,
            "progress": context.progress,
        }
        with silenced("probes.clustering"):  # where states coincide, as at layer 0, they score 0
            inside = probes.cluster(
                acts, given=given, k=self.k, score_against=["template"], **options
            )
            across = probes.cluster(
                acts, given=None, score_against=["input", "template"], kinds="resid", **options
            )
        near = probes.nearest_neighbour(
            acts, apart=self.apart, per=given, kinds="resid", permutations=self.permutations
        )
        place = ["site", "kind", "layer", "head", "by", "metric"]
        near_all = near.groupby(place, dropna=False, sort=False)[["value", "null_mean"]].mean()
        scores = pd.concat(
            [inside.frame, across.frame, near_all.reset_index().assign(given="none")],
            ignore_index=True,
        )
        groups = pd.concat([inside.groups, near[list(inside.groups)]], ignore_index=True)
        labels = {
            name: ("prompt", acts[name].values)
            for name in dict.fromkeys(("task", "template", "instruction", given))
        }
        found = Source(source, seed, groups, inside.assignments.assign_coords(labels), given)
        return scores.assign(source=source, seed=seed), found

    @property
    def apart(self) -> list[str]:
        """What neighbours must not share: a folder's inputs belong to one task each."""
        return ["template"] if self.data is None else ["template", "input"]

    def neighbours(self, acts: xr.Dataset, source: Source) -> pd.DataFrame:
        """Whether each prompt's neighbour has its task, at the site that other groups chose."""
        import pandas as pd

        from studies.realistic_units import chosen_sites

        sites = chosen_sites(source.groups, "1nn_accuracy")
        prompt = [f"{i}" for i in range(acts.sizes["prompt"])]
        rows = []
        for site in sorted(set(sites.values())):
            at = acts.sel(layer=[lc.Site.parse(site).layer])[["resid"]].assign_coords(
                row=("prompt", prompt)
            )
            found = probes.nearest_neighbour(
                at, apart=self.apart, per="row", permutations=2, progress=False
            )
            right = found.set_index("group").loc[prompt, "value"].to_numpy()
            group = acts[source.given].values.astype(str)
            frame = pd.DataFrame(
                {
                    "prompt": prompt,
                    "value": right,
                    "group": group,
                    "instruction": acts["instruction"].values,
                }
            )
            rows.append(frame[[sites.get(name) == site for name in group]])
        return pd.concat(rows).assign(source=source.name, seed=source.seed)
