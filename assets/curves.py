# SPDX-License-Identifier: MIT
"""Learning curves of runs, from their --log files: python -m assets.curves FILE.png LOG.csv[=PAPER] ...

Before and after adaptation, of images on validation tasks, of reinforcement learning on the meta-batch; PAPER
is a published figure, in the unit of the log (accuracy: 0.487), as a line.
"""

import os
import sys

import cli
import maml


def plot_curves(canvas, runs):
    """A panel for each {log: the paper's figure as a text, or nothing}."""
    grid = canvas.subplots(-(-len(runs) // 3), min(len(runs), 3), squeeze=False).ravel()
    for axes, (log, figure) in zip(grid, runs.items()):
        if figure:
            axes.axhline(float(figure), color=maml.RED, lw=1, ls="--", label="the paper's figure")
        maml.learning(axes, log)
        name = os.path.splitext(os.path.basename(log))[0].removesuffix("-log")
        axes.set_title(name, loc="left", fontsize=10)
    lines = {name: line for axes in grid for line, name in zip(*axes.get_legend_handles_labels())}
    canvas.legend(lines.values(), lines, ncols=3, loc="outside lower center", frameon=False)
    for axes in grid[len(runs) :]:
        axes.set_axis_off()


def main(path, *logs):
    runs = {log: figure for log, _, figure in (word.partition("=") for word in logs)}
    canvas = cli.canvas_of(9, 0.4 + 2.5 * -(-len(runs) // 3))
    plot_curves(canvas, runs)
    cli.save_picture(path, canvas)


if __name__ == "__main__":
    try:
        if len(sys.argv) < 3:
            raise ValueError("name a picture and the --log files: FILE.png LOG.csv[=PAPER] ...")
        main(*sys.argv[1:])
    except (cli.Unusable, OSError, ValueError, KeyError) as error:
        text = f"a log has no column {error}" if isinstance(error, KeyError) else error
        cli.tell(f"curves.py: {text}")
        sys.exit(2)
