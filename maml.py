# SPDX-License-Identifier: MIT
"""Model-Agnostic Meta-Learning (Finn, Abbeel & Levine, ICML 2017; arXiv 1703.03400).

Axes: T tasks, P parameters. theta is [P], shared by all tasks, or [T, P]. A data set is a pair (x, y)
with the tasks in front, [T, examples, ...]. A loss is a callable loss(theta, x, y) -> [T], written with
autograd.numpy for theta [T, P]. Where it carries closed forms (`expand` and `grad`, as in
nets.py) they are used; else autograd supplies them. The dtype of theta decides the dtype of everything.
"""

import argparse
import csv
import ctypes
import io
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import zipfile
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import autograd.numpy as anp
import numpy as np
from autograd import grad, make_hvp, value_and_grad

import nets
import tasks

# The algorithm: its definition -----------------------------------------------------------------


def adapt(loss, theta, support, alpha, steps):
    """theta_{s+1} = theta_s - alpha ∇L(theta_s; support), s = 0 ... steps - 1: eq. (1), from theta_0 = theta.

    theta [P] or [T, P]; alpha a number or an array [P] -> theta_steps [T, P]. Autograd can trace it.

    Needs gradient, _checked, _per_task, _one_each.
    """
    alpha = _checked(theta, support, alpha, steps)
    for _ in range(steps):
        theta = theta - alpha * gradient(loss, theta, *support)
    return _per_task(theta, support[0])


def meta_loss(loss, theta, support, query, alpha, steps):
    """mean over tasks of L(adapt(theta, support); query): the objective of eq. (2)-(3), over T.

    Needs adapt, gradient, _checked, _per_task, _one_each.
    """
    return anp.mean(loss(adapt(loss, theta, support, alpha, steps), *query))


def meta_gradient_by_definition(loss, theta, support, query, alpha, steps):
    """∇_theta of `meta_loss`, eq. (4), by autograd through the unrolled inner steps: -> value, [P].

    The reference for everything below: it calls the loss alone, none of its closed forms. Its graph
    keeps every intermediate result of every step.

    Needs meta_loss, adapt, gradient, _checked, _per_task, _one_each.
    """
    return value_and_grad(
        lambda theta: meta_loss(lambda *data: loss(*data), theta, support, query, alpha, steps)
    )(theta)


# The algorithm: the recursion ------------------------------------------------------------------


def meta_gradient(loss, theta, support, query, alpha, steps, order=2):
    """Equals `meta_gradient_by_definition`: -> value, gradient [P], both means over tasks.

    By the chain rule through theta_{s+1} = theta_s - alpha ⊙ ∇L(theta_s), with H_s the Hessian of the
    support loss at theta_s,

        v_S = ∇L(theta_S; query),    v_s = v_{s+1} - H_s (alpha ⊙ v_{s+1}),    gradient = v_0.

    theta [P]; alpha a number or [P]. order=1 drops every H (first-order MAML), and keeps nothing of the
    steps. Costs steps + 1 gradients and `steps` Hessian-vector products, and keeps of a step its gradient
    and what its product reads.

    Needs adapt, unroll, expand, gradient, _checked, _per_task, _one_each.
    """
    alpha = _checked(theta, support, alpha, steps)
    if order == 1:
        value, v, _ = expand(loss, adapt(loss, theta, support, alpha, steps), *query)
        return value.mean(), v.mean(axis=0)
    theta, trail = unroll(loss, theta, support, alpha, steps)
    value, v, _ = expand(loss, theta, *query)
    for _, product in trail[:0:-1]:
        v = v - product(alpha * v)
    total = v.sum(axis=0)
    for _, product in trail[:1]:  # at the theta that all tasks share their products are wanted in sum
        total = total - product(alpha * v, total=True)
    return value.mean(), total / len(v)


def meta_gradient_recomputed(loss, theta, support, query, alpha, steps, kept=0):
    """Equals `meta_gradient`, in memory that does not grow with the steps but by their theta_s.

    What their products read is kept of the last `kept` steps; of those before it is computed anew: one
    gradient a step more.

    Needs unroll, expand, gradient, _checked, _per_task, _one_each.
    """
    alpha = _checked(theta, support, alpha, steps)
    thetas = [theta]
    for _ in range(steps - kept):
        thetas.append(thetas[-1] - alpha * gradient(loss, thetas[-1], *support))
    theta, trail = unroll(loss, thetas.pop(), support, alpha, min(kept, steps))
    value, v, _ = expand(loss, theta, *query)
    while trail:  # no name for a product, so that each is gone before the next is there
        v = v - trail.pop()[1](alpha * v)
    while thetas:
        v = v - expand(loss, thetas.pop(), *support)[2](alpha * v)
    return value.mean(), v.mean(axis=0)


def unroll(loss, theta, support, alpha, steps):
    """The steps of `adapt`: -> theta_S [T, P] and, of each step, (∇L(theta_s) [T, P], v ↦ H_s v)."""
    trail = []
    for _ in range(steps):
        _, g, product = expand(loss, theta, *support)
        step = alpha * g
        theta = np.subtract(theta, step, out=step)
        trail.append((g, product))
    return theta, trail


def expand(loss, theta, x, y):
    """L(theta + v) = value + g·v + v·H v / 2 + ..., per task: -> value [T], g [T, P], v ↦ H v.

    loss.expand, or autograd's. The product takes v [T, P] to [T, P], or with total=True to its sum over
    tasks, [P].
    """
    if hasattr(loss, "expand"):
        return loss.expand(theta, x, y)
    theta = _per_task(theta, x)
    product, g = make_hvp(lambda theta: anp.sum(_one_each(loss(theta, x, y), x)))(theta)
    return loss(theta, x, y), g, lambda v, total=False: product(v).sum(axis=0) if total else product(v)


def gradient(loss, theta, x, y):
    """∇L [T, P]: loss.grad, or autograd's (one task's loss does not depend on another's parameters)."""
    if hasattr(loss, "grad"):
        return loss.grad(theta, x, y)
    return grad(lambda theta: anp.sum(_one_each(loss(theta, x, y), x)))(_per_task(theta, x))


# The family: the same lines, read differently --------------------------------------------------


def meta_sgd_gradient(loss, theta_alpha, support, query, steps):
    """Meta-SGD (Li et al. 2017): alpha [P] is learned with theta; ∂/∂alpha = -Σ_s v_{s+1} ⊙ ∇L(theta_s).

    theta_alpha = [theta, alpha], [2P] -> value, gradient [2P], means over tasks.

    Needs unroll, expand, _per_task, _one_each.
    """
    theta, alpha = np.split(theta_alpha, 2)
    theta, trail = unroll(loss, theta, support, alpha, steps)
    value, v, _ = expand(loss, theta, *query)
    d_alpha = np.zeros_like(v)
    for g, hvp in reversed(trail):
        d_alpha -= v * g
        v = v - hvp(alpha * v)
    return value.mean(), np.concatenate([v.mean(axis=0), d_alpha.mean(axis=0)])


def reptile_gradient(loss, theta, support, query, alpha, steps):
    """Reptile (Nichol et al. 2018): the outer direction is theta - theta_S -> query loss at theta_S, [P].

    It needs no query set, so the inner steps see the examples of both. One step is joint training.

    Needs adapt, gradient, _checked, _per_task, _one_each.
    """
    both = [np.concatenate(pair, axis=1) for pair in zip(support, query)]
    adapted = adapt(loss, theta, both, alpha, steps)
    return loss(adapted, *query).mean(), theta - adapted.mean(axis=0)


def joint_gradient(loss, theta, support, query):
    """Pretraining on all tasks, the paper's baseline: ∇L(theta; support), as MAML with no inner step."""
    return meta_gradient(loss, theta, support, support, 0.0, 0)


def _checked(theta, support, alpha, steps):
    """alpha as a Python number or an array of theta's dtype; ValueError where the arguments do not fit."""
    x, y = support
    if theta.ndim not in (1, 2) or theta.dtype.kind != "f":
        raise ValueError(f"theta is {theta.dtype} {theta.shape}; expected floats, [P] or [tasks, P]")
    if len(x) != len(y) or theta.ndim == 2 and len(theta) != len(x):
        raise ValueError(f"theta {theta.shape}, x {x.shape}, y {y.shape}: different numbers of tasks")
    if steps != int(steps) or steps < 0:
        raise ValueError(f"steps = {steps}; expected an integer, 0 or more")
    if anp.ndim(alpha) == 0:
        return float(alpha) if isinstance(alpha, (int, float, np.generic, np.ndarray)) else alpha
    if alpha.shape != theta.shape[-1:] or alpha.dtype != theta.dtype:
        raise ValueError(
            f"alpha is {alpha.dtype} {alpha.shape}; expected {theta.dtype} {theta.shape[-1:]} or a number"
        )
    return alpha


def _per_task(theta, x):
    """theta [T, P], repeated from [P] if need be."""
    return theta if theta.ndim == 2 else theta + anp.zeros((len(x), 1), theta.dtype)


def _one_each(values, x):
    if values.shape != (len(x),):
        raise ValueError(f"the loss returned shape {values.shape}; expected one value a task, ({len(x)},)")
    return values


# The outer update ------------------------------------------------------------------------------


class State(NamedTuple):
    """What a meta-iteration changes: the learned parameters, Adam's two moments, the iteration count."""

    theta: np.ndarray
    m: np.ndarray
    v: np.ndarray
    iteration: int

    @classmethod
    def start(cls, theta):
        return cls(theta, np.zeros_like(theta), np.zeros_like(theta), 0)


def adam(state, g, beta, b1=0.9, b2=0.999, eps=1e-8):
    """theta ← theta - beta sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps): Adam, as TensorFlow has it.

    m ← b1 m + (1 - b1) g, v ← b2 v + (1 - b2) g², t = 1, 2, ...; eps is added after the bias correction
    is taken out (Kingma & Ba's "epsilon hat"), as in the authors' code.

    Needs State.
    """
    theta, m, v, t = state
    t += 1
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    rate = beta * (1 - b2**t) ** 0.5 / (1 - b1**t)
    return State(theta - rate * m / (np.sqrt(v) + eps), m, v, t)


def train(step, state, rng, iterations, map=map):
    """Meta-iterations, from state.iteration up to `iterations` in all: yields (state, outcome) of each.

    step(state, rng, map=map) -> state, outcome, e.g. `adam_step` with its settings. FloatingPointError names
    the iteration that failed; the state yielded last is still good. `map` as in `spread`.
    """
    while state.iteration < iterations:
        state, outcome = step(state, rng, map=map)
        yield state, outcome


def adam_step(state, rng, outer_gradient, sample, tasks, beta, clip=np.inf, parcel=None, map=map):
    """theta ← theta - beta ∇_theta Σ_i L_i(f_theta'_i), eq. (4), with Adam: -> State, meta-loss.

    outer_gradient(theta, support, query) -> value, gradient, means over tasks; sample, tasks, parcel and map
    as in `spread`. The gradient is clipped to ±clip, element by element. FloatingPointError names the
    iteration whose loss or gradient is not finite.

    Needs State, adam, mean_over_parcels, spread, parcels, on_drawn.
    """
    at_theta = partial(outer_gradient, state.theta)
    value, g = mean_over_parcels(at_theta, sample, rng, tasks, parcel, map)
    if not (np.isfinite(value) and np.isfinite(g).all()):
        raise FloatingPointError(f"the meta-loss became {value} at iteration {state.iteration + 1}")
    return adam(state, np.clip(g, -clip, clip) if clip < np.inf else g, beta), value


def mean_over_parcels(function, sample, rng, tasks, parcel=None, map=map):
    """The arrays function(support, query), means over a parcel's tasks, as means over all, summed in order.

    Needs spread, parcels, on_drawn.
    """
    results = spread(function, sample, rng, tasks, parcel, map)
    if len(results) == 1:
        return results[0]
    shares = [size / tasks for size in parcels(tasks, parcel)]
    return tuple(sum(share * part for share, part in zip(shares, column)) for column in zip(*results))


def spread(function, sample, rng, tasks, parcel=None, map=map):
    """[function(support, query) of each parcel of `tasks` tasks], sample(rng, tasks=n) -> support, query.

    A parcel is a seed and a count, and whoever computes it draws its tasks: so results do not depend on
    `map`, which may be any map-like, e.g. an executor's, and no data travel. One parcel alone is drawn from
    rng itself.

    Needs parcels, on_drawn.
    """
    sizes = parcels(tasks, parcel)
    if len(sizes) == 1:
        return [function(*sample(rng, tasks=tasks))]
    seeds = rng.integers(2**63, size=len(sizes)).tolist()
    return list(map(partial(on_drawn, function, sample), seeds, sizes))


def parcels(tasks, parcel=None):
    """How many of `tasks` tasks each parcel has: `parcel`, the last what is left; None: all."""
    parcel = parcel or tasks
    return [min(parcel, tasks - start) for start in range(0, tasks, parcel)]


def on_drawn(function, sample, seed, count):
    """function(support, query) of the tasks that a seed and a count stand for: all that a worker runs."""
    return function(*sample(np.random.default_rng(seed), tasks=count))


def cores():
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def one_blas_thread():
    """Keeps the OpenBLAS of NumPy's wheels to one thread, and glibc to one heap, which it keeps.

    A task's products are too small to share between cores, and where another process has one of the cores
    OpenBLAS's threads wait for each other up to 50 times as long as one takes. What runs in parallel is
    chunks of tasks, on threads; memory that glibc returned to the system, as it does with a thread's own heap
    when that is empty and with every large array, took a third of TRPO's time to fault in again.
    """
    library = ctypes.CDLL(np.linalg._umath_linalg.__file__)
    if hasattr(library, "scipy_openblas_set_num_threads64_"):
        library.scipy_openblas_set_num_threads64_(1)
    if hasattr(library, "mallopt"):
        library.mallopt(-8, 1)  # M_ARENA_MAX
        library.mallopt(-4, 0)  # M_MMAP_MAX
        library.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def evaluate(loss, theta, sample, rng, tasks, alpha, steps, metric=None, parcel=None, map=map):
    """metric(theta_s; query) after s = 0 ... steps inner steps on the support set: -> [steps + 1, tasks].

    The metric is the loss unless another is given, and is called as it: metric(theta, x, y) -> [T]. sample,
    tasks, parcel and map as in `spread`.

    Needs curve, spread, parcels, on_drawn, gradient, _checked, _per_task, _one_each.
    """
    one = partial(curve, loss, theta, alpha=alpha, steps=steps, metric=metric or loss)
    return np.concatenate(spread(one, sample, rng, tasks, parcel, map), axis=1)


def curve(loss, theta, support, query, alpha, steps, metric):
    """`evaluate` on given tasks: -> [steps + 1, T].

    Needs gradient, _checked, _per_task, _one_each.
    """
    alpha = _checked(theta, support, alpha, steps)
    theta = _per_task(theta, support[0])
    rows = [metric(theta, *query)]
    for _ in range(steps):
        theta = theta - alpha * gradient(loss, theta, *support)
        rows.append(metric(theta, *query))
    return np.stack(rows)


def summarize(values, threshold):
    """Of values [T]: mean, 95 % interval 1.96 std / sqrt(T), median, and how many tasks diverged.

    A task has diverged when its value is not finite or above `threshold`; it stays in the mean.
    """
    values = np.where(np.isfinite(values), values, np.inf).astype(float)
    mean = values.mean()
    ci95 = 1.96 * values.std() / len(values) ** 0.5 if np.isfinite(mean) else np.inf
    diverged = int((values > threshold).sum())
    return {
        "mean": mean,
        "ci95": ci95,
        "median": np.median(values),
        "diverged": diverged,
        "tasks": len(values),
    }


# The experiments -------------------------------------------------------------------------------

RL_TASKS = ("navigation", "cheetah-vel", "cheetah-dir", "ant-vel", "ant-dir")
METHODS = ("maml", "fomaml", "anil", "meta-sgd", "reptile")
BASELINES = ("random", "pretrained", "oracle", "nearest")
UNTRAINED = ("random", "nearest")
CLASSIFIED = {
    "omniglot": 1100,
    "miniimagenet": 64,
}  # training classes, which the pretrained baseline tells apart

# Defaults a task. A checkpoint keeps those above the line; those below it may differ at every evaluation.
TASKS = {
    "sinusoid": dict(
        shots=10,
        query=10,
        steps=1,
        alpha=0.01,
        beta=0.001,
        meta_batch=25,
        iterations=70_000,
        # ---
        eval_tasks=600,
        eval_steps=10,
        eval_shots=[5, 10, 20],
    ),
    "omniglot": dict(
        ways=5,
        shots=1,
        query=None,
        net="conv",
        filters=64,
        steps=1,
        alpha=2.0,
        beta=0.001,
        meta_batch=32,
        iterations=60_000,
        # ---
        eval_tasks=600,
        eval_steps=10,
        eval_shots=None,
    ),
    "miniimagenet": dict(
        ways=5,
        shots=1,
        query=15,
        net="conv",
        filters=32,
        steps=5,
        alpha=0.05,
        beta=0.001,
        meta_batch=4,
        iterations=60_000,
        # ---
        eval_tasks=600,
        eval_steps=10,
        eval_shots=None,
    ),
}

# What the paper prints (Tables 1 and 2): (task, method, what it depends on) -> {step: figure}.
PAPER = {
    ("sinusoid", "maml", 5): {1: "0.67", 5: "0.38", 10: "0.35"},
    ("sinusoid", "pretrained", 5): {1: "2.41", 5: "2.23", 10: "2.19"},
    ("omniglot", "maml", 1, 5, "conv"): {3: "98.7 ± 0.4"},
    ("omniglot", "maml", 5, 5, "conv"): {3: "99.9 ± 0.1"},
    ("omniglot", "maml", 1, 20, "conv"): {5: "95.8 ± 0.3"},
    ("omniglot", "maml", 5, 20, "conv"): {5: "98.9 ± 0.2"},
    ("omniglot", "maml", 1, 5, "mlp"): {3: "89.7 ± 1.1"},
    ("omniglot", "maml", 5, 5, "mlp"): {3: "97.5 ± 0.6"},
    ("miniimagenet", "maml", 1, 5, "conv"): {10: "48.70 ± 1.84"},
    ("miniimagenet", "maml", 5, 5, "conv"): {10: "63.11 ± 0.92"},
    ("miniimagenet", "fomaml", 1, 5, "conv"): {10: "48.07 ± 1.75"},
    ("miniimagenet", "fomaml", 5, 5, "conv"): {10: "63.15 ± 0.91"},
}

VALIDATION_TASKS = 600
EVAL_QUERY = 100  # query points of a test sinusoid: the figure is the paper's, with less noise
DIVERGED = 100.0  # of a sinusoid's error: four times the largest amplitude squared
SPLITS = {"training": "train", "validation": "val", "test": "test"}
STREAMS = ("training", "test", "validation", "init")
KEPT_STEPS = {"omniglot": 2, "miniimagenet": 5}  # the last inner steps whose products keep what they read
REPTILE_STEPS = 10  # with one inner step Reptile is joint training


class Experiment:
    """A task distribution, its network and loss, and the method that learns them, by name."""

    parcel = None  # tasks computed at once
    clip, map, unit = np.inf, staticmethod(map), "loss"
    meta_gradient = staticmethod(meta_gradient)
    log_every, save_every, keeps_best = 500, 1000, False  # meta-iterations; whether validation selects
    columns, state = ("loss", "before", "after"), State  # of the log; what `train` yields

    def __init__(self, settings):
        self.settings, self.method = settings, settings["method"]
        oracle = self.method == "oracle"
        self.network = nets.mlp((3 if oracle else 1, 40, 40, 1))
        self.loss = self.metric = nets.mean_squared_error(self.network)
        self.oracle, self.threshold = oracle, DIVERGED

    @property
    def size(self):
        """How many numbers are learned."""
        return self.network.size * (2 if self.method == "meta-sgd" else 1)

    def open(self, path):
        """Loads what data there is."""

    def sample(self, purpose, shots, query):
        """sample(rng, tasks) -> support, query, of tasks for a purpose."""
        dtype = np.dtype(self.settings["dtype"])
        return partial(tasks.sinusoid, shots=shots, query_shots=query, oracle=self.oracle, dtype=dtype)

    def eval_query(self, shots):
        """Query examples of a test task."""
        return EVAL_QUERY

    def stream(self, purpose):
        """The seed's generator for one purpose, so that all methods meet the same tasks."""
        return np.random.default_rng([self.settings["seed"], STREAMS.index(purpose)])

    def start(self):
        """What is learned, at the start: theta [P], and for Meta-SGD its alpha [P] behind it."""
        theta = self.network.init(self.stream("init"), self.settings["dtype"])
        if self.method != "meta-sgd":
            return State.start(theta)
        return State.start(np.concatenate([theta, np.zeros_like(theta) + self.inner_rate()]))

    def outer_gradient(self):
        """(theta, support, query) -> value, gradient: what the method descends."""
        alpha, steps = self.inner_rate(), self.settings["steps"]
        return {
            "maml": partial(self.meta_gradient, self.loss, alpha=alpha, steps=steps),
            "anil": partial(self.meta_gradient, self.loss, alpha=alpha, steps=steps),
            "fomaml": partial(meta_gradient, self.loss, alpha=alpha, steps=steps, order=1),
            "meta-sgd": partial(meta_sgd_gradient, self.loss, steps=steps),
            "reptile": partial(reptile_gradient, self.loss, alpha=alpha, steps=steps),
        }.get(self.method, partial(joint_gradient, self.loss))

    def meta_batch(self):
        """-> sample, how many tasks of it a meta-iteration takes, and how many a parcel."""
        s = self.settings
        return self.sample("training", s["shots"], s["query"]), s["meta_batch"], self.parcel

    def train(self, state, rng, iterations):
        """`train` with the settings: yields (state, meta-loss)."""
        sample, count, parcel = self.meta_batch()
        step = partial(
            adam_step,
            outer_gradient=self.outer_gradient(),
            sample=sample,
            tasks=count,
            beta=self.settings["beta"],
            clip=self.clip,
            parcel=parcel,
        )
        return train(step, state, rng, iterations, self.map)

    def measure(self, state, loss):
        """-> a row of the log, the line of progress, and the validation score or None."""
        curve = self.validate(state.theta)
        before, after = curve[0], curve[-1]
        text = f"{self.unit} {before:.3f} before, {after:.3f} after adaptation"
        return (loss, before, after), text, after

    def validate(self, learned):
        """The mean metric on validation tasks, as tested, before and after each of the training's steps."""
        s = self.settings
        return self.curve(learned, "validation", VALIDATION_TASKS, s["shots"], s["steps"]).mean(axis=1)

    def score(self, learned):
        """What selects the best checkpoint: larger is better."""
        return self.validate(learned)[-1]

    def inner_rate(self):
        """alpha, or an array [P]: zero on batch norm's shifts, and for ANIL on all but the last layer."""
        alpha, names = self.settings["alpha"], list(self.network.shapes)
        fixed = [name for name in names if name.startswith("beta")]
        if self.method == "anil":
            fixed = names[:-2]  # Raghu et al. 2020; the last two are w and b
        if not fixed:
            return alpha
        rates = np.full(self.network.size, alpha, self.settings["dtype"])
        for name, view in self.network.unflatten(rates).items():
            if name in fixed:
                view[...] = 0
        return rates

    def adaptation(self, learned):
        """theta and alpha with which to adapt to a new task, from what was learned."""
        if self.method == "meta-sgd":
            return np.split(learned, 2)
        return learned, self.inner_rate()

    def curve(self, learned, purpose, count, shots, steps):
        """The metric [steps + 1, count] of unseen tasks after 0 ... steps inner steps."""
        theta, alpha = self.adaptation(learned)
        drawn = self.sample(purpose, shots, self.eval_query(shots)), self.stream(purpose), count
        return evaluate(self.loss, theta, *drawn, alpha, steps, self.metric, self.parcel, self.map)


class ImageExperiment(Experiment):
    """N-way K-shot images: cross-entropy, accuracy, and a convolutional network or a perceptron."""

    threshold, unit, save_every, keeps_best = np.inf, "accuracy", 100, True

    def __init__(self, settings):
        self.settings, self.method, self.images = settings, settings["method"], None
        mini, ways = settings["task"] == "miniimagenet", settings["ways"]
        shape = (84, 84, 3) if mini else (28, 28, 1)
        if settings["net"] == "conv":
            network = partial(nets.convnet, shape, filters=settings["filters"], pool=mini)
        else:
            network = partial(_perceptron, shape)
        self.network, self.classifier = network(ways), network(CLASSIFIED[settings["task"]])
        self.loss = nets.cross_entropy(self.network)
        self.metric = partial(accuracy, self.network)
        self.parcel = 1 if mini or ways > 10 else max(1, 8 // settings["shots"])
        if settings["steps"] > KEPT_STEPS[settings["task"]]:
            self.meta_gradient = partial(meta_gradient_recomputed, kept=KEPT_STEPS[settings["task"]])
        self.map = ThreadPoolExecutor(cores(), initializer=partial(np.seterr, all="ignore")).map
        if mini:  # the authors clip to ±10 a loss that is ways · query / shots times the mean
            self.clip = 10 * settings["shots"] / (ways * settings["query"])

    def open(self, path):
        s = self.settings
        path, own = path or f"data/{s['task']}", path is None
        try:
            if s["task"] == "omniglot":
                if own and not os.path.isdir(os.path.join(path, "images_background")):
                    tasks.download_omniglot(path)
                self.images = tasks.load_omniglot(path)
            else:
                self.images = tasks.load_miniimagenet(path, s["shots"] + s["query"])
        except (OSError, ValueError) as error:
            raise Unusable(tasks.one_line(error))
        for purpose in STREAMS[:3]:
            try:
                self.sample(purpose, s["shots"], s["query"])(self.stream(purpose), tasks=1)
            except ValueError as error:
                raise Unusable(f"{path}, {SPLITS[purpose]}: {error}")

    def sample(self, purpose, shots, query):
        s = self.settings
        return partial(
            tasks.few_shot,
            images=self.images[SPLITS[purpose]],
            ways=s["ways"],
            shots=shots,
            query_shots=query,
            rotate=s["task"] == "omniglot",
            dtype=np.dtype(s["dtype"]),
        )

    def eval_query(self, shots):
        return shots

    @property
    def size(self):
        return self.classifier.size if self.method == "pretrained" else super().size

    def start(self):
        if self.method != "pretrained":
            return super().start()
        return State.start(self.classifier.init(self.stream("init"), self.settings["dtype"]))

    def meta_batch(self):
        """As many images as MAML meets make one task of the pretrained classifier."""
        if self.method != "pretrained":
            return super().meta_batch()
        s, outputs = self.settings, self.classifier.outputs[0]
        count = s["meta_batch"] * s["ways"] * (s["shots"] + s["query"])
        draw = partial(
            tasks.labelled,
            images=self.images["train"],
            count=count,
            outputs=outputs,
            dtype=np.dtype(s["dtype"]),
        )
        return partial(joint_sample, sample=draw), 1, None

    def outer_gradient(self):
        if self.method == "pretrained":
            return partial(joint_gradient, nets.cross_entropy(self.classifier))
        return super().outer_gradient()

    def adaptation(self, learned):
        """Of the pretrained classifier all but the last layer, which starts again from zero."""
        if self.method != "pretrained":
            return super().adaptation(learned)
        names = list(self.network.shapes)[-2:]
        body = self.network.size - sum(math.prod(self.network.shapes[name]) for name in names)
        theta = np.zeros(self.network.size, learned.dtype)
        theta[:body] = learned[:body]
        return theta, self.inner_rate()

    def curve(self, learned, purpose, count, shots, steps):
        if self.method != "nearest":
            return super().curve(learned, purpose, count, shots, steps)
        sample, rng = self.sample(purpose, shots, self.eval_query(shots)), self.stream(purpose)
        return np.concatenate(spread(nearest_accuracy, sample, rng, count, self.parcel, self.map), axis=1)


def joint_sample(rng, tasks, sample):
    """One data set as both support and query."""
    batch = sample(rng)
    return batch, batch


def nearest_accuracy(support, query):
    """The baseline without learning: how many queries have their nearest support image's label, [1, T]."""
    return (tasks.nearest(support, query) * query[1]).sum(axis=-1).mean(axis=1)[None].astype(float)


def _perceptron(shape, ways):
    """The authors' network without convolutions."""
    return nets.mlp((math.prod(shape), 256, 128, 64, 64, ways), normalize=True)


def accuracy(network, theta, x, y):
    """The fraction of examples whose largest output is at the label: -> [T]."""
    return (network.forward(theta, x)[0].argmax(axis=-1) == y.argmax(axis=-1)).mean(axis=1)


def experiment_of(settings):
    """The experiment that these settings name."""
    return (Experiment if settings["task"] == "sinusoid" else ImageExperiment)(settings)


# Files -----------------------------------------------------------------------------------------


class Unusable(Exception):
    """Bad usage or input: its message is one line for the user; exit code 2."""


def write_file(path, data):
    """Writes bytes to a temporary name beside `path`, then renames: `path` is whole or what it was."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def write_rows(path, rows):
    """Dictionaries as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue().encode())


def write_figure(path, canvas):
    """A matplotlib figure, in the format that the name's ending says."""
    picture = io.BytesIO()
    canvas.savefig(picture, format=os.path.splitext(path)[1].lstrip("."), dpi=110)
    write_file(path, picture.getvalue())


def check_writable(flag, path):
    """Unusable unless a file can be made beside `path`; found out by making one (root may write anywhere)."""
    probe = f"{path}.{os.getpid()}.tmp"
    try:
        if os.path.isdir(path):
            raise IsADirectoryError(21, "is a folder")
        with open(probe, "xb"):
            os.remove(probe)
    except OSError as error:
        raise Unusable(
            f"{flag} {path}: cannot write there ({error.strerror}); name a file in a writable folder"
        )


def save_checkpoint(path, settings, state, rng):
    """An .npz of `state`, the generator's state and the settings, the last two as JSON text."""
    buffer = io.BytesIO()
    texts = {"settings": json.dumps(settings), "rng": json.dumps(rng.bit_generator.state)}
    np.savez(buffer, **state._asdict(), **texts)
    write_file(path, buffer.getvalue())


def load_checkpoint(path, command):
    """-> settings, what `command` trains, Generator; nothing is unpickled.

    Unusable where it is not a whole checkpoint of that command.
    """
    try:
        if os.path.exists(path) and not zipfile.is_zipfile(path):
            raise ValueError("it is no .npz file")
        with zipfile.ZipFile(path) as members:
            if sum(member.file_size for member in members.infolist()) > os.path.getsize(path):
                raise ValueError("it is compressed, and --save compresses nothing")
        with np.load(path, allow_pickle=False) as arrays:
            settings, rng_state = (json.loads(str(arrays[key])) for key in ("settings", "rng"))
            kept = {key: arrays[key] for key in arrays if key not in ("settings", "rng", "iteration")}
            iteration = int(arrays["iteration"])
        rng = np.random.default_rng(0)
        rng.bit_generator.state = rng_state
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items() if key != "method"]
        kind = "baseline" if settings["method"] in BASELINES else "method"
        parsed = command.parser().parse_args([*flags, f"--{kind}={settings['method']}"])
        if command.settings_of(parsed) != settings:
            raise ValueError(f"its settings are {', '.join(settings)}")
        if iteration < 0:
            raise ValueError(f"its iteration is {iteration}")
        experiment = command.experiment_of(settings)
        state = experiment.state(**kept, iteration=iteration)
        expected = (experiment.size,), np.dtype(settings["dtype"])
    except FileNotFoundError:
        raise Unusable(f"{path}: there is no such file; name a checkpoint that --save wrote")
    except Exception as error:  # whatever the bytes hold
        reason = tasks.one_line(error)
        raise Unusable(f"{path}: not a whole checkpoint ({reason}); name a file that --save wrote")
    for name, found in kept.items():
        if (found.shape, found.dtype) != expected:
            raise Unusable(
                f"{path}: {name} is {found.dtype} {found.shape}; expected {expected[1]} {expected[0]}"
            )
    return settings, state, rng


class Log:
    """The learning curve as CSV, one row a write, so that no row is torn; it goes on after `iteration`."""

    def __init__(self, path, columns, iteration):
        head, rows = ["iteration", *columns], []
        if iteration and os.path.exists(path):
            with open(path, newline="", errors="replace") as file:
                rows = list(csv.reader(file))
            if rows[:1] != [head]:
                raise Unusable(f"--log {path}: not the log of this run; name another file, or remove it")
            rows = [row for row in rows[1:] if row and int(row[0]) <= iteration]
        write_file(path, "".join(",".join(row) + "\n" for row in [head, *rows]).encode())
        self.file = open(path, "ab", buffering=0)

    def write(self, *row):
        self.file.write((",".join(map(str, row)) + "\n").encode())


# The command line ------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Errors are one line."""

    def error(self, message):
        raise Unusable(" ".join(message.split()))


def count(text):
    """A flag's value as a whole number, 1 or more."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def whole(text):
    """A flag's value as a whole number, 0 or more."""
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def rate(text):
    """A flag's value as a finite number, 0 or more."""
    number = float(text)
    if not 0 <= number < np.inf:
        raise ValueError
    return number


def task_name(text):
    """A flag's value as the name of a task that this command knows."""
    if text in RL_TASKS:
        raise Unusable(f"{text} is a task of rl.py: python rl.py --task {text}")
    return text


count.__name__, whole.__name__, rate.__name__ = (
    "count (1 or more)",
    "whole number (0 or more)",
    "rate (finite, 0 or more)",
)

# Flag, type, unit and meaning. The first group is what a checkpoint keeps; defaults are in TASKS.
SETTINGS = (
    ("--shots", count, "support examples K a task"),
    ("--query", count, "query examples a task in training"),
    ("--steps", count, "inner gradient steps in training"),
    ("--alpha", rate, "inner step size, loss gradient to parameters"),
    ("--beta", rate, "outer step size, Adam's"),
    ("--meta-batch", count, "tasks a meta-iteration"),
    ("--iterations", count, "meta-iterations in all"),
    ("--ways", count, "classes N a task"),
    ("--filters", count, "filters a convolution"),
)
EVALUATION = (
    ("--eval-tasks", count, "unseen tasks for the table"),
    ("--eval-steps", count, "gradient steps up to which the table goes"),
)


def build_parser():
    """The command's flags. A flag that was not given is None, and settled by `settings_of`."""
    parser = Parser(
        prog="maml.py",
        allow_abbrev=False,
        description="Model-Agnostic Meta-Learning: meta-trains, then evaluates on unseen tasks.",
    )
    parser.add_argument("--task", type=task_name, choices=TASKS, help="the task distribution p(T)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--method", choices=METHODS, help="what is learned, and how (default: maml)")
    which.add_argument(
        "--baseline", choices=BASELINES, help="in place of a method: what the paper compares with"
    )
    for flag, kind, text in SETTINGS + EVALUATION:
        key = flag[2:].replace("-", "_")
        tables = [f"{task} {table[key] or 'as shots'}" for task, table in TASKS.items() if key in table]
        defaults = ", ".join(tables)
        parser.add_argument(
            flag, type=kind, metavar="N" if kind is count else "RATE", help=f"{text} (default: {defaults})"
        )
    parser.add_argument(
        "--eval-shots",
        type=count,
        nargs="+",
        metavar="K",
        help="support sizes to evaluate at (default: sinusoid 5 10 20, else --shots)",
    )
    add_worker_flags(parser, "compute the chunks of an image meta-batch (default: a thread for each core)")
    parser.add_argument("--net", choices=("conv", "mlp"), help="of images (default: conv)")
    which.add_argument(
        "--first-order", dest="method", action="store_const", const="fomaml", help="--method fomaml"
    )
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="of the images (default: data/omniglot, fetched where it is missing; data/miniimagenet)",
    )
    add_common_flags(parser, Experiment)
    return parser


def add_worker_flags(parser, what):
    """Who computes the chunks of a meta-batch; the bits do not depend on it."""
    who = parser.add_mutually_exclusive_group()
    who.add_argument(
        "--workers",
        type=count,
        metavar="N",
        help=f"processes that {what}",
    )
    who.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="Dask scheduler whose workers compute them, e.g. tcp://10.0.0.1:8786 (needs dask[distributed])",
    )


def add_common_flags(parser, experiment):
    """The flags that have nothing to do with the task."""
    parser.add_argument("--seed", type=whole, metavar="N", help="of every random draw (default: 0)")
    parser.add_argument(
        "--dtype", choices=("float32", "float64"), help="of all arithmetic (default: float32)"
    )
    parser.add_argument(
        "--save",
        metavar="FILE.npz",
        help=f"checkpoint, every {experiment.save_every} meta-iterations, on Ctrl-C and at the end",
    )
    parser.add_argument(
        "--resume",
        metavar="FILE.npz",
        help="go on from this checkpoint, to the bits of an unbroken run; saves to it unless --save is given",
    )
    parser.add_argument(
        "--evaluate",
        metavar="FILE.npz",
        nargs="+",
        help="train nothing, evaluate these checkpoints; --alpha may be given to fine-tune at another rate",
    )
    parser.add_argument(
        "--log",
        metavar="FILE.csv",
        help=f"learning curve, every {experiment.log_every} meta-iterations: {', '.join(experiment.columns)}",
    )
    parser.add_argument("--results", metavar="FILE.csv", help="the final table")
    parser.add_argument(
        "--plot",
        metavar="FILE.png",
        help="picture of some test tasks, and the curve against gradient steps (needs matplotlib)",
    )


def settings_of(args):
    """What a checkpoint keeps, from the flags and the task's defaults."""
    if args.task is None:
        raise Unusable(f"--task is missing; name one of {', '.join(TASKS)}")
    settings = {"task": args.task, "method": args.method or args.baseline or "maml"}
    other = {"oracle": "sinusoid", "nearest": "omniglot or miniimagenet"}.get(settings["method"], args.task)
    if args.task not in other:
        raise Unusable(f"--baseline {settings['method']} is for --task {other}, not {args.task}")
    given = {key: value for key, value in vars(args).items() if value is not None}
    for key, default in defaults(args.task, settings["method"], given).items():
        settings[key] = given.get(key, default)
    for key in {"ways", "net", "filters", "data"} & set(given) - set(settings):
        if key != "data" or args.task == "sinusoid":
            raise Unusable(f"--{key} is for images, and --task {args.task} has none; leave it out")
    return settings


def defaults(task, method, given):
    """{setting: value} where no flag is given; some depend on the others (paper, A.1)."""
    table = {key: value for key, value in TASKS[task].items() if not key.startswith("eval_")}
    if task == "omniglot" and given.get("ways", 5) > 10:
        table |= {"steps": 5, "meta_batch": 16}
    if task == "miniimagenet" and given.get("shots", 1) > 1:
        table |= {"meta_batch": 2}
    if "query" not in given and table["query"] is None:
        table |= {"query": given.get("shots", table["shots"])}
    if method == "reptile":
        table |= {"steps": REPTILE_STEPS}
    return table | {"seed": 0, "dtype": "float32"}


def check_agreement(args, settings, path, free):
    """Unusable where a flag contradicts the checkpoint, but for those in `free`."""
    for key, kept in settings.items():
        given = (args.method or args.baseline) if key == "method" else getattr(args, key)
        if given is not None and given != kept and key not in free:
            raise Unusable(
                f"{path} was trained with {key.replace('_', '-')} {kept}, not {given}; leave the flag out"
            )


def check_plottable(args, models):
    """Unusable where one picture would have to show sinusoids and images."""
    if args.plot and len({type(experiment) for experiment, _ in models}) > 1:
        raise Unusable("--plot draws checkpoints of one kind of task; leave the others out of --evaluate")


@contextmanager
def workers_of(args, command):
    """The map that --workers or --scheduler asks for, or None; closed at the end."""
    if args.workers:
        with process_pool(args.workers) as pool:
            yield partial(pool_map, pool, args.workers)
    elif args.scheduler:
        with dask_client(args.scheduler, command) as client:
            yield partial(_dask_map, client)
    else:
        yield None


def process_pool(workers):
    """An executor of so many processes, with a BLAS thread each; Ctrl-C is their parent's to answer."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)


def _start_worker():
    threading.Thread(target=_die_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    np.seterr(all="ignore")
    one_blas_thread()


def _die_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def pool_map(pool, workers, function, *columns):
    """pool.map with one parcel a worker, so that theta travels once to each."""
    columns = [list(column) for column in columns]
    return pool.map(function, *columns, chunksize=-(-len(columns[0]) // workers))


def _dask_map(client, function, *columns):
    """The executor's map; a chunk whose worker is lost goes to another."""
    from distributed import KilledWorker

    try:
        return list(client.get_executor().map(function, *columns))
    except KilledWorker:
        raise WorkerLost from None


class WorkerLost(Exception):
    """Dask gave a chunk up after several workers died of it."""


def dask_client(address, command):
    """A client of the scheduler there, whose workers have been sent this project's modules."""
    try:
        from distributed import Client
    except ImportError:
        raise Unusable('--scheduler needs Dask; pip install "dask[distributed]"') from None
    try:
        client = Client(address, timeout=10)
    except Exception as error:  # whatever the address says
        reason = tasks.one_line(error)
        raise Unusable(
            f"--scheduler {address}: no scheduler answers ({reason}); start one with dask scheduler"
        )
    for name in dict.fromkeys(("nets", "tasks", __name__, command.settings_of.__module__)):
        client.upload_file(sys.modules[name].__file__, load=False)
    client.run(one_blas_thread)
    return client


class Command(NamedTuple):
    """What this file's command line and rl.py's differ in."""

    name: str
    parser: object
    settings_of: object
    experiment_of: object
    report: object
    lower: str  # what to lower where training diverges


def run(args, command):
    """The command: -> exit code."""
    with workers_of(args, command) as map:
        return run_on(args, command, map)


def run_on(args, command, map):
    """`run`, where `map` is not None as the experiments' map."""
    for flag in ("save", "resume", "log", "results", "plot"):
        if getattr(args, flag):
            check_writable(f"--{flag}", getattr(args, flag))
    if args.plot:
        check_plotting(args.plot)
    if args.evaluate:
        for flag in ("resume", "save", "log", "iterations"):
            if getattr(args, flag):
                raise Unusable(
                    f"--evaluate trains nothing, so --{flag} does not go with it; leave one of them out"
                )
        models = []
        for path in args.evaluate:
            settings, state, _ = load_checkpoint(path, command)
            check_agreement(args, settings, path, free=() if settings["method"] == "meta-sgd" else ("alpha",))
            settings["alpha"] = settings["alpha"] if args.alpha is None else args.alpha
            settings["iterations"] = state.iteration  # of a stopped run, or the best, not those asked for
            models.append((command.experiment_of(settings), state.theta))
        check_plottable(args, models)
        for experiment, _ in models:
            experiment.map = map or experiment.map
            experiment.open(getattr(args, "data", None))
    else:
        if args.resume:
            settings, state, rng = load_checkpoint(args.resume, command)
            check_agreement(args, settings, args.resume, free=("iterations",))
            settings["iterations"] = args.iterations or settings["iterations"]
            if settings["iterations"] <= state.iteration:
                raise Unusable(
                    f"{args.resume} is at iteration {state.iteration}; give --iterations above that"
                )
            experiment = command.experiment_of(settings)
        else:
            experiment = command.experiment_of(command.settings_of(args))
            rng, state = experiment.stream("training"), experiment.start()
        check_plottable(args, [(experiment, None)])
        experiment.map = map or experiment.map
        experiment.open(getattr(args, "data", None))
        learned = meta_train(experiment, state, rng, args.save or args.resume, args.log, command)
        if learned is None:
            return 130
        models = [(experiment, learned)]
    command.report(models, args)
    return 0


def meta_train(experiment, state, rng, save, log, command):
    """`train` with checkpoints, learning curve, progress and Ctrl-C: -> what was learned, or None if stopped.

    Where validation selects, that is what was best on it, kept beside `save` in FILE.best.npz.
    """
    settings = experiment.settings
    iterations = iterations_of(settings)
    best = kept_best(experiment, save, state, command)
    log = log and Log(log, experiment.columns, state.iteration)
    run = experiment.train(state, rng, iterations)
    with Interrupt() as interrupt, Progress(state.iteration, iterations) as progress:
        try:
            for state, outcome in run:
                i, last = state.iteration, state.iteration == iterations
                if i % experiment.log_every == 0 or last:
                    row, progress.text, score = experiment.measure(state, outcome)
                    if log:
                        log.write(i, *row)
                    if score is not None and score > best[0]:
                        best = score, state
                        if save:
                            save_checkpoint(best_of(save), settings, state, rng)
                if save and (i % experiment.save_every == 0 or last or interrupt.asked):
                    save_checkpoint(save, settings, state, rng)
                progress.show(i, last)
                if interrupt.asked and not last:
                    hint = f"saved; go on with --resume {save}" if save else "nothing was saved (no --save)"
                    progress.say(f"{command.name}: interrupted at iteration {i}: {hint}")
                    return None
        except FloatingPointError as error:
            kept = f"; {save} holds the last checkpoint" if save and os.path.exists(save) else ""
            raise FloatingPointError(f"{error}: lower {command.lower}{kept}") from None
    if save and iterations == 0:
        save_checkpoint(save, settings, state, rng)
    return (best[1] or state).theta


def best_of(save):
    """Where the checkpoint that is best on validation is kept: FILE.best.npz beside FILE.npz."""
    root, suffix = os.path.splitext(save)
    return f"{root}.best{suffix}"


def kept_best(experiment, save, state, command):
    """(validation score, State) of the best so far, in an earlier part of this run; the State may be None."""
    if not experiment.keeps_best:
        return np.inf, None
    if state.iteration == 0 or not save or not os.path.exists(best_of(save)):
        return -np.inf, None
    settings, state, _ = load_checkpoint(best_of(save), command)
    if settings != experiment.settings | {"iterations": settings["iterations"]}:
        return -np.inf, None
    return experiment.score(state.theta), state


class Interrupt:
    """Ctrl-C as a flag, `asked`; the second one interrupts as ever."""

    def __enter__(self):
        self.asked = False
        self.previous = signal.signal(signal.SIGINT, self.ask)
        return self

    def ask(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.previous)


class Progress:
    """One updating line on a terminal's stderr; elsewhere a plain line every ten seconds."""

    def __init__(self, iteration, iterations):
        self.first, self.iterations, self.text, self.shown = iteration, iterations, "", None
        self.terminal = sys.stderr.isatty()

    def __enter__(self):
        self.began = time.monotonic()
        return self

    def show(self, iteration, last):
        now = time.monotonic()
        if not last and now - (self.shown or self.began) < (0.2 if self.terminal else 10):
            return
        self.shown = now
        speed = (iteration - self.first) / max(now - self.began, 1e-9)
        left = round((self.iterations - iteration) / speed)
        line = f"{iteration}/{self.iterations}  {self.text}  {speed:.4g} iterations/s"
        line += f"  {left // 60}:{left % 60:02d} left"
        ends = ("\r", "\033[K", "") if self.terminal else ("", "", "\n")
        print(f"{ends[0]}{line}{ends[1]}", end=ends[2], file=sys.stderr, flush=True)

    def say(self, line):
        """Another line, below the updating one."""
        print("\n" * (self.terminal and self.shown is not None) + line, file=sys.stderr)
        self.shown = None

    def __exit__(self, *_):
        if self.terminal and self.shown is not None:
            print(file=sys.stderr)


def report(models, args):
    """The table of each model, on stdout and in --results; --plot."""
    rows, curves = [], []
    for experiment, learned in models:
        settings = experiment.settings
        table = TASKS[settings["task"]] | {
            "eval_shots": TASKS[settings["task"]]["eval_shots"] or [settings["shots"]]
        }
        asked = {key: getattr(args, key) or table[key] for key in ("eval_tasks", "eval_steps", "eval_shots")}
        metric = "mse" if experiment.unit == "loss" else "accuracy"
        for shots in asked["eval_shots"]:
            values = experiment.curve(learned, "test", asked["eval_tasks"], shots, asked["eval_steps"])
            curves.append((settings["method"], shots, [summarize(v, experiment.threshold) for v in values]))
            label = {"task": settings["task"], "method": settings["method"], "shots": shots}
            for step, row in enumerate(curves[-1][2]):
                rows.append(label | {"step": step, "metric": metric} | row)
        print_table(settings, asked, curves[-len(asked["eval_shots"]) :])
    if args.results:
        write_rows(args.results, rows)
    if args.plot:
        draw = plot_images if isinstance(models[0][0], ImageExperiment) else plot
        write_figure(args.plot, draw(models, curves, args.log))


def print_table(settings, asked, curves):
    """One model's table: a row a gradient step, a column a support size, and the paper's figures."""
    task, method, images = settings["task"], settings["method"], "ways" in settings
    kind = f", {settings['ways']}-way, {settings['net']}" if images else ""
    print(f"\n{task}{kind}, {method}, seed {settings['seed']}, {iterations_of(settings)} meta-iterations")
    what = "query accuracy in %" if images else f"query MSE; diverged: above {DIVERGED:.0f}"
    print(f"{asked['eval_tasks']} unseen tasks: mean ± 95 % interval, median, tasks diverged ({what})\n")
    print("steps  " + "".join(f"{f'K = {shots}':<34}" for _, shots, _ in curves) + "paper")
    for step in range(max(len(rows) for _, _, rows in curves)):
        cells, paper = [], []
        for _, shots, rows in curves:
            row = rows[step]
            mean, ci95, median = (
                figure(row[key] * (100 if images else 1)) for key in ("mean", "ci95", "median")
            )
            cell = f"{mean} ± {ci95}  {median}  {row['diverged'] or '-'}"
            cells.append(f"{cell:<34}")
            key = (
                (task, method, shots, settings["ways"], settings["net"]) if images else (task, method, shots)
            )
            printed = PAPER.get(key, {}).get(step)
            paper += [f"{printed} at K = {shots}"] if printed else []
        print(f"{step:>5}  {''.join(cells)}{', '.join(paper)}".rstrip())


def iterations_of(settings):
    """Meta-iterations that a run of these settings takes."""
    return 0 if settings["method"] in UNTRAINED else settings["iterations"]


def figure(number):
    """A number in seven places."""
    return f"{number:.3f}" if number < 1000 else f"{number:.1e}"


def check_plotting(path):
    """Unusable where matplotlib is missing or does not know the kind of picture."""
    try:
        from matplotlib import backend_bases
    except ImportError:
        raise Unusable("--plot needs matplotlib; pip install matplotlib") from None
    suffix, known = (
        os.path.splitext(path)[1].lstrip("."),
        backend_bases.FigureCanvasBase.get_supported_filetypes(),
    )
    if suffix not in known:
        raise Unusable(
            f"--plot {path}: unknown kind of picture; end the name in one of {', '.join(sorted(known))}"
        )


def plot(models, curves, _):
    """As figure 2 of the paper: test sinusoids before and after adaptation, a row a model; and the error."""
    from matplotlib.figure import Figure

    tasks_shown = 3
    canvas = Figure(figsize=(13, 2.7 * len(models) + 1.2), layout="constrained")
    grid = canvas.add_gridspec(len(models), tasks_shown + 1, width_ratios=[1] * tasks_shown + [1.25])
    lines = plot_fits(canvas, grid, models, tasks_shown)
    canvas.legend(*lines, fontsize=8, ncols=5, loc="outside lower left", frameon=False)
    axes = canvas.add_subplot(grid[:, -1])
    methods, sizes = (list(dict.fromkeys(column)) for column in list(zip(*curves))[:2])
    for method, shots, rows in curves:
        mean, ci95 = (np.array([r[key] for r in rows]) for key in ("mean", "ci95"))
        style = dict(color=f"C{sizes.index(shots)}", marker="osv^D*PX"[methods.index(method) % 8])
        (drawn,) = axes.plot(mean, ms=4, lw=1.2, label=f"{method}, K = {shots}", **style)
        axes.fill_between(
            range(len(rows)), mean - ci95, mean + ci95, color=drawn.get_color(), alpha=0.15, lw=0
        )
    axes.set(xlabel="gradient steps", ylabel="query MSE", yscale="log")
    axes.set_ylim(top=min(axes.get_ylim()[1], 3 * max(rows[0]["mean"] for _, _, rows in curves)))
    axes.set_title("error on unseen tasks, mean and 95 % interval", loc="left", fontsize=10)
    lines = axes.get_legend_handles_labels()
    canvas.legend(*lines, fontsize=8, ncols=len(methods), loc="outside lower right", frameon=False)
    return canvas


def plot_fits(canvas, grid, models, tasks_shown):
    """Test sinusoids before and after adaptation, a row a model -> the legend's handles and names."""
    for row, (experiment, learned) in enumerate(models):
        shots, line = experiment.settings["shots"], np.linspace(-5, 5, 200)
        theta, alpha = experiment.adaptation(learned)
        support, query = experiment.sample("test", shots, len(line))(experiment.stream("test"), tasks_shown)
        shown = query[0].copy()
        shown[..., 0] = line
        _, (latent, _) = tasks.sinusoid(experiment.stream("test"), tasks_shown, shots, 1, oracle=True)
        for column in range(tasks_shown):
            axes = canvas.add_subplot(grid[row, column])
            axes.plot(
                line,
                latent[column, 0, 1] * np.sin(line - latent[column, 0, 2]),
                color="#c0392b",
                lw=1.5,
                label="truth",
            )
            for steps, style, color in ((0, ":", "#7f8c8d"), (1, "--", "#2e86c1"), (10, "-", "#1a5276")):
                adapted = adapt(experiment.loss, theta, support, alpha, steps)
                out = experiment.network.apply(adapted, shown)[column, :, 0]
                name = "before" if steps == 0 else f"after {steps} step{'s' * (steps > 1)}"
                axes.plot(line, out, style, color=color, lw=1.5, label=name)
            axes.plot(
                support[0][column, :, 0],
                support[1][column, :, 0],
                "^",
                color="#6c3483",
                ms=6,
                label="support",
            )
            axes.set(xlim=(-5, 5), ylim=(-5.5, 5.5), xlabel="x" if row == len(models) - 1 else "")
            axes.set_title(
                f"{experiment.method}, K = {shots}" if column == 0 else "", loc="left", fontsize=10
            )
    return axes.get_legend_handles_labels()


def plot_images(models, curves, log):
    """A test task before and after adaptation, accuracy against gradient steps, and the learning curve."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(13, 5.2), layout="constrained")
    left, right = canvas.subfigures(1, 2, width_ratios=[1.7, 1])
    plot_episode(left, *next((m for m in models if m[0].method != "nearest"), models[0]))
    panels = right.subplots(2 if log else 1, 1, squeeze=False)[:, 0]
    for method, shots, rows in curves:
        mean, ci95 = (100 * np.array([r[key] for r in rows]) for key in ("mean", "ci95"))
        panels[0].errorbar(
            range(len(rows)), mean, ci95, marker="o", ms=4, lw=1.2, label=f"{method}, K = {shots}"
        )
    panels[0].set(xlabel="gradient steps", ylabel="query accuracy, %", ylim=(0, 102))
    panels[0].set_title("unseen tasks, mean and 95 % interval", loc="left", fontsize=10)
    panels[0].legend(fontsize=8, frameon=False)
    if log:
        with open(log, newline="") as file:
            curve = np.array(
                [[float(row[k]) for k in ("iteration", "before", "after")] for row in csv.DictReader(file)]
            )
        for column, name in ((1, "before"), (2, "after")):
            panels[1].plot(curve[:, 0], 100 * curve[:, column], lw=1.2, label=f"{name} adaptation")
        panels[1].set(xlabel="meta-iterations", ylabel="validation accuracy, %", ylim=(0, 102))
        panels[1].legend(fontsize=8, frameon=False)
    return canvas


def plot_episode(canvas, experiment, learned):
    """Support images above; a query image of each class below them, with its probabilities."""
    s, shown = experiment.settings, min(experiment.settings["ways"], 6)
    shots = min(s["shots"], 3)
    support, query = experiment.sample("test", s["shots"], 1)(experiment.stream("test"), tasks=1)
    theta, alpha = experiment.adaptation(learned)
    steps = 3 if s["task"] == "omniglot" and s["ways"] <= 10 else max(s["steps"], 5)
    probability = []
    for count in (0, steps):
        out = experiment.network.apply(adapt(experiment.loss, theta, support, alpha, count), query[0])[0]
        out = np.exp(out - out.max(axis=-1, keepdims=True))
        probability.append(out / out.sum(axis=-1, keepdims=True))
    grid = canvas.subplots(shots + 2, shown, squeeze=False, height_ratios=[1] * (shots + 1) + [1.3])
    for label in range(shown):
        for row in range(shots + 1):
            image = support[0][0, label * s["shots"] + row] if row < shots else query[0][0, label]
            grid[row, label].imshow(
                image if image.shape[-1] == 3 else 1 - image[..., 0], cmap="gray", vmin=0, vmax=1
            )
            grid[row, label].set(xticks=[], yticks=[])
        grid[0, label].set_title(f"class {label + 1}", fontsize=9)
        axes, ways = grid[-1, label], np.arange(s["ways"]) + 1
        for out, color, name, shift in zip(
            probability, ("#bdc3c7", "#1a5276"), ("before", "after"), (-0.2, 0.2)
        ):
            axes.bar(
                ways + shift,
                out[label],
                0.4,
                color=color,
                label=f"{name}{f' {steps} steps' * (name == 'after')}",
            )
        right = probability[1][label].argmax() == label
        said = f"class {probability[1][label].argmax() + 1}"
        axes.set_title(
            f"{said}, {'right' if right else 'wrong'}", fontsize=9, color="#1e8449" if right else "#c0392b"
        )
        axes.set(ylim=(0, 1), yticks=[0, 1] if label == 0 else [], xticks=ways if s["ways"] <= 6 else [])
    for row in range(shots + 1):
        grid[row, 0].set_ylabel("support" if row < shots else "query", fontsize=9)
    grid[-1, 0].set_ylabel("probability", fontsize=9)
    canvas.legend(
        *grid[-1, 0].get_legend_handles_labels(), ncols=2, fontsize=8, loc="outside lower left", frameon=False
    )


COMMAND = Command("maml.py", build_parser, settings_of, experiment_of, report, "--alpha or --beta")


def main(argv=None, command=COMMAND):
    """Runs the command line: -> exit code."""
    one_blas_thread()
    try:
        with np.errstate(all="ignore"):
            return run(command.parser().parse_args(argv), command)
    except Unusable as error:
        print(f"{command.name}: {error}", file=sys.stderr)
        return 2
    except (FloatingPointError, OSError) as error:
        print(f"{command.name}: {error}", file=sys.stderr)
        return 1
    except BrokenExecutor:
        print(
            f"{command.name}: a worker was lost; --resume goes on from the last checkpoint", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    import maml  # by this name workers find what they are sent

    sys.exit(maml.main())
