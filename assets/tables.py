# SPDX-License-Identifier: MIT
"""The README's table of the models in assets/weights: python -m assets.tables

Beside NAME.npz stand the --results of its evaluation, NAME.csv, and of 2,400 tasks, NAME-2400.csv.
"""

import csv
import json
from pathlib import Path

import numpy as np

import maml
import rl

WEIGHTS = Path(__file__).parent / "weights"


def results(path):
    """(K, step) -> summary, of a table of --results."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = "mean", "ci95", "median", "diverged", "tasks"
    return {(int(row["shots"]), int(row["step"])): {key: float(row[key]) for key in numbers} for row in rows}


def row(weights):
    """A model's line of the table."""
    with np.load(weights) as arrays:
        task = json.loads(str(arrays["settings"]))["task"]
    module = rl if task in rl.TASKS else maml
    settings, state, *_ = maml.load_checkpoint(str(weights), module)
    experiment = module.experiment_of(settings)
    found = results(weights.with_suffix(".csv"))
    shots, paper = next((k, experiment.published(k)) for k, _ in found if experiment.published(k))
    more = weights.with_name(f"{weights.stem}-2400.csv")
    figures = []
    for summaries in (found, results(more) if more.exists() else {}):
        some = [summaries[shots, step] for step in paper if (shots, step) in summaries]
        figures.append(", ".join(maml.cell(one, experiment.scale, experiment.digits) for one in some) or "–")
    cells = [
        f"`{weights.stem}`",
        f"{settings['iterations']:,}, {state.iteration:,}",
        str(settings["seed"]),
        ", ".join(map(str, paper)),
        *figures,
        ", ".join(paper.values()),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print("\n".join(row(weights) for weights in sorted(WEIGHTS.glob("*.npz"))))
