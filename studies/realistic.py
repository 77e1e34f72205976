"""Does a pretrained language model cluster natural-language instructions by task?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import lensclust as lc
import probes
from studies.study import Context, Findings, Study

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

PAPER = "Wu & Varshney, arXiv 2402.12151"
# A baseline this close to the model leaves little to be explained by the model.
HIGH_BASELINE = 0.5
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
    permutations: int = 100

    def check(self) -> None:
        """Refuse what can be refused before a model is loaded."""
        for name, value in {"inputs": self.inputs, "control_inputs": self.control_inputs}.items():
            if value is not None and value < 2:
                raise lc.InputError(f"{name}={value}: an interval needs at least 2")
        if self.data is not None:
            from lensclust.tasks.instruction_induction import read_folder

            read_folder(self.data)

    def run(self, context: Context) -> Findings:
        """Read both models, cluster, compare with the wording, decide."""
        import pandas as pd

        model = lc.load(self.model, progress=context.progress)
        prompts = self.prompts(model.tokenizer)
        given = "input" if self.data is None else "fold"
        sites = ["resid", "head"] if self.heads else ["resid"]
        own = self.read(model, prompts, sites, context, "activations")
        weights = {"model": own.attrs["weights"]}
        del model
        measured = [self.measure(own, "model", given, context)]
        words = probes.bag_of_tokens(prompts)
        measured.append(self.measure(words, "bag of tokens", given, context))
        few = prompts.where(**{given: list(prompts.rows[given].unique()[: self.control_inputs])})
        for seed in context.seeds:
            control = lc.load(self.model, random_weights=True, seed=seed, progress=context.progress)
            acts = self.read(control, few, ["resid"], context, f"random-{seed}")
            weights[f"random weights {seed}"] = acts.attrs["weights"]
            measured.append(self.measure(acts, "random weights", given, context, seed))
        scores, groups = (
            pd.concat(tables, ignore_index=True) for tables in zip(*measured, strict=True)
        )
        best = best_by_group(groups)
        return Findings(
            scores=scores,
            claims=claims(scores, groups, best, given),
            figures=pictures(scores, plane(own, scores, given), given),
            notes=notes(scores, best, given),
            provenance={"weights": weights, "prompts": prompts.digest(), "n": len(prompts)},
        )

    def prompts(self, tokenizer: Any) -> lc.Prompts:
        """The task set, with texts and a ``fold`` that holds every instruction once.

        Folds run along the diagonals of instruction and input, so that the prompts of one task
        in one fold differ in both.
        """
        if self.data is None:
            found = lc.tasks.natural(tokenizer, inputs=self.inputs, chat=self.chat)
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
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Scores of one source of states, and the scores of each group apart."""
        import pandas as pd

        options: dict[str, Any] = {
            "permutations": self.permutations,
            "seed": seed,
            "jobs": context.jobs,
            "progress": context.progress,
        }
        inside = probes.cluster(acts, given=given, score_against=["template"], **options)
        across = probes.cluster(
            acts, given=None, score_against=["input", "template"], kinds="resid", **options
        )
        # A folder's inputs belong to one task each, so they too must not be shared.
        apart = ["template"] if self.data is None else ["template", "input"]
        near = probes.nearest_neighbour(
            acts, apart=apart, per=given, kinds="resid", permutations=self.permutations
        )
        place = ["site", "kind", "layer", "head", "by", "metric"]
        near_all = near.groupby(place, dropna=False, sort=False)[["value", "null_mean"]].mean()
        scores = pd.concat(
            [inside.frame, across.frame, near_all.reset_index().assign(given="none")],
            ignore_index=True,
        )
        groups = pd.concat([inside.groups, near[list(inside.groups)]], ignore_index=True)
        return scores.assign(source=source, seed=seed), groups.assign(source=source, seed=seed)


def best_by_group(groups: pd.DataFrame) -> pd.DataFrame:
    """Each group's scores at the best site, the site chosen on the other half of the groups.

    The best of many sites is biased upwards on the data that chose it; here no group takes part
    in choosing its own site.
    """
    import pandas as pd

    halves = {name: i % 2 for i, name in enumerate(sorted(groups["group"].unique()))}
    half = groups["group"].map(halves)
    keys = ["source", "seed", "kind"]
    found = []
    for metric in ("ari", "1nn_accuracy"):
        asked = (groups["metric"] == metric) & (groups["by"] == "task")
        for side in (0, 1):
            mean = groups[asked & (half != side)].groupby([*keys, "site"])["value"].mean()
            sites = (
                mean.groupby(keys).idxmax().map(lambda key: key[-1]).rename("site").reset_index()
            )
            own = groups[(half == side) & (groups["metric"] == metric)]
            found.append(own.merge(sites, on=[*keys, "site"]))
    return pd.concat(found, ignore_index=True)


def claims(
    scores: pd.DataFrame, groups: pd.DataFrame, best: pd.DataFrame, given: str
) -> list[lc.Claim]:
    """Decide the claims; every value is one input's (or fold's)."""
    from lensclust.results import decide

    task = best[(best["by"] == "task") & (best["kind"] == "resid")]
    ari, near = (
        task[task["metric"] == metric].pivot_table("value", "group", "source")
        for metric in ("ari", "1nn_accuracy")
    )
    template = best[(best["by"] == "template") & (best["source"] == "model")]
    template = template[template["kind"] == "resid"].groupby("group")["value"].mean()
    both = ari.dropna()
    chance = scores[(scores["metric"] == "1nn_accuracy") & (scores["source"] == "model")]
    depth = depth_correlations(groups)
    paper: dict[str, Any] = {"source": PAPER, "origin": "reconstruction"}
    ours: dict[str, Any] = {"source": "this project", "origin": "extension"}
    shared: dict[str, Any] = {"unit": given, "n_seeds": int(scores["seed"].nunique())}
    found = [
        decide(
            "above-wording",
            f"States cluster by task (best layer, given the {given}) beyond their wording: ARI "
            "above that of the bag of tokens",
            (ari["model"] - ari["bag of tokens"]).to_numpy(),
            control=_means(ari[["model", "bag of tokens"]]),
            at_least=0.2,
            **paper,
            **shared,
        ),
        decide(
            "above-random-weights",
            "and beyond what the architecture alone does: ARI above that of random weights",
            (both["model"] - both["random weights"]).to_numpy(),
            control=_means(both[["model", "random weights"]]),
            at_least=0.2,
            **paper,
            **shared,
        ),
        decide(
            "paraphrase-neighbours",
            "A prompt's nearest neighbour with another paraphrase has the same task (accuracy)",
            near["model"].to_numpy(),
            control={"chance": float(chance["null_mean"].mean())}
            | _means(near.drop(columns="model")),
            at_least=0.55,
            **paper,
            **shared,
        ),
        decide(
            "deeper",
            "Deeper layers cluster more (rank correlation of ARI with layer)",
            depth["model"].to_numpy(),
            control={"random weights": float(depth["random weights"].mean())},
            at_least=0.0,
            **paper,
            **shared,
        ),
        decide(
            "not-template",
            "The clusters are tasks, not sentence shapes: ARI with task above ARI with template",
            (ari["model"] - template).dropna().to_numpy(),
            control={"ARI with template": float(template.mean())},
            at_least=0.0,
            **ours,
            **shared,
        ),
    ]
    heads = best[(best["kind"] == "head") & (best["by"] == "task") & (best["metric"] == "ari")]
    if len(heads):
        head = heads.groupby("group")["value"].mean()
        found.append(
            decide(
                "heads",
                "A single head's output clusters by task beyond the wording (best head)",
                (head - ari["bag of tokens"]).to_numpy(),
                control={"best head": float(head.mean())} | _means(ari[["bag of tokens"]]),
                at_least=0.0,
                **ours,
                **shared,
            )
        )
    return found


def depth_correlations(groups: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rho of ARI with layer, by group and source (sources without layers left out)."""
    rows = groups[(groups["metric"] == "ari") & (groups["by"] == "task")]
    rows = rows[(rows["kind"] == "resid") & (rows["source"] != "bag of tokens")]
    rho = {
        key: part["layer"].corr(part["value"], method="spearman")
        for key, part in rows.groupby(["group", "source"])
    }
    import pandas as pd

    return pd.Series(rho).fillna(0.0).unstack()


def plane(acts: xr.Dataset, scores: pd.DataFrame, given: str) -> pd.DataFrame:
    """Two principal components of one group's states at six depths, the best layer among them."""
    import numpy as np
    import pandas as pd
    from sklearn.decomposition import PCA

    rows = select(scores, "model", "ari", given)
    last = int(rows["layer"].max())
    best = int(rows.loc[rows["value"].idxmax(), "layer"])
    layers = sorted({*np.linspace(0, last, 5).round().astype(int).tolist(), best})
    part = acts.isel(prompt=np.flatnonzero(acts[given].values == acts[given].values[0]))
    labels = {name: part[name].values for name in ("task", "template", "input", "text")}
    tables = []
    for layer in layers:
        points = PCA(2, svd_solver="full").fit_transform(part.resid.sel(layer=layer)[:, 0].values)
        where = {"layer": layer, "x": points[:, 0], "y": points[:, 1]}
        tables.append(pd.DataFrame({**where, **labels}))
    return pd.concat(tables, ignore_index=True)


def pictures(scores: pd.DataFrame, states: pd.DataFrame, given: str) -> dict[str, Any]:
    """The study's figures, by file name."""
    from lensclust import figures

    layers = scores[(scores["kind"] == "resid") & (scores["by"] == "task")]
    inside = layers[(layers["given"] == given) & (layers["metric"] == "ari")]
    near = layers[layers["metric"] == "1nn_accuracy"]
    across = scores[(scores["given"] == "none") & (scores["metric"] == "ari")]
    across = across[(across["source"] == "model") & (across["kind"] == "resid")]
    heads = scores[(scores["kind"] == "head") & (scores["metric"] == "ari")]
    heads = heads[heads["by"] == "task"]
    found = {
        "ari_by_layer": figures.curves(
            spread(inside),
            color="source",
            title=f"Clustering by task, given the {given}",
            caption="ARI by layer, beside the words alone and random weights",
            y_title="ARI",
        ),
        "neighbours": figures.curves(
            spread(near),
            color="source",
            band=None,
            title="Is the nearest neighbour of another paraphrase of the same task?",
            caption="1-nearest-neighbour task accuracy (cosine), neighbours with another template.",
            y_title="accuracy",
        ),
        "task_input_template": figures.curves(
            across,
            color="by",
            title="All prompts together: task, input or template?",
            caption="k-means with as many clusters as tasks, scored against each label",
            y_title="ARI",
        ),
        "clusters": figures.scatter(
            states,
            shape="template",
            title=f"The prompts of one {given}, by layer",
            caption="Two principal components of each layer.",
            tooltip=("text", "template"),
        ),
    }
    if len(heads):
        found["heads"] = figures.head_map(
            heads,
            title="Which heads carry the task",
            caption=f"ARI of each head's contribution to the residual stream, given the {given}.",
        )
    return found


def spread(rows: pd.DataFrame) -> pd.DataFrame:
    """Draw a source that has one layer only (the words) as a level line over all layers."""
    import pandas as pd

    layers = sorted(rows["layer"].unique())
    flat = rows.groupby("source")["layer"].transform("nunique") == 1
    level = [rows[flat].assign(layer=layer) for layer in layers]
    return pd.concat([rows[~flat], *level], ignore_index=True)


def notes(scores: pd.DataFrame, best: pd.DataFrame, given: str) -> list[str]:
    """What the reader must know before believing the picture."""
    task = best[(best["by"] == "task") & (best["kind"] == "resid") & (best["metric"] == "ari")]
    mean = task.groupby("source")["value"].mean()
    said = [
        f"Best-layer ARI given the {given}: model {mean['model']:.2f}, bag of tokens (tf-idf) "
        f"{mean['bag of tokens']:.2f}, random weights {mean['random weights']:.2f}."
    ]
    for source in ("bag of tokens", "random weights"):
        if mean[source] > HIGH_BASELINE * mean["model"]:
            said.append(
                f"The {source} baseline is high: {mean[source]:.2f} against {mean['model']:.2f}. "
                "Prompts of one task share words here, so these clusters alone prove little."
            )
    everything = select(scores, "model", "ari", "none").nlargest(1, "value").iloc[0]
    words = select(scores, "bag of tokens", "ari", "none")["value"].max()
    said.append(
        f"All prompts together: ARI {everything['value']:.2f} at {everything['site']}, bag of "
        f"tokens {words:.2f} (best site chosen on the same prompts)."
    )
    return said


def select(scores: pd.DataFrame, source: str, metric: str, given: str) -> pd.DataFrame:
    """Residual-stream scores by task of one source."""
    rows = scores[(scores["source"] == source) & (scores["metric"] == metric)]
    rows = rows[(rows["given"] == given) & (rows["by"] == "task") & (rows["kind"] == "resid")]
    return rows.reset_index(drop=True)


def _means(table: pd.DataFrame) -> dict[str, float]:
    return {str(name): float(value) for name, value in table.mean().items()}
