# SPDX-License-Identifier: MIT
"""One test a claim: the mathematics first, then the samplers, the command, and the README.

Everything mathematical runs in float64 with relative tolerances and no absolute floor. Finite
differences are central. Problems whose ReLU inputs come near zero are drawn again, so that no
difference steps over a kink.
"""

import builtins
import csv
import dis
import functools
import http.server
import importlib
import inspect
import io
import json
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from hashlib import md5
from pathlib import Path

import autograd.numpy as anp
import numpy as np
import pytest
from autograd import grad
from hypothesis import given, settings
from hypothesis import strategies as st

import maml
import nets
import rl
import tasks

HERE = Path(__file__).resolve().parent
settings.register_profile("maml", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("maml")


def error(found, expected):
    """Relative error in the norm, with no floor: an exact zero must be met exactly."""
    found, expected = np.asarray(found, float), np.asarray(expected, float)
    assert found.shape == expected.shape
    scale = np.linalg.norm(expected)
    return np.linalg.norm(found - expected) / scale if scale else np.linalg.norm(found)


def difference(f, x, v, h=1e-4):
    """Central difference of f at x along v, of fourth order."""
    near, far = f(x + h * v) - f(x - h * v), f(x + 2 * h * v) - f(x - 2 * h * v)
    return (8 * near - far) / (12 * h)


def hidden(loss):
    """The loss without its closed forms, so that autograd supplies them."""
    return lambda theta, x, y: loss(theta, x, y)


def single(*arrays):
    return [np.asarray(array, np.float32) for array in arrays]


def unit(v):
    """Each task's direction, of length 1."""
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def distance_to_kink(network, theta, x):
    """The smallest |input| of any ReLU, or lead of a pool's largest pixel."""
    arrays, nearest = network.unflatten(theta), np.inf
    for layer in network.layers:
        if isinstance(layer, nets.Relu):
            nearest = min(nearest, np.abs(x).min())
        if isinstance(layer, nets.MaxPool):
            second, first = np.sort(nets._quads(x), axis=0)[2:]
            nearest = min(nearest, (first - second).min())
        x = layer.apply(x, *[arrays[name] for name in layer.shapes])
    return nearest


def away_from_kinks(draw, seed, distance=2e-3):
    """The first problem that is: draw(rng) -> problem, [(network, theta, x) where it is differentiated]."""
    for attempt in range(1000):
        problem, points = draw(np.random.default_rng([seed, attempt]))
        if min(distance_to_kink(*point) for point in points) > distance:
            return problem
    raise AssertionError("no problem away from the kinks was found")


class Problem:
    """A random network, loss, theta, alpha, support and query, far from every kink for `steps` inner steps.

    theta [P] is shared by the tasks, each [T, P] is not, and v [T, P] is a direction.
    """

    def __init__(self, rng, sizes, count, examples, classify, normalize, steps, many):
        self.rng, self.network = rng, nets.mlp(sizes, normalize)
        self.loss = (nets.cross_entropy if classify else nets.mean_squared_error)(self.network)
        size, self.steps = self.network.size, steps
        self.alpha = rng.uniform(0, 0.05, size) if many else 0.05
        self.theta = rng.normal(size=size) / 2
        self.each = rng.normal(size=(count, size)) / 2
        self.v = unit(rng.normal(size=(count, size)))
        self.support, self.query = (self.data(sizes, (count, n), classify) for n in examples)

    def data(self, sizes, shape, classify):
        x = self.rng.normal(size=(*shape, sizes[0]))
        if classify:
            return x, np.eye(sizes[-1])[self.rng.integers(0, sizes[-1], shape)]
        return x, self.rng.normal(size=(*shape, sizes[-1]))

    @property
    def args(self):
        return self.theta, self.support, self.query, self.alpha, self.steps

    def points(self):
        thetas = [
            maml.adapt(self.loss, self.theta, self.support, self.alpha, s) for s in range(self.steps + 1)
        ]
        pairs = [(theta, self.support) for theta in (self.each, *thetas)] + [(thetas[-1], self.query)]
        return [(self.network, theta, x) for theta, (x, _) in pairs]


def problem(
    seed=0, sizes=(2, 3, 1), count=2, examples=(3, 3), classify=False, normalize=False, steps=2, many=False
):
    def draw(rng):
        p = Problem(rng, sizes, count, examples, classify, normalize, steps, many)
        return p, p.points()

    return away_from_kinks(draw, seed)


@st.composite
def problems(draw, steps=2, normalize=(False, True)):
    sizes = (draw(st.integers(1, 3)), *draw(st.lists(st.integers(1, 5), max_size=2)), draw(st.integers(1, 3)))
    batch_norm, many = draw(st.sampled_from(normalize)), draw(st.booleans())
    examples = draw(st.tuples(*[st.integers(2 if batch_norm else 1, 4)] * 2))
    steps = draw(steps) if isinstance(steps, st.SearchStrategy) else steps
    count, classify = draw(st.integers(1, 3)), draw(st.booleans())
    return problem(draw(st.integers(0, 10**6)), sizes, count, examples, classify, batch_norm, steps, many)


# Networks and losses ---------------------------------------------------------------------------


def check_closed_forms(loss, theta, x, y, v, tolerance):
    """They equal the definition's, also a second product of one pass, and the sum over tasks."""
    value, gradient, product = maml.expand(hidden(loss), theta, x, y)
    found, g, hvp = loss.expand(theta, x, y)
    before, expected = g.copy(), product(v)
    assert error(found, value) < 1e-12 and error(g, gradient) < tolerance
    for _ in range(2):
        assert error(hvp(v), expected) < 10 * tolerance
    assert error(hvp(v, total=True), hvp(v).sum(axis=0)) < tolerance
    assert (g == before).all() and (loss.grad(theta, x, y) == g).all()


def check_differences(loss, theta, x, y, v, tolerance=1e-7, h=1e-4):
    """Gradient and product along v are the differences of value and gradient."""
    _, g, hvp = loss.expand(theta, x, y)
    assert error((g * v).sum(axis=1), difference(lambda theta: loss(theta, x, y), theta, v, h)) < tolerance
    assert error(hvp(v), difference(lambda theta: loss.grad(theta, x, y), theta, v, h)) < tolerance


@given(problems(steps=0))
def test_closed_forms_equal_the_definition_and_finite_differences(p):
    for theta in (p.theta, p.each):
        check_closed_forms(p.loss, theta, *p.support, p.v, 1e-11)
    check_differences(p.loss, p.each, *p.support, p.v)


@settings(max_examples=10)
@given(problems())
def test_float32_stays_float32_and_agrees(p):
    (theta,), support, query = single(p.theta), single(*p.support), single(*p.query)
    for loss in (p.loss, hidden(p.loss)):
        for alpha in (0.05, np.float64(0.05), np.full_like(theta, 0.05)):
            value, g = maml.meta_gradient(loss, theta, support, query, alpha, 2)
            assert value.dtype == g.dtype == np.float32
            assert maml.adapt(loss, theta, support, alpha, 2).dtype == np.float32
            assert maml.curve(loss, theta, support, query, alpha, 1, loss).dtype == np.float32
    assert error(g, maml.meta_gradient(p.loss, p.theta, p.support, p.query, 0.05, 2)[1]) < 1e-3


def test_theta_is_laid_out_as_documented():
    network = nets.mlp((1, 40, 40, 1))
    assert network.size == 1761 and list(network.shapes) == ["w1", "b1", "w2", "b2", "w3", "b3"]
    theta = np.arange(1761.0)
    arrays = network.unflatten(theta)
    assert np.array_equal(np.concatenate([a.ravel() for a in arrays.values()]), theta)
    assert all(np.shares_memory(a, theta) for a in arrays.values())
    assert list(nets.mlp((4, 3, 2), normalize=True).shapes) == ["w1", "beta1", "w2", "b2"]


@pytest.mark.parametrize("network", [nets.mlp((4, 3, 2)), nets.convnet((16, 16, 1), 2, 2, pool=True)])
def test_a_loss_pickles(network):
    rng, loss = np.random.default_rng(0), nets.cross_entropy(network)
    data = network.init(rng, np.float64), rng.normal(size=(2, 3, *network.inputs)), np.ones((2, 3, 2))
    assert np.array_equal(pickle.loads(pickle.dumps(loss)).grad(*data), loss.grad(*data))


def test_initial_weights_are_the_authors():
    rng = np.random.default_rng(0)
    network = nets.mlp((1, 400, 400, 1))
    arrays = network.unflatten(network.init(rng))
    assert np.abs(arrays["w2"]).max() <= 0.02 and not arrays["b1"].any()
    assert abs(arrays["w2"].std() / 0.0087963 - 1) < 0.01  # a normal of deviation 0.01 cut at two deviations
    omniglot, mini = nets.convnet((28, 28, 1), 20), nets.convnet((84, 84, 3), 5, filters=32, pool=True)
    for network, spread in ((omniglot, 1), (mini, np.sqrt(2 / 805))):
        arrays = network.unflatten(network.init(rng, np.float64))
        for name, (*_, inputs, outputs) in [(name, s) for name, s in network.shapes.items() if len(s) == 4]:
            bound = np.sqrt(6 / (9 * inputs + 9 * outputs))
            assert 0.95 * bound < np.abs(arrays[name]).max() <= bound
        assert not any(arrays[name].any() for name in ("beta1", "beta2", "beta3", "beta4", "b"))
        assert abs(arrays["w"].std() / spread - 1) < 0.06


# Convolutional networks ------------------------------------------------------------------------


def image_problem(rng, shape, ways, filters, pool, tasks, n, shared):
    """loss, theta, x, y, v of a convolutional network near its start."""
    loss = nets.cross_entropy(nets.convnet(shape, ways, filters, pool))
    theta = loss.network.init(rng, np.float64)
    theta = theta + 0.1 * rng.normal(size=theta.shape if shared else (tasks, theta.size))
    x = rng.normal(size=(tasks, n, *shape))
    y = np.eye(ways)[rng.integers(0, ways, (tasks, n))]
    return loss, theta, x, y, rng.normal(size=(tasks, theta.shape[-1]))


@st.composite
def image_problems(draw):
    pool = draw(st.booleans())
    size = st.integers(16, 19) if pool else st.integers(3, 12)
    shape = (draw(size), draw(size), draw(st.sampled_from([1, 3])))
    ways, shots = draw(st.integers(2, 3)), draw(st.integers(1, 2))
    shared, tasks, filters = draw(st.booleans()), draw(st.integers(1, 3)), draw(st.integers(2, 4))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    return image_problem(rng, shape, ways, filters, pool, tasks, ways * shots, shared)


@given(image_problems(), st.sampled_from([1, nets.BLOCK]))
def test_convolutional_closed_forms_equal_the_definition_in_blocks_of_any_size(case, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nets, "BLOCK", block)
        check_closed_forms(*case, 1e-10)


@pytest.mark.parametrize("pool, shape", [(False, (9, 6, 1)), (True, (16, 17, 3))])
def test_convolutional_closed_forms_equal_finite_differences_and_float32s(pool, shape):
    def draw(rng):
        case = image_problem(rng, shape, 2, 3, pool, 2, 2, shared=False)
        return case, [(case[0].network, case[1], case[2])]

    loss, theta, x, y, v = away_from_kinks(draw, seed=0, distance=1e-3)
    check_differences(loss, theta, x, y, unit(v), 1e-6, h=1e-5)
    for at in (theta, theta[0]):
        value, g, hvp = loss.expand(at, x, y)
        rough, rough_g, rough_hvp = loss.expand(*single(at, x, y))
        found = [rough, rough_g, rough_hvp(*single(v)), rough_hvp(*single(v), total=True)]
        for a, b in zip(found, [value, g, hvp(v), hvp(v, total=True)]):
            assert a.dtype == np.float32 and error(a, b) < 1e-3
        assert loss(*single(at, x, y)).dtype == np.float32


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (7, 14), (4, 5), (2, 1)])
def test_same_padding_is_tensorflows(stride, size):
    """By hand: at stride 2 an even size is padded after only, everything else on both sides."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(1, 2, *size, 3)), rng.normal(size=(3, 3, 3, 4))
    pads = [(0, 1) if stride == 2 and n % 2 == 0 else (1, 1) for n in size]
    padded = np.pad(x, ((0, 0), (0, 0), *pads, (0, 0)))
    out = nets.Conv(3, 4, "w", stride).apply(x, w)
    for i, j in np.ndindex(out.shape[2:4]):
        patch = padded[:, :, stride * i : stride * i + 3, stride * j : stride * j + 3]
        assert error(out[:, :, i, j], np.einsum("tnhwi,hwio->tno", patch, w)) < 1e-13


def test_sizes_of_the_convolutional_networks():
    omniglot, mini = nets.convnet((28, 28, 1), 5), nets.convnet((84, 84, 3), 5, filters=32, pool=True)
    assert omniglot.size == 111_749, "the paper's code adds 4 x 64 biases, which batch norm cancels"
    assert mini.size == 32_773 - 4 * 32, "the same for 32 filters"
    names = ["conv1", "beta1", "conv2", "beta2", "conv3", "beta3", "conv4", "beta4", "w", "b"]
    assert list(omniglot.shapes) == list(mini.shapes) == names
    assert omniglot.shapes["w"] == (64, 5) and mini.shapes["w"] == (800, 5)
    assert mini.shapes["conv1"] == (3, 3, 3, 32) and mini.shapes["conv2"] == (3, 3, 32, 32)


def test_pool_shares_a_ties_gradient():
    out, backward = nets.MaxPool().forward(None, np.ones((1, 1, 2, 2, 1)))
    assert backward(np.ones((1, 1, 1, 1, 1)), None)[0].ravel().tolist() == [0.25] * 4


def test_cross_entropys_closed_form_bears_large_outputs():
    out, y = np.array([[[1000.0, -1000.0]]]), np.array([[[0.0, 1.0]]])
    value, u, second = nets.CrossEntropy().expand(out, y)
    assert value == [2000] and u.tolist() == [[[1, -1]]] and np.isfinite(second(out)).all()


# The meta-gradient -----------------------------------------------------------------------------


@given(problems(steps=st.integers(0, 3)))
def test_recursion_equals_definition_and_finite_differences(p):
    value, expected = maml.meta_gradient_by_definition(p.loss, *p.args)
    ways = [partial(maml.meta_gradient, p.loss), partial(maml.meta_gradient, hidden(p.loss))]
    ways += [partial(maml.meta_gradient_recomputed, p.loss, kept=kept) for kept in range(p.steps + 2)]
    for way in ways:
        found = way(*p.args)
        assert error(found[0], value) < 1e-11 and error(found[1], expected) < 1e-9

    def objective(theta):
        return maml.meta_loss(p.loss, theta, *p.args[1:])

    assert error(grad(objective)(p.theta), expected) < 1e-9, "autograd through the closed forms' products"
    assert error(expected @ p.v[0], difference(objective, p.theta, p.v[0])) < 1e-6


@pytest.mark.parametrize(
    "pool, shape, steps", [(False, (7, 6, 1), 1), (False, (6, 6, 3), 5), (True, (17, 18, 3), 3)]
)
def test_convolutional_meta_gradient_equals_the_definition(pool, shape, steps):
    """Two ways, one example a class, through batch norm and pooling; the shifts are not adapted."""
    rng = np.random.default_rng(steps)
    network = nets.convnet(shape, 2, filters=3, pool=pool)
    loss, theta = nets.cross_entropy(network), network.init(rng, np.float64)
    alpha = np.full(network.size, 0.1)
    for name, view in network.unflatten(alpha).items():
        view[...] *= not name.startswith("beta")
    support, query = ((rng.random((2, n, *shape)), np.tile(np.eye(2), (2, n // 2, 1))) for n in (2, 4))
    value, expected = maml.meta_gradient_by_definition(loss, theta, support, query, alpha, steps)
    for recursion in (maml.meta_gradient, maml.meta_gradient_recomputed):
        found = recursion(loss, theta, support, query, alpha, steps)
        assert error(found[0], value) < 1e-11 and error(found[1], expected) < 1e-8
    first = maml.meta_gradient(loss, theta, support, query, alpha, steps, order=1)[1]
    adapted = maml.adapt(hidden(loss), theta, support, alpha, steps)
    assert error(first, maml.gradient(hidden(loss), adapted, *query).mean(axis=0)) < 1e-8
    assert error(first, expected) > 1e-4
    (theta, alpha), support, query = single(theta, alpha), single(*support), single(*query)
    rough = maml.meta_gradient(loss, theta, support, query, alpha, steps)[1]
    assert rough.dtype == np.float32 and error(rough, expected) < 1e-3


def test_exact_integers():
    """A linear model on integers: the values that another implementation's tests publish."""
    w, a, b = np.array([2.0, 3, 5]), np.array([[1.0, 2, 3]]), np.array([[4.0, 5, 6]])
    square, linear = np.ones(1), np.zeros(1)

    def loss(theta, x, kind):
        out = anp.sum(x * theta, axis=1)
        return kind * 0.5 * out**2 + (1 - kind) * out

    def meta_gradient(support, query, alpha, steps, order=2):
        value, g = maml.meta_gradient(loss, w, support, query, alpha, steps, order)
        return value.item(), g.tolist()

    assert maml.adapt(loss, w, (a, square), 0.5, 1).tolist() == [[-9.5, -20, -29.5]]
    assert meta_gradient((a, square), (b, square), 0.5, 1) == (49612.5, [3780, 8505, 13230])
    assert meta_gradient((a, square), (b, square), 0.5, 1, order=1) == (49612.5, [-1260, -1575, -1890])
    assert maml.adapt(loss, w, (b, square), 0.5, 1).tolist() == [[-104, -129.5, -154]]
    assert meta_gradient((b, square), (a, square), 0.5, 1, order=1) == (340312.5, [-825, -1650, -2475])
    assert maml.adapt(loss, w, (a, square), 1.0, 3).tolist() == [[-3609, -7219, -10828]]
    assert meta_gradient((a, square), (b, linear), 1.0, 3)[1] == [-5020, -10043, -15066]


@given(st.integers(0, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 10**6))
def test_quadratic_oracle(steps, size, count, seed):
    """Support (theta-c)ᵀA(theta-c)/2, query (theta-d)ᵀB(theta-d)/2: (I - A diag alpha)^k B (theta_k - d)."""
    rng = np.random.default_rng(seed)
    alpha, theta = rng.uniform(0, 0.3, size), rng.normal(size=size)

    def bowl(theta, centre, matrix):
        return 0.5 * anp.einsum("ti,tij,tj->t", theta - centre, matrix, theta - centre)

    (c, d), (a, b) = rng.normal(size=(2, count, size)), rng.normal(size=(2, count, size, size))
    a, b = a @ a.swapaxes(1, 2), b @ b.swapaxes(1, 2) + np.eye(size)
    expected = np.zeros(size)
    for t in range(count):
        k = theta
        for _ in range(steps):
            k = k - alpha * (a[t] @ (k - c[t]))
        expected += np.linalg.matrix_power(np.eye(size) - a[t] * alpha, steps) @ b[t] @ (k - d[t]) / count
    _, g = maml.meta_gradient(bowl, theta, (c, a), (d, b), alpha, steps)
    assert error(g, expected) < 1e-10


def test_a_wrong_meta_gradient_is_rejected():
    p = problem(1, (2, 5, 5, 1), 3, (4, 4))
    theta, support, query, alpha, steps = p.args
    expected = maml.meta_gradient_by_definition(p.loss, *p.args)[1]
    gradient = partial(maml.meta_gradient, p.loss, theta, support, query)
    assert error(gradient(alpha, steps)[1], expected) < 1e-10
    for wrong in (
        1.001 * gradient(alpha, steps)[1],
        gradient(alpha, steps, order=1)[1],
        gradient(alpha, steps - 1)[1],
        gradient(1.02 * alpha, steps)[1],
    ):
        assert error(wrong, expected) > 5e-4


# The family ------------------------------------------------------------------------------------


@given(problems())
def test_first_order_is_the_query_gradient_at_the_adapted_parameters(p):
    value, g = maml.meta_gradient(p.loss, *p.args, order=1)
    adapted = maml.adapt(p.loss, p.theta, p.support, p.alpha, p.steps)
    assert error(g, p.loss.grad(adapted, *p.query).mean(axis=0)) < 1e-12
    assert error(value, p.loss(adapted, *p.query).mean()) < 1e-12


@given(problems())
def test_meta_sgd_is_the_gradient_by_theta_and_alpha(p):
    both = np.concatenate([p.theta, p.alpha + np.zeros_like(p.theta)])

    def outer(both):
        theta, alpha = both[: len(p.theta)], both[len(p.theta) :]
        return maml.meta_loss(hidden(p.loss), theta, p.support, p.query, alpha, p.steps)

    value, g = maml.meta_sgd_gradient(p.loss, both, p.support, p.query, p.steps)
    assert error(value, outer(both)) < 1e-12
    assert error(g, grad(outer)(both)) < 1e-9


@given(problems(normalize=(False,)))
def test_reptile_is_the_way_from_the_adapted_parameters(p):
    value, g = maml.reptile_gradient(p.loss, *p.args)
    both = [np.concatenate(pair, axis=1) for pair in zip(p.support, p.query)]
    adapted = p.theta + np.zeros_like(p.each)
    for _ in range(p.steps):
        adapted = adapted - p.alpha * maml.gradient(hidden(p.loss), adapted, *both)
    assert error(g, p.theta - adapted.mean(axis=0)) < 1e-10
    assert error(value, p.loss(adapted, *p.query).mean()) < 1e-12


# The outer loop --------------------------------------------------------------------------------


def test_adam_is_its_equation():
    state, theta, m, v = maml.State.start(np.array([1.0, -2.0])), np.array([1.0, -2.0]), 0, 0
    for t, g in enumerate(np.random.default_rng(0).normal(size=(5, 2)), 1):
        state = maml.adam(state, g, 0.1)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        theta = theta - 0.1 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-8)
        assert error(state.theta, theta) < 1e-14 and state.iteration == t


def test_training_reaches_the_minimum_of_the_meta_objective_where_first_order_does_not():
    """Two bowls of different curvature: the minima of MAML, first order and no adaptation are known."""
    curvature, centre, alpha = np.array([[0.5], [2.5]]), np.array([[-1.0], [1.0]]), 0.3

    def bowl(theta, centre, curvature):
        return 0.5 * anp.sum(curvature * (theta - centre) ** 2, axis=1)

    def minimum(weights):
        return ((weights * curvature * centre).sum() / (weights * curvature).sum()).item()

    shrink, data = 1 - alpha * curvature, (centre, curvature)
    maml_minimum, first_order, joint = (minimum(shrink**power) for power in (2, 1, 0))
    gradient = partial(maml.meta_gradient, bowl, alpha=alpha, steps=1)
    step = partial(maml.adam_step, sample=lambda _, tasks: (data, data), tasks=2, beta=0.02)
    step = partial(step, outer_gradient=gradient)
    *_, (state, _) = maml.train(step, maml.State.start(np.zeros(1)), None, 600)
    assert abs(state.theta.item() - maml_minimum) < 1e-3
    assert abs(first_order - maml_minimum) > 0.2 and abs(joint - maml_minimum) > 0.5


def test_parcels_are_a_mean_of_a_seed_and_a_count_each_and_the_same_bits_on_any_executor():
    loss = nets.mean_squared_error(nets.mlp((1, 8, 1)))
    theta = loss.network.init(np.random.default_rng(0), np.float64)
    sample = partial(tasks.sinusoid, shots=5, query_shots=6, dtype=np.float64)
    step = partial(maml.meta_gradient, loss, theta, alpha=0.1, steps=2)

    def found(parcel, map=map):
        return maml.mean_over_parcels(step, sample, np.random.default_rng(1), 7, parcel, map)

    seeds = np.random.default_rng(1).integers(2**63, size=3)
    drawn = [sample(np.random.default_rng(seed), count) for seed, count in zip(seeds, (3, 3, 1))]
    joined = [[np.concatenate(arrays) for arrays in zip(*pairs)] for pairs in zip(*drawn)]
    in_parcels = found(3)
    assert all(error(a, b) < 1e-12 for a, b in zip(in_parcels, step(*joined)))
    with ThreadPoolExecutor(2) as pool:
        on_threads = found(3, pool.map)
    assert np.array_equal(in_parcels[1], on_threads[1]) and in_parcels[0] == on_threads[0]
    whole = step(*sample(np.random.default_rng(1), 7))
    assert np.array_equal(found(None)[1], whole[1]) and np.array_equal(found(7)[1], whole[1])


def peak_memory(function, *args):
    tracemalloc.start()
    function(*args)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_grows_by_what_a_step_keeps():
    """A step keeps its theta, gradient and activations; 100 of them on 25 tasks stay under 200 MB."""
    rng = np.random.default_rng(0)
    loss = nets.mean_squared_error(nets.mlp((1, 40, 40, 1)))
    gradient = partial(maml.meta_gradient, loss, loss.network.init(rng), *tasks.sinusoid(rng, 25, 10, 10))
    few, many = (peak_memory(gradient, 0.01, steps) for steps in (10, 100))
    kept = 2 * 25 * 1761 + 25 * 10 * (2 + 4 * 40 + 2 * 41 + 4 * 40 + 2)  # theta, gradient; a, mask, u a layer
    assert (many - few) / 90 < 4 * kept * 1.1 and many < 200e6


def test_recomputed_memory_hardly_grows_with_the_steps():
    rng = np.random.default_rng(0)
    loss = nets.cross_entropy(network := nets.convnet((28, 28, 1), 5, filters=16))
    batch = tasks.few_shot(rng, rng.random((6, 4, 28, 28, 1)), 1, 5, 2, 2)
    gradient = partial(maml.meta_gradient_recomputed, loss, network.init(rng), *batch, 0.1)
    assert peak_memory(gradient, 10) < 1.3 * peak_memory(gradient, 1)


RESIDENT = """
import sys, numpy as np, maml, tasks
from concurrent.futures import ThreadPoolExecutor
from functools import partial
maml.one_blas_thread()
flags = ["--task", "omniglot", "--ways", "20", "--steps", sys.argv[1]]
experiment = maml.experiment_of(maml.settings_of(maml.build_parser().parse_args(flags)))
rng = np.random.default_rng(0)
experiment.images = {"train": rng.integers(256, size=(40, 2, 28, 28, 1)).astype(np.uint8)}
sample, theta = experiment.sample("training", 1, 1), experiment.network.init(rng)
one, threads = partial(experiment.outer_gradient(), theta), ThreadPoolExecutor(2).map
for _ in range(30 // experiment.settings["steps"]):  # until both threads were at their peaks at once
    maml.mean_over_parcels(one, sample, rng, 4, experiment.parcel, threads)
print(*[line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_resident_memory_of_a_20_way_task_hardly_grows_with_the_steps():
    def peak(steps):
        words = [sys.executable, "-c", RESIDENT, str(steps)]
        return int(subprocess.run(words, capture_output=True, text=True, check=True, cwd=HERE).stdout)

    assert peak(10) < 1.3 * peak(1)


def test_diverged_tasks_are_counted_and_kept_in_the_mean():
    row = maml.summarize(np.array([1.0, 2.0, 3.0, 1e9]), 100)
    assert row["diverged"] == 1 and row["median"] == 2.5 and row["mean"] > 1e8 and row["tasks"] == 4
    row = maml.summarize(np.array([1.0, np.nan, np.inf], np.float32), 100)
    assert row["diverged"] == 2 and row["mean"] == row["ci95"] == np.inf
    row = maml.summarize(np.array([1.0, 3.0]), 100)
    assert row == {"mean": 2, "ci95": 1.96 / 2**0.5, "median": 2, "diverged": 0, "tasks": 2}


# Sinusoids -------------------------------------------------------------------------------------


def test_sinusoid_ranges_moments_and_seed():
    support, query = tasks.sinusoid(np.random.default_rng(0), 4000, 3, 2, oracle=True, dtype=np.float64)
    x, y = (np.concatenate(pair, axis=1) for pair in zip(support, query))
    assert x.shape == (4000, 5, 3) and y.shape == (4000, 5, 1)
    x, amplitude, phase = x[..., 0], x[..., 1], x[..., 2]
    assert np.allclose(y[..., 0], amplitude * np.sin(x - phase), rtol=1e-12)
    for values, low, high in ((x, -5, 5), (amplitude[:, 0], 0.1, 5), (phase[:, 0], 0, np.pi)):
        assert (
            low
            <= values.min()
            < low + 0.01 * (high - low)
            < high - 0.01 * (high - low)
            < values.max()
            <= high
        )
        spread = (high - low) / 12**0.5
        assert abs(values.mean() - (low + high) / 2) < 4 * spread / 4000**0.5
        assert abs(values.std() - spread) < 0.04 * spread
    again = tasks.sinusoid(np.random.default_rng(0), 4000, 3, 2)[0]
    assert again[0].dtype == np.float32 and np.array_equal(again[1], support[1].astype(np.float32))


# Images ----------------------------------------------------------------------------------------

PARTS = ("images_background", "images_evaluation")
SPLITS = ("train", "val", "test")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def leftovers(*folders):
    """Caches and temporary files in the folders and where caches go instead."""
    folders = [*folders, Path(os.environ["XDG_CACHE_HOME"])]
    return [file for folder in folders for file in folder.rglob("*") if file.suffix in (".npy", ".tmp")]


@contextmanager
def refused(message, kind=ValueError):
    """An error of one line that matches."""
    with pytest.raises(kind, match=message) as caught:
        yield
    assert "\n" not in str(caught.value)


# Drawn data


def glyph(seed, n=1):
    """n noisy drawings of one random character, bool [n, 105, 105], True where there is ink."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((7, 7)) < 0.3
    ink = np.tile(coarse.repeat(15, 0).repeat(15, 1), (n, 1, 1))
    return ink ^ (rng.random(ink.shape) < 0.02)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(ink, kind=0, header=(105, 105, 1, 0, 0, 0, 0)):
    rows = np.packbits(~ink, axis=-1)
    packed = zlib.compress(np.insert(rows, 0, kind, axis=1).tobytes())
    body = [chunk(b"IHDR", struct.pack(">2I5B", *header)), chunk(b"tIME", bytes(7))]
    body += [chunk(b"IDAT", packed[:40]), chunk(b"IDAT", packed[40:]), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@functools.cache
def drawn(characters=8, n=4):
    """{path: PNG} of a small Omniglot, and its ink {class: bool [n, 105, 105]}."""
    files, inks = {}, {}
    for c in range(characters):
        name = f"{PARTS[c % 2]}/Script{c // 4}/character{c:02d}"
        inks[name] = glyph(c, n)
        files |= {f"{name}/{c:04d}_{i:02d}.png": png(ink) for i, ink in enumerate(inks[name])}
    return files, inks


def unpacked(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def zipped(folder, files, kind=zipfile.ZIP_DEFLATED):
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        with zipfile.ZipFile(folder / f"{part}.zip", "w", kind) as archive:
            archive.writestr("__MACOSX/._0000_01.png", b"not an image")
            archive.writestr(f"{part}/../../escaped/a/b.png", b"not an image")
            for name in sorted(files, reverse=True):
                if name.startswith(part):
                    archive.writestr(name, files[name])
    return folder


def changed(key, data):
    """The small Omniglot with another content of its key-th image (None removes it), and that one's name."""
    files = dict(drawn()[0])
    name = sorted(files)[key]
    files |= {name: data}
    return {name: data for name, data in files.items() if data is not None}, name


def photographs(folder, counts=(4, 4, 4), sizes=((30, 40), (84, 84), (120, 90))):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for split in SPLITS:
        for c, count in enumerate(counts):
            (folder / split / f"n{c}").mkdir(parents=True)
            for i in range(count):
                colours = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
                picture = image.fromarray(colours).resize(sizes[i % len(sizes)], image.Resampling.NEAREST)
                picture.save(folder / split / f"n{c}" / f"{i}.{'JPEG' if i % 2 else 'png'}")
    return folder


def stamped(classes=6, each=5, size=6, channels=1):
    """Images whose corner pixel is their number, uint8 [classes, each, size, size, channels]."""
    images = np.zeros((classes, each, size, size, channels), np.uint8)
    images[:, :, 0, 0, 0] = np.arange(classes * each).reshape(classes, each)
    return images


def same(a, b):
    return all(np.array_equal(a[split], b[split]) for split in SPLITS)


# Sampling

sizes = st.tuples(*[st.integers(1, 4)] * 4)


@given(sizes, st.integers(0, 2), st.integers(0, 2), st.integers(0, 99), st.booleans())
def test_support_and_query_share_no_image_and_the_classes_of_a_task_differ(size, more, spare, seed, rotate):
    count, ways, shots, queries = size
    each = shots + queries + spare
    images = stamped(ways + more, each)
    support, query = tasks.few_shot(np.random.default_rng(seed), images, count, ways, shots, queries, rotate)
    corners = [x[..., [0, 0, -1, -1], [0, -1, 0, -1], 0].max(axis=-1) for x, _ in (support, query)]
    numbers = [np.rint(255 * corner).astype(int).reshape(count, ways, -1) for corner in corners]
    for task in np.concatenate(numbers, axis=-1):
        classes = task // each
        assert len(np.unique(task)) == task.size and len(np.unique(classes[:, 0])) == ways
        assert (classes == classes[:, :1]).all()
    for (x, y), n in ((support, shots), (query, queries)):
        assert x.shape == (count, ways * n, 6, 6, 1) and y.shape == (count, ways * n, ways)
        assert x.dtype == y.dtype == np.float32 and x.min() >= 0 and x.max() <= 1
        assert (y.argmax(-1) == np.arange(ways).repeat(n)).all() and (y.sum(-1) == 1).all()


def test_a_class_turns_alike_in_support_and_query_by_every_multiple_of_90_degrees():
    rng, images = np.random.default_rng(0), np.zeros((3, 4, 5, 5, 2), np.uint8)
    images[...] = rng.integers(0, 256, (3, 1, 5, 5, 2))  # a class's images are all the same one
    (x, _), (xq, _) = tasks.few_shot(rng, images, 200, 3, 1, 3, rotate=True, dtype=np.float64)
    assert (x.reshape(200, 3, 1, -1) == xq.reshape(200, 3, 3, -1)).all()
    turned = np.stack([np.rot90(images[:, 0] / 255, k, axes=(1, 2)) for k in range(4)], 1)
    found = (x[:, :, None, None] == turned).all((-3, -2, -1))  # [task, way, class, turn]
    assert (found.sum((2, 3)) == 1).all()
    assert (abs(found.sum((0, 1)) - 50) < 30).all()
    (x, _), _ = tasks.few_shot(rng, images, 20, 3, 1, 3)
    assert not (x[:, :, None, None] == turned[:, 1:]).all((-3, -2, -1)).any()


def test_every_class_and_image_is_as_likely_in_every_place():
    images = stamped(5, 4)
    (x, _), (xq, _) = tasks.few_shot(np.random.default_rng(0), images, 8000, 2, 1, 1)
    for numbers in (np.rint(255 * x[..., 0, 0, 0]).astype(int), np.rint(255 * xq[..., 0, 0, 0]).astype(int)):
        for place in numbers.T:
            counts = np.bincount(place, minlength=20)  # 400 expected, with a deviation of 19.5
            assert abs(counts - 400).max() < 100
            assert ((counts - 400) ** 2 / 400).sum() < 50  # chi-squared with 19 degrees: p = 1e-4


def test_floats_pass_unscaled_and_integers_become_fractions():
    images = np.random.default_rng(0).random((3, 2, 4, 4, 1))
    for dtype in (np.float32, np.float64):
        (x, y), _ = tasks.few_shot(np.random.default_rng(1), images, 5, 3, 1, 1, dtype=dtype)
        assert x.dtype == y.dtype == dtype and np.isin(x, images.astype(dtype)).all()
    full = np.full((3, 2, 4, 4, 1), 255, np.uint8)
    assert (tasks.few_shot(np.random.default_rng(1), full, 2, 3, 1, 1)[0][0] == 1).all()


@pytest.mark.parametrize(
    "images, change, message",
    [
        (stamped(), {"ways": 7}, "7-way task needs 7 classes"),
        (stamped(), {"shots": 4, "query_shots": 2}, "4 support and 2 query"),
        (stamped()[:, :, :4], {"rotate": True}, "square"),
        (stamped().astype(np.int64), {}, "int64.*expected uint8 or floats"),
        (stamped().astype(np.uint16), {}, "uint16.*expected uint8 or floats"),
        (stamped()[..., 0], {}, "expected uint8 or floats, .classes, each, height, width, channels"),
        (stamped(), {"ways": 0}, "ways, shots, query_shots = 2, 0, 1, 1"),
        (stamped(), {"shots": 0}, "= 2, 2, 0, 1; expected 1 or more"),
        (stamped(), {"tasks": 0}, "= 0, 2, 1, 1; expected 1 or more"),
    ],
)
def test_few_shot_says_what_is_lacking_and_takes_nothing_that_it_would_misread(images, change, message):
    asked = {"tasks": 2, "ways": 2, "shots": 1, "query_shots": 1} | change
    with refused(message):
        tasks.few_shot(np.random.default_rng(0), images, **asked)


def test_labelled_images_carry_their_class():
    images = np.arange(12, dtype=np.uint8).reshape(4, 3, 1, 1, 1) * 10
    x, y = tasks.labelled(np.random.default_rng(0), images, 50, 6)
    assert x.shape == (1, 50, 1, 1, 1) and x.dtype == y.dtype == np.float32
    assert np.array_equal(y[0].argmax(axis=-1), np.round(x.ravel() * 255 / 10).astype(int) // 3)
    with refused("4 training classes.*3 outputs"):
        tasks.labelled(np.random.default_rng(0), images, 5, 3)


def test_nearest_neighbour_by_hand():
    support = np.array([[[0.0, 0], [3, 0], [0, 3]]]), np.eye(3)[None]
    found = tasks.nearest(support, (np.array([[[2.0, 0], [1, 2], [0.1, 0]]]), None))
    assert found.argmax(axis=-1).tolist() == [[1, 2, 0]]


def test_a_large_mapped_file_does_not_stay_resident(tmp_path):
    np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint8, (30, 150, 84, 84, 3))[:] = 7
    images = tasks.Split(tmp_path / "a.npy", 0, 30)
    x = tasks.few_shot(np.random.default_rng(0), images, 2, 5, 1, 15)[0][0]
    assert np.allclose(x, 7 / 255)
    if sys.platform == "linux":
        assert str(tmp_path / "a.npy") not in Path("/proc/self/smaps").read_text()


# Omniglot


def test_zips_and_folders_hold_the_same_images_in_any_order(tmp_path):
    files = drawn()[0]
    a = tasks.load_omniglot(zipped(tmp_path / "zips", files))
    b = tasks.load_omniglot(unpacked(tmp_path / "folders", files))
    c = tasks.load_omniglot(zipped(tmp_path / "stored", files, zipfile.ZIP_STORED))
    assert same(a, b) and same(a, c)
    assert [len(a[split]) for split in a] == [5, 0, 3] and not (tmp_path / "escaped").exists()
    assert {x.dtype for x in a.values()} == {np.dtype(np.uint8)}
    sent = pickle.dumps(a["test"])
    assert len(sent) < 500 and np.array_equal(pickle.loads(sent), a["test"])


def test_pixels_are_area_averages_of_the_ink(tmp_path):
    files, inks = drawn()
    splits = tasks.load_omniglot(zipped(tmp_path, files))
    images = np.concatenate(list(splits.values()))
    assert images.shape == (8, 4, 28, 28, 1)
    names = [sorted(inks)[i] for i in np.random.default_rng(0).permutation(8)]
    for name, found in zip(names, images, strict=True):
        fine = inks[name].repeat(4, 1).repeat(4, 2)  # 420 = 28 * 15
        means = fine.reshape(-1, 28, 15, 28, 15).mean((2, 4))
        assert abs(found[..., 0] / 255 - means).max() <= 0.5001 / 255


def test_a_cache_that_is_not_what_was_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    images = np.ones((3, 20, 28, 28, 1), np.uint8)

    def build(harm):
        yield from images
        (part,) = tmp_path.rglob("*.tmp")
        with part.open("r+b") as file:
            file.seek(5000)
            file.write(bytes(harm))

    with pytest.raises(ValueError, match="not what was written"):
        tasks._cached(tmp_path, "a", ["key"], lambda: (images.shape, build(1)))
    file, classes = tasks._cached(tmp_path, "a", ["key"], lambda: (images.shape, build(0)))
    assert classes == 3 and (np.load(file) == images).all()


def test_the_cache_is_reused_and_made_again_when_it_must_be(tmp_path, monkeypatch):
    files, _ = drawn()
    first = {name: np.array(split) for name, split in tasks.load_omniglot(zipped(tmp_path, files)).items()}
    cache = tmp_path / "omniglot.npy"
    whole, calls = cache.read_bytes(), []
    decode = tasks._characters
    monkeypatch.setattr(tasks, "_characters", lambda parts: calls.append(1) or decode(parts))
    again = tasks.load_omniglot(tmp_path)
    assert not calls and same(first, again)
    for broken in (whole[:-1], whole[:-32], whole[:500], b"", whole[:40] + whole[60:], bytes(len(whole))):
        calls.clear()
        cache.unlink()
        cache.write_bytes(broken)
        assert same(first, tasks.load_omniglot(tmp_path)) and calls and cache.read_bytes() == whole
    calls.clear()
    other, _ = changed(0, png(glyph(99)[0]))
    assert not same(first, tasks.load_omniglot(zipped(tmp_path, other))) and calls
    assert leftovers(tmp_path) == [cache]


def test_a_changed_file_of_a_folder_makes_the_cache_again(tmp_path):
    first = tasks.load_omniglot(unpacked(tmp_path, drawn()[0]))
    first = {split: np.array(x) for split, x in first.items()}
    assert not same(first, tasks.load_omniglot(unpacked(tmp_path, changed(3, png(glyph(99)[0]))[0])))


def test_a_folder_that_cannot_be_written_is_cached_elsewhere(tmp_path, monkeypatch):
    folder = zipped(tmp_path / "data", drawn()[0])
    write = tasks._write

    def only_elsewhere(place, *rest):
        if place.parent == folder:
            raise PermissionError(13, "Permission denied")
        write(place, *rest)

    monkeypatch.setattr(tasks, "_write", only_elsewhere)
    first = tasks.load_omniglot(folder)
    assert leftovers(folder) == leftovers() and len(leftovers()) == 1
    monkeypatch.setattr(tasks, "_write", None)
    assert same(first, tasks.load_omniglot(folder))


def test_a_full_disk_leaves_no_cache_behind(tmp_path):
    folder = zipped(tmp_path, drawn()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with refused(r"omniglot.npy and .* cannot be written \(File too large\): free"):
            tasks.load_omniglot(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert leftovers(folder) == []


good = png(glyph(0)[0])


def png_of(pixels):
    return good[:33] + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data, reason",
    [
        (None, "3 images, where others have 4"),
        (b"", "not a 1-bit"),
        (good[:60], "broken|unpack"),
        (good[:-12], "unpack"),
        (good.replace(b"IDAT", b"IDAX", 1), "checksum"),
        (good[:70] + bytes([good[70] ^ 1]) + good[71:], "checksum"),
        (png(glyph(0)[0], header=(106, 105, 1, 0, 0, 0, 0)), "not a 1-bit"),
        (png(glyph(0)[0], header=(105, 105, 8, 0, 0, 0, 0)), "not a 1-bit"),
        (png(glyph(0)[0][:104]), "pixel data"),
        (png(np.zeros((106, 105), bool)), "pixel data"),
        (png(glyph(0)[0], kind=1), "filtered pixel data"),
        (png_of(zlib.compress(bytes(10**7))), "pixel data"),
        (png_of(zlib.compress(b"\5" * 1575)), "pixel data"),
        (png_of(zlib.compress(bytes(1575))[:-4]), "pixel data"),
        (png_of(b"no zlib"), "Error -3"),
        (bytes(1 << 17), "more than|not a 1-bit"),
    ],
)
@pytest.mark.parametrize("layout", [zipped, unpacked])
def test_a_broken_or_missing_image_is_named(tmp_path, layout, data, reason):
    files, name = changed(5, data)
    where = f"{name}: does not decode" if data is not None else f"{name.rpartition('/')[0]}:"
    with refused(f"{where} .*({reason}).*fetch"):
        tasks.load_omniglot(layout(tmp_path, files))
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "harm, line",
    [
        (lambda _: None, "neither images_evaluation.zip nor images_evaluation/.*fetch https"),
        (lambda _: b"PK no", "images_evaluation.zip: no whole zip file.*fetch https"),
        (lambda _: b"", "images_evaluation.zip: no whole zip file.*fetch https"),
        (lambda data: data[:-3000], "images_evaluation.zip: no whole zip file.*fetch https"),
        (lambda data: data.replace(b"_evaluation", b"_background"), "holds no images_eval.*fetch https"),
        (lambda data: data.replace(b"IEND", b"IENX"), "png: does not decode .*CRC.*fetch the archive"),
    ],
)
def test_a_missing_or_broken_zip_is_named(tmp_path, harm, line):
    file = zipped(tmp_path, drawn()[0], zipfile.ZIP_STORED) / "images_evaluation.zip"
    data = harm(file.read_bytes())
    file.unlink() if data is None else file.write_bytes(data)
    with refused(line):
        tasks.load_omniglot(tmp_path)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("path", ["nowhere", "file"])
@pytest.mark.parametrize("load", [tasks.load_omniglot, tasks.load_miniimagenet])
def test_a_path_that_is_no_data_folder_is_named(tmp_path, load, path):
    (tmp_path / "file").write_bytes(b"")
    with refused(f"{path}.*(neither|should be a folder)"):
        load(tmp_path / path)


if "MAML_OMNIGLOT" in os.environ:  # a folder of the real data, which no test requires

    def test_the_real_omniglot(tmp_path):
        for part in PARTS:
            (tmp_path / f"{part}.zip").symlink_to(Path(os.environ["MAML_OMNIGLOT"], f"{part}.zip").resolve())
        tasks.load_omniglot(tmp_path)
        start = time.perf_counter()
        splits = tasks.load_omniglot(tmp_path)
        assert time.perf_counter() - start < 0.5
        assert [x.shape for x in splits.values()] == [(n, 20, 28, 28, 1) for n in (1100, 100, 423)]
        assert all(0.07 < x.mean() / 255 < 0.09 for x in splits.values())


# The download


class Server(http.server.BaseHTTPRequestHandler):
    """/how/name answers with a zip in one of four ways."""

    def do_GET(self):
        how, body = self.path.split("/")[1], b"zip" * 30_000
        self.send_response(404 if how == "missing" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if how == "stall":
            self.wfile.write(body[:1000])
            self.wfile.flush()
            self.server.done.wait(5)
        elif how != "missing":
            self.wfile.write(body[:-7] if how == "short" else body.replace(b"zip", b"zap", how == "wrong"))

    def log_message(self, *_):
        pass


@pytest.fixture
def url():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.done = threading.Event()
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.done.set()
        server.shutdown()


DIGESTS = {"a.zip": md5(b"zip" * 30_000).hexdigest(), "b.zip": md5(b"zip" * 30_000).hexdigest()}


def test_a_download_is_whole_and_shown_and_not_repeated(folder, url, capsys):
    unpacked(folder, {"new/a.zip": b"my own"})
    tasks.download_omniglot("new", f"{url}/good", DIGESTS)
    assert Path("new/a.zip").read_bytes() == b"my own"
    assert Path("new/b.zip").read_bytes() == b"zip" * 30_000
    assert "b.zip: 0.1 MB\n" in capsys.readouterr().err
    tasks.download_omniglot("new", "http://127.0.0.1:1", DIGESTS)
    assert sorted(os.listdir("new")) == ["a.zip", "b.zip"]


@pytest.mark.parametrize(
    "how, reason",
    [("stall", "timed out"), ("short", "MD5"), ("wrong", "MD5"), ("missing", "404"), (None, "refused")],
)
def test_a_failed_download_says_what_to_fetch_and_leaves_nothing(tmp_path, url, how, reason):
    address = f"{url}/{how}" if how else "http://127.0.0.1:1"
    with refused(f"cannot fetch {address}/a.zip .*{reason}.*: fetch it and put it into {tmp_path}"):
        tasks.download_omniglot(tmp_path, address, DIGESTS, timeout=0.2)
    assert os.listdir(tmp_path) == []


def test_a_download_without_end_is_cut_off(capsys):
    with refused("more than 100 bytes"):
        tasks._copy(io.BytesIO(bytes(1000)), io.BytesIO(), "a.zip", limit=100)


def test_the_command_fetches_what_its_own_folder_lacks_and_tries_again(folder, monkeypatch, capsys):
    def fetch(path):
        calls.append(path)
        if len(calls) == 1:
            Path(path).mkdir(parents=True)
            raise ValueError("no network")
        zipped(Path(path), drawn(40, 3)[0])

    calls = []
    monkeypatch.setattr(tasks, "download_omniglot", fetch)
    words = "--task omniglot --ways 2 --net mlp --baseline nearest --eval-tasks 2".split()
    assert command(*words) == 2 and capsys.readouterr().err.startswith("maml.py: no network; or name")
    assert command(*words) == 0 and calls == ["data/omniglot"] * 2
    assert command(*words, "--data", "nowhere") == 2 and len(calls) == 2


# MiniImagenet


def test_photographs_are_resized_as_pillow_does_it(tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    photographs(tmp_path)
    (tmp_path / "val" / "n0" / "._0.JPEG").write_bytes(b"left by another system")
    splits = tasks.load_miniimagenet(tmp_path)
    assert "3 of 3 classes\n" in capsys.readouterr().err
    for split, images in splits.items():
        assert images.shape == (3, 4, 84, 84, 3) and images.dtype == np.uint8
        for c in range(3):
            for i, file in enumerate(sorted((tmp_path / split / f"n{c}").glob("[!.]*"))):
                expected = image.open(file).convert("RGB").resize((84, 84), image.Resampling.LANCZOS)
                assert (images[c, i] == np.asarray(expected)).all()
    assert {file.name for file in leftovers(tmp_path)} == {f"miniimagenet-{split}.npy" for split in SPLITS}
    assert same(splits, tasks.load_miniimagenet(tmp_path)) and capsys.readouterr().err == ""
    for c in range(3):
        (tmp_path / "val" / f"n{c}" / "9.png").write_bytes((tmp_path / "val" / "n0" / "0.png").read_bytes())
    assert tasks.load_miniimagenet(tmp_path)["val"].shape[:2] == (3, 5), "an added one makes the cache again"


def test_photographs_of_any_mode_become_rgb_and_keep_their_greys(tmp_path):
    image = pytest.importorskip("PIL.Image")
    grey = np.linspace(0, 65535, 84 * 84).reshape(84, 84).astype(np.uint16)
    for split in SPLITS:
        (tmp_path / split / "a").mkdir(parents=True)
        for mode in ("L", "P", "RGBA", "1", "LA"):
            image.new(mode, (9, 9)).save(tmp_path / split / "a" / f"{mode}.png")
        image.new("CMYK", (9, 9)).save(tmp_path / split / "a" / "cmyk.jpg")
        image.fromarray(grey).save(tmp_path / split / "a" / "0.png")
    found = tasks.load_miniimagenet(tmp_path)["val"]
    assert found.shape == (1, 7, 84, 84, 3) and (found[0, 0] == (grey >> 8)[..., None]).all()


def test_classes_are_cut_to_the_smallest_or_it_is_named(tmp_path, capsys):
    photographs(tmp_path, counts=(4, 2, 5))
    assert tasks.load_miniimagenet(tmp_path, each=2)["test"].shape[:2] == (3, 2)
    assert "every class is cut to the 2 images of n1" in capsys.readouterr().err
    with refused("train/n1: 2 images, and a task needs 3: add some, or remove it"):
        tasks.load_miniimagenet(tmp_path, each=3)


def huge(size=(9000, 9000)):
    header = chunk(b"IHDR", struct.pack(">2I5B", *size, 8, 2, 0, 0, 0))
    return good[:8] + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "name, harm, line",
    [
        ("train/n1/1.JPEG", lambda file: file.write_bytes(b""), "1.JPEG: does not decode .*: replace or"),
        ("train/n1/1.JPEG", lambda file: file.write_bytes(b"GIF89a"), "1.JPEG: does not decode .*: replace"),
        ("train/n1/1.JPEG", lambda file: os.truncate(file, 400), "1.JPEG: does not decode .*: replace or"),
        ("train/n1/0.png", lambda file: file.write_bytes(huge()), r"0.png: does not .* \(9000x9000 pixels\)"),
        ("val/empty", lambda file: file.mkdir(), "val/empty: 0 images"),
        ("test", shutil.rmtree, "test: No such file or directory; it should be a folder of"),
        ("test", lambda file: [shutil.rmtree(part) for part in file.iterdir()], "test: empty; it should"),
    ],
)
def test_what_is_wrong_with_the_photographs_is_named(tmp_path, name, harm, line):
    folder = photographs(tmp_path)
    harm(folder / name)
    with refused(line):
        tasks.load_miniimagenet(folder)
    others = {f"miniimagenet-{split}.npy" for split in SPLITS if not name.startswith(split)}
    assert {file.name for file in leftovers(folder)} <= others


# Hostile data

FUZZ = int(os.environ.get("MAML_FUZZ", 40))  # MAML_FUZZ=10000 python -m pytest -k no_damage
HOSTILE = {
    "a directory": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to nothing": lambda path: path.symlink_to(path.parent / "nothing"),
    "a link to no end": lambda path: path.symlink_to("/dev/zero"),
    "a link to a text": lambda path: path.symlink_to(HERE / "README.md"),
}
ENTRIES = {
    "absolute": ("/escaped/a/b/c.png", b"no image"),
    "above": ("../../escaped/a/b/c.png", b"no image"),
    "inside and above": ("images_background/../../escaped/c.png", b"no image"),
    "bomb": ("images_background/a/b/c.png", bytes(10**7)),
    "long": (f"images_background/a/b/{'c' * 60_000}.png", b"no image"),
    "line": ("images_background/a/b\n/c.png", b"no image"),
}


@contextmanager
def one_line_at_most(*errors):
    try:
        yield
    except errors as error:
        assert "\n" not in str(error) and len(str(error)) < 600


def damaged(data, good):
    """Bytes cut, flipped, overwritten, inserted, or others altogether."""
    at = data.draw(st.integers(0, 1 << 30)) % len(good)
    piece = data.draw(st.binary(max_size=40))
    return {
        "cut": good[:at],
        "flip": good[:at] + bytes([good[at] ^ (1 << len(piece) % 8)]) + good[at + 1 :],
        "overwrite": good[:at] + piece + good[at + len(piece) :],
        "insert": good[:at] + piece + good[at:],
        "random": piece,
    }[data.draw(st.sampled_from(["cut", "flip", "overwrite", "insert", "random"]))]


@contextmanager
def harmed(data, path):
    """In place of a file damaged bytes, or what is no file of data; in a zip, hostile entries."""
    good, harms = path.read_bytes(), ["bytes"] * 6 + [*HOSTILE] + [*ENTRIES] * (path.suffix == ".zip")
    harm = data.draw(st.sampled_from(harms))
    bad = damaged(data, good)
    path.unlink()
    if harm in HOSTILE:
        HOSTILE[harm](path)
    else:
        path.write_bytes(bad if harm == "bytes" else good)
    if harm in ENTRIES:
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(*ENTRIES[harm])
    try:
        yield
    finally:
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(good)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder beside which there is nothing."""
    return tmp_path_factory.mktemp("alone")


@pytest.mark.parametrize("layout", [zipped, unpacked, photographs])
@settings(max_examples=FUZZ)
@given(data=st.data())
def test_no_damage_to_images_is_more_than_one_line(alone, layout, data):
    folder, mini = alone / layout.__name__, layout is photographs
    load, size = (tasks.load_miniimagenet, (84, 84, 3)) if mini else (tasks.load_omniglot, (28, 28, 1))
    if not folder.exists():
        load(layout(folder, (2, 2) if mini else drawn()[0]))
    caches = [f"miniimagenet-{split}.npy" for split in SPLITS] if mini else ["omniglot.npy"]
    names = {
        zipped: [f"{part}.zip" for part in PARTS],
        unpacked: sorted(drawn()[0])[:9:4],
        photographs: ["train/n0/0.png", "val/n1/1.JPEG"],
    }[layout]
    with harmed(data, folder / data.draw(st.sampled_from([*names, *caches]))):
        with one_line_at_most(ValueError, OSError):
            for images in load(folder).values():
                assert images.dtype == np.uint8 and images.shape[2:] == size
                assert np.asarray(images).sum() >= 0
    assert not [file for file in alone.rglob("*") if "escaped" in file.name]
    assert {file.name for file in leftovers(folder) if folder in file.parents} == {*caches}


# Arguments -------------------------------------------------------------------------------------


def test_wrong_shapes_dtypes_and_values_are_named():
    p = problem()
    theta, (x, y), _, alpha, _ = p.args
    size, (narrow,) = p.network.size, single(theta)
    adapt, wide = partial(maml.adapt, p.loss), lambda *data: p.loss(*data).astype(np.float64)
    for call, message in [
        (lambda: p.loss(theta[1:], x, y), rf"\({size - 1},\).*\({size},\)"),
        (lambda: p.loss.grad(theta, x[..., :1], y), r"\(2, 3, 1\).*tasks, examples"),
        (lambda: p.loss.grad(p.each[:1], x, y), r"\(1, 13\).*\(2, 3, 2\)"),
        (lambda: p.loss(theta, x, y[:, :2]), r"\(2, 2, 1\).*\(2, 3, 1\)"),
        (lambda: p.loss.grad(theta, x, y[..., 0]), r"\(2, 3\).*\(2, 3, 1\)"),
        (lambda: p.loss(narrow, x, y), "float64.*float32"),
        (lambda: p.loss.grad(theta, x, y.astype(int)), "int64.*float64"),
        (lambda: p.loss.expand(theta, x, y)[2](p.v[:, 1:]), r"\(2, 12\).*\(2, 13\)"),
        (lambda: adapt(theta.astype(int), p.support, 0.1, 1), "int64"),
        (lambda: adapt(theta.tolist(), p.support, 0.1, 1), "theta is list"),
        (lambda: adapt(theta, (x, y[:1]), 0.1, 1), "different numbers of tasks"),
        (lambda: adapt(theta, (x[:0], y[:0]), 0.1, 1), "1 task and 1 example or more"),
        (lambda: adapt(theta, (x[:, :0], y[:, :0]), 0.1, 1), "1 task and 1 example or more"),
        (lambda: adapt(theta, p.support, theta[1:], 1), r"\(12,\).*\(13,\)"),
        (lambda: adapt(theta, p.support, narrow, 1), "float32.*float64"),
        (lambda: adapt(theta, p.support, 0.1, -1), "steps = -1"),
        (lambda: adapt(theta, p.support, 0.1, 2.0), "steps = 2.0"),
        (lambda: maml.adapt(lambda *d: p.loss(*d).sum(), theta, p.support, 0.1, 1), "one value a task"),
        (lambda: maml.adapt(wide, narrow, single(x, y), 0.1, 1), "float64.*one value a task, float32"),
        (lambda: maml.meta_gradient(p.loss, *p.args, order=3), "order = 3; expected 1 or 2"),
        (lambda: maml.meta_gradient(p.loss, *p.args, order=0), "order = 0; expected 1 or 2"),
        (lambda: maml.meta_gradient_recomputed(p.loss, *p.args, kept=-1), "kept = -1"),
        (lambda: nets.convnet((8, 8, 3), 2, pool=True), "16x16 pixels or more"),
        (lambda: tasks.sinusoid(np.random.default_rng(0), 0, 1, 1), "0, 1, 1"),
    ]:
        with refused(message):
            call()


# The command -----------------------------------------------------------------------------------

QUICK = ["--task", "sinusoid", "--iterations", "40", "--meta-batch", "3", "--eval-tasks", "8"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*words):
    return maml.main([str(word) for word in words])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def arrays(path):
    with np.load(path) as file:
        return {key: file[key] for key in file.files}


def test_command_prints_the_table_and_writes_log_and_results(folder, capsys):
    assert command(*QUICK, "--iterations", 600, "--log", "log.csv", "--results", "results.csv") == 0
    out = capsys.readouterr().out
    assert "K = 5" in out and "K = 20" in out and "0.67 at K = 5" in out
    with open("results.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == "task method shots step metric mean ci95 median diverged tasks".split()
    assert [(r["shots"], r["step"]) for r in rows] == [
        (str(k), str(s)) for k in (5, 10, 20) for s in range(11)
    ]
    assert all(f"{float(r['mean']):.3f} ± {float(r['ci95']):.3f}" in out for r in rows)
    log = Path("log.csv").read_text().splitlines()
    assert log[0] == "iteration,loss,before,after" and [row.split(",")[0] for row in log[1:]] == [
        "500",
        "600",
    ]


@pytest.mark.parametrize("kind", [*maml.METHODS, *maml.BASELINES[:3]])
def test_every_method_and_baseline_runs_saves_and_evaluates_alike(folder, capsys, kind):
    flag = "--baseline" if kind in maml.BASELINES else "--method"
    assert command(*QUICK, flag, kind, "--save", "a.npz") == 0
    table = capsys.readouterr().out
    assert f"sinusoid, {kind}, seed 0" in table
    assert command("--evaluate", "a.npz", "--eval-tasks", 8) == 0
    assert capsys.readouterr().out == table


@pytest.mark.parametrize("method", ["maml", "meta-sgd"])
def test_resume_ends_in_the_bits_of_an_unbroken_run(folder, monkeypatch, method):
    monkeypatch.setattr(maml.Experiment, "save_every", 15)
    base = [*QUICK[:2], "--meta-batch", 3, "--eval-tasks", 4, "--eval-shots", 2, "--method", method]
    assert command(*base, "--iterations", 40, "--save", "whole.npz", "--log", "whole.csv") == 0
    assert command(*base, "--iterations", 25, "--save", "part.npz") == 0
    assert command("--resume", "part.npz", "--iterations", 40, "--log", "part.csv") == 0
    whole, resumed = arrays("whole.npz"), arrays("part.npz")
    assert whole.keys() == resumed.keys()
    assert all(np.array_equal(whole[key], resumed[key]) for key in whole)
    assert Path("whole.csv").read_text() == Path("part.csv").read_text()


def test_same_seed_same_bits_and_another_seed_others(folder):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        command(*QUICK, "--seed", seed, "--save", f"{name}.npz")
    a, b, c = (arrays(f"{name}.npz")["theta"] for name in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_a_log_goes_on_after_the_checkpoint_it_resumes(folder, monkeypatch):
    monkeypatch.setattr(maml.Experiment, "log_every", 10)
    command(*QUICK, "--iterations", 60, "--log", "whole.csv")
    command(*QUICK, "--iterations", 30, "--save", "a.npz", "--log", "a.csv")
    with open("a.csv", "a") as file:
        file.write("40,9,9,9\n50,9,")
    command("--resume", "a.npz", "--iterations", 60, "--log", "a.csv")
    assert Path("a.csv").read_text() == Path("whole.csv").read_text()


def test_ctrl_c_after_the_checkpoint_of_an_iteration_is_due_is_saved_with_the_next(
    folder, monkeypatch, capsys
):
    show = maml.Progress.show

    def interrupting(progress, iteration, *rest):
        show(progress, iteration, *rest)
        if iteration == 7:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(maml.Progress, "show", interrupting)
    assert command(*QUICK, "--save", "a.npz") == 130
    assert "interrupted at iteration 8: saved" in capsys.readouterr().err
    assert int(arrays("a.npz")["iteration"]) == 8


def test_ctrl_c_saves_says_how_to_resume_and_exits_130(folder, capsys):
    process = subprocess.Popen(
        [sys.executable, HERE / "maml.py", "--task", "sinusoid", "--save", "a.npz"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not (folder / "a.npz").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    assert process.returncode == 130 and "--resume a.npz" in stderr and "Traceback" not in stderr
    iteration = int(arrays("a.npz")["iteration"])
    assert iteration == int(re.search(r"iteration (\d+)", stderr)[1])
    command("--evaluate", "a.npz", "--eval-tasks", 2)
    assert f" {iteration} meta-iterations" in capsys.readouterr().out


def interrupted(module, words, until):
    """The command as a process, sent Ctrl-C as soon as its stderr says `until`: -> exit code, stderr."""
    words = [sys.executable, HERE / f"{module}.py", *map(str, words)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    seen = ""
    try:
        while until not in seen:
            line = process.stderr.readline()
            assert line, seen
            seen += line
        os.killpg(process.pid, signal.SIGINT)
        seen += process.communicate(timeout=60)[1]
    finally:
        process.kill()
    return process.returncode, seen


def test_ctrl_c_during_evaluation_says_what_is_lost(folder):
    command(*QUICK, "--save", "a.npz")
    code, seen = interrupted("maml", ["--evaluate", "a.npz", "--eval-tasks", 300_000], "evaluating")
    assert code == 130 and "no table; --evaluate makes it again" in seen and "Traceback" not in seen


def test_ctrl_c_while_workers_start_says_what_happens(folder, glyphs):
    """The whole group gets it, as from a terminal: also those that are only starting."""
    words = [*GLYPHS, "--data", glyphs, "--workers", 2, "--iterations", 10**6, "--save", "a.npz"]
    code, seen = interrupted("maml", words, "characters")
    assert code == 130 and "Traceback" not in seen and "maml.py: interrupted" in seen
    assert ("--resume a.npz" in seen) == os.path.exists("a.npz")


def test_a_diverging_run_stops_names_the_iteration_and_keeps_the_checkpoint(folder, capsys, monkeypatch):
    monkeypatch.setattr(maml.Experiment, "save_every", 1)
    assert command(*QUICK, "--beta", 100, "--save", "a.npz") == 1
    message = capsys.readouterr().err.splitlines()[-1]
    stopped = int(re.search(r"at iteration (\d+).*--alpha or --beta.*a.npz", message)[1])
    saved = arrays("a.npz")
    assert int(saved["iteration"]) == stopped - 1 and np.isfinite(saved["theta"]).all()


def test_evaluation_may_fine_tune_at_another_rate_and_survives_divergence(folder, capsys):
    command(*QUICK, "--baseline", "pretrained", "--save", "a.npz")
    with np.errstate(all="raise"):
        assert command("--evaluate", "a.npz", "--alpha", 1e6, "--eval-tasks", 8, "--eval-steps", 9) == 0
    assert "median inf, 8 of 8 diverged" in capsys.readouterr().out


def checkpoint(path, **changes):
    """A good checkpoint with some of its arrays replaced."""
    command(*QUICK, "--save", path)
    saved = arrays(path)
    change = {**json.loads(str(saved["settings"])), **changes.pop("settings", {})}
    np.savez(path, **{**saved, "settings": json.dumps(change), **changes})


BAD = [
    ("--task nothing", "nothing"),
    ("--task sinusoid --method nothing", "nothing"),
    ("--task sinusoid --nothing", "--nothing"),
    ("", "--task is missing"),
    *[
        (f"--task sinusoid --{flag} {value}", f"--{flag}.*{value}")
        for flag in "shots query steps meta-batch iterations eval-tasks eval-steps eval-shots".split()
        for value in ("0", "-1", "1.5", "many")
    ],
    *[
        (f"--task sinusoid --{flag}={value}", f"--{flag}.*{value}")
        for flag in ("alpha", "beta")
        for value in ("-0.1", "inf", "nan", "x")
    ],
    ("--task sinusoid --seed -1", "--seed"),
    ("--task sinusoid --dtype float16", "float16"),
    ("--task sinusoid --method maml --baseline random", "not allowed with"),
    ("--evaluate good.npz --resume good.npz", "--resume does not go"),
    ("--evaluate good.npz --save b.npz", "--save does not go"),
    ("--evaluate good.npz --iterations 5", "--iterations does not go"),
    ("--evaluate good.npz --method anil", "trained with method maml, not anil"),
    ("--resume good.npz --alpha 0.5", "trained with alpha 0.01, not 0.5"),
    ("--resume good.npz --iterations 10", "at iteration 40"),
    ("--task sinusoid --save nowhere/a.npz", "nowhere/a.npz"),
    ("--task sinusoid --save afile/a.npz", "afile/a.npz"),
    ("--task sinusoid --save .", "is a folder"),
    ("--task sinusoid --log nowhere/a.csv", "nowhere/a.csv"),
    ("--task sinusoid --results nowhere/a.csv", "nowhere/a.csv"),
    ("--evaluate missing.npz", "no such file"),
    ("--evaluate afile", "not a whole checkpoint"),
    ("--evaluate empty", "not a whole checkpoint"),
    ("--evaluate cut.npz", "not a whole checkpoint"),
    ("--resume cut.npz", "not a whole checkpoint"),
    ("--evaluate other.npz", "not a whole checkpoint"),
    ("--evaluate pickled.npz", "not a whole checkpoint"),
    ("--evaluate task.npz", "invalid choice: 'omelette'"),
    ("--evaluate shape.npz", r"theta is float32 \(5,\); expected float32 \(1761,\)"),
    ("--evaluate dtype.npz", "theta is float64.*expected float32"),
    ("--evaluate extra.npz", "not a whole checkpoint"),
    ("--evaluate endless.npz", "not a whole checkpoint"),
    ("--evaluate negative.npz", "its iteration is -1"),
    ("--evaluate bomb.npz", "it is compressed"),
    ("--resume good.npz --iterations 50 --log afile", "not the file of this run"),
    ("--resume good.npz --iterations 50 --log empty", "not the file of this run"),
    ("--resume nowhere/a.npz", "nowhere/a.npz"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a good checkpoint and many bad ones."""
    folder = tmp_path_factory.mktemp("files")
    good = str(folder / "good.npz")
    checkpoint(good)
    (folder / "afile").write_text("hello")
    (folder / "empty").write_bytes(b"")
    (folder / "cut.npz").write_bytes((folder / "good.npz").read_bytes()[:-300])
    np.savez(folder / "other.npz", weights=np.ones(3))
    np.savez(folder / "pickled.npz", theta=np.array([{}], object), settings="{}")
    checkpoint(str(folder / "task.npz"), settings={"task": "omelette"})
    checkpoint(str(folder / "extra.npz"), settings={"help": ""})
    checkpoint(str(folder / "endless.npz"), iteration=np.array(np.inf))
    checkpoint(str(folder / "negative.npz"), iteration=np.array(-1))
    np.savez_compressed(folder / "bomb.npz", **arrays(good) | {"theta": np.zeros(10**7, np.float32)})
    checkpoint(str(folder / "shape.npz"), theta=np.ones(5, np.float32))
    checkpoint(str(folder / "dtype.npz"), theta=np.ones(1761))
    return folder


@pytest.mark.parametrize("words, message", BAD)
def test_bad_use_is_one_line_and_exit_code_2_and_changes_nothing(files, monkeypatch, capsys, words, message):
    monkeypatch.chdir(files)
    monkeypatch.setattr(maml, "train", lambda *_: pytest.fail("training began"))
    before = contents(files)
    assert command(*shlex.split(words)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err
    assert re.search(message, err)
    assert contents(files) == before


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that not even root may write to")
def test_a_read_only_folder_is_found_out_before_training(capsys, monkeypatch):
    monkeypatch.setattr(maml, "train", lambda *_: pytest.fail("training began"))
    assert command("--task", "sinusoid", "--save", "/proc/self/a.npz") == 2
    assert "/proc/self/a.npz: cannot write there" in capsys.readouterr().err


def test_help_gives_every_flag_with_its_default():
    words = [sys.executable, HERE / "maml.py", "--help"]
    out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    numbers = "shots query steps alpha beta meta-batch iterations seed dtype method"
    numbers += " eval-tasks eval-steps eval-shots"
    files = "task baseline save resume evaluate log results plot"
    for flag in (numbers + " " + files).split():
        assert f"--{flag} " in out
    helps = {action.option_strings[-1][2:]: action.help for action in maml.build_parser()._actions}
    assert all("default: " in helps[flag] for flag in numbers.split())


def test_plot_draws_a_picture(folder):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    assert (
        command(*QUICK, "--save", "a.npz")
        == command(*QUICK, "--baseline", "pretrained", "--save", "b.npz")
        == 0
    )
    assert command("--evaluate", "a.npz", "b.npz", "--eval-tasks", 8, "--plot", "a.png") == 0
    assert Path("a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert command("--evaluate", "a.npz", "--plot", "a.xyz") == 2


def test_short_training_learns_to_adapt(folder):
    """After 1,500 meta-iterations one step leaves 0.9; first order 1.4, and no adaptation at least 3.0."""
    after = {}
    for method in ("maml", "fomaml"):
        words = ["--iterations", 1500, "--beta", 0.003, "--eval-shots", 10, "--results", "a.csv"]
        assert command("--task", "sinusoid", "--method", method, *words) == 0
        with open("a.csv") as file:
            after[method] = [float(row["mean"]) for row in csv.DictReader(file)]
    assert after["maml"][0] > 2.5 and after["maml"][1] < 1.1
    assert after["fomaml"][1] > 1.2


# The command on images --------------------------------------------------------------------------

GLYPHS = ["--task", "omniglot", "--filters", 8, "--meta-batch", 5, "--eval-tasks", 40]


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory):
    """A folder in Omniglot's layout: 100 drawn characters of four images, so 67, 6 and 27 classes."""
    folder = tmp_path_factory.mktemp("glyphs")
    unpacked(folder, drawn(100, 4)[0])
    return folder


def test_short_training_on_drawn_glyphs_beats_chance_by_far(folder, glyphs, capsys):
    """5-way, 1-shot: chance is 20 %, the stated bar 70 %."""
    words = ["--data", glyphs, "--iterations", 60, "--save", "a.npz", "--log", "a.csv", "--results", "r.csv"]
    assert command(*GLYPHS, *words) == 0
    table = capsys.readouterr().out
    assert "omniglot, 5-way, conv, maml" in table and "98.7 ± 0.4 at K = 1" in table
    with open("r.csv") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["metric"] == "accuracy" and len(rows) == 11
    assert float(rows[0]["mean"]) < 0.35 and float(rows[3]["mean"]) > 0.7
    assert "a.best.npz" in contents(folder)
    assert command("--evaluate", "a.best.npz", "--data", glyphs, "--eval-tasks", 40) == 0
    assert capsys.readouterr().out == table


@pytest.mark.parametrize("extra", [["--net", "mlp"], ["--first-order"], ["--method", "anil"]])
def test_images_resume_to_the_bits_of_an_unbroken_run(folder, glyphs, monkeypatch, extra):
    """Chunks go to threads, and their results are added in order."""
    monkeypatch.setattr(maml.Experiment, "log_every", 2)
    base = [*GLYPHS, "--data", glyphs, "--ways", 3, "--eval-steps", 1, "--save"]
    assert command(*base, "whole.npz", "--iterations", 6, *extra) == 0
    assert command(*base, "part.npz", "--iterations", 4, *extra) == 0
    assert command("--resume", "part.npz", "--data", glyphs, "--iterations", 6, "--eval-steps", 1) == 0
    for kind in ("", ".best"):
        whole, resumed = arrays(f"whole{kind}.npz"), arrays(f"part{kind}.npz")
        assert whole.keys() == resumed.keys()
        assert all(np.array_equal(whole[key], resumed[key]) for key in whole if key != "settings")


def test_images_baselines_run_resume_and_share_the_test_tasks(folder, glyphs, capsys):
    """Nearest neighbour beats chance on drawn glyphs; the pretrained body starts with a zero last layer."""
    words = [*GLYPHS, "--data", glyphs, "--eval-steps", 2, "--results", "r.csv"]
    assert command(*words, "--baseline", "nearest") == 0
    with open("r.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1 and float(rows[0]["mean"]) > 0.3
    assert command(*words, "--baseline", "pretrained", "--iterations", 2, "--save", "a.npz") == 0
    assert command("--resume", "a.npz", "--iterations", 3, "--data", glyphs, "--eval-steps", 2) == 0
    assert "omniglot, 5-way, conv, pretrained" in capsys.readouterr().out
    assert command(*words, "--baseline", "pretrained", "--iterations", 3, "--save", "b.npz") == 0
    assert np.array_equal(arrays("a.npz")["theta"], arrays("b.npz")["theta"])


def test_a_query_alone_is_normalised_with_the_support_set_and_nothing_else():
    network, rng = nets.convnet((8, 8, 1), 3, filters=4), np.random.default_rng(0)
    theta = network.init(rng, np.float64)
    support, queries = rng.uniform(size=(2, 2, 3, 8, 8, 1))
    out = maml.alone(network, np.stack([theta, theta]), (queries, support))
    for i in range(3):
        one = np.concatenate([support, queries[:, i : i + 1]], axis=1)
        assert error(out[:, i], network.apply(theta, one)[:, -1]) < 1e-12
    together = maml.together(network, np.stack([theta, theta]), queries)
    assert error(together, network.apply(theta, queries)) < 1e-12 and error(out, together) > 1e-3


def test_ones_own_images_are_classified(folder, glyphs, capsys):
    image = pytest.importorskip("PIL.Image", reason="needs pillow")
    words = [*GLYPHS, "--data", glyphs, "--ways", 2, "--iterations", 30, "--save", "a.npz", "--results", "r"]
    assert command(*words, "--eval-queries", "alone") == 0
    assert float(Path("r").read_text().splitlines()[4].split(",")[5]) > 0.7
    for name in ("bar", "ring", "query"):
        Path("own", name).mkdir(parents=True)
    bar, ring = np.full((2, 60, 50), 255, np.uint8)
    bar[:, 20:28], ring[10:50, 10:40], ring[18:42, 18:32] = 0, 0, 255
    for name, pixels in {"bar/1.png": bar, "ring/1.png": ring, "2.jpg": bar, "query/3.png": ring}.items():
        image.fromarray(pixels).save(Path("own", name))
    capsys.readouterr()
    assert command("--evaluate", "a.npz", "--adapt", "own") == 0
    head, *lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head == ["class", "probability", "query"]
    assert [(label, file) for label, _, file in lines] == [("bar", "own/2.jpg"), ("ring", "own/query/3.png")]
    assert all(float(probability) > 0.6 for _, probability, _ in lines)
    Path("own/third").mkdir()
    for use, message in {
        "--adapt own": "needs a trained model",
        "--evaluate a.npz --adapt own": "own/third: no JPEG or PNG",
        "--evaluate a.npz --adapt .": "no JPEG or PNG",
    }.items():
        assert command(*use.split()) == 2 and message in capsys.readouterr().err


def test_plot_of_images_draws_a_picture(folder, glyphs):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    words = [*GLYPHS, "--data", glyphs, "--ways", 3, "--iterations", 2, "--eval-steps", 1]
    assert command(*words, "--log", "a.csv", "--save", "a.npz", "--plot", "a.png") == 0
    assert Path("a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    command(*QUICK, "--save", "b.npz")
    assert command("--evaluate", "a.npz", "b.npz", "--data", glyphs, "--plot", "b.png") == 2


def test_image_defaults_are_the_papers():
    def settings(*words):
        return maml.settings_of(maml.build_parser().parse_args([str(word) for word in words]))

    five, twenty = (settings("--task", "omniglot", "--ways", ways) for ways in (5, 20))
    assert (five["steps"], five["meta_batch"], five["query"]) == (1, 32, 1)
    assert (twenty["steps"], twenty["meta_batch"]) == (5, 16)
    assert (
        five["alpha"] == 5 * 0.4 and twenty["alpha"] == 20 * 0.1
    )  # alpha of the paper on a mean over examples
    assert settings("--task", "omniglot", "--shots", 5)["query"] == 5
    mini = settings("--task", "miniimagenet", "--shots", 5)
    assert (mini["alpha"], mini["steps"], mini["meta_batch"], mini["query"], mini["filters"]) == (
        0.05,
        5,
        2,
        15,
        32,
    )


def test_batch_norms_shift_is_not_adapted_but_learned(glyphs):
    words = [str(word) for word in GLYPHS]
    experiment = maml.experiment_of(maml.settings_of(maml.build_parser().parse_args(words)))
    experiment.open(glyphs, {"eval_shots": 1})
    theta, alpha = experiment.adaptation(experiment.start().theta)
    batch = experiment.sample("training", 1, 1)(np.random.default_rng(0), tasks=5)
    adapted = experiment.network.unflatten(maml.adapt(experiment.loss, theta, batch[0], alpha, 2))
    _, g = experiment.outer_gradient()(theta, *batch)
    for name, start in experiment.network.unflatten(theta).items():
        assert np.array_equal(adapted[name][0], start) == name.startswith("beta")
        assert experiment.network.unflatten(g)[name].any()


@pytest.mark.parametrize(
    "words, message",
    [
        ("--task sinusoid --ways 3", "--ways is for --task omniglot, miniimagenet"),
        ("--task sinusoid --data .", "--data is for images"),
        ("--task omniglot --baseline oracle", "is for --task sinusoid"),
        ("--task omniglot --data nowhere", "nowhere: neither images_background.zip"),
        ("--task omniglot --data glyphs --ways 7", "there are 6: lower the ways"),
        ("--task omniglot --data glyphs --shots 3", "there are 4: lower the shots"),
        ("--task sinusoid --baseline nearest", "--baseline nearest is for --task omniglot or miniimagenet"),
        ("--task miniimagenet --data glyphs", "train"),
        ("--evaluate a.npz --data glyphs --ways 4", "trained with ways 3, not 4"),
    ],
)
def test_bad_use_of_images_is_one_line(folder, glyphs, monkeypatch, capsys, words, message):
    (folder / "glyphs").symlink_to(glyphs)
    if "a.npz" in words:
        command(
            *GLYPHS, "--data", glyphs, "--ways", 3, "--iterations", 1, "--eval-steps", 1, "--save", "a.npz"
        )
    monkeypatch.setattr(maml, "train", lambda *_: pytest.fail("training began"))
    capsys.readouterr()
    before = contents(folder)
    assert command(*shlex.split(words)) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "characters, where all of Omniglot" not in line]
    assert out == "" and len(lines) == 1 and re.search(message, lines[0])
    assert contents(folder) == before


@pytest.mark.parametrize(
    "module, words, package",
    [
        (maml, "--task miniimagenet --data photographs", "pillow"),
        (maml, "--task sinusoid --plot a.png", "matplotlib"),
        (maml, "--task omniglot --data glyphs --scheduler nowhere", '"dask[distributed]"'),
        (rl, "--task ant-vel", '"gymnasium[mujoco]"'),
    ],
)
def test_without_a_package_the_line_says_what_to_install(
    folder, glyphs, monkeypatch, capsys, module, words, package
):
    unpacked(folder / "photographs", {f"{split}/a/{i}.png": b"" for split in SPLITS for i in range(16)})
    (folder / "glyphs").symlink_to(glyphs)
    for name in ("PIL", "PIL.Image", "matplotlib", "distributed", "gymnasium", "mujoco"):
        monkeypatch.setitem(sys.modules, name, None)
    before = contents(folder)
    assert maml.main(shlex.split(words), module) == 2
    assert capsys.readouterr().err.endswith(f"pip install {package}\n") and contents(folder) == before
    assert leftovers(folder / "photographs") == []


# The command does what its methods say ------------------------------------------------------------


def experiment_of(*words):
    return maml.experiment_of(maml.settings_of(maml.build_parser().parse_args([*map(str, words)])))


def image_experiment(*words):
    """An experiment on images of three splits that do not look alike."""
    experiment = experiment_of("--filters", 3, "--dtype", "float64", *words)
    rng, (height, width, channels) = np.random.default_rng(0), experiment.network.inputs
    splits = {"train": (0, 60), "val": (90, 150), "test": (190, 255)}
    experiment.images = {
        name: rng.integers(*span, (8, 20, height, width, channels)).astype(np.uint8)
        for name, span in splits.items()
    }
    return experiment


@pytest.mark.parametrize("module", [maml, rl])
def test_every_purpose_has_its_own_stream(module):
    words = ["--task", "sinusoid" if module is maml else "navigation"]
    experiment = module.experiment_of(module.settings_of(module.build_parser().parse_args(words)))
    draws = [experiment.stream(purpose).random() for purpose in ("training", "test", "validation", "init")]
    assert len(set(draws)) == 4


@pytest.mark.parametrize(
    "purpose, low, high", [("training", 0, 60), ("validation", 90, 150), ("test", 190, 255)]
)
def test_every_purpose_has_its_own_classes(purpose, low, high):
    (x, _), (xq, _) = image_experiment("--task", "omniglot").sample(purpose, 2, 3)(
        np.random.default_rng(0), tasks=4
    )
    assert low / 255 <= x.min() and max(x.max(), xq.max()) <= high / 255


@pytest.mark.parametrize("task, turned", [("omniglot", True), ("miniimagenet", False)])
def test_characters_are_turned_and_photographs_are_not(task, turned):
    experiment = image_experiment("--task", task)
    height, width, channels = experiment.network.inputs
    images = np.zeros((8, 20, height, width, channels), np.uint8)
    images[:, :, 0] = 255  # a bright first row
    experiment.images = dict.fromkeys(experiment.images, images)
    (x, _), _ = experiment.sample("training", 1, 1)(np.random.default_rng(0), tasks=9)
    assert (x[:, :, 0].min() == 1) != turned


@pytest.mark.parametrize("method", ["maml", "fomaml", "anil", "reptile", "meta-sgd"])
@pytest.mark.parametrize("task", ["sinusoid", "omniglot"])
def test_each_method_descends_its_own_gradient_with_all_its_steps(method, task):
    words = ["--task", task, "--method", method, "--steps", 3, "--alpha", 0.05, "--dtype", "float64"]
    experiment = image_experiment(*words) if task == "omniglot" else experiment_of(*words)
    shots, state = experiment.settings["shots"], experiment.start()
    support, query = experiment.sample("training", shots, 2)(np.random.default_rng(0), tasks=2)
    alpha = np.full(experiment.network.size, 0.05)
    for name, part in experiment.network.unflatten(alpha).items():
        frozen = (
            name not in list(experiment.network.shapes)[-2:] if method == "anil" else name.startswith("beta")
        )
        part[...] = 0 if frozen else 0.05
    rng = np.random.default_rng(1)
    theta = state.theta[: experiment.network.size] + 0.1 * rng.normal(size=experiment.network.size)
    learned, data = theta, (hidden(experiment.loss), theta, support, query)
    if method == "meta-sgd":
        learned = np.concatenate([theta, alpha])
        expected = maml.meta_sgd_gradient(experiment.loss, learned, support, query, 3)
    elif method == "reptile":
        expected = maml.reptile_gradient(*data, alpha, 3)
    elif method == "fomaml":
        expected = maml.meta_gradient(*data, alpha, 3, order=1)
    else:
        expected = maml.meta_gradient_by_definition(*data, alpha, 3)
    found = experiment.outer_gradient()(learned, support, query)
    assert error(found[0], expected[0]) < 1e-9 and error(found[1], expected[1]) < 1e-7


def test_the_pretrained_bodys_new_last_layer_starts_from_zero():
    experiment = image_experiment("--task", "omniglot", "--baseline", "pretrained")
    learned = experiment.start().theta
    arrays = experiment.network.unflatten(experiment.adaptation(learned)[0])
    names = list(arrays)
    assert not arrays["w"].any() and not arrays["b"].any()
    kept = experiment.classifier.unflatten(learned)
    assert all(np.array_equal(arrays[name], kept[name]) for name in names[:-2])


@pytest.mark.parametrize("shots, clip", [(1, 10 / 75), (5, 10 / 15)])
def test_miniimagenets_meta_gradient_is_clipped_on_the_authors_scale(shots, clip):
    experiment = image_experiment("--task", "miniimagenet", "--shots", shots)
    assert experiment.step.keywords["clip"] == pytest.approx(clip)
    assert experiment_of("--task", "omniglot").clip == np.inf
    state = maml.State.start(np.zeros(3))
    steep = partial(maml.adam_step, state, None, lambda *_: (0.0, np.array([9.0, -9.0, 0.01])))
    moments = steep(sample=lambda *_, tasks: (0, 0), tasks=1, beta=0.1, clip=clip)[0].moments
    assert np.allclose(10 * moments[0], [clip, -clip, 0.01])


def test_a_test_task_has_the_papers_queries():
    assert experiment_of("--task", "sinusoid").eval_query(5) == 100
    experiment = image_experiment("--task", "miniimagenet", "--shots", 5)
    assert [experiment.eval_query(k) for k in (1, 5)] == [1, 5]
    values = experiment.curve(experiment.start().theta, "test", 2, 5, 0)
    assert np.allclose(values * 25, np.rint(values * 25))


def test_the_final_table_is_of_what_was_best_on_validation(folder, glyphs, monkeypatch, capsys):
    scores = iter([0.2, 0.9, 0.3, 0.1])
    monkeypatch.setattr(maml.Experiment, "log_every", 1)
    monkeypatch.setattr(maml.Experiment, "validate", lambda *_: (0.0, next(scores)))
    words = ["--data", glyphs, "--iterations", 4, "--beta", 0.05, "--eval-steps", 2, "--save", "a.npz"]
    assert command(*GLYPHS, *words) == 0
    table = capsys.readouterr().out.partition("steps")[2]
    assert int(arrays("a.best.npz")["iteration"]) == 2
    evaluated = {}
    for name in ("a.best.npz", "a.npz"):
        command("--evaluate", name, "--data", glyphs, "--eval-tasks", 40, "--eval-steps", 2)
        evaluated[name] = capsys.readouterr().out.partition("steps")[2]
    assert evaluated["a.best.npz"] == table != evaluated["a.npz"]


if (
    "MAML_AUTHORS" in os.environ
):  # MAML_AUTHORS=authors.npy MAML_DATA=FOLDER python -m pytest -k authors_weights

    def test_the_authors_weights_reach_what_they_reached_elsewhere(folder):
        """The paper has 48.7 after 10 steps, another user of the weights 46.9: 200 tasks stray by 3.2."""
        settings = maml.settings_of(maml.build_parser().parse_args(["--task", "miniimagenet"]))
        maml.save_weights("a.npz", settings, np.load(os.environ["MAML_AUTHORS"]), 60_000)
        words = ["--data", os.environ["MAML_DATA"], "--eval-tasks", 200, "--results", "r.csv"]
        assert command("--evaluate", "a.npz", *words) == 0
        with open("r.csv") as file:
            after = [float(row["mean"]) for row in csv.DictReader(file)]
        assert abs(after[0] - 0.2) < 0.01 and 0.31 < after[1] < 0.41 and 0.42 < after[10] < 0.52


# Workers and faults -----------------------------------------------------------------------------

SPREAD = ["--task", "omniglot", "--filters", 3, "--ways", 3, "--meta-batch", 10, "--eval-tasks", 10]
SPREAD += ["--eval-steps", 1, "--iterations", 3]


def test_any_number_of_workers_gives_the_same_bits(folder, glyphs):
    run = [sys.executable, HERE / "maml.py", *map(str, [*SPREAD, "--data", glyphs])]
    for name, words in (("threads", []), ("one", ["--workers", "1"]), ("four", ["--workers", "4"])):
        done = subprocess.run([*run, *words, "--save", name + ".npz"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    a, b, c = (arrays(f"{name}.npz") for name in ("threads", "one", "four"))
    assert all(np.array_equal(a[key], b[key]) and np.array_equal(a[key], c[key]) for key in a)


def test_a_dask_cluster_gives_the_same_bits_and_may_lose_a_worker(folder, glyphs):
    distributed = pytest.importorskip("distributed", reason="needs dask[distributed]")
    images = [HERE / "maml.py", *SPREAD, "--data", glyphs, "--iterations", 50, "--log", "a.csv"]
    walk = [HERE / "rl.py", *WALK, "--meta-batch", 12, "--iterations", 2]
    for name, run in (("images", images), ("walk", walk)):
        words = [sys.executable, *map(str, run), "--save", f"{name}.npz"]
        assert subprocess.run(words, capture_output=True).returncode == 0
    Path("a.csv").unlink()
    with distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=None) as cluster:
        for name, run in (("images", images), ("walk", walk)):
            words = [*map(str, run), "--scheduler", cluster.scheduler_address, "--save", f"{name}-dask.npz"]
            process = subprocess.Popen([sys.executable, *words], stderr=subprocess.PIPE, text=True)
            if name == "images":
                wait_for(lambda: Path("a.csv").exists(), process)
                time.sleep(0.5)
                os.kill(next(iter(cluster.workers.values())).pid, signal.SIGKILL)
            assert process.wait(timeout=120) == 0, process.stderr.read()
            a, b = arrays(f"{name}.npz"), arrays(f"{name}-dask.npz")
            assert all(np.array_equal(a[key], b[key]) for key in a)


def wait_for(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_killed_worker_ends_the_run_with_one_line(folder, glyphs):
    run = [sys.executable, HERE / "maml.py", *map(str, [*SPREAD, "--data", glyphs, "--workers", 2])]
    process = subprocess.Popen(
        [*run, "--iterations", "100000", "--save", "a.npz"], stderr=subprocess.PIPE, text=True
    )
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline, workers = time.monotonic() + 60, []
        while len(workers) < 3 and time.monotonic() < deadline:  # the two, and Python's resource tracker
            workers = children.read_text().split() if children.exists() else []
            time.sleep(0.05)
        time.sleep(1)
        os.kill(int(workers[-1]), signal.SIGKILL)
        stderr = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 1 and stderr.splitlines()[-1].startswith("maml.py: a worker was lost")
    assert "Traceback" not in stderr


def test_rl_gives_the_same_bits_on_processes_and_they_end_with_their_parent(folder):
    run = [sys.executable, HERE / "rl.py", *WALK, "--meta-batch", "12", "--eval-steps", "1"]
    for name, words in (("none", []), ("one", ["--workers", "1"]), ("four", ["--workers", "4"])):
        words = [*words, "--iterations", "2", "--save", name + ".npz"]
        assert subprocess.run([*run, *words], capture_output=True).returncode == 0
    a, b, c = (arrays(f"{name}.npz") for name in ("none", "one", "four"))
    assert all(np.array_equal(a[key], b[key]) and np.array_equal(a[key], c[key]) for key in a)
    process = subprocess.Popen(
        [*run, "--iterations", "100000", "--workers", "2", "--log", "a.csv"], stderr=subprocess.DEVNULL
    )
    log, deadline = Path("a.csv"), time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    while any(alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(children) >= 2 and not any(alive(child) for child in children)


def alive(pid):
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


KILLS = int(os.environ.get("MAML_KILLS", 2))


def test_killed_at_any_moment_a_run_resumes_to_the_same_bits(folder, monkeypatch):
    """MAML_KILLS=100 python -m pytest -k killed_at: as many kill -9, at random moments."""
    script = "import maml, sys; maml.Experiment.save_every = 3; maml.Experiment.log_every = 2; "
    script += "sys.exit(maml.main())"
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    quick = [*map(str, QUICK), "--iterations", "90", "--eval-shots", "2"]
    run = [sys.executable, "-c", script, *quick]
    subprocess.run([*run, "--save", "whole.npz", "--log", "whole.csv"], check=True, capture_output=True)
    rng, kills = np.random.default_rng(0), 0
    while kills < KILLS:
        saved = Path("a.npz").exists()
        words = ["--resume", "a.npz", "--iterations", "90"] if saved else [*quick, "--save", "a.npz"]
        process = subprocess.Popen([*run[:3], *words, "--log", "a.csv"], stderr=subprocess.DEVNULL)
        try:
            process.wait(rng.uniform(0.2, 1.2))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        if Path("a.npz").exists() and int(arrays("a.npz")["iteration"]) == 90:
            check_same_run()
            for name in ("a.npz", "a.csv"):
                Path(name).unlink()
        if Path("a.csv").exists():
            assert Path("a.csv").read_bytes().endswith(b"\n")
    if Path("a.npz").exists():
        subprocess.run([*run[:3], "--resume", "a.npz", "--iterations", "90", "--log", "a.csv"], check=True)
        check_same_run()


def check_same_run():
    whole, resumed = arrays("whole.npz"), arrays("a.npz")
    assert all(np.array_equal(whole[key], resumed[key]) for key in whole)


def test_two_runs_that_save_to_one_file_leave_a_whole_checkpoint_at_all_times(folder, monkeypatch):
    script = "import maml, sys; maml.Experiment.save_every = 1; sys.exit(maml.main())"
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    assert (
        command(*QUICK[:2], "--meta-batch", 3, "--iterations", 1, "--eval-tasks", 2, "--save", "a.npz") == 0
    )
    words = ["--resume", "a.npz", "--iterations", "150", "--eval-shots", "2", "--eval-tasks", "2"]
    runs = [subprocess.Popen([sys.executable, "-c", script, *words]) for _ in "ab"]
    seen, deadline = set(), time.monotonic() + 60
    while any(run.poll() is None for run in runs) and time.monotonic() < deadline:
        seen.add(maml.load_checkpoint("a.npz", maml)[1].iteration)
    assert [run.wait() for run in runs] == [0, 0] and len(seen) > 1
    assert maml.load_checkpoint("a.npz", maml)[1].iteration == 150
    assert os.listdir() == ["a.npz"]


def test_a_full_disk_leaves_the_checkpoint_before(folder):
    """A limit on the size of files stands for a disk that is full."""
    command(*QUICK, "--save", "a.npz")
    before = contents(folder)
    script = "import resource, sys, signal, maml; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    script += "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); sys.exit(maml.main())"
    words = [sys.executable, "-c", script, "--resume", folder / "a.npz", "--iterations", "60"]
    done = subprocess.run(words, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 1 and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert contents(folder) == before


@settings(max_examples=FUZZ)
@given(st.data())
def test_no_damage_to_a_checkpoint_is_more_than_one_line(files, data):
    path = files / "fuzzed.npz"
    path.write_bytes(damaged(data, (files / "good.npz").read_bytes()))
    with one_line_at_most(maml.Unusable):
        maml.load_checkpoint(str(path), maml)
    path.unlink()


# Reinforcement learning -------------------------------------------------------------------------


class Policies:
    """A random policy, its theta (one log_std at the floor), and steps of old policies on made-up data.

    A task's trajectories end early, each at a step that is the same for all tasks.
    """

    def __init__(self, seed, inputs=2, actions=2, width=4, tasks_=2, trajectories=2, horizon=3, steps=1):
        self.policy = rl.gaussian_policy(inputs, actions, (width, width))
        self.loss = nets.Loss(self.policy, rl.PolicyGradient())
        for attempt in range(1000):
            rng = self.rng = np.random.default_rng([seed, attempt])
            self.theta = rng.normal(size=self.policy.size) / 3
            shape = tasks_, trajectories, horizon
            self.batches = []
            for _ in range(steps + 1):
                ends = rng.integers(1, horizon + 1, trajectories)
                mask = np.tile(np.arange(horizon) < ends[:, None], (tasks_, 1, 1)).astype(float)
                episodes = rl.Episodes(
                    rng.normal(size=(*shape, inputs)) * mask[..., None],
                    rng.normal(size=(*shape, actions)) * mask[..., None],
                    rng.normal(size=shape) * mask,
                    mask,
                )
                taken = mask[0].ravel() > 0
                self.batches.append(tuple(array[:, taken] for array in rl.batch_of(episodes, 0.9, 0.8)))
            self.adapted, near = self.theta, []
            for x, y in self.batches[:-1]:
                near.append(distance_to_kink(self.policy, self.adapted, x))
                self.adapted = self.adapted - 0.1 * self.loss.grad(self.adapted, x, y)
            self.adapted = self.adapted + np.zeros((tasks_, 1))
            near.append(distance_to_kink(self.policy, self.adapted, self.batches[-1][0]))
            if min(near) > 2e-3:
                return
        raise AssertionError("no policy away from the kinks was found")

    def direction(self, shape):
        v = self.rng.normal(size=shape)
        return v / np.linalg.norm(v)

    def objective(self, theta):
        """[-surrogate, KL], means over tasks, by definition: autograd differentiates all of it."""
        old = self.policy.apply(self.adapted, self.batches[-1][0])
        *supports, query = self.batches
        one = rl.surrogate(self.policy, hidden(self.loss), 0.1, theta, supports, query, old)
        return anp.mean(one, axis=1)

    def outer(self, order=2):
        """Gradient and product of `rl.outer_problem`, a task at a time; its values are the definition's."""
        each = [[(x[[i]], y[[i]]) for x, y in self.batches] for i in range(len(self.adapted))]
        value, g, product, objective = rl.outer_problem(self.loss, 0.1, order, self.theta, each)
        assert abs(value - self.objective(self.theta)[0]) < 1e-12
        trial = self.theta + 0.1 * self.direction(self.theta.shape)
        assert error(objective(trial), self.objective(trial)) < 1e-12
        at_once = rl.outer_problem(self.loss, 0.1, order, self.theta, [self.batches])
        assert error(at_once[1], g) < 1e-12 and error(at_once[2](g), product(g)) < 1e-12
        return g, product


policies = st.builds(
    Policies, st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 2), steps=st.integers(0, 2)
)


@given(policies)
def test_policy_loss_equals_autograd_and_finite_differences(p):
    (x, y), plain = p.batches[-1], hidden(p.loss)
    v = p.direction(p.adapted.shape)
    g, hvp = p.loss.expand(p.adapted, x, y)[1:]
    expected, by_autograd = maml.expand(plain, p.adapted, x, y)[1:]
    assert error(g, expected) < 1e-10 and error(hvp(v), by_autograd(v)) < 1e-10
    assert error((g * v).sum(axis=1), difference(lambda theta: p.loss(theta, x, y), p.adapted, v)) < 1e-7
    assert error(hvp(v), difference(lambda theta: p.loss.grad(theta, x, y), p.adapted, v)) < 1e-7


def test_log_std_has_a_floor_below_which_nothing_moves_it():
    p = Policies(0)
    theta = np.array(p.theta)
    p.policy.unflatten(theta)["log_std"][0] = -20
    x, y = p.batches[0]
    assert np.allclose(p.policy.apply(theta, x)[..., 2], np.log(1e-6))
    g = p.policy.unflatten(p.loss.grad(theta, x, y))["log_std"]
    assert not g[:, 0].any() and g[:, 1].all()
    assert error(p.policy.forward(theta, x)[0], p.policy.apply(theta, x)) == 0


@settings(max_examples=10)
@given(policies)
def test_meta_gradient_of_the_surrogate_equals_autograd_and_finite_differences(p):
    g, _ = p.outer()
    v = p.direction(p.theta.shape)
    assert error(g, grad(lambda theta: p.objective(theta)[0])(p.theta)) < 1e-9
    assert error(g @ v, difference(lambda theta: p.objective(theta)[0], p.theta, v)) < 1e-7


@settings(max_examples=8)
@given(policies)
def test_fisher_product_is_the_hessian_of_the_kl_through_adaptation(p):
    _, product = p.outer()
    v = p.direction(p.theta.shape)
    value, slope = p.objective(p.theta)[1], grad(lambda theta: p.objective(theta)[1])
    assert abs(value) < 1e-15 and np.abs(slope(p.theta)).max() < 1e-13
    assert error(product(v), grad(lambda theta: anp.dot(slope(theta), v))(p.theta)) < 1e-9
    assert error(product(v), difference(slope, p.theta, v)) < 1e-7


def test_first_and_second_order_differ_clearly():
    p = Policies(1)
    (second, product), (first, plain) = p.outer(), p.outer(order=1)
    v = p.direction(p.theta.shape)
    assert 0.02 < error(first, second) and 0.02 < error(plain(v), product(v))


def test_kl_of_gaussians_has_its_direction():
    """KL(N(0, 1) ‖ N(1, 4)) = log 2 + (1 + 1) / 8 - 1/2, and the other way round log 1/2 + 5/2 - 1/2."""
    old, new = np.array([[[0.0, 0.0]]]), np.array([[[1.0, np.log(2)]]])
    assert np.allclose(rl.kl(old, new), np.log(2) - 0.25) and np.allclose(rl.kl(new, old), 2 - np.log(2))
    density = np.exp(rl.log_likelihood(new, np.array([[[3.0]]])))
    assert np.allclose(density, np.exp(-0.5) / np.sqrt(8 * np.pi))


@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_returns_and_advantages_equal_plain_loops_with_early_ends(seed, discount, lam):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 6, (2, 3))
    mask = (np.arange(5) < lengths[..., None]).astype(float)
    rewards, values = rng.normal(size=(2, *mask.shape)) * mask
    a = rl.advantages(rewards, values, mask, discount, lam)
    totals = rl.discounted(rewards, discount)
    for i in range(2):
        plain, found = [], []
        for j, length in enumerate(lengths[i]):
            for t in range(length):
                assert np.isclose(
                    totals[i, j, t], sum(discount**k * rewards[i, j, t + k] for k in range(5 - t))
                )
                following = [*values[i, j, 1:length], 0]
                deltas = rewards[i, j, :length] + discount * np.array(following) - values[i, j, :length]
                plain.append(sum((discount * lam) ** k * d for k, d in enumerate(deltas[t:])))
                found.append(a[i, j, t])
        assert np.allclose(found, (plain - np.mean(plain)) / (np.std(plain) + 1e-8), rtol=1e-6)
    assert not a[mask == 0].any()


@given(st.integers(0, 10**6))
def test_baseline_equals_one_least_squares_a_task(seed):
    rng = np.random.default_rng(seed)
    mask = (np.arange(6) < rng.integers(1, 7, (3, 5))[..., None]).astype(float)
    observations, targets = rng.normal(size=(3, 5, 6, 2)), rng.normal(size=(3, 5, 6))
    found = rl.baseline(observations, targets, mask)
    for i in range(3):
        phi = rl.features(observations[i : i + 1])[0][mask[i] == 1]
        ridge = np.sqrt(1e-5) * np.eye(phi.shape[-1])
        rows, right = np.vstack([phi, ridge]), [*targets[i][mask[i] == 1], *np.zeros(len(ridge))]
        w = np.linalg.lstsq(rows, right, rcond=None)[0]
        assert error(found[i][mask[i] == 1], phi @ w) < 1e-6
    assert not found[mask == 0].any()


def test_navigation_steps_by_hand():
    environment = rl.Navigation([[0.1, 0.05], [0.5, -0.5]], 1)
    assert not environment.reset(np.random.default_rng(0)).any()
    observation, reward, done = environment.step(np.array([[[5.0, 0.0]], [[-0.5, -0.5]]]))
    assert np.allclose(observation[:, 0], [[0.1, 0], [-0.05, -0.05]])
    assert np.allclose(reward[:, 0], [-0.05, -np.hypot(0.55, 0.45)]) and not done.any()
    observation, reward, done = environment.step(np.array([[[0.0, 0.45]], [[0.0, 0.0]]]))
    assert np.allclose(reward[0], -0.005) and done[:, 0].tolist() == [True, False]
    oracle = rl.Navigation([[0.1, 0.05]], 1, oracle=True).reset(None)
    assert oracle.tolist() == [[[0, 0, 0.1, 0.05]]]


def test_rollout_masks_what_follows_the_end():
    policy = rl.gaussian_policy(2, 2, (3,))
    theta = np.zeros(policy.size)
    policy.unflatten(theta)["log_std"][:] = -30
    policy.unflatten(theta)["b2"][:] = [1, 0.5]
    episodes = rl.rollout(
        rl.Navigation([[0.2, 0.1], [0.4, -0.4]], 3), policy, theta, np.random.default_rng(0)
    )
    assert episodes.mask[0].sum(axis=1).tolist() == [2, 2, 2] and episodes.mask[1].all()
    assert np.allclose(episodes.rewards[0, 0, :2], [-np.hypot(0.1, 0.05), 0], atol=1e-5)
    assert not episodes.rewards[0, :, 2:].any() and episodes.rewards.shape == (2, 3, 100)
    assert np.allclose(episodes.returns()[0], -np.hypot(0.1, 0.05), atol=1e-5)


def rl_experiment(*words):
    words = ["--task", *map(str, words), "--dtype", "float64", "--hidden", 3]
    return rl.Experiment(rl.settings_of(rl.build_parser().parse_args([*map(str, words)])))


def test_adaptation_takes_turns_between_trajectories_and_steps_and_leaves_what_follows_an_end():
    experiment = rl_experiment("navigation", "--discount", 0.9, "--lam", 0.6)
    theta = np.zeros(experiment.policy.size)
    experiment.policy.unflatten(theta)["log_std"][:] = -3
    experiment.policy.unflatten(theta)["b3"][:] = [1, 0.5]
    goals, rates, seeds = np.array([[0.2, 0.1], [0.4, -0.4]]), [0.5, 0.25], [3, 4, 5]
    given = experiment.settings, experiment.loss, theta, 3, rates, goals, seeds
    (returns, batches), along = rl.experience(*given), rl.returns_along(*given)
    for step, (seed, rate) in enumerate(zip(seeds, [*rates, 0])):
        environment, rng = rl.Navigation(goals, 3), np.random.default_rng(seed)
        episodes = rl.rollout(environment, experiment.policy, theta + np.zeros((2, 1)), rng)
        assert error(returns[step], episodes.returns()) < 1e-12 > error(along[step], returns[step])
        data = rl.batch_of(episodes, 0.9, 0.6)
        for i, taken in enumerate(episodes.mask.reshape(2, -1) > 0):
            for found, padded in zip(batches[i][step], data):
                assert error(found, padded[[i]][:, taken]) < 1e-12
        theta = theta - rate * experiment.loss.grad(theta, *data)
    assert batches[0][0][0].shape[1] < 300 == batches[1][0][0].shape[1]


def test_a_meta_iteration_is_one_step_of_the_outer_problem_of_all_parcels():
    words = ["--horizon", 8, "--meta-batch", 12, "--trajectories", 5, "--steps", 2]
    experiment = rl_experiment("navigation", *words)
    settings, loss, theta = experiment.settings, experiment.loss, experiment.start().theta
    found, reported = experiment.meta_iteration(theta, np.random.default_rng(0))
    rng = np.random.default_rng(0)
    goals, seeds = rl.drawn_goals("navigation", rng, 12), rng.integers(2**63, size=(3, 2))
    parcels = (goals[:10], seeds[:, 0]), (goals[10:], seeds[:, 1])
    parts = [rl.experience(settings, loss, theta, 5, [0.5, 0.5], *parcel) for parcel in parcels]
    returns = np.concatenate([returns for returns, _ in parts], axis=1).mean(axis=1)
    batches = [*parts[0][1], *parts[1][1]]
    taken = sum(len(x[0]) for batch in batches for x, _ in batch)
    problem = rl.outer_problem(loss, 0.5, 2, theta, batches)
    expected, tries, kl = rl.trust_region_step(theta, *problem, 0.01, 10, 1e-5, 0.8, 15)
    assert error(found, expected) < 1e-12 < error(found, theta)
    assert np.allclose(reported, [returns[0], returns[-1], kl, tries, taken]) and taken <= 12 * 5 * 3 * 8


def test_the_surrogates_kl_is_from_the_old_policy():
    p = Policies(0, steps=0)
    new, (x, y) = p.theta + p.direction(p.theta.shape), p.batches[0]
    old, after = p.policy.apply(p.theta, x), p.policy.apply(new, x)
    divergence = rl.surrogate(p.policy, p.loss, 0.1, new, [], (x, y), old)[1]
    assert error(divergence, rl.kl(old, after).mean(axis=1)) < 1e-12


def gymnasium_alone(environment, actions):
    """The states [H, nq + nv] of gymnasium's environment from the same start, stepped alone."""
    gymnasium = pytest.importorskip("gymnasium", reason='needs "gymnasium[mujoco]"')
    alone = gymnasium.make("Ant-v5" if environment.ant else "HalfCheetah-v5", frame_skip=1).unwrapped
    alone.reset(seed=0)
    alone.model.opt.timestep = environment.model.opt.timestep
    start = environment.states[1, : alone.model.nq + alone.model.nv]
    alone.set_state(*np.split(start, [alone.model.nq]))
    alone.data.qacc_warmstart[:] = 0
    states = []
    for action in actions:
        alone.do_simulation(action, 1)
        states.append(np.concatenate([alone.data.qpos, alone.data.qvel]))
    return np.array(states)


@pytest.mark.parametrize("name", ["cheetah-vel", "cheetah-dir", "ant-vel", "ant-dir"])
def test_locomotion_equals_gymnasium_and_pays_the_authors_rewards(name):
    """A trajectory of a batch equals gymnasium's, bit for bit; v is the centre of mass's, by differences."""
    mujoco = pytest.importorskip("mujoco", reason='needs "gymnasium[mujoco]"')
    rng, ant = np.random.default_rng(0), name.startswith("ant")
    environment = rl.Locomotion(name, [-1.0, 1.0], 1)
    observation = environment.reset(rng)
    assert observation.shape == (2, 1, 125 if ant else 20)
    actions = rng.normal(size=(200, 2, 1, environment.actions))
    alone = gymnasium_alone(environment, np.clip(actions[:, 1, 0], -1, 1))
    ended = np.zeros((2, 1), bool)
    for t, action in enumerate(actions):
        before = ended
        observation, reward, ended = environment.step(action)
        if before.any():
            break
        simulation, model = environment.simulation, environment.model  # last of all it was trajectory 1
        state = np.concatenate([simulation.qpos, simulation.qvel])
        assert np.array_equal(state, alone[t])
        moved, h = mujoco.MjData(model), 1e-6
        moved.qpos = simulation.qpos
        mujoco.mj_integratePos(model, moved.qpos, simulation.qvel, h)
        mujoco.mj_kinematics(model, moved)
        mujoco.mj_comPos(model, moved)
        centre = observation[1, 0, -3:]
        assert np.array_equal(
            observation[1, 0, : model.nq - 1], simulation.qpos[0 if ant else 1 :][: model.nq - 1]
        )
        velocity = (moved.subtree_com[1] - centre)[0] / h
        expected = velocity if name.endswith("dir") else -abs(velocity - 1)
        expected -= (0.005 if ant else 0.05) * (np.clip(action[1, 0], -1, 1) ** 2).sum()
        if ant:
            contacts = np.clip(simulation.cfrc_ext, -1, 1)
            expected += 0.05 + name.endswith("vel") - 0.0005 * (contacts**2).sum()
            assert ended[1, 0] == (not 0.2 <= simulation.qpos[2] <= 1)
        assert abs(reward[1, 0] - expected) < 1e-4
    assert t > 10 and (ant or t == 199)


@pytest.mark.parametrize("name", ["cheetah-vel", "ant-vel"])
def test_locomotion_starts_as_the_authors_do(name):
    pytest.importorskip("mujoco", reason='needs "gymnasium[mujoco]"')
    environment = rl.Locomotion(name, [1.0], 300)
    environment.reset(np.random.default_rng(0))
    nq, nv = environment.model.nq, environment.model.nv
    noise = environment.states[:, : nq + nv].std(axis=0)
    assert np.allclose(noise[:nq], 0.01, rtol=0.2) and np.allclose(noise[nq:], 0.1, rtol=0.2)
    start = np.mean(environment.states[:, 2 if name == "ant-vel" else 1])
    assert abs(start - (0.55 if name == "ant-vel" else 0)) < 0.005


def test_an_ant_that_has_ended_stays_as_it_is_and_is_paid_nothing():
    pytest.importorskip("mujoco", reason='needs "gymnasium[mujoco]"')
    environment = rl.Locomotion("ant-dir", [1.0], 2, oracle=True)
    environment.reset(np.random.default_rng(0))
    environment.states[0, 2] = 1.5
    _, first, done = environment.step(np.zeros((1, 2, 8)))
    seen, second, _ = environment.step(np.ones((1, 2, 8)))
    assert done.tolist() == [[True, False]] and first[0, 0] != 0 and second[0, 0] == 0 != second[0, 1]
    again, _, done = environment.step(np.ones((1, 2, 8)))
    assert np.array_equal(again[0, 0], seen[0, 0]) and done[0, 0] and again.shape == (1, 2, 126)


@pytest.mark.parametrize("task", ["cheetah-vel", "ant-dir"])
def test_locomotion_trains_and_resumes_to_the_same_bits(folder, monkeypatch, task):
    monkeypatch.setattr(rl, "VALIDATION_TASKS", 1)
    pytest.importorskip("mujoco", reason='needs "gymnasium[mujoco]"')
    base = f"--task {task} --horizon 5 --meta-batch 2 --trajectories 2 --hidden 4 --eval-tasks 2".split()
    base += ["--eval-trajectories", 2, "--eval-steps", 1]
    assert rl_command(*base, "--iterations", 2, "--save", "whole.npz") == 0
    assert rl_command(*base, "--iterations", 1, "--save", "part.npz") == 0
    assert (
        rl_command("--resume", "part.npz", "--iterations", 2, "--eval-tasks", 2, "--eval-trajectories", 1)
        == 0
    )
    assert np.array_equal(arrays("whole.npz")["theta"], arrays("part.npz")["theta"])
    assert {path.suffix for path in folder.iterdir()} == {".npz"}  # MuJoCo leaves no log behind


def test_conjugate_gradient_solves_and_the_line_search_keeps_theta_where_nothing_helps():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6))
    matrix, b = root @ root.T + np.eye(6), rng.normal(size=6)
    x, residual = rl.conjugate_gradient(lambda v: matrix @ v, b, 6, 0)
    assert error(x, np.linalg.solve(matrix, b)) < 1e-9 > np.linalg.norm(residual)
    x, residual = rl.conjugate_gradient(lambda v: matrix @ v, b, 3)
    assert error(residual, b - matrix @ x) < 1e-9
    constants = 0.02, 6, 0.0, 0.5, 4
    theta, j, kl = rl.trust_region_step(
        np.zeros(6), 0.0, b, lambda v: matrix @ v, lambda x: (b @ x, x @ matrix @ x / 2), *constants
    )
    assert j in (0, 1) and b @ theta < 0 and error(kl, 0.02 / 4**j) < 1e-6
    theta, j, kl = rl.trust_region_step(
        np.ones(6), 0.0, b, lambda v: matrix @ v, lambda x: (0.0, 0.0), *constants
    )
    assert (theta == 1).all() and (j, kl) == (4, 0)


def test_nothing_to_descend_is_no_step():
    x, residual = rl.conjugate_gradient(lambda v: v, np.zeros(3), 5)
    assert not x.any() and not residual.any()


def test_an_ant_whose_state_is_not_finite_is_done():
    pytest.importorskip("mujoco", reason="needs gymnasium[mujoco]")
    environment = rl.Locomotion("ant-vel", [1.0], 2)
    environment.reset(np.random.default_rng(0))
    environment.states[0, environment.model.nq] = 1e200
    _, reward, done = environment.step(np.zeros((1, 2, 8)))
    assert done.tolist() == [[True, False]]


@pytest.mark.parametrize(
    "task, low, high, mean",
    [("cheetah-vel", 0, 2, 1), ("ant-vel", 0, 3, 1.5), ("cheetah-dir", -1, 1, 0), ("ant-dir", -1, 1, 0)],
)
def test_goals_are_drawn_over_their_whole_range(task, low, high, mean):
    goals = rl.drawn_goals(task, np.random.default_rng(0), 4000)
    assert low <= goals.min() < low + 0.01 and high - 0.01 < goals.max() <= high
    assert abs(goals.mean() - mean) < 0.07
    assert task.endswith("vel") or set(goals) == {-1, 1}


def test_navigations_goals_fill_the_square():
    goals = rl.drawn_goals("navigation", np.random.default_rng(0), 4000)
    assert goals.min(axis=0).max() < -0.49 and goals.max(axis=0).min() > 0.49
    quadrants = np.bincount((goals > 0) @ [2, 1], minlength=4) / 4000
    assert np.abs(quadrants - 0.25).max() < 0.03


@pytest.mark.parametrize(
    "task, goals",
    [
        ("navigation", [[-0.082978, 0.220324], [-0.499886, -0.197667]]),
        ("cheetah-vel", [0.834044, 1.440649, 0.000229]),
        ("ant-vel", [1.251066, 2.160973, 0.000343]),
        ("cheetah-dir", [-1, 1, -1, -1]),
        ("ant-dir", [-1, -1, 1, -1]),
    ],
)
def test_the_authors_test_goals(task, goals):
    assert np.allclose(rl.test_goals(task, len(goals)), goals, atol=1e-6)


def test_features_and_batches_are_as_the_authors_have_them():
    o = np.zeros((1, 1, 3, 2))
    phi = rl.features(o)
    assert np.allclose(phi[0, 0, 2, 4:], [0.02, 0.0004, 0.000008, 1])
    assert rl.features(o - 20)[0, 0, 0, :4].tolist() == [-10, -10, 100, 100]
    rng = np.random.default_rng(0)
    episodes = rl.Episodes(
        rng.normal(size=(1, 4, 9, 2)),
        rng.normal(size=(1, 4, 9, 1)),
        rng.normal(size=(1, 4, 9)),
        np.ones((1, 4, 9)),
    )
    values = rl.baseline(episodes.observations, rl.discounted(episodes.rewards, 0.9), episodes.mask)
    expected = rl.advantages(episodes.rewards, values, episodes.mask, 0.9, 0.5) / 36
    assert error(rl.batch_of(episodes, 0.9, 0.5)[1][..., 1].ravel(), expected.ravel()) < 1e-12


def test_the_line_search_keeps_to_the_limit_and_damping_counts():
    def far(trial):
        return -1.0, float(trial @ trial)

    b, identity = np.ones(2), lambda v: v
    theta, j, divergence = rl.trust_region_step(np.zeros(2), 0.0, b, identity, far, 0.02, 5, 0.0, 0.5, 9)
    assert 0 < divergence <= 0.02 and j == 1
    steps = [
        rl.trust_region_step(np.zeros(2), 0.0, b, product, lambda _: (-1.0, 0.0), 0.02, 5, damping, 0.5, 9)[0]
        for product, damping in ((lambda v: 4 * v, 0.0), (identity, 3.0))
    ]
    assert error(*steps) < 1e-12


@pytest.mark.parametrize(
    "purpose, method", [("test", "maml"), ("validation", "maml"), ("test", "oracle"), ("test", "random")]
)
def test_a_curve_is_of_its_purposes_goals_at_its_rates(purpose, method):
    """alpha, then alpha times --eval-shrink; the oracle is not adapted."""
    which = "--method" if method == "maml" else "--baseline"
    experiment = rl_experiment("navigation", which, method, "--horizon", 5)
    rng, theta = experiment.stream(purpose), experiment.start().theta
    goals = (
        rl.drawn_goals("navigation", rng, 4) if purpose == "validation" else rl.test_goals("navigation", 4)
    )
    rates = [] if method == "oracle" else [0.5, 0.05, 0.05]
    seeds = rng.integers(2**63, size=len(rates) + 1)
    expected = rl.returns_along(experiment.settings, experiment.loss, theta, 2, rates, goals, seeds)
    found = experiment.curve(theta, purpose, 4, 2, 3, 0.1)
    assert found.shape == (len(rates) + 1, 4) and error(found, expected) < 1e-12


@pytest.mark.parametrize("method, score", [("maml", -2), ("oracle", -26.5)])
def test_a_score_is_after_adaptation_where_there_is_some(monkeypatch, method, score):
    asked = []
    experiment = rl_experiment("navigation", "--method" if method == "maml" else "--baseline", method)
    curve = np.array([[-100.0], [-3.0], [-2.0], [-1.0]])
    monkeypatch.setattr(experiment, "curve", lambda _, purpose, *rest: asked.append(purpose) or curve)
    assert experiment.score(None) == score and asked == ["validation"]


@pytest.mark.parametrize(
    "baseline, task, alpha",
    [
        ("pretrained", "cheetah-vel", 0.02),
        ("random", "cheetah-vel", 0.1),
        ("pretrained", "ant-dir", 0.2),
        ("random", "navigation", 0.5),
        ("oracle", "ant-vel", 0.1),
    ],
)
def test_baselines_adapt_at_the_authors_rates(baseline, task, alpha):
    words = ["--task", task, "--baseline", baseline]
    assert rl.settings_of(rl.build_parser().parse_args(words))["alpha"] == alpha


WALK = "--task navigation --horizon 20 --meta-batch 6 --trajectories 10 --hidden 16 --eval-tasks 6".split()
WALK += "--eval-trajectories 5".split()


def rl_command(*words):
    return maml.main([str(word) for word in words], rl)


def test_short_navigation_training_learns_to_adapt(folder, capsys):
    """After 30 meta-iterations a step wins 1.5 in 20 steps, and ends 1.0 above one from the untrained."""
    words = [*WALK, "--alpha", 1, "--max-kl", 0.05, "--eval-tasks", 40, "--results", "r.csv"]
    returns = []
    for more in (["--baseline", "random"], ["--iterations", 30, "--save", "a.npz", "--log", "a.csv"]):
        assert rl_command(*words, *more) == 0
        with open("r.csv") as file:
            rows = list(csv.DictReader(file))
        returns.append([float(row["mean"]) for row in rows])
    assert returns[1][1] > returns[1][0] + 1.5 and returns[1][1] > returns[0][1] + 1
    assert list(rows[0]) == "task method shots step metric mean ci95 median diverged tasks".split()
    assert len(Path("a.csv").read_text().splitlines()) == 31
    out = capsys.readouterr().out
    assert "navigation, maml" in out and "-11.7" not in out  # the authors' figure, of 40 trajectories
    assert rl_command("--evaluate", "a.npz", "--eval-tasks", 4, "--eval-trajectories", 40) == 0
    assert "-11.7" in capsys.readouterr().out


@pytest.mark.parametrize("extra", [["--steps", 2], ["--order", 1], ["--baseline", "oracle"]])
def test_rl_resumes_to_the_bits_of_an_unbroken_run(folder, extra):
    base = [*WALK, "--eval-steps", 1, *extra, "--save"]
    assert rl_command(*base, "whole.npz", "--iterations", 6, "--log", "whole.csv") == 0
    assert rl_command(*base, "part.npz", "--iterations", 5) == 0
    assert rl_command("--resume", "part.npz", "--iterations", 6, "--eval-tasks", 2) == 0
    whole, resumed = arrays("whole.npz"), arrays("part.npz")
    assert all(np.array_equal(whole[key], resumed[key]) for key in ("theta", "iteration", "rng"))


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "--task is missing"),
        ("--task sinusoid", "python maml.py --task sinusoid"),
        ("--task navigation --order 3", "--order"),
        ("--task navigation --alpha -1", "--alpha"),
        ("--task navigation --trajectories 0", "--trajectories"),
        ("--task navigation --discount 2", "share .0 to 1.*2"),
        ("--task navigation --backtrack 1", "--backtrack 1.0 never shortens"),
        ("--task navigation --baseline oracle --steps 1", "--steps is for --method maml"),
        ("--task navigation --method maml --baseline random", "not allowed with"),
        ("--task navigation --save nowhere/a.npz", "nowhere/a.npz"),
        ("--evaluate a.npz --steps 3", "trained with steps 1, not 3"),
        ("--evaluate sinusoid.npz", "not a whole checkpoint"),
        ("--evaluate missing.npz", "no such file"),
    ],
)
def test_bad_use_of_rl_is_one_line(folder, monkeypatch, capsys, words, message):
    if "a.npz" in words:
        rl_command(*WALK, "--iterations", 1, "--eval-steps", 1, "--save", "a.npz")
    if "sinusoid.npz" in words:
        command(*QUICK, "--iterations", 1, "--save", "sinusoid.npz")
    monkeypatch.setattr(rl.Experiment, "meta_iteration", lambda *_: pytest.fail("training began"))
    capsys.readouterr()
    before = contents(folder)
    assert rl_command(*shlex.split(words)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and re.search(message, err) and err.startswith("rl.py: ")
    assert contents(folder) == before


def test_maml_py_names_the_command_of_an_rl_task(capsys):
    assert command("--task", "navigation") == 2
    assert "python rl.py --task navigation" in capsys.readouterr().err


def test_a_policy_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(folder, monkeypatch, capsys):
    monkeypatch.setattr(rl.Experiment, "save_every", 1)
    assert rl_command(*WALK, "--iterations", 2, "--save", "a.npz") == 0
    monkeypatch.setattr(rl, "kl", lambda old, new: np.full(old.shape[:2], 0.0))
    monkeypatch.setattr(rl, "fisher", lambda out: np.full_like(out, np.nan))
    assert rl_command("--resume", "a.npz", "--iterations", 4) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"not finite.*iteration 3.*--max-kl; a.npz holds", message)
    assert int(arrays("a.npz")["iteration"]) == 2


def test_rl_plot_draws_a_picture(folder):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    assert rl_command(*WALK, "--iterations", 1, "--eval-steps", 1, "--plot", "a.png") == 0
    assert Path("a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# Nothing lost -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "--task omniglot --eval-shots 1 3",
        "--task omniglot --shots 3 --query 1",
        "--evaluate a.npz --eval-shots 3",
    ],
)
def test_sizes_that_only_the_table_needs_are_known_before_training(
    folder, glyphs, monkeypatch, capsys, words
):
    command(*GLYPHS, "--data", glyphs, "--iterations", 1, "--eval-steps", 1, "--save", "a.npz")
    monkeypatch.setattr(maml, "train", lambda *_: pytest.fail("training began"))
    capsys.readouterr()
    assert command(*shlex.split(words), "--data", glyphs) == 2
    assert re.search("there are 4: lower the shots", capsys.readouterr().err)


@pytest.mark.parametrize("kind", ["images", "rl"])
def test_a_run_resumed_from_anywhere_to_anywhere_is_the_unbroken_one(folder, glyphs, monkeypatch, kind):
    """Log, best and table, not theta alone; parts end where nothing is due to be measured or saved."""
    if kind == "images":
        monkeypatch.setattr(maml.Experiment, "log_every", 3)
        monkeypatch.setattr(maml, "VALIDATION_TASKS", 16)
        run, base = command, [*GLYPHS, "--data", glyphs, "--ways", 3, "--beta", 0.02]
        data = ["--data", glyphs]
    else:
        monkeypatch.setattr(rl, "VALIDATION_TASKS", 2)
        run, base, data = rl_command, [*WALK, "--max-kl", 0.2], []
    assert run(*base, "--iterations", 11, "--save", "a.npz", "--log", "a.csv", "--results", "a.t") == 0
    assert run(*base, "--iterations", 4, "--save", "b.npz", "--log", "b.csv") == 0
    assert run("--resume", "b.npz", *data, "--iterations", 7, "--save", "c.npz", "--log", "b.csv") == 0
    more = ["--save", "d.npz", "--log", "b.csv", "--results", "b.t", *base[-2:]]
    more += ["--eval-tasks", 40 if kind == "images" else 6]
    more += [] if kind == "images" else ["--eval-trajectories", 5]
    assert run("--resume", "c.npz", *data, "--iterations", 11, *more) == 0
    for one, other in (("a.npz", "d.npz"), ("a.best.npz", "d.best.npz")):
        one, other = arrays(one), arrays(other)
        assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
    for one, other in (("a.csv", "b.csv"), ("a.t", "b.t")):
        assert Path(one).read_text() == Path(other).read_text()


def test_weights_are_evaluated_and_not_resumed(folder, glyphs, capsys):
    words = [*GLYPHS, "--data", glyphs, "--iterations", 2, "--eval-steps", 1, "--save", "a.npz"]
    assert command(*words) == 0
    assert set(arrays("a.best.npz")) == {"theta", "iteration", "settings"}
    assert command("--resume", "a.best.npz", "--iterations", 9, "--data", glyphs) == 2
    assert "a.best.npz holds weights alone" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "words, message",
    [
        ("--save x.npz --results x.npz", "--save and --results are both x.npz"),
        ("--log x.csv --results ./x.csv", "are both ./x.csv"),
        ("--log notes.txt", "notes.txt: not the file of this run"),
        ("--results notes.txt", "notes.txt: not the file of this run"),
        ("--save run.npz", "go on from it with --resume run.npz, or remove it"),
        ("--log /dev/null", "/dev/null: cannot write there .is no regular file"),
        ("--results fifo", "fifo: cannot write there .is no regular file"),
        ("--workers 2", "sinusoid has nothing to spread"),
        ("--filters 3", "--filters is for --task omniglot, miniimagenet"),
    ],
)
def test_files_of_others_and_flags_without_effect_are_refused(folder, monkeypatch, capsys, words, message):
    for name in ("notes.txt", "run.npz"):
        Path(name).write_text("mine")
    os.mkfifo("fifo")
    monkeypatch.setattr(maml, "train", lambda *_: pytest.fail("training began"))
    before, names = contents(folder), sorted(os.listdir())
    assert command(*QUICK, *shlex.split(words)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(message, err)
    assert contents(folder) == before and sorted(os.listdir()) == names


def test_a_link_is_followed_and_permissions_stay(folder):
    Path("real.csv").write_text("task,method,rest\n")
    os.chmod("real.csv", 0o640)
    os.symlink("real.csv", "link.csv")
    assert command(*QUICK, "--results", "link.csv") == 0
    assert os.path.islink("link.csv") and "maml" in Path("real.csv").read_text()
    assert os.stat("real.csv").st_mode & 0o777 == 0o640


@pytest.mark.parametrize("tail", ["40,", "40,,,", "\0\0\0\0", "40,1,1,1,1\nx,1,1,1", "40,0.1,0.2,0.3"])
def test_a_damaged_tail_of_the_log_is_healed(folder, monkeypatch, tail):
    monkeypatch.setattr(maml.Experiment, "log_every", 10)
    command(*QUICK, "--iterations", 60, "--log", "whole.csv")
    command(*QUICK, "--iterations", 30, "--save", "a.npz", "--log", "a.csv")
    with open("a.csv", "a") as file:
        file.write(tail)
    assert command("--resume", "a.npz", "--iterations", 60, "--log", "a.csv") == 0
    assert Path("a.csv").read_text() == Path("whole.csv").read_text()


@pytest.mark.parametrize("shell", ["| head -1", "| true", ">&-", "2>&-", "2>/dev/full", ">/dev/full"])
def test_nobody_needs_to_read_what_is_printed(folder, shell):
    words = [sys.executable, HERE / "maml.py", *QUICK, "--results", "a.csv", "--save", "a.npz"]
    line = f"{shlex.join(map(str, words))} {shell}"
    run = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert "Traceback" not in run.stderr and "Exception" not in run.stderr
    assert len(Path("a.csv").read_text().splitlines()) == 34
    assert int(arrays("a.npz")["iteration"]) == 40


def test_a_table_is_printed_where_its_signs_are_not_known(folder):
    words = [sys.executable, HERE / "maml.py", *map(str, QUICK)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    run = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert run.returncode == 0 and "K = 20" in run.stdout and "Traceback" not in run.stderr


# Nothing silently wrong --------------------------------------------------------------------------


def test_an_image_model_that_diverges_says_so(folder, glyphs, capsys):
    words = ["--iterations", 1, "--eval-steps", 3, "--save", "a.npz"]
    assert command(*GLYPHS, "--data", glyphs, "--net", "mlp", *words) == 0
    assert command("--evaluate", "a.npz", "--data", glyphs, "--alpha", 1e38, "--eval-tasks", 9) == 0
    assert "9 of 9 diverged" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        "--task omniglot --baseline nearest --log a.csv",
        "--task omniglot --baseline random --log a.csv",
        "--task navigation --trajectories 2 --iterations 1",
        "--evaluate walk.npz run.npz",
    ],
)
def test_pictures_of_unusual_runs(folder, glyphs, words, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    small, runs = ["--eval-steps", 1, "--plot", "a.png"], {"omniglot": [*GLYPHS[2:], "--data", glyphs]}
    if "navigation" in words:
        code = rl_command(*WALK, *shlex.split(words), *small)
    elif "evaluate" in words:
        pytest.importorskip("mujoco", reason="needs gymnasium[mujoco]")
        rl_command(*WALK, "--iterations", 1, "--save", "walk.npz")
        rl_command("--task", "cheetah-dir", *WALK[2:], "--iterations", 1, "--save", "run.npz")
        assert rl_command(*shlex.split(words), *small) == 2
        assert "one kind of task" in capsys.readouterr().err
        return
    else:
        code = command(*shlex.split(words), *runs["omniglot"], *small)
    assert code == 0 and Path("a.png").read_bytes()[:4] == b"\x89PNG"


# The README ------------------------------------------------------------------------------------

README = (HERE / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_readme_quotes_the_source():
    page = next(block for block in blocks("python") if block.startswith("def adapt"))
    functions = (maml.adapt, maml.meta_loss, maml.meta_gradient)
    assert page == "\n\n".join(inspect.getsource(function) for function in functions)


OUTSIDE = {
    "np": np,
    "anp": anp,
    "grad": grad,
    "make_hvp": maml.make_hvp,
    "partial": partial,
}
OUTSIDE |= {"value_and_grad": maml.value_and_grad, "NamedTuple": maml.NamedTuple}


def globals_of(code):
    found = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return found.union(*(globals_of(inner) for inner in code.co_consts if inspect.iscode(inner)))


def test_a_function_can_be_copied_out_with_what_the_readme_says_it_needs():
    copied = {}
    table = README.partition("| functions | need |")[2].partition("\n\n")[0]
    rows = [re.findall(r"`([\w.]+)`", cell) for line in table.splitlines() for cell in line.split("|")[1:3]]
    for function, needs in ((name, needs) for names, needs in zip(rows[::2], rows[1::2]) for name in names):
        module, _, name = function.rpartition(".")
        module = importlib.import_module(module or "maml")
        source = "\n".join(inspect.getsource(getattr(module, part)) for part in [*needs, name])
        copied[function] = dict(OUTSIDE)
        exec(source, copied[function])
        used = globals_of(compile(source, function, "exec"))
        assert used <= {*copied[function], *dir(builtins), "__annotations__"}, function
        assert set(needs) <= used, function
    assert len(copied) > 25
    p = problem(sizes=(1, 4, 1))
    for name in ("meta_gradient", "meta_gradient_by_definition", "meta_gradient_recomputed"):
        found = copied[name][name](p.loss, *p.args)[1]
        assert np.array_equal(found, getattr(maml, name)(p.loss, *p.args)[1])


def test_readme_examples_run_and_learn(folder):
    (example,) = [block for block in blocks("python") if not block.startswith("def adapt")]
    assert len(example.splitlines()) <= 25
    names = {}
    exec(example, names)
    assert names["curve"][1] < 0.6 * names["curve"][0] and names["curve"][3] < names["curve"][1]
    assert np.array_equal(names["theta"], names["state"].theta)
    assert error(names["predicted"], names["y"]) < 1


def test_readme_commands_are_understood():
    lines = [
        line.split("#")[0].split("&&")[-1].strip() for block in blocks("bash") for line in block.splitlines()
    ]
    commands = [shlex.split(line)[1:] for line in lines if re.match(r"python (maml|rl).py", line)]
    assert len(commands) > 12
    for name, *words in commands:
        if "--help" not in words:
            {"maml.py": maml, "rl.py": rl}[name].build_parser().parse_args(words)


def test_every_module_is_licensed():
    for path in HERE.glob("*.py"):
        assert path.read_text().startswith("# SPDX-License-Identifier: MIT\n")
