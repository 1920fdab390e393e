# SPDX-License-Identifier: MIT
"""`python bench.py [images | rl | scaling]`: hot paths beside their definitions, PyTorch and JAX.

Without a word the sinusoids: gradients, meta-gradients, and the whole run. images: convolutional networks;
rl: the policy's products and a meta-iteration; scaling: both cores against one, and a model of many workers.

JAX and PyTorch are written as their users do: parameters as a list of arrays, vmap over tasks, jit or
torch.compile, and one scan for the whole run. Equality is asserted before anything is timed. All sides are
float32 and free to use all cores. The sides of a row take turns, in blocks of calls, and each shows the
median of its blocks, so that a machine whose speed drifts slows all alike. Ratios above 1: ours is faster.
"""

import importlib
import os
import pickle
import platform
import sys
import tempfile
import time
from functools import partial

import autograd.numpy as anp
import numpy as np
from autograd import grad, make_vjp

import maml
import nets
import rl
import tasks


def optional(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


jax, torch = optional("jax"), optional("torch")
COLUMNS = "definition", "torch.func", "compiled", "jax"


def assert_equal(found, expected, tolerance=2e-3):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype == np.float32 and found.shape == expected.shape
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < tolerance, f"relative error {error}"


def milliseconds(sides, seconds=0.1, blocks=7):
    """{name: callable} -> {name: median milliseconds a call}."""
    calls = {}
    for name, side in sides.items():
        side()
        began = time.perf_counter()
        side()
        calls[name] = max(1, int(seconds / (time.perf_counter() - began)))
    times = {name: [] for name in sides}
    for _ in range(blocks):
        for name, side in sides.items():
            began = time.perf_counter()
            for _ in range(calls[name]):
                side()
            times[name].append((time.perf_counter() - began) / calls[name])
    return {name: 1e3 * float(np.median(values)) for name, values in times.items()}


def row(label, sides, columns=COLUMNS, **timing):
    """Prints one line: the first side is ours -> its milliseconds."""
    times = milliseconds(sides, **timing)
    ours = next(iter(times.values()))
    cells = [f"{ours:9.3f}"]
    for name in columns:
        cells.append(f"{times[name]:9.3f} {times[name] / ours:6.2f}×" if name in times else " " * 17)
    print(f"{label:<38}" + "  ".join(cells), flush=True)
    return ours


def sinusoid_sides(loss, theta, support, query, alpha, steps):
    """The meta-gradient, four ways; equality asserted."""
    args = (theta, support, query, alpha, steps)
    sides = {
        "ours": lambda: maml.meta_gradient(loss, *args)[1],
        "definition": lambda: maml.meta_gradient_by_definition(loss, *args)[1],
    }
    if torch:
        sides["torch.func"] = torch_meta_gradient(loss.network, *args)
        sides["compiled"] = torch_meta_gradient(loss.network, *args, transform=torch.compile)
    if jax:
        sides["jax"] = jax_meta_gradient(loss.network, *args)
    for name, side in sides.items():
        began = time.perf_counter()
        assert_equal(side(), sides["definition"]())
        if name == "compiled":
            print(f"  compiled in {time.perf_counter() - began:.0f} s", flush=True)
    return sides


def mlp_loss(relu, arrays, x, y):
    """The mean squared error of a multi-layer perceptron, of one task, in any array library."""
    for i in range(0, len(arrays), 2):
        x = (relu(x) if i else x) @ arrays[i] + arrays[i + 1]
    return ((x - y) ** 2).mean()


def one_task(grad, loss, alpha, steps):
    """MAML's objective of one task on a list of arrays, as a user of such a library writes it."""

    def objective(arrays, sx, sy, qx, qy):
        for _ in range(steps):
            slopes = grad(loss)(arrays, sx, sy)
            arrays = [array - alpha * slope for array, slope in zip(arrays, slopes)]
        return loss(arrays, qx, qy)

    return objective


def flat(arrays):
    return np.concatenate([np.asarray(array).ravel() for array in arrays])


def jax_meta_gradient(network, theta, support, query, alpha, steps):
    each = jax.vmap(one_task(jax.grad, partial(mlp_loss, jax.nn.relu), alpha, steps), (None, 0, 0, 0, 0))
    outer = jax.jit(jax.grad(lambda *data: each(*data).mean()))
    data = jax.tree.map(jax.numpy.asarray, (list(network.unflatten(theta).values()), *support, *query))
    return lambda: flat(jax.block_until_ready(outer(*data)))


def torch_meta_gradient(network, theta, support, query, alpha, steps, transform=lambda f: f):
    objective = one_task(torch.func.grad, partial(mlp_loss, torch.relu), alpha, steps)
    each = torch.func.vmap(objective, (None, 0, 0, 0, 0))
    outer = transform(torch.func.grad(lambda *data: each(*data).mean()))
    arrays = [torch.tensor(array) for array in network.unflatten(theta).values()]
    data = [torch.from_numpy(array) for array in (*support, *query)]
    return lambda: flat(outer(arrays, *data))


def sinusoid_run(loss, theta, count):
    """`count` meta-iterations of the paper's experiment, sampling and Adam included: ours, and JAX's scan."""
    step = partial(
        maml.adam_step,
        outer_gradient=partial(maml.meta_gradient, loss, alpha=0.01, steps=1),
        sample=partial(tasks.sinusoid, shots=10, query_shots=10),
        tasks=25,
        beta=1e-3,
    )

    def ours():
        *_, (state, _) = maml.train(step, maml.State.start(theta), np.random.default_rng(0), count)
        return state.theta

    return {"ours": ours} | ({"jax": jax_run(loss.network, theta, count)} if jax else {})


def jax_run(network, theta, count):
    jnp, tree = jax.numpy, jax.tree.map
    objective = one_task(jax.grad, partial(mlp_loss, jax.nn.relu), 0.01, 1)
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


def image_sides(shape, ways, filters, pool, count, queries, steps):
    """The meta-gradient of a convolutional network: chunks of tasks on threads, and PyTorch's two forms.

    Equality is asserted in float64 on two tasks: in float32 rounding tips single ReLUs and pools over, and
    PyTorch's two forms then differ from each other by a per cent.
    """
    words = (
        f"--task {'miniimagenet' if pool else 'omniglot'} --ways {ways} --filters {filters} --steps {steps}"
    )
    words += f" --query {queries // ways} --alpha 0.001 --dtype float64"
    experiment = maml.experiment_of(maml.settings_of(maml.build_parser().parse_args(words.split())))
    rng, classes = np.random.default_rng(0), count + 3
    drawn = rng.random((classes * ways, 1 + queries // ways, *shape))
    images = 0.5 * drawn + 0.5 * drawn[:, :1]
    theta, step = experiment.network.init(rng, np.float64), experiment.outer_gradient().func
    step = partial(step, experiment.loss, alpha=0.001, steps=steps)
    kept = {"kept": maml.KEPT_STEPS[experiment.settings["task"]]}
    if steps > kept["kept"]:
        step = partial(maml.meta_gradient_recomputed, experiment.loss, alpha=0.001, steps=steps, **kept)

    def sides(count, theta, dtype):
        sample = partial(
            tasks.few_shot, images=images, ways=ways, shots=1, query_shots=queries // ways, dtype=dtype
        )
        batch = maml.spread(lambda *pairs: pairs, sample, np.random.default_rng(0), count, experiment.parcel)
        support, query = (tuple(map(np.concatenate, zip(*pairs))) for pairs in zip(*batch))
        ours = {
            "ours": lambda: maml.mean_over_parcels(
                partial(step, theta),
                sample,
                np.random.default_rng(0),
                count,
                experiment.parcel,
                experiment.map,
            )[1]
        }
        if not torch:
            return ours
        return ours | torch_image_sides(experiment.network, pool, theta, support, query, 0.001, steps)

    two = sides(2, theta, np.float64)
    for side in two.values():
        error = np.linalg.norm(side() - two["ours"]()) / np.linalg.norm(two["ours"]())
        assert error < 1e-8, f"relative error {error}"
    return sides(count, theta.astype(np.float32), np.float32)


def torch_image_sides(network, pool, theta, support, query, alpha, steps):
    """torch.func's vmap over the tasks, and the loop over tasks with create_graph."""
    functional = torch.nn.functional

    def apply(p, x):
        for i in range(0, 8, 2):
            stride, size = 1 if pool else 2, x.shape[-1]
            total = max((-(-size // stride) - 1) * stride + 3 - size, 0)
            x = functional.pad(x, (total // 2, total - total // 2) * 2)
            x = functional.conv2d(x, p[i], stride=stride)
            x = functional.batch_norm(x, None, None, torch.ones_like(p[i + 1]), p[i + 1], True, 0.1, 0.001)
            x = functional.relu(x)
            x = functional.max_pool2d(x, 2) if pool else x
        x = x.permute(0, 2, 3, 1).flatten(1) if pool else x.mean((2, 3))
        return x @ p[8] + p[9]

    def loss(p, x, y):
        return -(y * functional.log_softmax(apply(p, x), -1)).sum(-1).mean()

    def one_task(p, sx, sy, qx, qy):
        for _ in range(steps):
            p = [a - alpha * g for a, g in zip(p, torch.func.grad(loss)(p, sx, sy))]
        return loss(p, qx, qy)

    def flattened(p):
        return flat([(a.permute(2, 3, 1, 0) if a.ndim == 4 else a).detach() for a in p])

    arrays = network.unflatten(theta).values()
    p = [torch.tensor(a.transpose(3, 2, 0, 1) if a.ndim == 4 else a).contiguous() for a in arrays]
    data = [
        torch.tensor(a.transpose(0, 1, 4, 2, 3) if a.ndim == 5 else a).contiguous()
        for a in (*support, *query)
    ]

    def mapped():
        total = torch.func.grad(lambda p: torch.func.vmap(lambda *d: one_task(p, *d))(*data).mean())
        return flattened(total(p))

    def looped():
        start, total = [a.detach().requires_grad_() for a in p], [torch.zeros_like(a) for a in p]
        for sx, sy, qx, qy in zip(*data):
            q = start
            for _ in range(steps):
                g = torch.autograd.grad(loss(q, sx, sy), q, create_graph=True)
                q = [a - alpha * b for a, b in zip(q, g)]
            for a, b in zip(total, torch.autograd.grad(loss(q, qx, qy), start)):
                a += b / len(data[0])
        return flattened(total)

    return {"torch.func": mapped, "torch loop": looped}


def loops_rollout(policy, theta, goals, trajectories, rng):
    """`rl.rollout` of navigation as plain loops: one point, one step at a time."""
    episodes = rl.Episodes(
        *(np.zeros((len(goals), trajectories, 100, *n), np.float32) for n in ((2,), (2,), (), ()))
    )
    for i, goal in enumerate(goals):
        for j in range(trajectories):
            position = np.zeros(2)
            for t in range(100):
                out = policy.apply(theta[i : i + 1], position.astype(np.float32)[None, None])[0, 0]
                action = out[:2] + np.exp(out[2:]) * rng.standard_normal(2, np.float32)
                moved = position + np.clip(0.1 * action, -0.1, 0.1)
                reward = -np.hypot(*(moved - goal))
                for array, value in zip(episodes, (position, action, reward, 1)):
                    array[i, j, t] = value
                position = moved
                if (np.abs(position - goal) < 0.01).all():
                    break
    return episodes


def loops_baseline(observations, targets, mask):
    """`rl.baseline` as one least-squares problem a task."""
    values = np.zeros_like(targets)
    for i, phi in enumerate(rl.features(observations)):
        kept = mask[i] == 1
        rows, y = phi[kept], targets[i][kept]
        ridge = np.sqrt(1e-5) * np.eye(rows.shape[1])
        w = np.linalg.lstsq(np.vstack([rows, ridge]), np.append(y, np.zeros(len(ridge))), rcond=None)[0]
        values[i][kept] = rows @ w
    return values


def outer_step(experiment, theta, samples, problem):
    """A navigation meta-iteration with other ways to sample and to differentiate: -> theta."""
    s, count = experiment.settings, experiment.settings["meta_batch"]
    support = samples(theta + np.zeros((count, 1), np.float32))
    adapted = theta - experiment.alpha * experiment.loss.grad(theta, *support[1])
    query = samples(adapted)
    old = experiment.policy.forward(adapted, query[1][0])[0]
    constants = (s[name] for name in ("max_kl", "cg_steps", "damping", "backtrack", "tries"))
    start = np.float32(-query[1][1][..., -1].sum() / count)
    return rl.trust_region_step(theta, start, *problem(experiment, theta, support, query, old), *constants)[0]


def by_autograd(experiment, theta, support, query, old):
    """The outer problem by definition: autograd through `rl.surrogate`, and twice through its KL."""
    plain = lambda *data: experiment.loss(*data)  # noqa: E731

    def objective(theta):
        one = rl.surrogate(experiment.policy, plain, experiment.alpha, theta, [support[1]], query[1], old)
        return anp.mean(one, axis=1)

    slope = grad(lambda theta: objective(theta)[1])
    product = make_vjp(slope)(theta)[0]  # the Hessian is symmetric
    return grad(lambda theta: objective(theta)[0])(theta), product, objective


def by_torch(experiment, theta, support, query, old):
    """The outer problem in PyTorch, all tasks at once: create_graph, and double backpropagation of the KL."""
    shapes, count = experiment.policy.shapes, len(old)
    sx, sy, qx, qy, old = (torch.from_numpy(a) for a in (*support[1], *query[1], old))

    def policy(theta, x):
        arrays, start = [], 0
        for shape in shapes.values():
            stop = start + int(np.prod(shape))
            arrays.append(theta[:, start:stop].reshape(-1, *shape))
            start = stop
        for i in (0, 2, 4):
            x = torch.baddbmm(arrays[i + 1][:, None], torch.relu(x) if i else x, arrays[i])
        return x, arrays[6].clamp(min=rl.LOWEST)[:, None]

    def log_likelihood(out, action):
        mean, log_std = out
        return (-0.5 * ((action - mean) / log_std.exp()) ** 2 - log_std - 0.5 * np.log(2 * np.pi)).sum(-1)

    def losses(theta):
        each = theta.expand(count, -1)
        inner = -(sy[..., 2] * log_likelihood(policy(each, sx), sy[..., :2])).sum()
        each = each - experiment.alpha * torch.autograd.grad(inner, each, create_graph=True)[0]
        mean, log_std = new = policy(each, qx)
        m0, l0 = old[..., :2], old[..., 2:]
        ratio = (log_likelihood(new, qy[..., :2]) - log_likelihood((m0, l0), qy[..., :2])).exp()
        kl = log_std - l0 + 0.5 * ((2 * l0).exp() + (m0 - mean) ** 2) * (-2 * log_std).exp() - 0.5
        return -(ratio * qy[..., 2]).sum() / count, kl.sum(-1).mean()

    start = torch.from_numpy(theta).requires_grad_()
    loss, kl = losses(start)
    gradient = torch.autograd.grad(loss, start, retain_graph=True)[0].numpy()
    (slope,) = torch.autograd.grad(kl, start, create_graph=True)

    def product(v):
        return torch.autograd.grad(slope @ torch.from_numpy(v), start, retain_graph=True)[0].numpy()

    def objective(theta):
        return [value.item() for value in losses(torch.from_numpy(theta).requires_grad_())]

    return gradient, product, objective


def by_recursion(experiment, theta, support, query, old):
    """The gradient and the product of `rl.Experiment.meta_iteration`, of all tasks at once."""
    return rl.outer_problem(experiment.loss, experiment.alpha, 2, theta, [[support[1], query[1]]])[1:]


def reinforcement():
    columns = "loops, autograd", "torch"
    header(columns)
    for hidden in (64, 100):
        experiment = rl_experiment("navigation", "--meta-batch", "20", "--hidden", str(hidden))
        policy, count, trajectories = experiment.policy, 20, 20
        rng = np.random.default_rng(0)
        theta, goals = policy.init(rng), rl.drawn_goals("navigation", rng, count)
        theta += rng.normal(0, 0.1, theta.shape).astype(np.float32)  # at the origin all units are at the kink
        each = theta + np.zeros((count, 1), np.float32)

        def at_once(theta):
            return rl.rollout(rl.Navigation(goals, trajectories), policy, theta, rng)

        def in_loops(theta):
            return loops_rollout(policy, theta, goals, trajectories, rng)

        def samples(rollout, theta):
            episodes = rollout(theta)
            return episodes, rl.batch_of(episodes, 0.99, 1.0)

        if hidden == 64:
            still = each.copy()
            policy.unflatten(still)["log_std"][:] = -30  # no noise, so that the two can be compared
            assert_equal(at_once(still).observations, in_loops(still).observations)
            sides = {"ours": partial(at_once, each), columns[0]: partial(in_loops, each)}
            row("rollout, 20 tasks × 20 × 100 steps", sides, columns, blocks=3)
            episodes = at_once(each)
            data = episodes.observations, rl.discounted(episodes.rewards, 0.99), episodes.mask
            sides = {"ours": partial(rl.baseline, *data), columns[0]: partial(loops_baseline, *data)}
            assert_equal(*(side() for side in sides.values()))
            row("baseline, 20 tasks", sides, columns)

        support = samples(at_once, each)
        adapted = theta - experiment.alpha * experiment.loss.grad(theta, *support[1])
        query = samples(at_once, adapted)
        plain = lambda *data: experiment.loss(*data)  # noqa: E731
        v = rng.standard_normal(each.shape, np.float32)
        ours, definition = (maml.expand(loss, each, *support[1])[2] for loss in (experiment.loss, plain))
        sides = {"ours": partial(ours, v), columns[0]: partial(definition, v)}
        assert_equal(*(side() for side in sides.values()))
        row(f"policy's H v, {hidden}-{hidden}, 20 tasks", sides, columns, blocks=3)

        ways = {"ours": by_recursion, columns[0]: by_autograd} | ({"torch": by_torch} if torch else {})
        old = policy.forward(adapted, query[1][0])[0]
        problems = [way(experiment, theta, support, query, old) for way in ways.values()]
        for gradient, product, _ in problems[1:]:
            assert_equal(gradient, problems[0][0])
            assert_equal(product(v[0]), problems[0][1](v[0]))
        del problems, ours, definition
        step = partial(outer_step, experiment, theta)
        sides = {
            "ours": partial(experiment.meta_iteration, theta, rng),
            columns[0]: partial(step, partial(samples, in_loops), by_autograd),
        } | ({"torch": partial(step, partial(samples, at_once), by_torch)} if torch else {})
        row(f"navigation meta-iteration, {hidden}-{hidden}", sides, columns, blocks=3)


def echo(theta, _):
    """What a worker does but for the computing: theta comes, a gradient goes."""
    return theta


def image_meta_iteration(*words):
    """-> the experiment on random images, and its outer gradient under a map."""
    experiment = maml.experiment_of(maml.settings_of(maml.build_parser().parse_args(words)))
    rng, shape = np.random.default_rng(0), experiment.network.inputs
    # A file, for whoever computes to map, as a data set is.
    experiment.file = tempfile.NamedTemporaryFile(suffix=".npy")
    np.save(experiment.file, rng.integers(256, size=(64, 20, *shape)).astype(np.uint8))
    experiment.file.flush()
    experiment.images = {"train": tasks.Split(experiment.file.name, 0, 64)}
    one = partial(experiment.outer_gradient(), experiment.start().theta)
    sample, count, parcel = experiment.meta_batch().values()

    def gradient(map):
        return maml.mean_over_parcels(one, sample, np.random.default_rng(0), count, parcel, map)[1]

    return experiment, gradient


def rl_experiment(task, *words):
    return rl.Experiment(rl.settings_of(rl.build_parser().parse_args(["--task", task, *words])))


def speed_up(label, call, many):
    """Prints a line: call(map) on both cores and on one, to the same bits -> seconds on one."""
    assert_equal(call(many), call(map), 1e-12)
    times = milliseconds({"many": partial(call, many), "one": partial(call, map)}, seconds=2, blocks=5)
    print(
        f"{label:<38}{times['many']:9.1f}  {times['one']:8.1f} {times['one'] / times['many']:7.2f}×",
        flush=True,
    )
    return times["one"] / 1e3


def scaling():
    """Both cores against one, the map's own cost, and a model of many workers fitted to what is measured."""
    header(("one core",))
    omniglot, gradient = image_meta_iteration("--task", "omniglot")
    speed_up("Omniglot 5-way, threads", gradient, omniglot.map)
    mini, mini_gradient = image_meta_iteration("--task", "miniimagenet")
    compute = {"MiniImagenet": speed_up("MiniImagenet 5-way, threads", mini_gradient, mini.map) / 4}
    traffic = {"MiniImagenet": 2 * 4 * mini.network.size}
    navigation = rl_experiment("navigation")
    threads, theta = maml.threads, navigation.start().theta

    def iteration(map):
        maml.threads = lambda: map
        return navigation.meta_iteration(theta, np.random.default_rng(0))[0]

    speed_up("navigation, threads", iteration, threads())
    maml.threads = threads
    with maml.process_pool(2) as pool:
        both = partial(maml.pool_map, pool, 2)
        for task in ("cheetah-dir", "ant-dir") if optional("mujoco") and optional("gymnasium") else ():
            experiment = rl_experiment(task)
            theta, goals = experiment.start().theta, rl.test_goals(task, 40)

            def sample(map):
                rng = np.random.default_rng(0)
                return np.concatenate(experiment.spread(rl.returns_along, theta, 20, [], goals, rng, map))

            compute[task] = speed_up(f"{task}, sampling, processes", sample, both) / 40
            one = rl.experience(experiment.settings, experiment.loss, theta, 20, [0.1], goals[:1], [0, 1])
            traffic[task] = 4 * theta.size + len(pickle.dumps(one))
    with maml.process_pool(1) as pool:
        alone = partial(maml.pool_map, pool, 1)
        times = milliseconds({"here": partial(gradient, map), "there": partial(gradient, alone)}, 0.5, 21)
        cost = times["there"] / times["here"] - 1
        print(f"\nOmniglot 5-way through a map to one worker: {100 * cost:+.1f} %")
        sizes = 1 << np.arange(12, 25, 2)
        arrays = {str(size): np.zeros(size // 4, np.float32) for size in sizes}
        sides = {
            name: lambda array=array: [*alone(partial(echo, array), [0])] for name, array in arrays.items()
        }
        spent = [value / 1e3 for value in milliseconds(sides).values()]
    weight = 1 / np.array(spent)  # relative errors
    columns = weight[:, None] * np.stack([np.ones(len(sizes)), 2 * sizes], axis=1)
    latency, second = np.linalg.lstsq(columns, weight * spent, rcond=None)[0]
    print(f"a parcel costs its parent {1e3 * latency:.2f} ms, and a byte {1e9 * second:.2f} ns\n")
    print(
        f"{'seconds, and the share of parcels':<38}" + "".join(f"{n:>10} workers" for n in (1, 10, 100, 1000))
    )
    for name, c in compute.items():
        parcel = latency + traffic[name] * second
        cells = "".join(
            f"{c + n * parcel:10.2f} ({100 * n * parcel / (c + n * parcel):2.0f} %)"
            for n in (1, 10, 100, 1000)
        )
        print(f"{name}, {traffic[name] / 1e6:.2f} MB a task".ljust(38) + f"{cells}, half at {c / parcel:.0f}")


def header(columns):
    versions = [f"numpy {np.__version__}", *(f"{m.__name__} {m.__version__}" for m in (torch, jax) if m)]
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), cpu)
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    print(f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, {', '.join(versions)}")
    print(f"{blas['name']} {blas['version']}, one thread; PyTorch and JAX as they come")
    print("milliseconds a call; × is how many times ours is as fast\n")
    print(f"{'':<38}{'ours':>9}  " + "  ".join(f"{name:>17}" for name in columns))


def images():
    columns = "torch.func", "torch loop"
    header(columns)
    for label, *sizes in (
        ("Omniglot 5-way, 32 tasks, steps 1", (28, 28, 1), 5, 64, False, 32, 5, 1),
        ("Omniglot 20-way, 16 tasks, steps 5", (28, 28, 1), 20, 64, False, 16, 20, 5),
        ("MiniImagenet 5-way, 4 tasks, steps 5", (84, 84, 3), 5, 32, True, 4, 75, 5),
    ):
        ours = row(label, image_sides(*sizes), columns, blocks=3)
        shape, ways, _, _, count, queries, _ = sizes
        drawn = np.random.default_rng(0).integers(256, size=(ways + 3, 600, *shape)).astype(np.uint8)
        call = partial(tasks.few_shot, np.random.default_rng(0), drawn, count, ways, 1, queries // ways)
        spent = milliseconds({"few_shot": call}, blocks=3)["few_shot"]
        print(f"  sampled by few_shot                 {spent:9.3f} ({100 * spent / ours:.1f} %)", flush=True)


def sinusoids():
    header(COLUMNS)
    rng = np.random.default_rng(0)
    loss = nets.mean_squared_error(nets.mlp((1, 40, 40, 1)))
    theta = (0.3 * rng.normal(size=loss.network.size)).astype(np.float32)
    plain = lambda *data: loss(*data)  # noqa: E731  the definition: no closed forms

    (x, y), query = tasks.sinusoid(rng, 25, 10, 10)
    v = rng.normal(size=(25, loss.network.size)).astype(np.float32)
    sides = {"ours": lambda: loss.grad(theta, x, y), "definition": lambda: maml.gradient(plain, theta, x, y)}
    assert_equal(sides["ours"](), sides["definition"]())
    row("gradient, 25 tasks", sides)
    products = loss.expand(theta, x, y)[2], maml.expand(plain, theta, x, y)[2]
    sides = {"ours": lambda: products[0](v), "definition": lambda: products[1](v)}
    assert_equal(sides["ours"](), sides["definition"]())
    row("Hessian-vector product, 25 tasks", sides)

    for count, steps in ((25, 1), (100, 1), (25, 5), (100, 5)):
        support, query = tasks.sinusoid(rng, count, 10, 10)
        row(
            f"meta-gradient, {count} tasks, steps {steps}",
            sinusoid_sides(loss, theta, support, query, 0.01, steps),
        )
    start = loss.network.init(np.random.default_rng(0))
    row("sinusoid, 500 meta-iterations", sinusoid_run(loss, start, 500))


if __name__ == "__main__":
    maml.one_blas_thread()  # as the command does; PyTorch and JAX have thread pools of their own
    parts = {"": sinusoids, "images": images, "rl": reinforcement, "scaling": scaling}
    name = "".join(sys.argv[1:2])
    if name in ("-h", "--help"):
        print(__doc__)
    elif name not in parts:
        print(f"bench.py: {name!r} is none of images, rl and scaling; see --help", file=sys.stderr)
        sys.exit(2)
    else:
        parts[name]()
