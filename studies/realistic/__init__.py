"""Does a pretrained language model cluster natural-language instructions by task?"""

from __future__ import annotations

from typing import Any

import lensclust as lc
import probes
from studies.realistic.options import Options
from studies.realistic.pretrained import measure, neighbours, prompts_of, read_states
from studies.scores import where
from studies.study import Context, Findings, check_clusters


class Realistic(Options):
    def check(self) -> None:
        """Raise InputError for unusable options before a model is loaded."""
        if self.permutations < 2:
            raise lc.InputError(f"permutations={self.permutations}: expected at least 2")
        for name, value in {"inputs": self.inputs, "control_inputs": self.control_inputs}.items():
            if value is not None and value < 2:
                raise lc.InputError(f"{name}={value}: an interval needs at least 2")
        if self.data is not None:
            from lensclust.tasks.words import read_folder

            read_folder(self.data)

    def run(self, context: Context) -> Findings:
        """Read both models, cluster, compare with the wording, decide."""
        import pandas as pd

        from studies.head_pages import opened_heads, sample_prompts
        from studies.realistic.claims import (
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
        prompts = prompts_of(self, model.tokenizer)
        given = "input" if self.data is None else "fold"
        if self.k is not None:
            check_clusters(self.k, prompts.rows, [given])
        sites = ["resid", "head"] if self.heads else ["resid"]
        own = read_states(self, model, prompts, sites, context, "activations")
        weights = {"model": own.attrs["weights"]}
        samples = sample_prompts(prompts, given) if self.heads else None
        attention = None if samples is None else probes.sample_attention(model, samples)
        words = probes.bag_of_tokens(prompts)
        measured = [
            measure(self, own, MODEL, given, context),
            measure(self, words, WORDS, given, context),
        ]
        if self.data is None:
            others = prompts_of(self, model.tokenizer, held_out=True)
            acts = read_states(self, model, others, ["resid"], context, "held-out")
            measured.append(measure(self, acts, HELD_OUT, given, context))
            measured.append(
                measure(self, probes.bag_of_tokens(others), HELD_OUT_WORDS, given, context)
            )
        del model
        few = prompts.where(**{given: list(prompts.rows[given].unique()[: self.control_inputs])})
        controls = []
        for seed in context.seeds:
            control = lc.load(self.model, random_weights=True, seed=seed, progress=context.progress)
            acts = read_states(self, control, few, ["resid"], context, f"random-{seed}")
            weights[f"random weights {seed}"] = acts.attrs["weights"]
            measured.append(measure(self, acts, RANDOM, given, context, seed))
            controls.append(acts)
        tables, sources = zip(*measured, strict=True)
        scores = pd.concat(tables, ignore_index=True)
        # Whether each prompt's neighbour is right, at the reported site.
        read = [own, words, *controls]
        places = [each for each in sources if each.name in (MODEL, WORDS, RANDOM)]
        near = pd.concat([neighbours(self, a, s) for a, s in zip(read, places, strict=True)])
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
                title="Heads by the clustering of their outputs by task",
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
