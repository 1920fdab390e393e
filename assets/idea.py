# SPDX-License-Identifier: MIT
"""The idea as a picture, the paper's figure 1 from a real run: python -m assets.idea

Trains on the paper's sinusoids, on all tasks jointly and by MAML, and takes one gradient step from both to
the same new tasks. The sinusoid a sin(x - p) is the point at distance a and angle p, so that the tasks are
half a disc; a network stands at the sinusoid nearest to its output.
"""

import sys
from collections import deque
from functools import partial

import numpy as np

import cli
import maml
import nets
import tasks

PICTURE, ITERATIONS, ALPHA, SHOTS = "assets/idea.png", 70_000, 0.01, 10
NETWORK = nets.mlp((1, 40, 40, 1))
LOSS = nets.mean_squared_error(NETWORK)


def trained(outer_gradient):
    """theta [P] after ITERATIONS meta-iterations."""
    rng, sample = np.random.default_rng(0), partial(tasks.sinusoid, shots=SHOTS, query_shots=SHOTS)
    step = partial(maml.adam_step, outer_gradient=outer_gradient, sample=sample, tasks=25, beta=0.001)
    states = (state for state, _ in maml.train(step, maml.State.start(NETWORK.init(rng)), rng, ITERATIONS))
    return deque(states, maxlen=1)[0].theta


def nearest_sinusoids(theta):
    """(a cos p, a sin p), [2, T], of the a sin(x - p) nearest to the outputs, by least squares on [-5, 5]."""
    x = np.linspace(-5, 5, 200, dtype=theta.dtype)[:, None]
    outputs = NETWORK.apply(theta, np.broadcast_to(x, (len(theta), *x.shape)))[..., 0]
    return np.linalg.lstsq(np.hstack([np.sin(x), -np.cos(x)]), outputs.T, rcond=None)[0]


def plot_idea(canvas, starts, count=14, seed=1):
    """For each {title: theta} half a disc: theta, the tasks, the step's path to each, and its end."""
    draw = partial(tasks.sinusoid, tasks=count, shots=SHOTS, query_shots=100)
    support, query = draw(np.random.default_rng(seed))
    _, (latent, _) = draw(np.random.default_rng(seed), oracle=True)
    goals = latent[:, 0, 1] * np.array([np.cos(latent[:, 0, 2]), np.sin(latent[:, 0, 2])])
    angle, rates = np.linspace(0, np.pi, 100), np.linspace(0, ALPHA, 11)
    for axes, (title, theta) in zip(canvas.subplots(1, len(starts)), starts.items()):
        along = [maml.adapt(LOSS, theta, support, rate, 1) for rate in rates]
        path = np.array([nearest_sinusoids(adapted) for adapted in along])
        for radius in range(6):
            axes.plot(radius * np.cos(angle), radius * np.sin(angle), color="#d5d8dc", lw=0.8)
            axes.text(radius, -0.35, radius, ha="center", fontsize=8, color=maml.GREY)
        before, after = (LOSS(along[i], *query).mean() for i in (0, -1))
        axes.set_title(f"{title}: one step takes the error from {before:.1f} to {after:.1f}", fontsize=11)
        star = axes.plot(*goals, "*", color="#d35400", ms=13, mec="white", zorder=3)
        start = axes.plot(*path[0, :, :1], "ko", ms=9, zorder=3)
        step = axes.plot(*path.transpose(1, 0, 2), "o-", color="#2471a3", lw=2, ms=5, markevery=[-1])
        left = axes.plot(*np.stack([path[-1], goals], axis=1), ":", color=maml.GREY, zorder=1)
        axes.set(aspect="equal", xlim=(-5.3, 5.3), ylim=(-0.4, 5.1))
        axes.set_axis_off()
    names = "a new task's sinusoid", "θ", "one gradient step on 10 examples", "what is left"
    key = "a point is a sinusoid: its distance from 0 is the amplitude, its angle the phase"
    handles = [lines[0] for lines in (star, start, step, left)]
    canvas.legend(handles, names, title=key, ncols=4, loc="outside lower center", frameon=False)


def main(*given):
    if given:
        raise cli.Unusable(f"{' '.join(given)}: this script takes no words, and draws {PICTURE}")
    cli.check_picture("this script", PICTURE)
    cli.one_blas_thread()
    canvas = cli.canvas_of(9, 3.4)
    maml_gradient = partial(maml.meta_gradient, LOSS, alpha=ALPHA, steps=1)
    methods = {"Joint training": partial(maml.joint_gradient, LOSS), "MAML": maml_gradient}
    plot_idea(canvas, {title: trained(outer_gradient) for title, outer_gradient in methods.items()})
    cli.save_picture(PICTURE, canvas)


if __name__ == "__main__":
    sys.exit(cli.guarded("idea.py", lambda: main(*sys.argv[1:])))
