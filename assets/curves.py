# SPDX-License-Identifier: MIT
"""Learning curves of runs, from their --log files: python -m assets.curves FILE.png NAME-log.csv ...

Before and after the training's inner steps: the accuracy or error on validation tasks, of reinforcement
learning the return on each meta-batch; where NAME.npz and NAME.csv are beside it, the published test figure.
"""

import sys
from pathlib import Path

import cli
import maml
from assets import tables


def plot_curves(canvas, logs):
    """A panel for each log."""
    grid = canvas.subplots(-(-len(logs) // 4), min(len(logs), 4), squeeze=False).ravel()
    for axes, log in zip(grid, map(Path, logs)):
        name = log.stem.removesuffix("-log")
        with tables.explained(f"{log}: it or its model is damaged, or not of this project"):
            figure, scale, metric, steps = published(log.with_name(f"{name}.npz"), log)
            maml.learning(axes, log, scale)
        if figure:
            axes.axhline(float(figure.split()[0]), color=maml.RED, lw=1, ls="--", label="published, test")
            axes.autoscale(axis="y")  # where the line would fall on the frame
        axes.set_title(f"{cli.text_of(name)}{steps}", loc="left", fontsize=8)
        axes.set(ylabel=metric)
    lines = {name: line for axes in grid for line, name in zip(*axes.get_legend_handles_labels())}
    canvas.legend(lines.values(), lines, ncols=3, loc="outside lower center", frameon=False)
    for axes in grid[len(logs) :]:
        axes.set_axis_off()


def published(weights, log=None):
    """A model's published figure as a text, after one step where there are several; its scale and metric.

    Last come the gradient steps of the curve, and those of the figure where these are others.
    """
    results = weights.with_suffix(".csv")
    if not (weights.exists() and results.exists()) or results == log:
        return None, 1, "", ""
    settings, _, experiment, shots, *_ = tables.loaded(weights)
    figures = experiment.published(settings.get("shots", shots))
    metric = experiment.metric_name + " in %" * (experiment.scale == 100)
    after = 1 if 1 in figures else max(figures, default=settings["steps"])
    steps = f"\nsteps: {settings['steps']}" + f"; published: after {after}" * (after != settings["steps"])
    return figures.get(after, ""), experiment.scale, metric, steps


def main(path=None, *logs):
    if not logs:
        raise cli.Unusable("name a picture and the --log files: FILE.png NAME-log.csv ...")
    cli.check_picture("FILE.png", path)
    canvas = cli.canvas_of(11, 0.4 + 2.5 * -(-len(logs) // 4))
    plot_curves(canvas, logs)
    cli.save_picture(path, canvas)


if __name__ == "__main__":
    sys.exit(cli.guarded("curves.py", lambda: main(*sys.argv[1:])))
