# SPDX-License-Identifier: MIT
"""`python bench.py [images]`: hot paths beside their definitions, and beside PyTorch and JAX where installed.

Equality is asserted before anything is timed. All sides are float32 and free to use all cores. The sides
of a row take turns, in blocks of calls, and each shows the median of its blocks, so that a machine whose
speed drifts slows all alike. Ratios above 1 mean that ours is faster.
"""

import importlib
import os
import platform
import sys
import time
from functools import partial

import numpy as np

import maml
import nets
import tasks


def optional(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


jax, torch = optional("jax"), optional("torch")
COLUMNS = "definition", "torch.func", "jax"


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
    """Prints one line: the first side is ours."""
    times = milliseconds(sides, **timing)
    ours = next(iter(times.values()))
    cells = [f"{ours:9.3f}"]
    for name in columns:
        cells.append(f"{times[name]:9.3f} {times[name] / ours:6.2f}×" if name in times else " " * 17)
    print(f"{label:<38}" + "  ".join(cells), flush=True)


def sinusoid_sides(loss, theta, support, query, alpha, steps):
    """The meta-gradient, four ways; equality asserted."""
    args = (theta, support, query, alpha, steps)
    sides = {
        "ours": lambda: maml.meta_gradient(loss, *args)[1],
        "definition": lambda: maml.meta_gradient_by_definition(loss, *args)[1],
    }
    if torch:
        sides["torch.func"] = torch_meta_gradient(loss.network.shapes, *args)
    if jax:
        sides["jax"] = jax_meta_gradient(loss.network.shapes, *args)
    for side in sides.values():
        assert_equal(side(), sides["definition"]())
    return sides


def sliced(shapes, theta):
    start = 0
    for shape in shapes.values():
        stop = start + int(np.prod(shape))
        yield theta[start:stop].reshape(shape)
        start = stop


def mlp_loss(shapes, relu, theta, x, y):
    """The mean squared error of a multi-layer perceptron, of one task, in any array library."""
    arrays = list(sliced(shapes, theta))
    for i in range(0, len(arrays), 2):
        x = (relu(x) if i else x) @ arrays[i] + arrays[i + 1]
    return ((x - y) ** 2).mean()


def jax_meta_gradient(shapes, theta, support, query, alpha, steps):
    loss = partial(mlp_loss, shapes, jax.nn.relu)

    def one_task(theta, support, query):
        for _ in range(steps):
            theta = theta - alpha * jax.grad(loss)(theta, *support)
        return loss(theta, *query)

    outer = jax.jit(jax.grad(lambda *data: jax.vmap(one_task, (None, 0, 0))(*data).mean()))
    data = jax.tree.map(jax.numpy.asarray, (theta, support, query))
    return lambda: outer(*data).block_until_ready()


def torch_meta_gradient(shapes, theta, support, query, alpha, steps):
    loss = partial(mlp_loss, shapes, torch.relu)

    def one_task(theta, sx, sy, qx, qy):
        for _ in range(steps):
            theta = theta - alpha * torch.func.grad(loss)(theta, sx, sy)
        return loss(theta, qx, qy)

    outer = torch.func.grad(lambda *data: torch.func.vmap(one_task, (None, 0, 0, 0, 0))(*data).mean())
    data = [torch.from_numpy(array) for array in (theta, *support, *query)]
    return lambda: outer(*data).numpy()


def sinusoid_run(loss, theta, count):
    """`count` meta-iterations of the paper's experiment, sampling and Adam included: ours, and JAX's scan."""
    step = partial(maml.meta_gradient, loss, alpha=0.01, steps=1)

    def ours():
        rng = np.random.default_rng(0)
        sample = partial(tasks.sinusoid, tasks=25, shots=10, query_shots=10)
        run = maml.train(step, sample, maml.State.start(theta), rng, 1e-3, count)
        *_, (state, _) = run
        return state.theta

    if not jax:
        return {"ours": ours}
    jnp, loss_of = jax.numpy, partial(mlp_loss, loss.network.shapes, jax.nn.relu)

    def outer(theta, x, y):
        def one_task(x, y):
            return loss_of(theta - 0.01 * jax.grad(loss_of)(theta, x[:10], y[:10]), x[10:], y[10:])

        return jax.vmap(one_task)(x, y).mean()

    def iteration(carry, key):
        theta, m, v, t = carry
        keys = jax.random.split(key, 3)
        amplitude = jax.random.uniform(keys[0], (25, 1, 1), minval=0.1, maxval=5)
        phase = jax.random.uniform(keys[1], (25, 1, 1), maxval=np.pi)
        x = jax.random.uniform(keys[2], (25, 20, 1), minval=-5, maxval=5)
        value, g = jax.value_and_grad(outer)(theta, x, amplitude * jnp.sin(x - phase))
        m, v, t = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g, t + 1
        rate = 1e-3 * jnp.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        return (theta - rate * m / (jnp.sqrt(v) + 1e-8), m, v, t), value

    @jax.jit
    def scan(theta, key):
        carry = (theta, jnp.zeros_like(theta), jnp.zeros_like(theta), 0.0)
        return jax.lax.scan(iteration, carry, jax.random.split(key, count))[0][0]

    key = jax.random.key(0)
    return {"ours": ours, "jax": lambda: scan(theta, key).block_until_ready()}


def image_sides(shape, ways, filters, pool, count, queries, steps):
    """The meta-gradient of a convolutional network: chunks of tasks on threads, and PyTorch's two forms.

    Equality is asserted in float64 on two tasks: in float32 rounding tips single ReLUs and pools over, and
    PyTorch's two forms then differ from each other by a per cent.
    """
    rng = np.random.default_rng(0)
    experiment = maml.experiment_of(
        {
            "task": "miniimagenet" if pool else "omniglot",
            "method": "maml",
            "ways": ways,
            "shots": 1,
            "query": queries // ways,
            "net": "conv",
            "filters": filters,
            "steps": steps,
            "alpha": 0.001,
            "seed": 0,
            "dtype": "float64",
        }
    )
    classes = rng.random((ways, count + 3, 1 + queries // ways, *shape)).swapaxes(0, 1)
    classes = 0.5 * classes + 0.5 * classes[:, :, :1].mean(axis=2, keepdims=True)
    batch = tasks.few_shot(
        rng, classes.reshape(-1, *classes.shape[2:]), count, ways, 1, queries // ways, dtype=np.float64
    )
    theta = experiment.network.init(rng, np.float64)
    step = partial(maml.meta_gradient, experiment.loss, alpha=0.001, steps=steps)

    def sides(theta, support, query):
        ours = {
            "ours": lambda: maml.mean_over_chunks(
                step, theta, support, query, experiment.chunk, experiment.map
            )[1]
        }
        return ours | (
            torch_image_sides(experiment.network, pool, theta, support, query, 0.001, steps) if torch else {}
        )

    two = sides(theta, *(tuple(array[:2] for array in pair) for pair in batch))
    for side in two.values():
        error = np.linalg.norm(side() - two["ours"]()) / np.linalg.norm(two["ours"]())
        assert error < 1e-8, f"relative error {error}"
    return sides(*single((theta, *batch)))


def single(arrays):
    if isinstance(arrays, tuple):
        return tuple(single(array) for array in arrays)
    return arrays.astype(np.float32)


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

    def flat(p):
        return np.concatenate(
            [(a.permute(2, 3, 1, 0) if a.ndim == 4 else a).detach().numpy().ravel() for a in p]
        )

    arrays = network.unflatten(theta).values()
    p = [torch.tensor(a.transpose(3, 2, 0, 1) if a.ndim == 4 else a).contiguous() for a in arrays]
    data = [
        torch.tensor(a.transpose(0, 1, 4, 2, 3) if a.ndim == 5 else a).contiguous()
        for a in (*support, *query)
    ]

    def mapped():
        total = torch.func.grad(lambda p: torch.func.vmap(lambda *d: one_task(p, *d))(*data).mean())
        return flat(total(p))

    def looped():
        start, total = [a.detach().requires_grad_() for a in p], [torch.zeros_like(a) for a in p]
        for sx, sy, qx, qy in zip(*data):
            q = start
            for _ in range(steps):
                g = torch.autograd.grad(loss(q, sx, sy), q, create_graph=True)
                q = [a - alpha * b for a, b in zip(q, g)]
            for a, b in zip(total, torch.autograd.grad(loss(q, qx, qy), start)):
                a += b / len(data[0])
        return flat(total)

    return {"torch.func": mapped, "torch loop": looped}


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
        row(label, image_sides(*sizes), columns, blocks=3)


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
    images() if sys.argv[1:] == ["images"] else sinusoids()
