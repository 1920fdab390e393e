# SPDX-License-Identifier: MIT
"""Model-Agnostic Meta-Learning (Finn, Abbeel & Levine, ICML 2017; arXiv 1703.03400).

Axes: T tasks, P parameters. theta is [P], shared by all tasks, or [T, P]. A data set is a pair (x, y)
with the tasks in front, [T, examples, ...]. A loss is a callable loss(theta, x, y) -> [T], written with
autograd.numpy for theta [T, P]. Where it carries closed forms (`expand` and `grad`, as in
nets.py) they are used; else autograd supplies them. The dtype of theta decides the dtype of everything.
"""

import math
import sys
from functools import cached_property, partial
from typing import NamedTuple

import autograd.numpy as anp
import numpy as np
from autograd import grad, make_hvp, value_and_grad

import cli
import nets
import tasks
from cli import FLOATS, Unusable, count, rate, several, whole
from cli import one_blas_thread as one_blas_thread  # for programs of one's own

# The algorithm: its definition -----------------------------------------------------------------


def adapt(loss, theta, support, alpha, steps):
    """theta_{s+1} = theta_s - alpha ∇L(theta_s; support), s = 0 ... steps - 1, theta_0 = theta (section 2.2).

    theta [P] or [T, P]; alpha a number or an array [P] -> theta_steps [T, P]. Autograd can trace it where it
    can trace the loss's gradient, as it can `nets.Loss.grad`.
    """
    alpha = _checked(theta, support, alpha, steps)
    for _ in range(steps):
        theta = theta - alpha * gradient(loss, theta, *support)
    return _per_task(theta, support[0])


def meta_loss(loss, theta, support, query, alpha, steps):
    """Mean over tasks of L(adapt(theta, support); query): the objective of section 2.2, divided by T."""
    _checked(theta, support, alpha, steps, query=query)
    return anp.mean(_one_each(loss, adapt(loss, theta, support, alpha, steps), *query))


def meta_gradient_by_definition(loss, theta, support, query, alpha, steps):
    """∇_theta of `meta_loss`, as in eq. (1), by autograd through the unrolled steps: -> value, gradient [P].

    The reference for everything below: it calls the loss alone, none of its closed forms. Its graph
    keeps every intermediate result of every step.
    """
    _checked(theta, support, alpha, steps, 2, query)
    return value_and_grad(meta_loss, 1)(lambda *data: loss(*data), theta, support, query, alpha, steps)


# The algorithm: the recursion ------------------------------------------------------------------


def meta_gradient(loss, theta, support, query, alpha, steps, order=2):
    """Equals `meta_gradient_by_definition`: -> value, gradient [P], both means over tasks.

    By the chain rule through theta_{s+1} = theta_s - alpha ⊙ ∇L(theta_s), with H_s the Hessian of the
    support loss at theta_s,

        v_S = ∇L(theta_S; query),    v_s = v_{s+1} - H_s (alpha ⊙ v_{s+1}),    gradient = v_0.

    theta [P]; alpha a number or [P]. order=1 drops every H (first-order MAML), and keeps nothing of the
    steps. Costs steps + 1 gradients and `steps` Hessian-vector products; keeps, of each step, theta_s and
    what its product reads.
    """
    alpha = _checked(theta, support, alpha, steps, order, query)
    if order == 1:
        value, v = expand(loss, adapt(loss, theta, support, alpha, steps), *query)[:2]
        return value.mean(), v.mean(axis=0)
    theta, trail = unroll(loss, theta, [support] * steps, alpha)
    value, v = expand(loss, theta, *query)[:2]
    for product in reversed(trail[1:]):
        v -= product(alpha * v)
    total = v.sum(axis=0)
    if trail:  # theta_0 is shared by all tasks, so the sum of its products will do
        total -= trail[0](alpha * v, total=True)
    return value.sum() / len(v), total / len(v)


def meta_gradient_recomputed(loss, theta, support, query, alpha, steps, kept=0):
    """Equals `meta_gradient`, in memory that grows with the steps only by their theta_s.

    Of the last `kept` steps it keeps what their products read; of those before them theta_s alone, from which
    the rest is computed again: one more gradient for each of these steps.
    """
    alpha = _checked(theta, support, alpha, steps, 2, query)
    if not isinstance(kept, (int, np.integer)) or kept < 0:
        raise ValueError(f"kept = {kept}; expected an integer, 0 or more")
    thetas = [theta]
    for _ in range(int(steps) - int(kept)):
        thetas.append(thetas[-1] - alpha * gradient(loss, thetas[-1], *support))
    theta, trail = unroll(loss, thetas.pop(), [support] * min(kept, steps), alpha)
    value, v = expand(loss, theta, *query)[:2]
    while trail:  # no name for a product, so that each is gone before the next is there
        v -= trail.pop()(alpha * v)
    while thetas:
        v -= expand(loss, thetas.pop(), *support)[2](alpha * v)
    return value.mean(), v.mean(axis=0)


def unroll(loss, theta, supports, alpha):
    """The steps of `adapt`, each on its own support set: -> theta_S and, of each step, v ↦ H_s v."""
    trail = []
    for support in supports:
        _, g, product = expand(loss, theta, *support)
        g *= -alpha
        theta = np.add(theta, g, out=g)
        trail.append(product)
    return theta, trail


def expand(loss, theta, x, y):
    """L(theta + v) = value + g·v + v·H v / 2 + ..., per task: -> value [T], g [T, P], v ↦ H v.

    loss.expand, or autograd's. The product takes v [T, P] to [T, P], or with total=True to its sum over
    tasks, [P]. g is a new array, which the caller may overwrite.
    """
    if hasattr(loss, "expand"):
        return loss.expand(theta, x, y)
    theta = _per_task(theta, x)
    product, g = make_hvp(lambda theta: anp.sum(_one_each(loss, theta, x, y)))(theta)
    # +g is a copy: autograd may read its own g again, in the product
    return loss(theta, x, y), +g, lambda v, total=False: product(v).sum(axis=0) if total else product(v)


def gradient(loss, theta, x, y):
    """∇L [T, P]: loss.grad, or autograd's (one task's loss does not depend on another's parameters)."""
    if hasattr(loss, "grad"):
        return loss.grad(theta, x, y)
    return grad(lambda theta: anp.sum(_one_each(loss, theta, x, y)))(_per_task(theta, x))


# The family: the same lines, read differently --------------------------------------------------


def meta_sgd_gradient(loss, theta_alpha, support, query, steps):
    """Meta-SGD (Li et al. 2017): alpha [P] is learned with theta; ∂/∂alpha = -Σ_s v_{s+1} ⊙ ∇L(theta_s).

    theta_alpha = [theta, alpha], [2P] -> value, gradient [2P], means over tasks. The steps are those of
    `unroll`, but their gradients are kept.
    """
    theta, alpha = np.split(theta_alpha, 2)
    alpha = _checked(theta, support, alpha, steps, 2, query)
    trail = []
    for _ in range(steps):
        _, g, product = expand(loss, theta, *support)
        theta = theta - alpha * g
        trail.append((g, product))
    value, v = expand(loss, theta, *query)[:2]
    d_alpha = np.zeros_like(v)
    for g, product in reversed(trail):
        d_alpha -= v * g
        v -= product(alpha * v)
    return value.mean(), np.concatenate([v.mean(axis=0), d_alpha.mean(axis=0)])


def reptile_gradient(loss, theta, support, query, alpha, steps):
    """Reptile (Nichol et al. 2018): -> query loss at theta_S, theta - theta_S [P], means over tasks.

    It needs no query set, so the inner steps train on both sets. One step is joint training.
    """
    _checked(theta, support, alpha, steps, 1, query)
    both = [np.concatenate(pair, axis=1) for pair in zip(support, query)]
    adapted = adapt(loss, theta, both, alpha, steps)
    return _one_each(loss, adapted, *query).mean(), (theta - adapted).mean(axis=0)


def joint_gradient(loss, theta, support, query):
    """Pretraining on all tasks, the paper's baseline: ∇L(theta; support): MAML with no inner step."""
    return meta_gradient(loss, theta, support, support, 0.0, 0)


def _checked(theta, support, alpha, steps, order=None, query=None):
    """alpha as a Python number or an array of theta's dtype; ValueError where the arguments do not fit.

    A meta-gradient gives its order and query set, and its theta is [P].
    """
    shape, dtype = getattr(theta, "shape", ()), getattr(theta, "dtype", type(theta).__name__)
    if len(shape) not in ((1,) if order else (1, 2)) or getattr(dtype, "kind", "") != "f":
        expected = "[P]" if order else "[P] or [tasks, P]"
        raise ValueError(f"theta is {dtype} {shape}; expected an array of floats, {expected}")
    for x, y in (support, query or support):
        if 0 in x.shape[:2]:
            raise ValueError(f"x has shape {x.shape}; expected 1 task and 1 example or more")
        if len({len(support[0]), len(x), len(y), *theta.shape[:-1]}) > 1:
            shapes = f"theta {theta.shape}, x {x.shape}, y {y.shape}"
            raise ValueError(f"{shapes}: different numbers of tasks, of which support has {len(support[0])}")
    if not isinstance(steps, (int, np.integer)) or steps < 0:
        raise ValueError(f"steps = {steps}; expected an integer, 0 or more")
    if order not in (None, 1, 2):
        raise ValueError(f"order = {order}; expected 1 or 2")
    if np.ndim(alpha) == 0:
        return float(alpha) if isinstance(alpha, (int, float, np.generic, np.ndarray)) else alpha
    found = getattr(alpha, "dtype", type(alpha).__name__), getattr(alpha, "shape", ())
    expected = theta.dtype, theta.shape[-1:]
    if found != expected:
        raise ValueError("alpha is {} {}; expected {} {} or a number".format(*found, *expected))
    return alpha


def _per_task(theta, x):
    """theta [T, P], repeated from [P] if need be."""
    return theta if theta.ndim == 2 else theta + anp.zeros((len(x), 1), theta.dtype)


def _one_each(loss, theta, x, y):
    """loss(theta [T, P], x, y), if it is one value a task, of theta's dtype."""
    values = loss(theta, x, y)
    if (values.shape, values.dtype) != ((len(theta),), theta.dtype):
        expected = f"one value a task, {theta.dtype} ({len(theta)},)"
        raise ValueError(f"the loss returned {values.dtype} {values.shape}; expected {expected}")
    return values


# The outer update ------------------------------------------------------------------------------


class State(NamedTuple):
    """What a meta-iteration changes: the learned parameters, Adam's moments (m, v), the iteration count."""

    theta: np.ndarray
    moments: tuple
    iteration: int

    @classmethod
    def start(cls, theta, moments=2):
        return cls(theta, np.zeros((moments, *theta.shape), theta.dtype), 0)


def adam(state, g, beta, b1=0.9, b2=0.999, eps=1e-8):
    """theta ← theta - beta sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps): Adam, as in TensorFlow.

    m ← b1 m + (1 - b1) g, v ← b2 v + (1 - b2) g², t = 1, 2, ...; eps is added to the sqrt(v) that is
    not corrected for bias (Kingma & Ba's "epsilon hat"), as in the authors' code.
    """
    theta, (m, v), t = state
    if (g.shape, g.dtype) != (theta.shape, theta.dtype):
        raise ValueError(f"the gradient is {g.dtype} {g.shape}; expected {theta.dtype} {theta.shape}")
    t += 1
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    size = float(beta) * (1 - b2**t) ** 0.5 / (1 - b1**t)
    return State(theta - size * m / (np.sqrt(v) + eps), (m, v), t)


def train(step, state, rng, iterations, map=map):
    """Meta-iterations, from state.iteration up to `iterations` in all: yields (state, outcome) after each.

    step(state, rng, map=map) -> state, outcome, e.g. `adam_step` with its settings. FloatingPointError names
    the iteration that failed; the state yielded last is still good. `map` as in `spread`.
    """
    while state.iteration < iterations:
        state, outcome = step(state, rng, map=map)
        yield state, outcome


def adam_step(state, rng, outer_gradient, sample, tasks, beta, clip=np.inf, parcel=None, map=map):
    """theta ← theta - beta ∇_theta Σ_i L_i(f_theta'_i), eq. (1), with Adam: -> State, meta-loss.

    outer_gradient(theta, support, query) -> value, gradient, means over tasks; sample, tasks, parcel and map
    as in `spread`. The gradient is clipped to ±clip, element by element. FloatingPointError names the
    iteration whose loss, or sum of the gradient's squares, is not finite.
    """
    value, g = mean_over_parcels(partial(outer_gradient, state.theta), sample, rng, tasks, parcel, map)
    if not (np.isfinite(value) and np.isfinite(np.dot(g, g))):  # Adam's v are squares
        what = f"the meta-loss is {value}, its largest gradient {np.abs(g).max()}"
        raise FloatingPointError(f"{what}, at iteration {state.iteration + 1}")
    return adam(state, np.clip(g, -float(clip), float(clip)) if clip < np.inf else g, beta), value


def mean_over_parcels(function, sample, rng, tasks, parcel=None, map=map):
    """The arrays that function(support, query) returns, means over a parcel's tasks, as means over all."""
    results = spread(function, sample, rng, tasks, parcel, map)
    if len(results) == 1:
        return results[0]
    shares = [size / tasks for size in parcels(tasks, parcel)]
    return tuple(sum(share * part for share, part in zip(shares, column)) for column in zip(*results))


def spread(function, sample, rng, tasks, parcel=None, map=map):
    """[function(support, query) of each parcel of `tasks` tasks], sample(rng, tasks=n) -> support, query.

    A parcel is a seed and a count, and whoever computes it draws its tasks: so results do not depend on
    `map`, which may be any function like it, e.g. an executor's, and no data travel. A single parcel, as
    where `parcel` is None, is drawn from rng itself, here and without `map`.
    """
    sizes = parcels(tasks, parcel)
    if len(sizes) == 1:
        return [function(*sample(rng, tasks=tasks))]
    seeds = rng.integers(2**63, size=len(sizes)).tolist()
    return list(map(partial(on_drawn, function, sample), seeds, sizes))


def parcels(tasks, parcel=None):
    """The number of tasks in each parcel: `parcel`, in the last what is left; None: all in one."""
    parcel = tasks if parcel is None else parcel
    if min(tasks, parcel) < 1:
        raise ValueError(f"{tasks=}, {parcel=}; expected 1 or more of each")
    return [min(parcel, tasks - start) for start in range(0, tasks, parcel)]


def on_drawn(function, sample, seed, count):
    """function(support, query) of the tasks that a seed and a count stand for: all that a worker runs."""
    return function(*sample(np.random.default_rng(seed), tasks=count))


def evaluate(loss, theta, sample, rng, tasks, alpha, steps, metric=None, parcel=None, map=map):
    """metric(theta_s; query) after s = 0 ... steps inner steps on the support set: -> [steps + 1, tasks].

    The metric is the loss unless another is given, and is called like it: metric(theta, x, y) -> [T]. sample,
    tasks, parcel and map as in `spread`.
    """
    one = partial(curve, loss, theta, alpha=alpha, steps=steps, metric=metric or loss)
    return np.concatenate(spread(one, sample, rng, tasks, parcel, map), axis=1)


def curve(loss, theta, support, query, alpha, steps, metric):
    """`evaluate` on given tasks: -> [steps + 1, T]."""
    _checked(theta, support, alpha, steps, query=query)
    theta = adapt(loss, theta, support, alpha, 0)
    rows = [metric(theta, *query)]
    for _ in range(steps):
        theta = adapt(loss, theta, support, alpha, 1)
        rows.append(metric(theta, *query))
    return np.stack(rows)


def summarize(values, threshold=np.inf, worst=np.inf):
    """Of values [T]: mean, 95 % interval 1.96 std / sqrt(T), median, how many tasks diverged, and T.

    A task has diverged when its value is not finite or above `threshold`; it stays in the mean, as `worst`
    where it is not finite.
    """
    finite = np.isfinite(values)
    diverged = int((~finite | (values > threshold)).sum())
    values = np.where(finite, values, worst).astype(float)
    mean = values.mean()
    ci95 = 1.96 * values.std() / len(values) ** 0.5 if np.isfinite(mean) else np.inf
    return dict(mean=mean, ci95=ci95, median=np.median(values), diverged=diverged, tasks=len(values))


# The settings ----------------------------------------------------------------------------------

TASKS = cli.COMMANDS["maml.py"]
METHODS = ("maml", "fomaml", "anil", "meta-sgd", "reptile")
BASELINES = ("random", "pretrained", "oracle", "nearest")
OUTER = "beta"  # the outer step size
CLASSIFIED = {"omniglot": 1100, "miniimagenet": 64}  # training classes: the pretrained classifier's outputs
NETS, QUERIES = ("conv", "mlp"), ("together", "alone")
# fmt: off
SETTINGS = cli.table_of(  # what a checkpoint keeps; 20-way, 5-shot and Reptile differ: `conditional_defaults`
    TASKS,
    #                      sinusoid   omniglot   miniimagenet
    ("ways",       several, None,      5,         5,         "classes per task, N"),
    ("shots",      count,   10,        1,         1,         "support examples K per task (of a class)"),
    ("query",      count,   10,        "shots",   15,        "query examples in training, likewise"),
    ("net",        NETS,    None,      "conv",    "conv",    "network for images"),
    ("filters",    count,   None,      64,        32,        "filters per convolution (--net conv)"),
    ("steps",      count,   1,         1,         5,         "training inner steps (20-way 5, Reptile 10)"),
    ("alpha",      rate,    0.01,      2.0,       0.05,      "inner step size"),
    ("beta",       rate,    0.001,     0.001,     0.001,     "outer step size, Adam's; --resume may set it"),
    ("meta_batch", count,   25,        32,        4,         "meta-batch (20-way 16, MiniImagenet 5-shot 2)"),
    ("iterations", count,   70_000,    60_000,    60_000,    "meta-iterations in all"),
    ("seed",       whole,   0,         0,         0,         "seed of weights and tasks"),
    ("dtype",      FLOATS,  "float32", "float32", "float32", "number type of weights, data and networks"),
)
EVALUATION = cli.table_of(  # may differ at every evaluation
    TASKS,
    ("eval_tasks", count, 600,         600,     600,     "unseen tasks for the table"),
    ("eval_steps", count, 10,          10,      10,      "largest number of gradient steps in the table"),
    ("eval_shots", count, (5, 10, 20), "shots", "shots", "support sizes to evaluate at"),
    ("eval_queries", QUERIES, None, "together", "together", "queries in batch norm: all, or each alone"),
)
# fmt: on


def conditional_defaults(args, task, method):
    """The defaults that other flags change (paper, A.1; Reptile): {name: value}; Unusable where none goes."""
    other = {"oracle": ("sinusoid",), "nearest": ("omniglot", "miniimagenet")}.get(method, TASKS)
    if task not in other:
        raise Unusable(f"--baseline {method} is for --task {' or '.join(other)}, not {task}")
    defaults = {}
    if task == "omniglot" and (args.ways or 5) > 10:
        defaults |= {"steps": 5, "meta_batch": 16}
    if task == "miniimagenet" and (args.shots or 1) > 1:
        defaults |= {"meta_batch": 2}
    if method == "reptile":
        defaults |= {"steps": 10}  # with one inner step Reptile is joint training
    return defaults


def build_parser():
    """The command's flags. A flag that was not given is None, and settled by `cli.settings_of`."""
    first_order = {"dest": "method", "const": "fomaml", "help": "short for --method fomaml"}
    workers = "compute parcels of image tasks (default: one for each core)"
    parser = cli.parser_of(sys.modules[__name__], "Model-Agnostic Meta-Learning", first_order, workers)
    what = "folder of the images (default: data/omniglot, fetched where it is missing; data/miniimagenet)"
    parser.add_argument("--data", type=cli.nonempty, metavar="FOLDER", help=what)
    what = "with --evaluate: a folder of support images per class, and the images to classify beside these"
    parser.add_argument("--adapt", type=cli.nonempty, metavar="FOLDER", help=what)
    return parser


# The experiments -------------------------------------------------------------------------------

# What the paper prints: (task, method, K in training, K of the table, ways, network) -> {step: figure}.
PAPER = {
    ("sinusoid", "maml", 10, 5, None, None): {1: "0.67", 5: "0.38", 10: "0.35"},
    ("sinusoid", "pretrained", 10, 5, None, None): {1: "2.41", 5: "2.23", 10: "2.19"},
    ("omniglot", "maml", 1, 1, 5, "conv"): {3: "98.7 ± 0.4"},
    ("omniglot", "maml", 5, 5, 5, "conv"): {3: "99.9 ± 0.1"},
    ("omniglot", "maml", 1, 1, 20, "conv"): {5: "95.8 ± 0.3"},
    ("omniglot", "maml", 5, 5, 20, "conv"): {5: "98.9 ± 0.2"},
    ("omniglot", "maml", 1, 1, 5, "mlp"): {3: "89.7 ± 1.1"},
    ("omniglot", "maml", 5, 5, 5, "mlp"): {3: "97.5 ± 0.6"},
    ("miniimagenet", "maml", 1, 1, 5, "conv"): {10: "48.70 ± 1.84"},
    ("miniimagenet", "maml", 5, 5, 5, "conv"): {10: "63.11 ± 0.92"},
    ("miniimagenet", "fomaml", 1, 1, 5, "conv"): {10: "48.07 ± 1.75"},
    ("miniimagenet", "fomaml", 5, 5, 5, "conv"): {10: "63.15 ± 0.91"},
}

EVAL_QUERY = 100  # query points of a test sinusoid: the paper has K: the same mean, more noise
DIVERGED = 100.0  # of a sinusoid's error: four times the largest amplitude squared
SPLITS = {"training": "train", "validation": "val", "test": "test"}
STREAMS = ("training", "test", "validation", "init")
MANY_STEPS, KEPT_STEPS = 5, 2  # above 5 inner steps of images, only the last 2 keep what products read


class Experiment:
    """Sinusoids, and what every experiment is: a task distribution, a network, a loss, and what learns them.

    All that the command asks of one, here and in rl.py, built from the settings that a checkpoint keeps:

    open(data, asked)       loads the data and finds out what is missing, for training and for the table that
                            `asked` describes; Unusable
    start()                 -> the State that training begins with
    stream(purpose)         -> the seed's generator for "training" and other purposes
    step(state, rng, map)   -> State, outcome: a meta-iteration; progress shows the outcome, by the name
                            `watched`, as a mean over some `smoothed` meta-iterations
    measure(state, outcome) -> a row of the log (`columns`), a line of progress, the validation score or None
    score(theta)            -> the validation score, larger is better, where `measure` had None and it selects
    test(theta, asked)      yields K, `summarize` of the metric of unseen tasks at each step
    published(K)            {step: figure} of the paper or its authors for this task, method and K
    map                     who computes parcels where no flag says; `spreads`: whether there are several
    log_every, save_every   meta-iterations
    settings, method        as the checkpoint has them
    metric_name, heading    of the table, whose figures are the metric times `scale`, to so many `digits`
    keeps_best              whether what is evaluated is what was best on validation, else the last state
    picture                 the kind of picture: models of one kind share it
    """

    columns, watched, log_every, save_every = ("loss", "before", "after"), "loss", 500, 1000
    smoothed, keeps_best, spreads, map = 50, False, False, staticmethod(map)
    parcel, clip = None, np.inf  # tasks computed at once; the largest element of a meta-gradient
    validation_tasks = 100  # for the eye alone: no model is chosen by them
    metric_name, scale, digits, threshold, worst = "mse", 1, 3, DIVERGED, np.inf
    picture = "sinusoids"
    heading = f"query MSE: mean ± 95 % interval; above {DIVERGED:.0f} a task has diverged"
    meta_gradient = staticmethod(meta_gradient)

    def __init__(self, settings):
        self.settings, self.method = settings, settings["method"]
        self.network = nets.mlp((3 if self.method == "oracle" else 1, 40, 40, 1))
        self.loss = self.trained = self.metric = nets.mean_squared_error(self.network)

    def open(self, data, asked):
        if data:
            raise Unusable(f"--data is for images, and --task {self.settings['task']} has none; leave it out")

    def sample(self, purpose, shots, query=EVAL_QUERY):
        """sample(rng, tasks) -> support, query, of tasks for a purpose; a test task's queries by default."""
        oracle, dtype = self.method == "oracle", np.dtype(self.settings["dtype"])
        return partial(tasks.sinusoid, shots=shots, query_shots=query, oracle=oracle, dtype=dtype)

    def stream(self, purpose):
        """The seed's generator for one purpose, so that all methods meet the same tasks."""
        return np.random.default_rng([self.settings["seed"], STREAMS.index(purpose)])

    def start(self):
        theta = self.trained.network.init(self.stream("init"), self.settings["dtype"])
        if self.method == "meta-sgd":
            theta = np.concatenate([theta, np.zeros_like(theta) + self.inner_rate()])
        return State.start(theta)

    def outer_gradient(self):
        """(theta, support, query) -> value, gradient: what the method descends."""
        alpha, steps = self.inner_rate(), self.settings["steps"]
        return {
            "maml": partial(self.meta_gradient, self.loss, alpha=alpha, steps=steps),
            "anil": partial(self.meta_gradient, self.loss, alpha=alpha, steps=steps),
            "fomaml": partial(meta_gradient, self.loss, alpha=alpha, steps=steps, order=1),
            "meta-sgd": partial(meta_sgd_gradient, self.loss, steps=steps),
            "reptile": partial(reptile_gradient, self.loss, alpha=alpha, steps=steps),
        }.get(self.method, partial(joint_gradient, self.trained))

    def meta_batch(self):
        """What a meta-iteration takes: {sample, tasks, parcel}, as `spread` has them."""
        s = self.settings
        sample = self.sample("training", s["shots"], s["query"])
        return {"sample": sample, "tasks": s["meta_batch"], "parcel": self.parcel}

    @cached_property
    def step(self):
        """`adam_step` with the settings."""
        given = {"outer_gradient": self.outer_gradient(), "beta": self.settings["beta"], "clip": self.clip}
        return partial(adam_step, **given, **self.meta_batch())

    def measure(self, state, loss):
        s = self.settings
        values = self.curve(state.theta, "validation", self.validation_tasks, s["shots"], s["steps"])[[0, -1]]
        before, after = np.where(np.isfinite(values), values, self.worst).mean(axis=1)
        text = f"validation {self.metric_name} {before:.3f} before, {after:.3f} after adaptation"
        score = after if self.worst < np.inf else -after  # of an error, which is inf at worst
        return (loss, before, after), text, score if self.keeps_best else None

    def inner_rate(self):
        """alpha, or an array [P]: zero on batch norm's shifts, and for ANIL on all but the last layer."""
        alpha, names = self.settings["alpha"], list(self.network.shapes)
        fixed = [name for name in names if name.startswith("beta")]
        if self.method == "anil":
            fixed = names[:-2]  # Raghu et al. 2020; the last two are w and b
        if not fixed:
            return alpha
        rates = np.full(self.network.size, alpha, self.settings["dtype"])
        for name in fixed:
            self.network.unflatten(rates)[name][...] = 0
        return rates

    def adaptation(self, learned):
        """theta and alpha with which to adapt to a new task, from what was learned."""
        return np.split(learned, 2) if self.method == "meta-sgd" else (learned, self.inner_rate())

    def curve(self, learned, purpose, count, shots, steps):
        """The metric [steps + 1, count] of unseen tasks after 0 ... steps inner steps."""
        theta, alpha = self.adaptation(learned)
        drawn = self.sample(purpose, shots), self.stream(purpose), count
        return evaluate(self.loss, theta, *drawn, alpha, steps, self.metric, self.parcel, self.map)

    def test(self, learned, asked):
        count, steps, shots, *queries = asked.values()
        for k in dict.fromkeys(np.atleast_1d(shots).tolist()):
            values = self.curve(learned, "test", count, k, steps, *queries)
            yield k, [summarize(v, self.threshold, self.worst) for v in values]

    def published(self, shots):
        s = self.settings
        key = s["task"], s["method"], s["shots"], shots, s.get("ways"), s.get("net")
        return PAPER.get(key, {})


class ImageExperiment(Experiment):
    """N-way K-shot images: cross-entropy, accuracy, and a convolutional network or a perceptron."""

    save_every, keeps_best, spreads, validation_tasks = 100, True, True, 600
    metric_name, scale, digits, threshold, worst = "accuracy", 100, 2, np.inf, 0.0
    picture = "images"
    heading = "query accuracy in %: mean ± 95 % interval"

    def __init__(self, settings):
        self.settings, self.method, self.images = settings, settings["method"], None
        mini, ways = settings["task"] == "miniimagenet", settings["ways"]
        self.shape = (84, 84, 3) if mini else (28, 28, 1)
        if settings["net"] == "conv":
            self.network_for = partial(nets.convnet, self.shape, filters=settings["filters"], pool=mini)
        else:
            sizes = math.prod(self.shape), 256, 128, 64, 64  # the authors'
            self.network_for = lambda ways: nets.mlp((*sizes, ways), normalize=True)
        self.network = self.network_for(ways)
        self.loss = self.trained = nets.cross_entropy(self.network)
        self.parcel = 1 if mini or ways > 10 else max(1, 8 // settings["shots"])
        if settings["steps"] > MANY_STEPS:
            self.meta_gradient = partial(meta_gradient_recomputed, kept=KEPT_STEPS)
        self.map = cli.processes()
        if mini:  # the authors clip to ±10 a loss that is ways · query / shots times the mean
            self.clip = 10 * settings["shots"] / (ways * settings["query"])

    def open(self, data, asked):
        s = self.settings
        path = data or f"data/{s['task']}"
        try:
            if s["task"] == "omniglot" and not data:
                tasks.download_omniglot(path)
            load = tasks.load_omniglot if s["task"] == "omniglot" else tasks.load_miniimagenet
            self.images = load(path)
        except (OSError, ValueError) as error:
            hint = "" if data else "; or name the images' folder with --data"
            raise Unusable(tasks.one_line(error) + hint)
        samples = [("training", self.meta_batch()["sample"])]
        samples += [("validation", self.sample("validation", s["shots"]))]
        samples += [("test", self.sample("test", k)) for k in np.atleast_1d(asked["eval_shots"]).tolist()]
        samples += [("test", self.sample("test", s["shots"], 1))]  # the picture's
        for purpose, sample in samples:
            try:
                sample(self.stream(purpose), tasks=1)
            except ValueError as error:
                raise Unusable(f"{path}, {SPLITS[purpose]}: {error}")

    def sample(self, purpose, shots, query=None):
        s, query = self.settings, query or shots
        drawn = {"ways": s["ways"], "shots": shots, "query_shots": query, "dtype": np.dtype(s["dtype"])}
        images, rotate = self.images[SPLITS[purpose]], s["task"] == "omniglot"
        return partial(tasks.few_shot, images=images, rotate=rotate, **drawn)

    def curve(self, learned, purpose, count, shots, steps, queries="together"):
        theta, alpha = self.adaptation(learned)
        one = partial(accuracies, self.loss, theta, alpha=alpha, steps=steps, queries=queries)
        if self.method == "nearest":
            one = nearest_accuracy
        drawn = self.sample(purpose, shots), self.stream(purpose), count
        return np.concatenate(spread(one, *drawn, self.parcel, self.map), axis=1)


class PretrainedImages(ImageExperiment):
    """The baseline that learns all training classes, then adapts, with a new last layer, to each task."""

    def __init__(self, settings):
        super().__init__(settings)
        self.clip = np.inf  # the authors clip meta-gradients alone
        self.classifier = self.network_for(CLASSIFIED[settings["task"]])
        self.trained = nets.cross_entropy(self.classifier)

    def meta_batch(self):
        """As many images as MAML meets, as one task."""
        s, outputs = self.settings, self.classifier.outputs[0]
        count, dtype = s["meta_batch"] * s["ways"] * (s["shots"] + s["query"]), np.dtype(s["dtype"])
        drawn = {"images": self.images["train"], "count": count, "outputs": outputs, "dtype": dtype}
        return {"sample": partial(tasks.labelled, **drawn), "tasks": 1}

    def adaptation(self, learned):
        """The body, and a last layer of zeros."""
        theta = np.zeros(self.network.size, learned.dtype)
        *body, _, _ = self.network.unflatten(theta).values()
        for part, found in zip(body, self.classifier.unflatten(learned).values()):
            part[...] = found
        return theta, self.inner_rate()


def nearest_accuracy(support, query):
    """The baseline without learning: the share of queries that it gets right, [1, T]."""
    return (tasks.nearest(support, query) * query[1]).sum(axis=-1).mean(axis=1)[None].astype(float)


def alone(network, theta, x, support):
    """The outputs for queries x, each normalised with the support images and itself."""
    sets = (np.concatenate([support, x[:, i : i + 1]], axis=1) for i in range(x.shape[1]))
    return np.concatenate([network.forward(theta, one)[0][:, -1:] for one in sets], axis=1)


def softmax(out):
    """Outputs [..., ways] as probabilities."""
    chances = np.exp(out - out.max(axis=-1, keepdims=True))
    return chances / chances.sum(axis=-1, keepdims=True)


def accuracies(loss, theta, support, query, alpha, steps, queries):
    """`curve` of the accuracy, the queries `together` in batch norm or each `alone`."""
    metric = partial(accuracy, loss.network, support=support[0] if queries == "alone" else None)
    return curve(loss, theta, support, query, alpha, steps, metric)


def accuracy(network, theta, x, y, support=None):
    """The fraction of examples whose largest output is at the label, [T]; NaN if an output is not finite."""
    # batch norm takes the statistics of all examples, or of the support images and one at a time
    out = network.forward(theta, x)[0] if support is None else alone(network, theta, x, support)
    right = (out.argmax(axis=-1) == y.argmax(axis=-1)).mean(axis=1)
    return np.where(np.isfinite(out).all(axis=(1, 2)), right, np.nan)


def experiment_of(settings):
    """The experiment that these settings name."""
    if settings["task"] == "sinusoid":
        return Experiment(settings)
    return (PretrainedImages if settings["method"] == "pretrained" else ImageExperiment)(settings)


def classify(models, args):
    """The class and its probability of each query image in --adapt's folder."""
    for flag in "data results plot workers scheduler eval-tasks eval-shots eval-queries".split():
        if getattr(args, flag.replace("-", "_")):
            raise Unusable(f"--adapt prints its answer alone, so --{flag} does not go with it; leave it out")
    lines = []
    for (experiment, learned), name in zip(models, cli.names_of(models, args)):
        s, network = experiment.settings, experiment.network
        if experiment.picture != "images" or s["method"] == "nearest":
            raise Unusable(f"--adapt is for networks of images, not {s['task']}, {s['method']}")
        try:
            classes, support, files, x = tasks.load_own(args.adapt, experiment.shape, np.dtype(s["dtype"]))
        except (OSError, ValueError) as error:
            raise Unusable(tasks.one_line(error))
        if len(classes) != s["ways"]:
            raise Unusable(f"{args.adapt}: {len(classes)} classes, and the model is {s['ways']}-way")
        theta, alpha = experiment.adaptation(learned)
        steps = cli.settled(EVALUATION, args, s)["eval_steps"]
        theta = adapt(experiment.loss, theta, support, alpha, steps)
        out = alone(network, theta, x, support[0])[0]
        if not np.isfinite(out).all():
            found = f"the outputs diverge within {steps} steps"
            raise FloatingPointError(f"{found}: lower --alpha or --eval-steps")
        width = max(24, *(len(each) + 2 for each in classes))
        lines.append(f"{'class':<{width}}{'probability':<14}query, by {name}")
        for file, row in zip(files, softmax(out)):
            lines.append(f"{classes[row.argmax()]:<{width}}{row.max():<14.3f}{file}")
    cli.tell("\n".join(lines), to="stdout")


# Pictures: each is a function of its own, to be changed at will --------------------------------

PALE, GREY, BLUE, NAVY, RED, GREEN = "#bdc3c7", "#7f8c8d", "#2e86c1", "#154360", "#c0392b", "#1e8449"


def plot(models, curves, log):
    """The picture of (experiment, learned, name) of one kind, and their curves; --log's where it is given."""
    draw = {"sinusoids": plot_sinusoids, "images": plot_images}[models[0][0].picture]
    return draw(models, curves, log)


def learning(axes, log, scale=1):
    """What --log has written: the metric before and after adaptation; of many rows running means of ten."""
    with open(log, newline="") as file:
        rows = np.genfromtxt(file, delimiter=",", names=True, ndmin=1, loose=False)
    for when, color in {"before": GREY, "after": BLUE}.items():
        values, style = scale * rows[when], "o-"
        if len(rows) >= 100:
            values, style = np.convolve(values, np.full(10, 0.1), "valid"), "-"
        iterations = rows["iteration"][-len(values) :]
        axes.plot(iterations, values, style, ms=3, lw=1, color=color, label=f"{when} adaptation")
    axes.set(xlabel="meta-iterations")


def plot_sinusoids(models, curves, _):
    """As figure 2 of the paper: test sinusoids before and after adaptation, a row a model; and the error."""
    canvas = cli.canvas_of(10, 2.2 * len(models) + 0.8, len(curves))
    left, right = canvas.subfigures(1, 2, width_ratios=[2, 1])
    grid = left.subplots(len(models), 3, squeeze=False, sharex=True, sharey=True)
    for row, model in zip(grid, models):
        plot_fits(row, *model)
    for axes in grid[-1]:
        axes.set(xlabel="x")
    lines = grid[0, 0].get_legend_handles_labels()
    left.legend(*lines, fontsize=9, ncols=5, loc="outside lower center", frameon=False)
    axes = right.subplots()
    cli.panel(axes, curves, models[0][0], yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    return canvas


def plot_fits(row, experiment, learned, name):
    """Test sinusoids of one model before and after adaptation, one on each of the axes."""
    shots, steps = experiment.settings["shots"], {0: ("before", ":", GREY), 1: ("after 1 step", "--", BLUE)}
    steps[10] = "after 10 steps", "-", NAVY
    support, (x, y) = experiment.sample("test", shots, 500)(experiment.stream("test"), tasks=len(row))
    theta, alpha = experiment.adaptation(learned)
    thetas = {step: adapt(experiment.loss, theta, support, alpha, step) for step in steps}
    outs = {step: experiment.network.apply(adapted, x) for step, adapted in thetas.items()}
    for i, axes in enumerate(row):
        order = x[i, :, 0].argsort()
        axes.plot(x[i, order, 0], y[i, order, 0], color=RED, lw=2.5, alpha=0.5, label="truth")
        for step, (when, style, color) in steps.items():
            axes.plot(x[i, order, 0], outs[step][i, order, 0], style, color=color, lw=1.5, label=when)
        axes.plot(support[0][i, :, 0], support[1][i, :, 0], "^", color="black", ms=5, label="support")
        axes.set(ylim=(-7, 7), xticks=[-4, 0, 4], yticks=[-4, 0, 4])
    row[0].set_title(cli.text_of(f"{name}, K = {shots}"), loc="left", fontsize=10)
    row[0].set(ylabel="y")


def plot_images(models, curves, log):
    """A test task before and after adaptation, accuracy against gradient steps, and the learning curve."""
    canvas = cli.canvas_of(10, 4.6, len(curves))
    left, right = canvas.subfigures(1, 2, width_ratios=[1.6, 1])
    shown = next((model for model in models if model[0].method != "nearest"), models[0])
    plot_episode(left, *shown[:2])
    if len(models) > 1:
        left.suptitle(cli.text_of(shown[2]), fontsize=10)
    experiment, axes = models[0][0], right.subplots(2 if log else 1, 1, squeeze=False)[:, 0]
    chance = sorted({100 / model[0].settings["ways"] for model in models})
    for each in axes:
        across = each.get_yaxis_transform()
        each.hlines(chance, 0, 1, transform=across, color=GREY, lw=1, ls=":", label="chance")
    if log:
        learning(axes[0], log, experiment.scale)
        axes[0].set(ylim=(0, 103))
        axes[0].legend(fontsize=9, frameon=False)
        axes[0].set_title("validation accuracy in %", loc="left", fontsize=10)
    cli.panel(axes[-1], curves, experiment, ylim=(0, 103))
    return canvas


def plot_episode(canvas, experiment, learned):
    """Support images above; a query image of each class below them, with its probabilities."""
    s, steps = experiment.settings, max(experiment.settings["steps"], 3)
    ways, shots = np.arange(s["ways"]) + 1, min(s["shots"], 3)
    support, query = experiment.sample("test", s["shots"], 1)(experiment.stream("test"), tasks=1)
    theta, alpha = experiment.adaptation(learned)
    grid = canvas.subplots(shots + 2, min(len(ways), 6), squeeze=False, sharey="row")
    shown = [(0, "before", PALE, -0.2), (steps, f"after {steps} steps", NAVY, 0.2)]
    if experiment.method == "nearest":
        shown, chances = [(0, "nearest image", NAVY, 0)], tasks.nearest(support, query)[0]
    for i, name, color, aside in shown:
        if experiment.method != "nearest":
            out = experiment.network.apply(adapt(experiment.loss, theta, support, alpha, i), query[0])[0]
            chances = softmax(out)
        for axes, chance in zip(grid[-1], chances):
            axes.bar(ways + aside, chance, 0.4, color=color, label=name)
    for label, column in enumerate(grid.T):
        images = [*support[0][0, label * s["shots"] :][:shots], query[0][0, label]]
        for axes, image in zip(column, images):
            axes.imshow(image if image.shape[-1] == 3 else 1 - image[..., 0], cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
        column[0].set_title(f"class {label + 1}", fontsize=9)
        said = chances[label].argmax()
        verdict, color = ("right", GREEN) if said == label else ("wrong", RED)
        verdict = f"class {said + 1}, {chances[label, said]:.0%}\n{verdict}"
        if not np.isfinite(chances[label]).all():
            verdict, color = "diverged", RED
        column[-1].set_title(verdict, fontsize=9, color=color, fontweight="bold")
        column[-1].set(xlabel="class", ylim=(0, 1), yticks=[0, 1])
        column[-1].set_xticks(ways if len(ways) <= 6 else [1, len(ways)])
    for axes, name in zip(grid[:, 0], ["support"] * shots + ["query", "probability"]):
        axes.set_ylabel(name, fontsize=9)
    lines = grid[-1, 0].get_legend_handles_labels()
    canvas.legend(*lines, ncols=2, fontsize=9, loc="outside lower center", frameon=False)


main = partial(cli.main, sys.modules[__name__])  # main(argv=None) -> exit code

if __name__ == "__main__":
    import maml  # by this name workers find what they are sent

    sys.exit(maml.main())
