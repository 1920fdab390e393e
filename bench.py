# SPDX-License-Identifier: MIT
"""`python bench.py [images | memory | rl | scaling]`: hot paths beside their definitions, PyTorch and JAX.

Without an argument: sinusoids. images: convolutional networks; memory: peaks by inner steps; rl: a navigation
meta-iteration; scaling: all cores against one, and a model of many workers.

JAX and PyTorch are written as their users do: a list of arrays, vmap over tasks, jit or torch.compile, one
scan for the whole run. All sides are float32, and equal (images: in float64, on two tasks, whose compile time
is shown), which is asserted first, but for the whole run, whose tasks each side draws. They take turns, in
blocks of calls, and each shows the median of its blocks, so that a machine whose speed drifts slows all
alike; × is how many times ours is as fast. Of PyTorch on one thread and on all cores (images: all) the faster
counts; it gains by the heap that `cli.one_blas_thread` keeps, as ours does. The limit is the share of our
time that the definition's matrix products alone take, at NumPy's speed at their shapes (on as many cores).
"""

import math
import os
import pickle
import platform
import re
import sys
import tempfile
import time
import timeit
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from unittest import mock

import autograd.numpy as anp
import numpy as np
from autograd import grad, make_vjp

import cli
import maml
import nets
import rl
import tasks

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # compile times are those of a first call
jax, torch = (import_module(name) if find_spec(name) else None for name in ("jax", "torch"))
CXX = which(os.environ.get("CXX", "g++"))  # without which PyTorch compiles nothing
THREADS = sorted({1, cli.cores()})

# Measuring -------------------------------------------------------------------------------------


def milliseconds(sides, seconds=0.1, blocks=7):
    """{name: callable} -> {name: median milliseconds a call}."""
    timers = [timeit.Timer(side) for side in sides.values()]
    calls = [max(1, int(seconds / min(timer.repeat(2, 1)))) for timer in timers]
    times = [[timer.timeit(n) / n for timer, n in zip(timers, calls)] for _ in range(blocks)]
    return dict(zip(sides, 1e3 * np.median(times, axis=0)))


def check(sides, tolerance=2e-3):
    """Asserts, also under -O, that what the sides return is equal -> the sides; tells compile times."""
    expected = flat(sides["ours"]())
    for name, side in sides.items():
        began = time.perf_counter()
        found = flat(side())
        if name.startswith("compiled"):
            print(f"  {name}: compiled in {time.perf_counter() - began:.0f} s", flush=True)
        np.testing.assert_((found.dtype, found.shape) == (expected.dtype, expected.shape), name)
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        np.testing.assert_(error <= tolerance, f"{name}: relative error {error}")
    return sides


def flat(arrays):
    """An array or a list of arrays as one, [P]; PyTorch's filters are [out, in, 3, 3]."""
    arrays = [np.asarray(array) for array in (arrays if isinstance(arrays, list) else [arrays])]
    return np.concatenate([(a.transpose(2, 3, 1, 0) if a.ndim == 4 else a).ravel() for a in arrays])


def row(label, limit, sides, columns, **timing):
    """Prints a line -> {side: milliseconds}; a side is "ours", or a column and what it was tried with."""
    times = milliseconds(sides, **timing)
    ours = times["ours"]
    cells = [f"{ours:9.3f} " + (f"{limit / ours:6.0%}" if limit else " " * 6)]
    for name in columns:
        tried = [spent for side, spent in times.items() if side.split(",")[0] == name]
        cells.append(f"{min(tried):9.3f} {min(tried) / ours:6.2f}×" if tried else " " * 17)
    print(f"{label:<38}" + "  ".join(cells), flush=True)
    return times


def header(columns):
    cli.one_blas_thread()  # as the command does
    info, blas = Path("/proc/cpuinfo"), np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    cpu = re.search("model name.*: (.*)", info.read_text() if info.exists() else "")
    versions = [f"{m.__name__} {m.__version__}" for m in (np, torch, jax) if m]
    print(f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, {', '.join(versions)}")
    print(f"Python {platform.python_version()}, {blas['name']} {blas['version']} on one thread; in ms\n")
    print(f"{'':<38}{'ours    limit':>16}  " + "  ".join(f"{name:>17}" for name in columns))


def passes(network, tasks, n):
    """Milliseconds of the matrix products of a forward pass, a gradient and a Hessian-vector product.

    Each layer's is timed, [tasks, rows, in] by [tasks, in, out], for n examples. A gradient takes three such
    products, a Hessian-vector product six, and the layer that reads the data one and four fewer.
    """
    x, arrays, times = np.zeros((1, 1, *network.inputs)), network.unflatten(np.zeros(network.size)), []
    for layer in network.layers:
        x = layer.apply(x, *(arrays[name] for name in layer.shapes))
        if len(layer.view or ()) == 2:
            rows = n * x[0, 0, ..., 0].size
            timed = min(rows, 4096)
            a, w = (np.ones((tasks, *shape), np.float32) for shape in ((timed, layer.view[0]), layer.view))
            product = partial(np.matmul, a, w, out=a @ w)
            times.append(rows / timed * milliseconds({"product": product}, 0.02)["product"])
    forward = sum(times)
    return forward, 3 * forward - times[0], 6 * forward - 4 * times[0]


def meta_gradient_limit(experiment, cores=1):
    """Milliseconds that the matrix products of the meta-gradient's definition take on so many cores."""
    sample, count, parcel = experiment.meta_batch().values()
    (x, _), (qx, _) = sample(np.random.default_rng(0), tasks=1)
    size = parcel or count
    _, gradient, product = passes(experiment.network, size, x.shape[1])
    outer = passes(experiment.network, size, qx.shape[1])[1]
    return (experiment.settings["steps"] * (gradient + product) + outer) * count / size / cores


def experiment_of(module, words):
    """The experiment that these words of maml.py's or rl.py's command name."""
    return module.experiment_of(cli.settings_of(module.build_parser().parse_args(words.split()), module))


# The peers -------------------------------------------------------------------------------------


def perceptron(relu, arrays, x):
    """A multi-layer perceptron of one task, in any array library."""
    for i in range(0, len(arrays), 2):
        x = (relu(x) if i else x) @ arrays[i] + arrays[i + 1]
    return x


def squared_error(relu, arrays, x, y):
    return ((perceptron(relu, arrays, x) - y) ** 2).mean()


def convnet_loss(pool, arrays, x, y):
    """The cross-entropy of `nets.convnet`, of one task, in PyTorch: x [n, channels, height, width]."""
    functional = torch.nn.functional
    for w, beta in zip(arrays[:8:2], arrays[1:8:2]):
        stride, size = 1 if pool else 2, x.shape[-1]
        total = max((-(-size // stride) - 1) * stride + 3 - size, 0)
        x = functional.pad(x, (0, 1) * 2) if total % 2 else x
        x = functional.conv2d(x, w, stride=stride, padding=total // 2)
        x = functional.batch_norm(x, None, None, torch.ones_like(beta), beta, True, 0.1, nets.EPSILON)
        x = functional.relu(functional.max_pool2d(x, 2) if pool else x)
    x = x.permute(0, 2, 3, 1).flatten(1) if pool else x.mean((2, 3))
    return -(y * functional.log_softmax(x @ arrays[8] + arrays[9], -1)).sum(-1).mean()


def one_task(grad, loss, rates, steps):
    """MAML's objective of one task on a list of arrays, as a user of JAX or torch.func writes it."""

    def objective(arrays, sx, sy, qx, qy):
        for _ in range(steps):
            slopes = grad(loss)(arrays, sx, sy)
            arrays = [array - rate * slope for array, rate, slope in zip(arrays, rates, slopes)]
        return loss(arrays, qx, qy)

    return objective


def meta_gradient_sides(experiment, theta):
    """The meta-gradient of one meta-batch, as each column computes it; with images ours samples them too."""
    outer, network, steps = experiment.outer_gradient(), experiment.network, experiment.settings["steps"]
    parcels = maml.spread(lambda *batch: batch, rng=np.random.default_rng(0), **experiment.meta_batch())
    support, query = (tuple(map(np.concatenate, zip(*pairs))) for pairs in zip(*parcels))
    rates = network.unflatten(experiment.inner_rate() + np.zeros_like(theta)).values()
    data = [*network.unflatten(theta).values()], *support, *query
    rest = [float(rate.flat[0]) for rate in rates], steps, *data
    if experiment.spreads:
        loss = partial(convnet_loss, experiment.settings["task"] == "miniimagenet")
        sides = {"ours": partial(mean_gradient, experiment, theta, experiment.map)}
        return sides | (torch_meta_gradients(THREADS[-1:], loss, *rest) if torch else {})
    definition = partial(maml.meta_gradient_by_definition, experiment.loss, **outer.keywords)
    ways = {"ours": outer, "definition": definition}
    sides = {name: lambda way=way: way(theta, support, query)[1] for name, way in ways.items()}
    if torch:
        sides |= torch_meta_gradients(THREADS, partial(squared_error, torch.relu), *rest)
    if jax:
        sides["jax"] = jax_meta_gradient(partial(squared_error, jax.nn.relu), *rest)
    return sides


def jax_meta_gradient(loss, rates, steps, *data):
    each = jax.vmap(one_task(jax.grad, loss, rates, steps), (None, 0, 0, 0, 0))
    outer = jax.jit(jax.grad(lambda *data: each(*data).mean()))
    data = jax.tree.map(jax.numpy.asarray, data)
    return lambda: jax.block_until_ready(outer(*data))


def torch_meta_gradients(threads, loss, rates, steps, arrays, *data):
    """{name and threads: side}: torch.func as it stands, and compiled."""
    each = torch.func.vmap(one_task(torch.func.grad, loss, rates, steps), (None, 0, 0, 0, 0))
    outer = torch.func.grad(lambda *data: each(*data).mean())
    ways = {"torch.func": outer} | ({"compiled": torch.compile(outer, dynamic=False)} if CXX else {})
    data = [*map(channels_first, arrays)], *map(channels_first, data)
    return {f"{way}, {n} threads": partial(on_threads, n, ways[way], *data) for way in ways for n in threads}


def channels_first(array):
    """Filters [3, 3, in, out] and images [tasks, n, height, width, channels] as PyTorch has them."""
    order = {4: (3, 2, 0, 1), 5: (0, 1, 4, 2, 3)}.get(array.ndim, range(array.ndim))
    return torch.from_numpy(np.ascontiguousarray(array.transpose(order)))


def on_threads(threads, function, *args):
    torch.set_num_threads(threads)
    return function(*args)


def jax_run(network, theta, count):
    """`count` meta-iterations of the paper's sinusoids, sampling and Adam included, as one scan."""
    jnp, tree = jax.numpy, jax.tree.map
    objective = one_task(jax.grad, partial(squared_error, jax.nn.relu), [0.01] * 6, 1)
    each = jax.vmap(objective, (None, 0, 0, 0, 0))

    def iteration(carry, key):
        arrays, m, v, t = carry
        keys = jax.random.split(key, 3)
        amplitude = jax.random.uniform(keys[0], (25, 1, 1), minval=0.1, maxval=5)
        phase = jax.random.uniform(keys[1], (25, 1, 1), maxval=np.pi)
        x = jax.random.uniform(keys[2], (25, 20, 1), minval=-5, maxval=5)
        y = amplitude * jnp.sin(x - phase)
        data = x[:, :10], y[:, :10], x[:, 10:], y[:, 10:]
        value, g = jax.value_and_grad(lambda arrays: each(arrays, *data).mean())(arrays)
        m, t = tree(lambda m, g: 0.9 * m + 0.1 * g, m, g), t + 1
        v = tree(lambda v, g: 0.999 * v + 0.001 * g * g, v, g)
        rate = 1e-3 * jnp.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        arrays = tree(lambda a, m, v: a - rate * m / (jnp.sqrt(v) + 1e-8), arrays, m, v)
        return (arrays, m, v, t), value

    @jax.jit
    def scan(arrays, key):
        zeros = tree(jnp.zeros_like, arrays)
        return jax.lax.scan(iteration, (arrays, zeros, zeros, 0.0), jax.random.split(key, count))[0][0]

    arrays = tree(jnp.asarray, list(network.unflatten(theta).values()))
    return lambda: jax.block_until_ready(scan(arrays, jax.random.key(0)))


# Sinusoids -------------------------------------------------------------------------------------


def sinusoids():
    columns = "definition", "torch.func", "compiled", "jax"
    rng, experiment = np.random.default_rng(0), experiment_of(maml, "--task sinusoid")
    loss, (sample, count, _) = experiment.loss, experiment.meta_batch().values()
    plain = lambda *data: loss(*data)  # noqa: E731  the definition: no closed forms
    theta = (0.3 * rng.normal(size=loss.network.size)).astype(np.float32)
    v = rng.normal(size=(count, loss.network.size)).astype(np.float32)
    (x, y), _ = sample(rng, count)
    ways = {"ours": loss, "definition": plain}
    gradients = {name: partial(maml.gradient, way, theta, x, y) for name, way in ways.items()}
    products = {name: partial(maml.expand(way, theta, x, y)[2], v) for name, way in ways.items()}
    limits = partial(passes, loss.network, count, x.shape[1])
    rows = [("gradient, 25 tasks", lambda: limits()[1], check(gradients))]
    rows += [("Hessian-vector product, 25 tasks", lambda: limits()[2], check(products))]
    for count, steps in ((25, 1), (100, 1), (25, 5), (100, 5)):
        other = experiment_of(maml, f"--task sinusoid --meta-batch {count} --steps {steps}")
        sides, limit = check(meta_gradient_sides(other, theta)), partial(meta_gradient_limit, other)
        rows.append((f"meta-gradient, {count} tasks, steps {steps}", limit, sides))
    start = experiment.start()

    def run():
        *_, (state, _) = maml.train(experiment.step, start, np.random.default_rng(0), 500)
        return state.theta

    sides = {"ours": run} | ({"jax": jax_run(loss.network, start.theta, 500)} if jax else {})
    for side in sides.values():
        side()  # compiles
    rows.append(("sinusoid, 500 meta-iterations", lambda: 500 * meta_gradient_limit(experiment), sides))
    header(columns)
    for label, limit, sides in rows:
        row(label, limit(), sides, columns)


# Images: time and memory -----------------------------------------------------------------------


def image_experiment(words):
    """An experiment on images of noise, in a file that whoever computes maps, as a data set is."""
    experiment = experiment_of(maml, words)
    experiment.file = tempfile.NamedTemporaryFile(suffix=".npy")
    noise = np.random.default_rng(0).integers(256, size=(64, 20, *experiment.network.inputs), dtype=np.uint8)
    np.save(experiment.file, noise)
    experiment.file.flush()
    experiment.images = {"train": tasks.Split(experiment.file.name, 0, 64)}
    return experiment


def mean_gradient(experiment, theta, map):
    """A meta-iteration's gradient, sampling included."""
    one, rng = partial(experiment.outer_gradient(), theta), np.random.default_rng(0)
    return maml.mean_over_parcels(one, rng=rng, map=map, **experiment.meta_batch())[1]


def images():
    header(columns := ("torch.func", "compiled"))
    for words in ("--task omniglot", "--task omniglot --ways 20", "--task miniimagenet"):
        # In float32 rounding tips single ReLUs and pools over: some 15 % of MiniImagenet's gradient.
        two = image_experiment(words + " --meta-batch 2 --dtype float64")
        check(meta_gradient_sides(two, two.start().theta), 1e-8)
        experiment = image_experiment(words)
        sides = meta_gradient_sides(experiment, experiment.start().theta)
        row(words, meta_gradient_limit(experiment, cli.cores()), sides, columns, seconds=1, blocks=3)


def memory():
    """Peaks of a meta-gradient of eight tasks of Omniglot, 5-way 1-shot, each in a process of its own."""
    steps = 1, 5, 10, 20, 50
    ways = ["meta_gradient", "meta_gradient_recomputed", "meta_gradient_by_definition"]
    print(f"{'MB, by inner steps':<38}" + "".join(f"{n:>8}" for n in steps))
    for way in ways + ["torch.func"] * bool(torch):
        print(f"{way:<38}", end="")
        for n in steps:
            with cli.process_pool(1) as pool:
                print(f"{pool.submit(peak, way, n).result():8.0f}", end="", flush=True)
        print()


def peak(way, steps):
    """How far one call raises this process's resident memory above what it had before, in MB; needs Linux."""
    experiment = image_experiment(f"--task omniglot --meta-batch 8 --steps {steps}")
    theta, (sample, count, _) = experiment.start().theta, experiment.meta_batch().values()
    if way == "torch.func":
        side, small = f"torch.func, {THREADS[-1]} threads", image_experiment("--task omniglot --filters 2")
        meta_gradient_sides(small, small.start().theta)[side]()  # what only a first call loads
        call = meta_gradient_sides(experiment, theta)[side]
    else:
        alpha, batch = experiment.inner_rate(), sample(np.random.default_rng(0), tasks=count)
        call = partial(getattr(maml, way), experiment.loss, theta, *batch, alpha, steps)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    call()
    return resident("VmHWM") - before


def resident(field):
    return int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3


# Reinforcement learning ------------------------------------------------------------------------


def reinforcement():
    header(columns := ("definition", "torch"))
    experiment, rng = experiment_of(rl, "--task navigation --meta-batch 10"), np.random.default_rng(0)
    s, theta = experiment.settings, experiment.start().theta
    theta = theta + rng.normal(0, 0.1, theta.shape).astype(theta.dtype)  # at first every unit is at its kink
    goals = rl.drawn_goals("navigation", rng, s["meta_batch"])
    parcels = experiment.spread(rl.experience, theta, s["trajectories"], experiment.rates(1), goals, rng, map)
    batches = [batch for _, parcel in parcels for batch in parcel]

    ways = {"ours": rl.outer_problem, "definition": by_definition}
    ways |= {f"torch, {n} threads": partial(on_threads, n, by_torch) for n in THREADS if torch}
    problems = {n: way(experiment.loss, s["alpha"], 2, theta, batches, map) for n, way in ways.items()}
    v = rng.standard_normal(theta.size, theta.dtype)
    for part in (lambda p: p[1], lambda p: p[2](v), lambda p: np.float32(p[3](theta + 0.01 * v))):
        check({name: partial(part, problem) for name, problem in problems.items()})
    sides = {name: partial(meta_iteration, experiment, theta, way) for name, way in ways.items()}
    # Sampling twice, gradients inside and outside; each of CG's products is J, Fisher, Jᵀ; one trial.
    forward, gradient, product = passes(experiment.policy, len(goals), s["trajectories"] * s["horizon"])
    limit = 3 * (forward + gradient) + product + 2 * s["cg_steps"] * (product + gradient - forward)
    row("navigation, 10 tasks, a meta-iteration", limit / cli.cores(), sides, columns, blocks=3)


def meta_iteration(experiment, theta, outer_problem):
    """The experiment's, with another way to differentiate: -> theta."""
    with mock.patch.object(rl, "outer_problem", outer_problem):
        return experiment.meta_iteration(theta, np.random.default_rng(0))[0]


def by_definition(loss, alpha, order, theta, batches, map):
    """`rl.outer_problem` by autograd: through `rl.surrogate`, a task at a time, and twice through its KL."""
    plain, each = (lambda *data: loss(*data)), []
    for support, (x, y) in batches:
        old = loss.network.apply(maml.adapt(plain, theta, support, alpha, 1), x)
        each.append(([support], (x, y), old))

    def objective(theta):
        values = [rl.surrogate(loss.network, plain, alpha, theta, *task) for task in each]
        return anp.mean(anp.concatenate(values, axis=1), axis=1)

    slope = grad(lambda theta: objective(theta)[1])
    product = make_vjp(slope)(theta)[0]  # the Hessian is symmetric
    return objective(theta)[0], grad(lambda theta: objective(theta)[0])(theta), product, objective


def by_torch(loss, alpha, order, theta, batches, map):
    """`rl.outer_problem` in PyTorch, a task at a time: create_graph, and double backpropagation of the KL."""
    shapes, normal = [*loss.network.shapes.values()], partial(torch.distributions.Normal, validate_args=False)
    batches = [[torch.from_numpy(array) for pair in task for array in pair] for task in batches]

    def policy(theta, x):
        parts = theta.split([math.prod(shape) for shape in shapes])
        *arrays, log_std = (part.reshape(shape) for part, shape in zip(parts, shapes))
        return normal(perceptron(torch.relu, arrays, x), log_std.clamp(min=rl.LOWEST).exp())

    def adapted(theta, x, y):
        inner = -(policy(theta, x).log_prob(y[..., :2]) * y[..., 2:]).sum()
        return theta - alpha * torch.autograd.grad(inner, theta, create_graph=True)[0]

    def losses(theta):
        loss = divergence = 0
        for old, (sx, sy, x, y) in zip(olds, batches):
            new = policy(adapted(theta, sx, sy), x)
            ratio = (new.log_prob(y[..., :2]) - old.log_prob(y[..., :2])).sum(-1).exp()
            loss -= (ratio * y[..., 2]).sum() / len(batches)
            divergence += torch.distributions.kl_divergence(old, new).sum(-1).mean() / len(batches)
        return loss, divergence

    def product(v):
        return torch.autograd.grad(slope @ torch.from_numpy(v), start, retain_graph=True)[0].numpy()

    def objective(theta):
        return [value.item() for value in losses(torch.from_numpy(theta).requires_grad_())]

    start = torch.from_numpy(theta).requires_grad_()
    olds = [policy(adapted(start, sx, sy).detach(), x) for sx, sy, x, _ in batches]
    loss, divergence = losses(start)
    (gradient,) = torch.autograd.grad(loss, start, retain_graph=True)
    (slope,) = torch.autograd.grad(divergence, start, create_graph=True)
    return loss.item(), gradient.numpy(), product, objective


# Scaling ---------------------------------------------------------------------------------------


def speed_up(label, call, many):
    """Prints a line: call(map) by many and by one, to the same bits -> one's seconds."""
    sides = check({"ours": partial(call, many), "one core": partial(call, map)}, 0)
    return row(label, None, sides, ("one core",), seconds=2, blocks=5)["one core"] / 1e3


def scaling():
    """All cores against one; c, l, s and b of c + N (l + s b), a meta-iteration's seconds on N workers."""
    header(("one core",))
    omniglot, mini = (image_experiment(f"--task {task}") for task in ("omniglot", "miniimagenet"))
    gradient, mini_gradient = (partial(mean_gradient, one, one.start().theta) for one in (omniglot, mini))
    speed_up("Omniglot 5-way, processes", gradient, omniglot.map)
    seconds = speed_up("MiniImagenet 5-way, processes", mini_gradient, mini.map) / mini.settings["meta_batch"]
    models = {"MiniImagenet": (seconds, 2 * 4 * mini.network.size)}
    navigation = experiment_of(rl, "--task navigation")

    def iteration(map):
        with mock.patch.object(cli, "threads", lambda: map):
            return meta_iteration(navigation, navigation.start().theta, rl.outer_problem)

    speed_up("navigation, threads", iteration, cli.threads())
    for task in ("cheetah-dir", "ant-dir") if find_spec("mujoco") and find_spec("gymnasium") else ():
        models[task] = locomotion(task)
    with cli.process_pool(1) as pool:
        alone = partial(cli.pool_map, pool)
        speed_up("Omniglot 5-way, through one worker", gradient, alone)
        arrays = np.zeros(1 << 10, np.float32), np.zeros(1 << 22, np.float32)
        sides = {array.nbytes: lambda array=array: [*alone(np.asarray, [array])] for array in arrays}
        (small, little), (large, much) = milliseconds(sides).items()
    second = (much - little) / (2 * (large - small))  # there and back
    print(f"\nl = {little:.2f} ms, s = {1e6 * second:.2f} ns")
    for name, (compute, traffic) in models.items():
        half = 1e3 * compute / (little + traffic * second)
        print(f"{name}: c = {compute:.2f} s, b = {traffic / 1e6:.2f} MB; c is half at N = {half:.0f}")


def locomotion(task):
    """Sampling on a process for each core -> seconds to compute a task, and the bytes that come and go."""
    experiment = experiment_of(rl, f"--task {task}")
    theta, goals, given = experiment.start().theta, rl.test_goals(task, 40), (20, [0.1])

    def sample(map):
        parcels = experiment.spread(rl.experience, theta, *given, goals, np.random.default_rng(0), map)
        return np.concatenate([returns for returns, _ in parcels], axis=1)

    spent = speed_up(f"{task}, sampling, processes", sample, experiment.map) / len(goals)
    one = rl.experience(experiment.settings, experiment.loss, theta, *given, goals[:1], [0, 1])
    return spent, 4 * theta.size + len(pickle.dumps(one))


def main(name="", *more):
    parts = {"": sinusoids, "images": images, "memory": memory, "rl": reinforcement, "scaling": scaling}
    known = parts | dict.fromkeys(("-h", "--help"), partial(print, __doc__))
    if more or name not in known:
        raise cli.Unusable(f"{' '.join([name, *more])!r} is none of {', '.join(parts)[2:]}; see --help")
    known[name]()


if __name__ == "__main__":
    sys.exit(cli.guarded("bench.py", lambda: main(*sys.argv[1:])))
