# SPDX-License-Identifier: MIT
"""The README's tables, of the models in assets/weights and of the sinusoids: python -m assets.tables

Beside NAME.npz stand the --results of its evaluation, NAME.csv, and of 2,400 tasks, NAME-2400.csv. Where the
--results of all methods and baselines are given, METHOD-SEED.csv, assets/sinusoid.csv is made of them anew.
"""

import csv
import json
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import cli
import maml
import rl
import tasks

WEIGHTS, SINUSOIDS = (Path(__file__).with_name(name) for name in ("weights", "sinusoid.csv"))
SHOWN = (5, 0), (5, 1), (5, 5), (5, 10), (10, 1), (10, 10), (20, 1), (20, 10)  # K, gradient steps


@contextmanager
def explained(what):
    """Whatever the bytes of a file hold is an error of one line."""
    try:
        yield
    except Exception as error:
        raise cli.Unusable(f"{what} ({tasks.one_line(error)})") from None


def results(path):
    """(K, step) -> summary, of a table of --results."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = {"mean": float, "ci95": float, "median": float, "diverged": int, "tasks": int}
    return {
        (int(row["shots"]), int(row["step"])): {key: kind(row[key]) for key, kind in kinds.items()}
        for row in rows
    }


def loaded(weights):
    """A model -> settings, State, experiment, K (the published one where there is one), two `results`.

    The second is of 2,400 tasks, or empty.
    """
    more = weights.with_name(f"{weights.stem}-2400.csv")
    with explained(f"{weights}: it or its table is damaged, or missing"):
        with np.load(weights) as arrays:
            task = json.loads(arrays["settings"].item())["task"]
        module = rl if task in rl.TASKS else maml
        settings, state, *_ = cli.load_checkpoint(str(weights), module)
        experiment, found = module.experiment_of(settings), results(weights.with_suffix(".csv"))
        shots = next((k for k, _ in found if experiment.published(k)), min(found)[0])
        return settings, state, experiment, shots, found, results(more) if more.exists() else {}


def row(weights):
    """A model's line of the table."""
    settings, state, experiment, shots, *tables = loaded(weights)
    paper = experiment.published(shots)
    steps = list(paper) or [step for k, step in tables[0] if k == shots]
    figures = []
    for summaries in tables:
        some = [summaries[shots, step] for step in steps if (shots, step) in summaries]
        figures.append(", ".join(cli.cell(one, experiment.scale, experiment.digits) for one in some) or "–")
    cells = [
        f"`{weights.stem}`",
        f"{cli.iterations_of(settings):,}, {state.iteration:,}",
        str(settings["seed"]),
        ", ".join(map(str, steps)),
        *figures,
        ", ".join(paper.values()) or "–",
    ]
    return f"| {' | '.join(cells)} |"


def joined(paths):
    """The rows of METHOD-SEED.csv files as one table, with the seed in front."""
    tables, heads, methods = {}, set(), [m for m in maml.METHODS + maml.BASELINES if m != "nearest"]
    for path in map(Path, paths):
        with explained(f"{path}: no whole table of --results"):
            head, *lines = path.read_text().splitlines() or [""]
            missing = set(SHOWN) - results(path).keys()
        if missing:
            raise cli.Unusable(f"{path}: K, steps {sorted(missing)} are missing; evaluate as by default")
        heads.add(head)
        method, _, seed = path.stem.rpartition("-")
        if (method, seed) in tables:
            raise cli.Unusable(f"{path}: another file of this name came before; name one of them")
        tables[method, seed] = [f"{seed},{line}" for line in lines if line.startswith(f"sinusoid,{method},")]
    sizes = {*map(len, tables.values())}
    every = {(method, seed) for method in methods for _, seed in tables}
    if tables.keys() != every or 0 in sizes or max(len(sizes), len(heads)) > 1:
        files = f"METHOD-SEED.csv files of {', '.join(methods)}"
        raise cli.Unusable(f"name {files}, all of the same seeds and with one shape of table")
    order = sorted(tables, key=lambda key: (methods.index(key[0]), key[1]))
    return "\n".join([f"seed,{head}", *(line for key in order for line in tables[key]), ""])


def sinusoid_rows():
    """A line a method: the mean over seeds, the lowest and highest; or the median seed's median."""
    with open(SINUSOIDS, newline="") as file:
        rows = list(csv.DictReader(file))
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [f"`{method}`"]
        for at in SHOWN:
            some = [r for r in rows if r["method"] == method and (int(r["shots"]), int(r["step"])) == at]
            means, diverged = [float(r["mean"]) for r in some], sum(int(r["diverged"]) for r in some)
            middle = np.median([float(r["median"]) for r in some]) if diverged else np.mean(means)
            digits = 2 if middle >= 0.1 else 3
            middle, low, high = (f"{value:.{digits}f}" for value in (middle, min(means), max(means)))
            text = f"median {middle}, {diverged} diverged" if diverged else f"{middle} ({low} to {high})"
            cells.append(text)
        yield f"| {' | '.join(cells)} |"


def settings_rows(module):
    """A command's defaults: what all tasks share, and a line a task."""
    rows = module.SETTINGS + module.EVALUATION
    shared = [row for row in rows if len(set(row.defaults.values())) == 1]
    rows = [row for row in rows if row not in shared]
    yield f"All of {module.__name__}.py: `{' '.join(f'{row.flag} {row.shown()}' for row in shared)}`"
    yield f"| `--task` | {' | '.join(f'`{row.flag}`' for row in rows)} |"
    yield "| --- " * (len(rows) + 1) + "|"
    for task in module.TASKS:
        values = ("–" if row.defaults[task] is None else row.text(task) for row in rows)
        yield f"| `{task}` | {' | '.join(values)} |"


def main(*paths):
    if paths:
        table = joined(paths).encode()
        with cli.writing(SINUSOIDS) as file:
            file.write(table)
    with explained(f"{SINUSOIDS}: it is damaged, or missing"):
        sinusoids = [*sinusoid_rows()]
    lines = [*map(row, sorted(WEIGHTS.glob("*.npz"))), "", *sinusoids, ""]
    cli.tell("\n".join([*lines, *settings_rows(maml), "", *settings_rows(rl)]), to="stdout")


if __name__ == "__main__":
    sys.exit(cli.guarded("tables.py", lambda: main(*sys.argv[1:])))
