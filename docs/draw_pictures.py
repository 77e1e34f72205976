"""Draw the tutorial's pictures: ``.venv/bin/python docs/draw_pictures.py`` (a minute on a CPU)."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import lensclust as lc
from lensclust import figures
from probes import cluster, cluster_map, interchange

PICTURES = Path(__file__).parent / "pictures"


def main() -> None:
    """Run the tutorial's lines and save what they plot."""
    prompts = lc.tasks.sif(n_tasks=4, n_inputs=5, mappings_per_task=4, regexes_per_task=2)
    run = lc.train("sif-small", prompts, steps=150, n_checkpoints=3, progress=False)
    unseen = prompts.where(split="new_string")
    acts = lc.extract(run.model(), unseen, ["resid", "head"], progress=False)
    one = lc.extract(run.model(), unseen.where(input="x0"), "resid", progress=False)
    known = lc.extract(run.model(), prompts.where(split="train"), "resid", progress=False)
    tasks = cluster(known, by="task", given="input", jobs=1)

    def moves(source, target):
        move = tasks.transport(source, target)
        return [move, move.random_twin()]

    clusters = cluster(acts, by="task", given="input", jobs=1)
    moved = interchange(run.model(), unseen, moves, "resid", progress=False)
    charts = {
        "clusters": clusters.plot("cross_wording_ari"),
        "states": cluster_map(one).plot(),
        "moved": moved.plot(),
    }
    PICTURES.mkdir(exist_ok=True)
    with TemporaryDirectory() as folder:
        for name, chart in charts.items():
            shutil.copy(figures.save(chart, folder, name), PICTURES)


if __name__ == "__main__":
    main()
