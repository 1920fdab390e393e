# SPDX-License-Identifier: MIT
"""One test a claim: the mathematics first, then the samplers, the command, and the README.

Everything mathematical runs in float64 with relative tolerances and no absolute floor. Finite
differences are central. Problems whose ReLU inputs come near zero are drawn again, so that no
difference steps over a kink.
"""

import builtins
import copy
import csv
import dis
import inspect
import json
import multiprocessing
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from hashlib import md5
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import autograd.numpy as anp
import numpy as np
import pytest
from autograd import grad
from hypothesis import given, settings
from hypothesis import strategies as st

import assets.authors
import assets.tables
import cli
import maml
import nets
import rl
import tasks

HERE = Path(__file__).resolve().parent
settings.register_profile("maml", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("maml")
signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run in the background it is ignored


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


def away_from_kinks(draw, seed=0, distance=2e-3, **how):
    """The first draw(rng) that is: its `points` are [(network, theta, x) where it is differentiated]."""
    draws = (draw(np.random.default_rng([seed, attempt]), **how) for attempt in range(1000))
    return next(p for p in draws if min(distance_to_kink(*point) for point in p.points) > distance)


class Problem:
    """A random network, loss, theta, alpha, support and query, far from every kink for `steps` inner steps.

    theta [P] is shared by the tasks, each [T, P] is not, and v [T, P] is a direction.
    """

    def __init__(
        self, rng, sizes=(2, 3, 1), count=2, examples=(3, 3), classify=False, steps=2, many=False, **how
    ):
        self.rng, self.network = rng, nets.mlp(sizes, **how)
        self.loss = (nets.cross_entropy if classify else nets.mean_squared_error)(self.network)
        size, self.steps = self.network.size, steps
        self.alpha = rng.uniform(0, 0.05, size) if many else 0.05
        self.theta = rng.normal(size=size) / 2
        self.each = rng.normal(size=(count, size)) / 2
        self.v = unit(rng.normal(size=(count, size)))
        self.support, self.query = (self.data(sizes, (count, n), classify) for n in examples)
        self.args = self.theta, self.support, self.query, self.alpha, steps
        adapt = partial(maml.adapt, self.loss, self.theta, self.support, self.alpha)
        pairs = [(self.each, self.support), *((adapt(s), self.support) for s in range(steps))]
        self.points = [(self.network, theta, x) for theta, (x, _) in [*pairs, (adapt(steps), self.query)]]

    def data(self, sizes, shape, classify):
        x = self.rng.normal(size=(*shape, sizes[0]))
        if classify:
            weights = self.rng.integers(0, 3, (*shape, 1))
            return x, weights * np.eye(sizes[-1])[self.rng.integers(0, sizes[-1], shape)]
        return x, self.rng.normal(size=(*shape, sizes[-1]))


problem = partial(away_from_kinks, Problem)


@st.composite
def problems(draw, steps=(2,), normalize=(False, True)):
    ends, batch_norm = st.integers(1, 3), draw(st.sampled_from(normalize))
    return problem(
        draw(st.integers(0, 10**6)),
        sizes=(draw(ends), *draw(st.lists(st.integers(1, 5), max_size=2)), draw(ends)),
        count=draw(st.integers(1, 3)),
        examples=draw(st.tuples(*[st.integers(2 if batch_norm else 1, 4)] * 2)),
        classify=draw(st.booleans()),
        normalize=batch_norm,
        steps=draw(st.sampled_from(steps)),
        many=draw(st.booleans()),
        activation=draw(st.sampled_from([nets.Relu, nets.Tanh])),
    )


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


@given(problems(steps=(0,)))
def test_closed_forms_equal_the_definition_and_finite_differences(p):
    for theta in (p.theta, p.each):
        check_closed_forms(p.loss, theta, *p.support, p.v, 1e-11)
    check_differences(p.loss, p.each, *p.support, p.v)


def test_relu_may_write_into_what_batch_norm_hands_down_and_reads_again():
    p = problem(sizes=(2, 3, 3, 1))
    dense, relu, *rest = p.network.layers
    network = nets.Network([dense, relu, nets.BatchNorm(3, "beta"), *rest], (2,), (1,))
    theta = network.flatten({"beta": np.full(3, 0.5)} | p.network.unflatten(p.theta))
    v = unit(p.rng.normal(size=(len(p.each), network.size)))
    check_closed_forms(nets.mean_squared_error(network), theta, *p.support, v, 1e-10)
    assert relu.forward(None, np.zeros(1))[1](np.ones(1), None)[0] == grad(relu.apply)(0.0) == 0
    assert np.isnan([relu.apply(np.full(1, np.nan)), relu.forward(None, np.full(1, np.nan))[0]]).all()


@pytest.mark.parametrize("first", [nets.Tanh(), nets.BatchNorm(2, "beta"), nets.Dense(2, 2, ("w0",))])
def test_a_network_may_begin_with_any_layer(first):
    p = problem()
    network = nets.Network([first, nets.Dense(2, 1, ("w", "b"))], (2,), (1,))
    theta, loss = p.rng.normal(size=network.size), nets.mean_squared_error(network)
    check_closed_forms(loss, theta, *p.support, p.rng.normal(size=(2, network.size)), 1e-9)


@settings(max_examples=10)
@given(problems())
def test_float32_stays_float32_and_agrees(p):
    (theta,), support, query = single(p.theta), single(*p.support), single(*p.query)
    for loss in (p.loss, hidden(p.loss)):
        for alpha in (0.05, np.float64(0.05), np.array(0.05), np.full_like(theta, 0.05)):
            value, g = maml.meta_gradient(loss, theta, support, query, alpha, 2)
            assert value.dtype == g.dtype == np.float32
            assert maml.curve(loss, theta, support, query, alpha, 1, loss).dtype == np.float32
            assert error(g, maml.meta_gradient(p.loss, p.theta, p.support, p.query, 0.05, 2)[1]) < 1e-3
    each = maml.curve(p.loss, p.theta, p.support, p.query, 0.05, 0, lambda theta, *_: theta[:, 0])
    assert each.shape == (1, len(p.each)), "a metric sees theta [T, P] before adaptation too"


def test_theta_is_laid_out_as_documented():
    network, theta = nets.mlp((1, 40, 40, 1)), np.arange(1761.0)
    assert network.size == 1761 and list(network.shapes) == ["w1", "b1", "w2", "b2", "w3", "b3"]
    arrays = network.unflatten(theta)
    assert np.array_equal(np.concatenate([a.ravel() for a in arrays.values()]), theta)
    assert np.array_equal(network.flatten(dict(reversed(arrays.items()))), theta), "by name, in any order"
    assert all(np.shares_memory(a, theta) for a in arrays.values())
    with refused("the arrays have shapes .*; expected"):
        network.flatten(arrays | {"w1": arrays["w1"].T})
    assert list(nets.mlp((4, 3, 2), normalize=True).shapes) == ["w1", "beta1", "w2", "b2"]
    assert "beta4" in experiment_of("--task omniglot --net mlp").network.shapes
    omniglot, mini = nets.convnet((28, 28, 1), 5), nets.convnet((84, 84, 3), 5, filters=32, pool=True)
    assert nets.convnet((32, 16, 3), 5, pool=True).shapes["w"] == (2 * 64, 5)
    assert omniglot.size == 111_749, "the paper's code adds 4 x 64 biases, which batch norm cancels"
    assert mini.size == 32_773 - 4 * 32, "the same for 32 filters"
    names = ["conv1", "beta1", "conv2", "beta2", "conv3", "beta3", "conv4", "beta4", "w", "b"]
    assert list(omniglot.shapes) == list(mini.shapes) == names


def test_initial_weights_and_the_variances_epsilon_are_the_authors():
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
    arrays = (policy := rl.gaussian_policy(20, 6, (100, 100))).unflatten(policy.init(rng))
    assert 0.95 < np.abs(arrays["w2"]).max() / np.sqrt(6 / 200) <= 1 and not arrays["log_std"].any()
    x = np.array([[[-1.0], [1.0]]])
    assert error(nets.BatchNorm(1, "beta").apply(x, np.zeros(1)), x / np.sqrt(1.001)) < 1e-12


# Convolutional networks ------------------------------------------------------------------------


def image_problem(rng, shape, pool, ways=2, filters=3, tasks=2, n=2, shared=False):
    """A case, loss, theta, x, y, v, of a convolutional network near its start."""
    loss = nets.cross_entropy(nets.convnet(shape, ways, filters, pool))
    theta = loss.network.init(rng, np.float64)
    theta = theta + 0.1 * rng.normal(size=theta.shape if shared else (tasks, theta.size))
    x = rng.normal(size=(tasks, n, *shape))
    y = np.eye(ways)[rng.integers(0, ways, (tasks, n))]
    case = loss, theta, x, y, rng.normal(size=(tasks, theta.shape[-1]))
    return SimpleNamespace(case=case, points=[(loss.network, theta, x)])


@st.composite
def image_problems(draw):
    pool = draw(st.booleans())
    size = st.integers(16, 19) if pool else st.integers(3, 18)
    shape = (draw(size), draw(size), draw(st.sampled_from([1, 3])))
    ways, shots = draw(st.integers(2, 3)), draw(st.integers(1, 2))
    shared, tasks, filters = draw(st.booleans()), draw(st.integers(1, 3)), draw(st.integers(2, 4))
    rng, contrast = np.random.default_rng(draw(st.integers(0, 999))), draw(st.sampled_from([1, 1e-3, 0]))
    loss, theta, x, *rest = image_problem(rng, shape, pool, ways, filters, tasks, ways * shots, shared).case
    return loss, theta, 0.5 + contrast * x, *rest


@given(image_problems(), st.sampled_from([1, nets.BLOCK]))
def test_convolutional_closed_forms_equal_the_definition_in_blocks_of_any_size(case, block):
    """Also of flat images, whose pools are ties."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nets, "BLOCK", block)
        check_closed_forms(*case, 1e-10)


@pytest.mark.parametrize("pool, shape", [(False, (17, 6, 1)), (True, (16, 17, 3))])
def test_convolutional_closed_forms_equal_finite_differences_and_float32s(pool, shape):
    loss, theta, x, y, v = away_from_kinks(image_problem, distance=1e-3, shape=shape, pool=pool).case
    check_differences(loss, theta, x, y, unit(v), 1e-6, h=1e-5)
    for at in (theta, theta[0]):
        value, g, hvp = loss.expand(at, x, y)
        rough, rough_g, rough_hvp = loss.expand(*single(at, x, y))
        found = [rough, rough_g, rough_hvp(*single(v)), rough_hvp(*single(v), total=True)]
        for a, b in zip(found, [value, g, hvp(v), hvp(v, total=True)]):
            assert a.dtype == np.float32 and error(a, b) < 1e-3
        assert loss(*single(at, x, y)).dtype == np.float32


@pytest.mark.parametrize("offset, tolerance", [(100, 1e-4), (1000, 2e-3)])
def test_float32_bears_data_far_from_zero(offset, tolerance):
    rng = np.random.default_rng(0)
    x, norm = offset + rng.normal(size=(2, 5, 9, 9, 1)), nets.BatchNorm(1, "beta")
    for layer in (norm, nets.FirstBlock(nets.Conv(1, 1, "w", 2), norm)):
        w = rng.normal(size=(2, *layer.view))
        assert error(layer.forward(*single(w, x))[0], layer.forward(w, x)[0]) < tolerance


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


def test_cross_entropy_and_softmax_bear_large_outputs():
    out, y = np.array([[[1000.0, -1000.0]]]), np.array([[[0.0, 1.0]]])
    value, u, second = nets.CrossEntropy().expand(out, y)
    assert value == [2000] and u.tolist() == [[[1, -1]]] and np.isfinite(second(out)).all()
    assert nets.CrossEntropy().value(out, y) == [2000] and maml.softmax(out).tolist() == [[[1, 0]]]


# The meta-gradient -----------------------------------------------------------------------------


@given(problems(steps=range(4)))
def test_recursion_equals_definition_and_finite_differences(p):
    value, expected = maml.meta_gradient_by_definition(p.loss, *p.args)
    ways = [partial(maml.meta_gradient, p.loss), partial(maml.meta_gradient, hidden(p.loss))]
    ways += [
        partial(maml.meta_gradient_recomputed, p.loss, kept=kept)
        for kept in np.arange(p.steps + 2, dtype="u1")
    ]
    for way in ways:
        found = way(*p.args)
        assert error(found[0], value) < 1e-11 and error(found[1], expected) < 1e-9
    outer = partial(maml.meta_loss, p.loss, support=p.support, query=p.query, alpha=p.alpha, steps=p.steps)
    assert error(grad(outer)(p.theta), expected) < 1e-9, "autograd through the closed forms' products"
    assert error(expected @ p.v[0], difference(outer, p.theta, p.v[0], h=2e-5)) < 1e-6


@given(st.integers(0, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 10**6))
def test_quadratic_oracle(steps, size, count, seed):
    """Support (theta-c)ᵀA(theta-c)/2, query (theta-d)ᵀB(theta-d)/2: (I - A diag alpha)^k B (theta_k - d)."""
    rng = np.random.default_rng(seed)
    alpha, theta = rng.uniform(0, 0.3, size), rng.normal(size=size)

    def bowl(theta, centre, matrix):
        return 0.5 * anp.einsum("ti,tij,tj->t", theta - centre, matrix, theta - centre)

    (c, d), (a, b) = rng.normal(size=(2, count, size)), rng.normal(size=(2, count, size, size))
    a, b = a @ a.mT, b @ b.mT + np.eye(size)
    jacobian = np.linalg.matrix_power(np.eye(size) - alpha[:, None] * a, steps)  # of theta_k, by theta
    adapted = c + np.einsum("tij,tj->ti", jacobian, theta - c)
    expected = np.einsum("tji,tjk,tk->i", jacobian, b, adapted - d) / count
    _, g = maml.meta_gradient(bowl, theta, (c, a), (d, b), alpha, steps)
    assert error(g, expected) < 1e-10


# The family ------------------------------------------------------------------------------------


@given(problems())
def test_first_order_and_joint_training_are_gradients_where_they_say(p):
    adapted = maml.adapt(p.loss, p.theta, p.support, p.alpha, p.steps)
    for (value, g), theta, data in [
        (maml.meta_gradient(p.loss, *p.args, order=1), adapted, p.query),
        (maml.joint_gradient(p.loss, p.theta, p.support, p.query), p.theta, p.support),
    ]:
        assert error(g, p.loss.grad(theta, *data).mean(axis=0)) < 1e-12
        assert error(value, p.loss(theta, *data).mean()) < 1e-12


@given(problems())
def test_meta_sgd_is_the_gradient_by_theta_and_alpha(p):
    alpha = p.alpha + np.zeros_like(p.theta)
    args = hidden(p.loss), p.theta, p.support, p.query, alpha, p.steps
    both = np.concatenate([p.theta, alpha])
    value, g = maml.meta_sgd_gradient(p.loss, both, p.support, p.query, p.steps)
    assert error(value, maml.meta_loss(*args)) < 1e-12
    assert error(g, np.concatenate([grad(maml.meta_loss, i)(*args) for i in (1, 4)])) < 1e-9


@given(problems(normalize=(False,)))
def test_reptile_is_the_way_from_the_adapted_parameters(p):
    value, g = maml.reptile_gradient(p.loss, *p.args)
    both = [np.concatenate(pair, axis=1) for pair in zip(p.support, p.query)]
    adapted = maml.adapt(hidden(p.loss), p.theta, both, p.alpha, p.steps)
    assert error(g, p.theta - adapted.mean(axis=0)) < 1e-10
    assert error(value, p.loss(adapted, *p.query).mean()) < 1e-12
    data = 2 * [np.ones((20, 1), np.float32)]
    theta = data[0][:2, 0] / 3
    _, g = maml.reptile_gradient(lambda theta, *_: theta[:, 0] ** 2, theta, data, data, 0.1, 1)
    assert g[0] > 0 == g[1], "what no task moves stays, which Adam else would move far"


# The outer loop --------------------------------------------------------------------------------


def test_adam_is_its_equation():
    state, theta, m, v = maml.State.start(np.array([1.0, -2.0])), np.array([1.0, -2.0]), 0, 0
    for t, g in enumerate(np.random.default_rng(0).normal(size=(5, 2)), 1):
        state = maml.adam(state, g, 0.1)
        narrow = maml.adam(maml.State.start(*single(theta)), *single(g), np.float64(0.1))
        assert narrow.theta.dtype == np.float32
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        theta = theta - 0.1 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-8)
        assert error(state.theta, theta) < 1e-14 and state.iteration == t


def threaded(number):
    return [*cli.threads()(abs, [number])]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")  # which is what is tested
def test_parcels_are_a_mean_of_a_seed_and_a_count_each_and_the_same_bits_on_any_executor():
    sample = partial(tasks.sinusoid, shots=5, query_shots=6, dtype=np.float64)

    def means(support, query):
        return support[1].mean(), query[1].mean(axis=0)

    def found(parcel, map=map):
        return maml.mean_over_parcels(means, sample, np.random.default_rng(1), 7, parcel, map)

    seeds = np.random.default_rng(1).integers(2**63, size=3)
    drawn = [sample(np.random.default_rng(seed), count) for seed, count in zip(seeds, (3, 3, 1))]
    joined = [[np.concatenate(arrays) for arrays in zip(*pairs)] for pairs in zip(*drawn)]
    assert all(error(a, b) < 1e-12 for a, b in zip(found(3), means(*joined)))
    with ThreadPoolExecutor(2) as pool:
        assert all(map(np.array_equal, found(3), found(3, pool.map)))
    assert [*cli.threads()(abs, [-1])] == [1]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        answer = pool.apply_async(threaded, [-2])
        assert answer.get(timeout=300) == [2], "a forked worker makes threads of its own"
    whole = means(*sample(np.random.default_rng(1), 7))
    assert all(map(np.array_equal, found(None), whole)) and all(map(np.array_equal, found(7), whole))


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


def test_memory_of_a_20_way_task_hardly_grows_with_the_steps():
    images, peaks = np.random.default_rng(0).integers(256, size=(20, 2, 28, 28, 1)).astype(np.uint8), []
    for steps in (2, 10):
        experiment = experiment_of("--task omniglot --ways 20 --filters 16 --steps", steps)
        experiment.images = {"train": images}
        batch = experiment.sample("training", 1, 1)(np.random.default_rng(0), tasks=1)
        peaks.append(peak_memory(experiment.outer_gradient(), experiment.start().theta, *batch))
    assert peaks[1] < 1.3 * peaks[0]


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
        share = (values - low) / (high - low)
        assert 0 <= share.min() < 0.01 and 0.99 < share.max() <= 1
        assert abs(share.mean() - 0.5) < 4 / 12**0.5 / 4000**0.5 and abs(share.std() * 12**0.5 - 1) < 0.04
    again = tasks.sinusoid(np.random.default_rng(0), 4000, 3, 2)[0]
    assert again[0].dtype == np.float32 and np.array_equal(again[1], support[1].astype(np.float32))


# Images ----------------------------------------------------------------------------------------

PARTS = ("images_background", "images_evaluation")
SPLITS = ("train", "val", "test")
OTHERS = ["/escaped/a/b/c.png", "../../escaped/a/b/c.png", "images_background/../../escaped/c.png"]
OTHERS += ["__MACOSX/._0000_01.png", f"{PARTS[0]}/a/b/{'c' * 60_000}.png", f"{PARTS[0]}/a/b\n/c.png"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def leftovers(*folders):
    """Caches and temporary files in the folders and where caches go instead."""
    folders = [*folders, Path(os.environ["XDG_CACHE_HOME"])]
    return [file for folder in folders for file in folder.rglob("*") if file.suffix in (".npy", ".tmp")]


def refused(message):
    """A ValueError of one line that matches."""
    return pytest.raises(ValueError, match=rf"\A.*({message}).*\Z")


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


@cache
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
            images = {name: files[name] for name in sorted(files, reverse=True) if name.startswith(part)}
            for name, data in (dict.fromkeys(OTHERS, b"no image") | images).items():
                archive.writestr(name, data)
    return folder


def photographs(folder, counts=(4, 4, 4)):
    image, rng = pytest.importorskip("PIL.Image"), np.random.default_rng(0)
    sizes = (30, 40), (84, 84), (120, 90)
    for split in SPLITS:
        for c, count in enumerate(counts):
            (folder / split / f"n{c}").mkdir(parents=True)
            for i in range(count):
                colours = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
                picture = image.fromarray(colours).resize(sizes[i % 3], image.Resampling.NEAREST)
                picture.save(folder / split / f"n{c}" / f"{i}.{'JPEG' if i % 2 else 'png'}")
    return folder


def stamped(classes=6, each=5, size=6, channels=1):
    """Images whose corner pixel is their number, uint8 [classes, each, size, size, channels]."""
    images = np.zeros((classes, each, size, size, channels), np.uint8)
    images[:, :, 0, 0, 0] = np.arange(classes * each).reshape(classes, each)
    return images


def same(a, b):
    return all(np.array_equal(a[split], b[split]) for split in SPLITS)


@given(st.tuples(*[st.integers(1, 4)] * 4), *[st.integers(0, 2)] * 2, st.integers(0, 99), st.booleans())
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
    turns = found.any(axis=2).argmax(axis=-1)
    assert 0.2 < (turns[:, 1:] == turns[:, :1]).mean() < 0.3, "each by its own"


def test_every_class_and_image_is_as_likely_in_every_place():
    images = stamped(5, 4)
    (x, _), (xq, _) = tasks.few_shot(np.random.default_rng(0), images, 8000, 2, 1, 1)
    for place in np.concatenate([x, xq], axis=1)[..., 0, 0, 0].T:
        counts = np.bincount(np.rint(255 * place).astype(int), minlength=20)
        assert abs(counts - 400).max() < 100  # with a deviation of 19.5
        assert ((counts - 400) ** 2 / 400).sum() < 50  # chi-squared with 19 degrees: p = 1e-4
    numbers = np.rint(255 * x[..., 0, 0, 0]) % 4
    assert abs((numbers[:, 0] == numbers[:, 1]).mean() - 1 / 4) < 0.03, "each class's is drawn on its own"


def test_floats_pass_unscaled():
    images = np.random.default_rng(0).random((3, 2, 4, 4, 1))
    for dtype in (np.float32, np.float64):
        (x, y), _ = tasks.few_shot(np.random.default_rng(1), images, 5, 3, 1, 1, dtype=dtype)
        assert x.dtype == y.dtype == dtype and np.isin(x, images.astype(dtype)).all()


def test_labelled_images_carry_their_class_and_so_does_the_nearest():
    images = np.arange(12, dtype=np.uint8).reshape(4, 3, 1, 1, 1) * 10
    (x, y), _ = tasks.labelled(np.random.default_rng(0), images, 1, 50, 6)
    assert x.shape == (1, 50, 1, 1, 1) and x.dtype == y.dtype == np.float32
    assert np.array_equal(y[0].argmax(axis=-1), np.round(x.ravel() * 255 / 10).astype(int) // 3)
    assert len(np.unique(x)) == 12, "any image of a class"
    support = np.array([[[0, 0], [240, 0], [0, 240]]], np.uint8), np.eye(3)[None]
    query = np.array([[[160, 0], [80, 160], [8, 0]]], np.uint8)
    assert tasks.nearest(support, (query, None)).argmax(axis=-1).tolist() == [[1, 2, 0]]


def test_a_large_mapped_file_does_not_stay_resident(tmp_path):
    np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint8, (30, 150, 84, 84, 3))[:] = 7
    images = tasks.Split(tmp_path / "a.npy", 0, 30)
    x = tasks.few_shot(np.random.default_rng(0), images, 2, 5, 1, 15)[0][0]
    assert np.allclose(x, 7 / 255)
    assert str(tmp_path / "a.npy") not in Path("/proc/self/smaps").read_text()
    np.save(tmp_path / "a.npy", np.ones((30, 20), np.uint8))
    with pytest.raises(OSError, match="a.npy was replaced by other images"):
        images[0]


def test_zips_and_folders_in_any_order_become_area_averages_of_the_ink(tmp_path):
    files, inks = drawn()
    a = tasks.load_omniglot(zipped(tmp_path / "zips", files))
    b = tasks.load_omniglot(unpacked(tmp_path / "folders", files))
    assert same(a, b) and not list(tmp_path.rglob("*escaped*"))
    assert [(len(split), split.dtype) for split in a.values()] == [(n, np.uint8) for n in (5, 0, 3)]
    names = [sorted(inks)[i] for i in np.random.default_rng(0).permutation(8)]
    for name, found in zip(names, np.concatenate(list(a.values())), strict=True):
        fine = inks[name].repeat(4, 1).repeat(4, 2)  # 420 = 28 * 15
        means = fine.reshape(4, 28, 15, 28, 15, 1).mean((2, 4))
        assert abs(found / 255 - means).max() <= 0.5001 / 255
    sent = pickle.dumps(a["test"])
    assert len(sent) < 500 and np.array_equal(pickle.loads(sent), a["test"])


def test_omniglots_characters_are_split_as_the_authors_code_does(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", np.zeros((1623, 64), np.uint8))
    monkeypatch.setattr(tasks, "_part", lambda _, name: (name, None))
    monkeypatch.setattr(tasks, "_cached", lambda *_: tasks.Split(tmp_path / "a.npy"))
    assert [len(split) for split in tasks.load_omniglot("a").values()] == [1100, 100, 423]


def test_a_cache_that_is_not_what_was_written_is_refused(tmp_path):
    images = np.ones((30, 20, 28, 28, 1), np.uint8)  # several times what a file buffers

    def build():
        yield from images
        (part,) = leftovers(tmp_path)
        with part.open("r+b") as file:
            file.seek(5000)
            file.write(b"\0")

    with pytest.raises(ValueError, match="not what was written"):
        tasks._cached(tmp_path, "a", ["key"], lambda: (images.shape, build()))


@pytest.mark.parametrize("layout", [zipped, unpacked])
def test_the_cache_is_reused_and_made_again_when_it_must_be(tmp_path, monkeypatch, layout):
    splits = tasks.load_omniglot(layout(tmp_path, drawn()[0]))
    first = {name: np.array(split) for name, split in splits.items()}
    cache = tmp_path / "omniglot.npy"
    whole, decode = cache.read_bytes(), Mock(wraps=tasks._characters)
    monkeypatch.setattr(tasks, "_characters", decode)
    assert same(first, tasks.load_omniglot(tmp_path)) and not decode.called
    other_header = whole.replace(b"|u1", b"|i1", 1), whole.replace(b"False", b"True ", 1)
    cut = whole[:-1], whole[:-32], whole[:500], b"", whole[:40] + whole[60:], bytes(len(whole))
    for broken in (*cut, *other_header):
        decode.reset_mock()
        cache.unlink()
        cache.write_bytes(broken)
        assert same(first, tasks.load_omniglot(tmp_path)) and decode.called and cache.read_bytes() == whole
    decode.reset_mock()
    other = drawn()[0] | {sorted(drawn()[0])[0]: png(glyph(99)[0])}
    assert not same(first, tasks.load_omniglot(layout(tmp_path, other))) and decode.called
    if layout is unpacked:
        decode.reset_mock()
        os.utime(tmp_path / sorted(other)[0], (0, 0))
        assert tasks.load_omniglot(tmp_path) and decode.called
    assert leftovers(tmp_path) == [cache]


def test_where_no_cache_can_be_written_it_goes_to_a_home_if_there_is_one(tmp_path, monkeypatch):
    folder = zipped(tmp_path, drawn()[0])
    (folder / "omniglot.npy").mkdir()
    first = tasks.load_omniglot(folder)
    (cache,) = leftovers()
    assert leftovers(folder) == [folder / "omniglot.npy", cache]
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "_write", None)
        assert same(first, tasks.load_omniglot(folder))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("Could not determine home directory.")))
    with refused(r"[^ ]*omniglot.npy: cannot be written \(Is a directory"):
        tasks.load_omniglot(folder)
    (folder / "omniglot.npy").rmdir()
    assert same(first, tasks.load_omniglot(folder))


good = png(glyph(0)[0])
HUGE = good[:8] + chunk(b"IHDR", struct.pack(">2I5B", 9000, 9000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"")
ZIP, DRAWING = "images_evaluation.zip", "images_background/Script0/character02/0002_01.png"
DECODE = f"{DRAWING}: does not decode"
WHOLE = b"zip" * 30_000
DIGESTS = {"a.zip": md5(WHOLE).hexdigest(), "b.zip": md5(WHOLE).hexdigest()}


def test_a_download_is_whole_and_shown_and_not_repeated(folder, capsys):
    unpacked(folder, {"new/a.zip": b"my own", "there/b.zip": WHOLE})
    tasks.download_omniglot("new", f"file://{folder}/there", DIGESTS)
    assert Path("new/a.zip").read_bytes() == b"my own" and Path("new/b.zip").read_bytes() == WHOLE
    assert "b.zip: 1 MB\n" in capsys.readouterr().err
    tasks.download_omniglot("new", "file:///nowhere", DIGESTS)
    assert sorted(os.listdir("new")) == ["a.zip", "b.zip"]
    tasks.download_omniglot(unpacked(folder / "unpacked", drawn()[0]), "file:///nowhere")


@pytest.mark.parametrize("there", ["cut", "changed", "missing", "endless", "silent"])
def test_a_failed_download_says_what_to_fetch_and_leaves_nothing(folder, capsys, there):
    unpacked(folder, {"cut/a.zip": WHOLE[:-7], "changed/a.zip": WHOLE[:-1] + b"q", "endless/a.zip": b""})
    os.truncate("endless/a.zip", 33 << 20)
    reasons = {"missing": "No such file", "silent": "timed out"}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host = f"http://127.0.0.1:{silent.getsockname()[1]}" if there == "silent" else f"file://{folder}"
        address, reason = f"{host}/{there}", reasons.get(there, "MD5")
        with refused(f"cannot fetch {address}/a.zip .*{reason}.*; fetch it and put it into new"):
            tasks.download_omniglot("new", address, DIGESTS, timeout=0.2)
    assert not os.path.exists("new") or os.listdir("new") == []
    assert there != "endless" or capsys.readouterr().err.endswith(" 32 MB\n")


def test_the_command_fetches_what_its_own_folder_lacks_and_tries_again(folder, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "download_omniglot", fetch := Mock(side_effect=ValueError("no network")))
    words = "--task omniglot --ways 2 --net mlp --baseline nearest --eval-tasks 2"
    assert command(words) == 2 and capsys.readouterr().err.startswith("maml.py: no network; or name")
    os.makedirs("data/omniglot")
    fetch.side_effect = lambda path: zipped(Path(path), drawn(40, 3)[0])
    assert command(words) == 0 and [call.args for call in fetch.call_args_list] == [("data/omniglot",)] * 2
    assert command(words, "--data nowhere") == 2 and fetch.call_count == 2


def test_photographs_are_resized_as_pillow_does_it_and_cut_to_the_smallest_class(tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    photographs(tmp_path)
    (tmp_path / "val" / "n0" / "._0.JPEG").write_bytes(b"left by another system")
    (tmp_path / "val" / ".hidden").mkdir()
    splits = tasks.load_miniimagenet(tmp_path)
    assert "3 of 3 classes\n" in capsys.readouterr().err
    for split, images in splits.items():
        assert images.shape == (3, 4, 84, 84, 3) and images.dtype == np.uint8
        for found, file in zip(np.concatenate(images), sorted((tmp_path / split).glob("n*/[!.]*"))):
            expected = image.open(file).convert("RGB").resize((84, 84), image.Resampling.LANCZOS)
            assert (found == np.asarray(expected)).all()
    assert {file.name for file in leftovers(tmp_path)} == {f"miniimagenet-{split}.npy" for split in SPLITS}
    assert same(splits, tasks.load_miniimagenet(tmp_path)) and capsys.readouterr().err == ""
    os.utime(tmp_path / "val" / "n0" / "0.png", (0, 0))
    assert tasks.load_miniimagenet(tmp_path) and "val: 3 of 3 classes\n" in capsys.readouterr().err
    os.unlink(tmp_path / "val" / "n1" / "3.JPEG")
    assert tasks.load_miniimagenet(tmp_path)["val"].shape[:2] == (3, 3), "cut to the smallest class"
    assert "every class is cut to the 3 images of n1" in capsys.readouterr().err


def test_photographs_of_any_mode_become_rgb_and_keep_their_greys(tmp_path):
    image = pytest.importorskip("PIL.Image")
    grey = np.linspace(0, 65535, 84 * 84).reshape(84, 84).astype(np.uint16)
    for split in [f"{split}/a\u3000\u200d\udce9" for split in SPLITS]:
        (tmp_path / split).mkdir(parents=True)
        for mode in ("L", "P", "RGBA", "1", "LA"):
            image.new(mode, (9, 9)).save(tmp_path / split / f"{mode}.png")
        image.new("CMYK", (9, 9)).save(tmp_path / split / "cmyk.jpg")
        (exif := image.Exif())[0x0112] = 6  # stored lying, shown upright
        image.fromarray(np.rot90(grey)).save(tmp_path / split / "0.png", exif=exif)
        image.new("I;16", (9, 9), 300).save(tmp_path / split / "00.png", transparency=300)
    found = tasks.load_miniimagenet(tmp_path)["val"]
    assert found.shape == (1, 8, 84, 84, 3) and (found[0, 0] == (grey >> 8)[..., None]).all()
    assert (found[0, 1] == 255).all(), "what is transparent is white"


@pytest.mark.parametrize(
    "name, harm, line",
    [
        (DRAWING, os.unlink, "/character02: 3 images, where others have 4; fetch"),
        (DRAWING, good[:-12], f"{DECODE}.*unpack"),
        (ZIP, lambda file: zipped(file.parent, drawn()[0] | {DRAWING: good[:-12]}), f"{DECODE}.*unpack"),
        (DRAWING, good[:70] + bytes([good[70] ^ 1]) + good[71:], f"{DECODE}.*Error -3.*fetch"),
        (DRAWING, png(glyph(0)[0], header=(105, 105, 8, 0, 0, 0, 0)), f"{DECODE}.*not a 1-bit"),
        (DRAWING, png(glyph(0)[0][:104]), f"{DECODE}.*pixel data"),
        (DRAWING, png(np.zeros((106, 105), bool)), f"{DECODE}.*pixel data"),
        (DRAWING, png(glyph(0)[0], kind=1), f"{DECODE}.*filtered pixel data"),
        (DRAWING, good[:33] + chunk(b"IDAT", zlib.compress(bytes(1575))[:-4]) + good[-12:], "incomplete"),
        (ZIP, os.unlink, "neither images_evaluation.zip nor images_evaluation/.*fetch https"),
        (ZIP, lambda file: os.truncate(file, file.stat().st_size - 3000), "no whole zip file.*fetch https"),
        (ZIP, lambda file: shutil.copy(file.parent / f"{PARTS[0]}.zip", file), "holds no images_eval.*fetch"),
        (ZIP, lambda file: file.write_bytes(file.read_bytes().replace(b"IEND", b"IENX")), "png:.*CRC.*fetch"),
        ("train/n1/1.JPEG", lambda file: os.truncate(file, 400), "1.JPEG: does not decode .*; replace or"),
        ("train/n1/0.png", HUGE, r"0.png: does not .* \(9000x9000 pixels, and 2"),
        ("val/empty", os.mkdir, "val/empty: no JPEG"),
        ("test", shutil.rmtree, "test: cannot be read .*No such file or directory.*should be a folder of"),
        ("test", lambda file: [*map(shutil.rmtree, file.iterdir())], "test: no folders; it should hold one"),
    ],
)
def test_what_is_wrong_with_images_is_named(tmp_path, name, harm, line):
    layout = {ZIP: partial(zipped, kind=zipfile.ZIP_STORED), DRAWING: unpacked}.get(name)
    layout(tmp_path, drawn()[0]) if layout else photographs(tmp_path)
    harm(tmp_path / name) if callable(harm) else (tmp_path / name).write_bytes(harm)
    with refused(line):
        (tasks.load_omniglot if layout else tasks.load_miniimagenet)(tmp_path)
    others = {f"miniimagenet-{split}.npy" for split in SPLITS if not name.startswith(split)}
    assert {file.name for file in leftovers(tmp_path)} <= others


FUZZ = int(os.environ.get("MAML_FUZZ", 40))  # MAML_FUZZ=10000 python -m pytest -k no_damage
HOSTILE = [os.mkdir, os.mkfifo, lambda path: path.symlink_to(path)]
HOSTILE += [partial(os.symlink, to) for to in ("nothing", "/dev/zero", HERE / "README.md")]


@contextmanager
def harmed(data, path, *errors):
    """In place of a file its bytes cut, overwritten, inserted, or others altogether; or no file of data.

    What is done with it may fail with one of these errors, of one line.
    """
    good = path.read_bytes()
    start = data.draw(st.integers(0, 1 << 30)) % len(good)
    stop = start + data.draw(st.sampled_from([0, 1, 9, 40, 1 << 30]))
    bad = data.draw(st.sampled_from([good[:start], b""])) + data.draw(st.binary(max_size=40)) + good[stop:]
    path.unlink()
    data.draw(st.sampled_from(HOSTILE + 6 * [lambda path: path.write_bytes(bad)]))(path)
    try:
        yield
    except errors as error:
        assert "\n" not in str(error) and len(str(error)) < 600
    finally:
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(good)


@pytest.mark.parametrize("layout", [zipped, unpacked, photographs])
@settings(max_examples=FUZZ)
@given(data=st.data())
def test_no_damage_to_images_is_more_than_one_line(files, layout, data):
    folder, mini = files / "alone" / layout.__name__, layout is photographs
    load, size = (tasks.load_miniimagenet, (84, 84, 3)) if mini else (tasks.load_omniglot, (28, 28, 1))
    if not folder.exists():
        load(layout(folder, (2, 2) if mini else drawn()[0]))
    there = sorted(file for file in folder.rglob("*") if file.is_file())
    with harmed(data, data.draw(st.sampled_from(there)), ValueError, OSError):
        for images in load(folder).values():
            assert images.dtype == np.uint8 and images.shape[2:] == size
            assert np.asarray(images).sum() >= 0
    assert there == sorted(file for file in folder.rglob("*") if file.is_file())


# Arguments -------------------------------------------------------------------------------------


def test_wrong_shapes_dtypes_and_values_are_named():
    p = problem()
    theta, (x, y), _, alpha, _ = p.args
    size, (narrow,), layer = p.network.size, single(theta), nets.Dense(2, 2, ("w", "b"))
    adapt, wide = partial(maml.adapt, p.loss), lambda *data: p.loss(*data).astype(np.float64)
    total = lambda *data: anp.sum(p.loss(*data))  # noqa: E731
    asked = {"tasks": 2, "ways": 2, "shots": 1, "query_shots": 1}
    few_shot = partial(tasks.few_shot, p.rng, **asked)
    direct = maml.meta_loss, maml.meta_gradient_by_definition, maml.reptile_gradient
    ways = [maml.reptile_gradient, *(way for name, way in vars(maml).items() if "meta_gradient" in name)]
    for call, message in [
        (lambda: p.loss(theta[1:], x, y), rf"\({size - 1},\).*\({size},\)"),
        (lambda: p.loss.grad(theta, x[..., :1], y), r"\(2, 3, 1\).*tasks, examples"),
        (lambda: p.network.apply(theta.astype(int), x.astype(int)), "x is int64 and theta int64"),
        (lambda: nets.mlp((1, 1)).apply(np.zeros(2), y[..., 0]), "expected .tasks, examples"),
        (lambda: nets.convnet((5, 5, 3), 2).apply(theta, np.zeros((1, 2, 3, 5, 5))), r"\*\(5, 5, 3\)"),
        (lambda: p.loss.grad(p.each[:1], x, y), r"\(1, 13\).*\(2, 3, 2\)"),
        (lambda: p.loss(theta, x, y[:, :2]), r"\(2, 2, 1\).*\(2, 3, 1\)"),
        (lambda: p.loss(narrow, x, y), "float64.*float32"),
        (lambda: p.loss.grad(theta, x, y.astype(int)), "int64.*float64"),
        (lambda: p.loss.expand(theta, x, y)[2](p.v[:, 1:]), r"\(2, 12\).*\(2, 13\)"),
        (lambda: p.loss.expand(theta, x, y)[2](*single(p.v)), "float32.*float64"),
        (lambda: p.loss.grad(theta, x[:, :0], y[:, :0]), r"\(2, 0, 2\).*not empty"),
        (lambda: nets.Network([layer, layer], (2,), (2,)), "layers share a name among w, b"),
        (lambda: adapt(theta.astype(int), p.support, 0.1, 1), "int64"),
        (lambda: adapt(theta.tolist(), p.support, 0.1, 1), "theta is list"),
        (lambda: adapt(theta[None, None], p.support, 0.1, 1), r"\(1, 1, 13\).*\[P\] or \[tasks, P\]"),
        *[(partial(way, p.loss, p.each, *p.args[1:]), r"\(2, 13\).*floats, \[P\]$") for way in ways],
        (lambda: maml.meta_sgd_gradient(p.loss, np.tile(theta, 2), p.support, p.query, -1), "steps = -1"),
        (lambda: adapt(theta, (x, y[:1]), 0.1, 1), "different numbers of tasks"),
        (lambda: adapt(theta, (x[:0], y[:0]), 0.1, 1), "1 task and 1 example or more"),
        (lambda: maml.meta_loss(wide, theta, (x, y), (x[:1], y[:1]), 0.1, 1), "different numbers"),
        (lambda: maml.meta_gradient(wide, theta, (x, y), (x[:1], y[:1]), 0.1, 1), "different numbers"),
        (lambda: maml.meta_gradient(wide, theta, (x, y), (x[:, :0], y[:, :0]), 0.1, 1), "1 example or more"),
        (lambda: adapt(theta, p.support, theta[1:], 1), r"\(12,\).*\(13,\)"),
        (lambda: adapt(theta, p.support, narrow, 1), "float32.*float64"),
        (lambda: adapt(theta, p.support, theta.tolist(), 1), "alpha is list"),
        *[(partial(adapt, theta, p.support, 0.1, steps), f"steps = {steps}") for steps in (-1, 2.0)],
        (lambda: maml.adapt(total, theta, p.support, 0.1, 1), "one value a task"),
        *[(partial(way, total, theta, p.support, p.query, 0.1, 0), "one value a task") for way in direct],
        (lambda: maml.adapt(wide, narrow, single(x, y), 0.1, 1), "float64.*one value a task, float32"),
        *[(partial(maml.meta_gradient, p.loss, *p.args, n), f"order = {n}; expected 1 or 2") for n in (0, 3)],
        *[(partial(maml.meta_gradient_recomputed, p.loss, *p.args, n), f"kept = {n}") for n in (-1, 1.0)],
        (lambda: maml.curve(wide, theta, (x, y), (x[:1], y[:1]), 0.1, 1, wide), "different numbers"),
        (lambda: maml.adam(maml.State.start(theta), narrow, 0.1), "float32.*expected float64"),
        (lambda: maml.parcels(0), "tasks=0"),
        (lambda: maml.parcels(3, 0), "parcel=0"),
        (lambda: nets.convnet((16, 8, 3), 2, pool=True), "16x16 pixels or more"),
        *[(partial(tasks.sinusoid, p.rng, *n), "=0.*1 or more") for n in ((0, 1, 1), (1, 0, 1), (1, 1, 0))],
        (lambda: tasks.labelled(p.rng, stamped(4), 1, 5, 3), "4 training classes.*3 outputs"),
        (lambda: few_shot(stamped()[:, :, :4], rotate=True), "square"),
        (lambda: few_shot(stamped().astype(np.float32)), r"not all in \[0, 1\]; expected .* divided by 255"),
        (lambda: few_shot(stamped()[..., 0]), "expected .classes, each, height, width, channels"),
        (lambda: tasks.labelled(p.rng, stamped().astype(np.int64), 1, 5, 30), "int64.*uint8, or floats"),
        (lambda: rl.drawn_goals("walker", p.rng, 3), "walker; expected navigation, or"),
        (lambda: rl.Navigation([0.1, 0.2], 1), r"\(2,\); expected \[tasks, 2\]"),
        *[(partial(few_shot, stamped(), **{name: 0}), f"{name}=0.*; expected 1 or more") for name in asked],
    ]:
        with refused(message):
            call()


# The command -----------------------------------------------------------------------------------

QUICK = "--task sinusoid --iterations 40 --meta-batch 3 --eval-tasks 8"
GLYPHS = "--task omniglot --data glyphs --filters 8 --meta-batch 5 --eval-tasks 40"
WALK = "--task navigation --horizon 20 --meta-batch 6 --trajectories 10 --hidden 16"
WALK += " --eval-tasks 6 --eval-trajectories 5"
SMALL_GLYPHS = "--task omniglot --data glyphs --filters 3 --ways 3 --meta-batch 5 --beta 0.02"
SMALL_WALK = "--task navigation --horizon 5 --meta-batch 2 --trajectories 3 --hidden 4 --max-kl 0.2"
COLUMNS = "task method shots step metric mean ci95 median diverged tasks".split()


def words_of(*parts):
    """A command line: texts, which are split at their spaces, and paths and numbers."""
    return [word for part in parts for word in (part.split() if isinstance(part, str) else [str(part)])]


def command(*parts, module=maml):
    return module.main(words_of(*parts))


def process(*parts, module=maml, script=None, stderr=subprocess.PIPE, **options):
    """The command in a process of its own, or a script that imports it."""
    program = ["-c", script] if script else [HERE / f"{module.__name__}.py"]
    words, env = [sys.executable, *program, *words_of(*parts)], os.environ | {"PYTHONPATH": str(HERE)}
    return subprocess.Popen(words, stderr=stderr, text=True, env=env, **options)


def wait_for(condition, process=None, seconds=300):
    deadline = time.monotonic() + seconds
    while not (condition() or process and process.poll() is not None):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory; and few validation tasks, for speed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(maml.ImageExperiment, "validation_tasks", 16)
    monkeypatch.setattr(rl, "VALIDATION_TASKS", 2)
    return tmp_path


@pytest.fixture(scope="module")
def omniglot(tmp_path_factory):
    """A folder in Omniglot's layout: 100 drawn characters of four images, so 67, 6 and 27 classes."""
    return unpacked(tmp_path_factory.mktemp("omniglot"), drawn(100, 4)[0])


@pytest.fixture
def glyphs(folder, omniglot):
    (folder / "glyphs").symlink_to(omniglot)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


def rows_of(path):
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def arrays(path):
    with np.load(path) as file:
        return {key: file[key] for key in file.files}


@pytest.mark.parametrize("kind", [*maml.METHODS, *maml.BASELINES[:3]])
def test_every_method_writes_its_table_and_log_and_evaluates_alike(folder, monkeypatch, capsys, kind):
    monkeypatch.setattr(maml.Experiment, "log_every", 30)
    flag = "--baseline" if kind in maml.BASELINES else "--method"
    assert command(QUICK, flag, kind, "--save a.npz --log log.csv --results results.csv") == 0
    table, rows = capsys.readouterr().out, rows_of("results.csv")
    assert f"sinusoid, {kind}, seed 0" in table and ("0.67 at K = 5" in table) == (kind == "maml")
    assert list(rows[0]) == COLUMNS and re.findall(r"(?m)^ *(\d+)  ", table) == [*map(str, range(11))]
    steps = [(int(row["shots"]), int(row["step"])) for row in rows]
    assert steps == [(shots, step) for shots in (5, 10, 20) for step in range(11)]
    assert all(f"{float(row['mean']):.3f} ± {float(row['ci95']):.3f}" in table for row in rows)
    assert [row["iteration"] for row in rows_of("log.csv")] == ["30", "40"] * (kind != "random")
    assert command("--evaluate a.npz --eval-tasks 8") == 0
    assert capsys.readouterr().out == table
    for name in (kind, "b,.npz"):
        shutil.copy("a.npz", name)
    assert command("--evaluate a.npz", kind, "b,.npz --eval-tasks 2 --results results.csv") == 0
    assert re.findall(r"meta-iterations, (.*)", capsys.readouterr().out) == ["a.npz", "b,.npz"]
    assert [row["model"] for row in rows_of("results.csv")[::33]] == ["a.npz", kind, "b,.npz"]


@pytest.mark.parametrize(
    "module, run",
    [
        *[(maml, f"--task sinusoid --meta-batch 3 --method {method}") for method in ("maml", "meta-sgd")],
        *[(maml, f"{SMALL_GLYPHS} --{x}") for x in ("net conv", "net mlp", "first-order", "method anil")],
        (maml, SMALL_GLYPHS + " --baseline pretrained"),
        *[(rl, f"{SMALL_WALK} --{x}") for x in ("steps 2", "order 1", "baseline oracle")],
        *[(rl, f"{SMALL_WALK} --task {task}") for task in ("cheetah-vel", "ant-dir")],
    ],
)
def test_a_run_resumed_from_anywhere_to_anywhere_is_the_unbroken_one(glyphs, monkeypatch, module, run):
    """Log, best and table, not theta alone; parts end where nothing is due to be measured or saved."""
    if "cheetah" in run or "ant" in run:
        pytest.importorskip("mujoco", reason='needs "gymnasium[mujoco]"')
    monkeypatch.setattr(maml.Experiment, "log_every", 3)
    monkeypatch.setattr(rl, "VALIDATE_EVERY", 3)
    part, data = partial(command, module=module), "--data glyphs" if "glyphs" in run else ""
    table = "--eval-tasks 8 --eval-steps 1" + (" --eval-trajectories 3" if module is rl else "")
    assert part(run, table, "--iterations 11 --save a.npz --log a.csv --results a.table") == 0
    assert part(run, table, "--iterations 4 --save b.npz --log b.csv") == 0
    assert part("--resume b.npz --iterations 7 --save c.npz --log b.csv", table, data) == 0
    assert part("--resume c.npz --iterations 11 --save d.npz --log b.csv --results b.table", table, data) == 0
    np.testing.assert_equal(arrays("a.npz"), arrays("d.npz"))
    if "sinusoid" not in run:
        np.testing.assert_equal(arrays("a.best.npz"), arrays("d.best.npz"))
        assert set(arrays("a.best.npz")) == {"theta", "iteration", "settings"}
        assert part("--evaluate a.best.npz --results best.table", table, data) == 0
        assert Path("a.table").read_text() == Path("best.table").read_text()
        assert part("--evaluate a.npz --results last.table", table, data) == 0
        last = Path("a.table").read_text() == Path("last.table").read_text()
        assert last == np.array_equal(arrays("a.npz")["theta"], arrays("a.best.npz")["theta"])
    for suffix in ("csv", "table"):
        assert Path(f"a.{suffix}").read_text() == Path(f"b.{suffix}").read_text()
    assert {path.suffix for path in glyphs.iterdir()} <= {".npz", ".csv", ".table", ""}  # no log of MuJoCo's


def test_a_resumed_run_may_take_another_outer_step_size(folder):
    """Adam's next step is proportional to it, TRPO's KL below it; a further part keeps it."""
    assert command(QUICK, "--dtype float64 --save a.npz") == 0
    for name, flags in {"kept": "", "tenth": "--beta 0.0001"}.items():
        assert command("--resume a.npz --iterations 41 --eval-tasks 2 --save", f"{name}.npz", flags) == 0
    start, kept, tenth = (arrays(f"{name}.npz")["theta"] for name in ("a", "kept", "tenth"))
    np.testing.assert_allclose(kept - start, 10 * (tenth - start), rtol=1e-9, atol=1e-13)
    assert command("--resume tenth.npz --iterations 42 --eval-tasks 2") == 0
    for name, beta in {"kept": 0.001, "tenth": 0.0001}.items():
        assert cli.load_checkpoint(f"{name}.npz", maml)[0]["beta"] == beta
    assert command(SMALL_WALK, "--iterations 1 --eval-tasks 2 --save w.npz", module=rl) == 0
    assert command("--resume w.npz --iterations 4 --max-kl 1e-4 --log w.csv --eval-tasks 2", module=rl) == 0
    assert all(0 < float(row["kl"]) <= 1e-4 for row in rows_of("w.csv")) and len(rows_of("w.csv")) == 3


def test_a_damaged_tail_of_the_log_is_healed(folder, monkeypatch):
    monkeypatch.setattr(maml.Experiment, "log_every", 10)
    command(QUICK, "--iterations 60 --log whole.csv")
    command(QUICK, "--iterations 30 --save part.npz --log part.csv")
    part, whole = (Path(name).read_text().splitlines(keepends=True) for name in ("part.csv", "whole.csv"))
    tails = ["", "30,", "30,1,1,1,1", "40,9,9,9\n50,9,", "40,,,", "\0\0\0\0", "x,1,1,1", "²,1,1,1"]
    torn = [part[3][:-3], part[3][:-3] + "\0\0\n", "30,,,\n"]
    for kept, tail in [*((4, tail) for tail in tails), *((3, tail) for tail in torn)]:
        shutil.copy("part.npz", "a.npz")
        Path("a.csv").write_text("".join(part[:kept]) + tail)
        assert command("--resume a.npz --save ./a.npz --iterations 60 --log a.csv --eval-tasks 2") == 0
        assert Path("a.csv").read_text() == "".join(whole[:kept] + whole[4:]), tail


@pytest.mark.parametrize(
    "presses, at, save, hint",
    [
        (1, 8, "--save a.npz --log b.csv", "--resume a.npz --log b.csv"),
        (1, 8, "", ""),
        (1, 40, "--save a.npz --log b.csv --results c.csv", "--evaluate a.best.npz --results c.csv"),
        (0, 40, "--save a.npz", "--evaluate a.best.npz"),
        (2, 8, "--save a.npz", ""),
    ],
)
def test_ctrl_c_ends_the_next_iteration_a_second_this(folder, monkeypatch, capsys, presses, at, save, hint):
    """Pressed when it is too late for the checkpoint of the iteration before, or (0) during validation."""
    measure = maml.Experiment.measure

    def press(progress, iteration, outcome):
        for _ in range(presses if iteration == at - 1 else 0):
            os.kill(os.getpid(), signal.SIGINT)

    def pressed(*given):
        signal.raise_signal(signal.SIGINT)
        return measure(*given)

    monkeypatch.setattr(cli.Progress, "show", press)
    monkeypatch.setattr(maml.Experiment, "measure", measure if presses else pressed)
    monkeypatch.setattr(maml.Experiment, "keeps_best", at == 40)
    before = signal.signal(signal.SIGINT, handler := lambda *_: None)
    assert command(QUICK, save, "--eval-shots 5 7") == 130
    assert signal.signal(signal.SIGINT, before) is handler, "given back"
    way_on = f"saved; go on with {hint} --eval-tasks 8 --eval-shots 5 7"
    hint = way_on if save else "nothing was saved (no --save)"
    line = f"interrupted at iteration {at}: {hint}" if presses < 2 else "interrupted"
    assert capsys.readouterr().err.endswith(f"maml.py: {line}\n")
    assert os.path.exists("a.npz") == bool(save)
    if save:
        assert command("--evaluate a.npz --eval-tasks 2") == 0
        assert f" {at if presses < 2 else 0} meta-iterations" in capsys.readouterr().out


def test_the_way_on_after_ctrl_c_has_every_flag_that_no_checkpoint_keeps():
    words = "--data d --results r --plot ./-p.png --workers 2 --eval-tasks 8 --eval-steps 3 --eval-shots 1"
    args = maml.build_parser().parse_args(words.replace("--plot ./", "--plot=").split())
    assert cli.way_on(args, maml, "a.npz", last=False) == f"go on with --resume a.npz {words}"


@pytest.mark.parametrize(
    "module, run, what, lower",
    [(maml, QUICK + " --beta 100", "meta-loss is", "beta"), (rl, WALK, "not finite", "max-kl")],
)
def test_a_diverging_run_says_where_and_keeps_what_was(folder, capsys, monkeypatch, module, run, what, lower):
    monkeypatch.setattr(module.Experiment, "save_every", 1)
    monkeypatch.setattr(rl, "fisher", lambda out: np.full_like(out, np.nan))
    assert command(run, "--save a.npz", module=module) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    said = rf"{what}.*iteration (\d+).*or --{lower}; a.npz.*--evaluate it, or --resume.* lower --{lower}$"
    stopped, saved = int(re.search(said, message)[1]), arrays("a.npz")
    assert int(saved["iteration"]) == stopped - 1 and np.isfinite(saved["theta"]).all()


def test_progress_fits_the_terminal_that_shows_it(monkeypatch):
    shown = Mock(isatty=lambda: True, fileno=lambda: 77)
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(os, "get_terminal_size", {77: os.terminal_size((40, 9))}.get)
    monkeypatch.setattr(time, "monotonic", iter([0.0, 1.0, 1.0, 1.0]).__next__)
    cli.Progress(2, 6, "loss", 9).show(3, (7.0, 0.5))
    (line,) = [call.args[0] for call in shown.write.call_args_list if "loss" in call.args[0]]
    assert line == "\r3/6  loss 0.500  1 s/iteration  0:00:03\033[K"
    monkeypatch.setattr(os, "get_terminal_size", Mock(side_effect=OSError(25, "Inappropriate ioctl")))
    cli.Progress(0, 5, "loss", 1).show(5, 0.5)  # its window was closed: no reason to stop


def test_a_run_needs_neither_the_main_thread_nor_semaphores(glyphs, monkeypatch, capsys):
    for failure in (OSError(30, "Read-only file system"), NotImplementedError("no sem_open")):
        monkeypatch.setattr(cli, "ProcessPoolExecutor", Mock(side_effect=failure))
        assert cli.processes.__wrapped__() is map
        assert command(SMALL_GLYPHS, "--workers 2") == 2
        line = f"--workers: none can be had here ({failure}); leave it out"
        assert capsys.readouterr().err == f"maml.py: {line}\n"
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(command, QUICK).result() == 0


def test_a_log_that_cannot_be_appended_to_is_found_out_first(folder, monkeypatch, capsys, recwarn):
    Path("a.csv").write_text("iteration,loss,before,after\n")
    refusal = Mock(side_effect=PermissionError(13, "Permission denied"))  # which root never meets
    monkeypatch.setattr(cli, "open", lambda path, mode="r", **how: "a" in mode and refusal(), raising=False)
    assert command(QUICK, "--log a.csv") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert cli.guarded("a", Mock(side_effect=cli.BrokenExecutor)) == 1
    assert cli.guarded("a", lambda: np.empty(2**59)) == 1
    assert "a: out of memory; lower --meta-batch" in capsys.readouterr().err
    assert cli.guarded("a", lambda: warnings.warn("of a library", stacklevel=2)) == 0 and not recwarn


def test_evaluation_may_fine_tune_at_another_rate_and_says_what_diverged(glyphs, capsys):
    few = "--eval-tasks 8 --eval-steps 9 --alpha"
    command(QUICK, "--baseline pretrained --save a.npz")
    command(GLYPHS, "--net mlp --iterations 1 --eval-steps 1 --save b.npz")
    with np.errstate(all="raise"):
        assert command("--evaluate a.npz", few, 1e6) == 0
        assert "median inf, 8 of 8 diverged " in capsys.readouterr().out
        assert command("--evaluate b.npz --data glyphs", few, 1e38) == 0
        assert "8 of 8 diverged" in capsys.readouterr().out
    assert command("--evaluate a.npz --results r.csv --eval-shots 5 5", few, 0) == 0
    assert len(rows_of("r.csv")) == 10
    assert len({row["mean"] for row in rows_of("r.csv")}) == 1, "a rate of 0 is one"


@pytest.fixture(scope="module")
def files(tmp_path_factory, omniglot):
    """A folder with good checkpoints and bad ones, and what else a flag may name."""
    folder = tmp_path_factory.mktemp("files")
    good, few = folder / "good.npz", "--iterations 1 --eval-steps 1 --save"
    assert command(QUICK, "--save", good) == 0
    assert command(GLYPHS, "--data", omniglot, "--ways 3", few, folder / "glyphs.npz") == 0
    assert command(WALK, few, folder / "walk.npz", module=rl) == 0
    assert command(QUICK, "--method meta-sgd", few, folder / "sgd.npz") == 0
    cheetah = rl_experiment("cheetah-dir")
    cli.save_weights(str(folder / "cheetah.npz"), cheetah.settings, cheetah.start().theta, 0)
    (folder / "glyphs").symlink_to(omniglot)
    unpacked(folder / "photographs", {f"{split}/a/{i}.png": b"" for split in SPLITS for i in range(16)})
    unpacked(folder, {"own/third/notes.txt": b"", "afile": b"mine", "empty": b"", "lone.best.npz": b""})
    unpacked(folder, {"cut.npz": good.read_bytes()[:-300], "old.csv": b"iteration,loss,before,after\n5"})
    own = "two/a/1.png", "two/2.png", "three/a/1.png", "three/b/1.png", "three/c/1.png", "three/2.png"
    unpacked(folder, dict.fromkeys(own, png(glyph(0)[0])))
    os.mkfifo(folder / "fifo")
    np.savez(folder / "other.npz", weights=np.ones(3))
    np.savez(folder / "pickled.npz", theta=np.array([{}], object), settings="{}")
    saved = arrays(good)
    np.savez_compressed(folder / "bomb.npz", **saved | {"theta": np.zeros(10**7, np.float32)})
    settings = json.loads(saved["settings"].item())
    for name, change in {
        "task": {"settings": json.dumps(settings | {"task": "omelette"})},
        "extra": {"settings": json.dumps(settings | {"help": ""})},
        "old": {"settings": json.dumps(dict(list(settings.items())[:-1]))},
        "endless": {"iteration": np.array(np.inf)},
        "negative": {"iteration": np.array(-1)},
        "shape": {"theta": np.ones(5, np.float32)},
        "dtype": {"theta": np.ones(1761)},
    }.items():
        np.savez(folder / f"{name}.npz", **saved | change)
    return folder


TRAINING = "resume save log iterations".split()
COUNTS = "shots query steps meta-batch iterations eval-tasks eval-steps eval-shots".split()
INNER, FOREIGN = ("--steps", "--order"), ("log afile", "results afile", "log old.csv")
KEPT = {"alpha": 0.01, "seed": 0, "meta-batch": 3}
WRECKS = "afile empty fifo cut.npz other.npz pickled.npz extra.npz endless.npz".split()
BAD = {
    maml: [
        ("--task miniimagenet --data photographs", "pip install pillow$"),
        ("--task sinusoid --plot a.png", "pip install matplotlib$"),
        ("--task omniglot --data glyphs --scheduler nowhere", r'pip install "dask\[distributed\]"$'),
        ("", "--task is missing"),
        ("--task navigation", "navigation is a task of rl.py: give .* to python rl.py"),
        *[(f"--task sinusoid --{flag} 0", f"--{flag}.*0") for flag in COUNTS],
        ("--task sinusoid --shots 1.5", "--shots.*1.5"),
        *[(f"--task sinusoid --alpha={value}", f"--alpha.*{value}") for value in ("-0.1", "inf", "nan", "x")],
        ("--task sinusoid --seed -1", "--seed"),
        ("--task sinusoid --dtype float16", "float16"),
        ("--task sinusoid --method maml --baseline random", "not allowed with"),
        ("--task sinusoid --baseline nearest", "--baseline nearest is for --task omniglot or miniimagenet"),
        ("--task sinusoid --ways 3", "--ways is for --task omniglot, miniimagenet"),
        ("--task sinusoid --data .", "--data is for images"),
        ("--task sinusoid --workers 2", "sinusoid has nothing to spread"),
        ("--task omniglot --baseline oracle", "is for --task sinusoid"),
        ("--task omniglot --data glyphs --ways 7", "7-way task needs 7 classes.* 6: lower the ways"),
        ("--task omniglot --data glyphs --query 9", "train: 1 support and 9 query.* 4: lower the shots"),
        ("--task miniimagenet --data afile", "afile/train: .*should be a folder"),
        ("--evaluate glyphs.npz --data glyphs --eval-shots 1 3", "3 query.* 4: lower the shots"),
        ("--evaluate glyphs.npz --data glyphs --ways 4", "trained with ways 3, not 4; leave the flag out"),
        ("--evaluate glyphs.npz --data glyphs --shots 2", "trained with shots 1, not 2; give --eval-shots"),
        ("--task omniglot --data glyphs --shots 3 --query 1 --eval-shots 1", "val: 3 support and 3 query"),
        ("--adapt own", "needs a trained model"),
        ("--evaluate glyphs.npz --adapt own", "own/third: no JPEG or PNG"),
        ("--evaluate glyphs.npz --adapt photographs/train", "train: no JPEG or PNG: put queries beside"),
        ("--evaluate glyphs.npz --adapt two", "two: 1 classes, and the model is 3-way"),
        ("--evaluate glyphs.npz good.npz --adapt three", "for networks of images, not sinusoid, maml"),
        ("--evaluate sgd.npz --alpha 1", "was trained with alpha 0.01, not 1.0"),
        ("--evaluate glyphs.npz --adapt own --eval-tasks 9", "--eval-tasks does not go with it"),
        *[(f"--evaluate good.npz --{x} 5", f"--{x} does not go") for x in TRAINING],
        ("--evaluate good.npz --ways 3", "--ways is for --task omniglot, miniimagenet"),
        ("--evaluate good.npz --plot a.xyz", "a.xyz: cannot be drawn .Format 'xyz'"),
        ("--evaluate good.npz glyphs.npz --data glyphs --plot b.png", "one kind of task"),
        *[(f"--resume good.npz --{x} 9", f"trained with {x} {was}, not 9") for x, was in KEPT.items()],
        ("--resume good.npz --iterations 10", "at iteration 40"),
        ("--resume glyphs.best.npz --iterations 9 --data glyphs", "glyphs.best.npz holds weights alone"),
        ("--evaluate missing.npz", "no such file"),
        *[(f"--evaluate {name}", "not a whole checkpoint") for name in WRECKS],
        ("--evaluate pickled.npz", "allow_pickle=False"),
        ("--evaluate negative.npz", "its iteration is -1"),
        ("--evaluate old.npz", "it has task, .*seed, where task, .*seed, dtype are expected"),
        ("--evaluate bomb.npz", "it is compressed"),
        ("--evaluate task.npz", "invalid choice: 'omelette'"),
        ("--evaluate shape.npz", r"theta is float32 \(5,\); expected float32 \(1761,\)"),
        ("--evaluate dtype.npz", "theta is float64.*expected float32"),
        *[(f"--task sinusoid --{x} afile/a", "afile/a: cannot write") for x in ("save", "log", "results")],
        ("--task sinusoid --save /proc/self/a.npz", "a.npz: cannot write there"),  # not even by root
        *[(f"--task sinusoid --save {x}", f"{x}: cannot write there .is a folder") for x in (".", "x/")],
        ("--task sinusoid --save good.npz", "go on from it with --resume good.npz, or remove it"),
        *[(f"--task sinusoid --{x}", f"--{x}: not the file of this run") for x in FOREIGN],
        ("--task sinusoid --log /dev/null", "/dev/null: cannot write there .is no regular file"),
        ("--task sinusoid --save x.npz --log x.best.npz", "--save and --log are both x.best.npz"),
        ("--task sinusoid --save lone.npz", "there is a file lone.best.npz"),
        (f"--task sinusoid --log {'x' * 240}", "cannot write there .File name too long"),
        ("--task sinusoid --save=", r"--save.*invalid text \(not empty\) value"),
        ("--task sinusoid --iterations 3000000000", "--iterations.*1 to 2147483647"),
        *[(f"--task omniglot --ways {n}", f"--ways.*2 to 2147483647.*'{n}'") for n in (1, 10**20)],
        ("--task omniglot --workers 2147483647", "--workers.*1 to 1024"),
        ("--task sinusoid --log x.csv --results ./x.csv", "are both ./x.csv"),
    ],
    rl: [
        ("--task ant-vel", r'pip install "gymnasium\[mujoco\]"$'),
        ("--task navigation --first-order --order 2", "--order: not allowed with argument --first-order"),
        ("--task navigation --trajectories 0", "--trajectories"),
        ("--task navigation --discount 2", "share .0 to 1.*2"),
        *[(f"--task navigation --backtrack {x}", f"--backtrack {x}.0 has no shorter step") for x in (0, 1)],
        *[(f"--task navigation --baseline oracle {x} 1", f"{x} .*is for --method maml") for x in INNER],
        ("--evaluate walk.npz cheetah.npz --plot a.png", "one kind of task"),
        ("--evaluate good.npz", "not a whole checkpoint"),
    ],
}


@pytest.mark.parametrize("module, words, message", [(module, *bad) for module in BAD for bad in BAD[module]])
def test_bad_use_is_one_line_and_changes_nothing(files, monkeypatch, capsys, module, words, message):
    if "pip install" in message:
        for name in ("PIL", "PIL.Image", "matplotlib", "distributed", "gymnasium", "mujoco"):
            monkeypatch.setitem(sys.modules, name, None)
    elif "--plot" in words:
        pytest.importorskip("matplotlib", reason="needs matplotlib")
    elif "glyphs.npz --adapt" in words or "three" in words:
        pytest.importorskip("PIL", reason="needs pillow")
    monkeypatch.chdir(files)
    monkeypatch.setattr(module, "train", lambda *_: pytest.fail("training began"))
    before = contents(files)
    assert command(words, module=module) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "characters, where all of Omniglot" not in line]
    assert out == "" and len(lines) == 1
    assert re.search(f"^{module.__name__}.py: .*{message}", lines[0])
    assert contents(files) == before and leftovers(files / "photographs") == []


@pytest.mark.parametrize("shell", ["| true", ">&-", "2>&-", "2>/dev/full", ">/dev/full", ">out"])
def test_nobody_needs_to_read_what_is_printed(folder, monkeypatch, shell):
    """Also a table whose signs the encoding has not is printed, and no file is lost."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    line = shlex.join(words_of(Path(sys.executable), HERE / "maml.py", QUICK, "--results a.csv --save a.npz"))
    run = subprocess.run(["bash", "-c", f"{line} {shell}"], stderr=subprocess.PIPE, text=True, timeout=300)
    assert run.returncode == 0 and "Traceback" not in run.stderr and "Exception" not in run.stderr
    assert len(rows_of("a.csv")) == 33 and int(arrays("a.npz")["iteration"]) == 40
    assert shell != ">out" or "K = 20" in Path("out").read_text()


def test_a_table_that_no_disk_takes_is_printed(folder, monkeypatch, capsys):
    monkeypatch.setattr(cli, "lines_of", Mock(side_effect=OSError(28, "No space left on device")))
    assert command(QUICK, "--results a.csv") == 1 and not os.listdir()
    out, err = capsys.readouterr()
    assert "K = 20" in out and err.endswith("maml.py: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("failure", [OSError(28, "full"), RuntimeError("reentrant call: a signal's")])
def test_what_nobody_reads_is_dropped_from_then_on_but_for_a_line_in_a_signals_way(monkeypatch, failure):
    monkeypatch.setattr(sys, "stderr", stream := Mock(write=Mock(side_effect=failure)))
    tasks.tell("a")
    assert (sys.stderr is stream) == isinstance(failure, RuntimeError)


@pytest.mark.parametrize("module", [maml, rl])
def test_help_gives_every_setting_with_its_default(module, capsys):
    with pytest.raises(SystemExit) as exit:
        command("--help", module=module)
    out = "".join(capsys.readouterr().out.split())  # as lines are broken at hyphens too
    assert exit.value.code == 0 and "--evaluateFILE.npz" in out
    for setting in module.SETTINGS + module.EVALUATION:
        text = "".join(f"{setting.meaning} (default: {setting.shown()})".split())
        assert re.search(rf"{setting.flag}[^-]{{1,25}}{re.escape(text)}", out)


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib", reason="needs matplotlib")


@pytest.mark.parametrize(
    "words, classes, counts, reason",
    [
        ("--shots 5 --query 5 --eval-shots 2", 5, (12, 10, 4), "test: 5 support and 1 query images"),
        ("--baseline pretrained", 65, (20, 20, 20), "train: there are 65 training classes"),
    ],
)
def test_what_images_lack_is_found_out_before_training(
    folder, monkeypatch, capsys, words, classes, counts, reason
):
    images = {s: np.broadcast_to(np.uint8(0), (classes, n, 84, 84, 3)) for s, n in zip(SPLITS, counts)}
    monkeypatch.setattr(tasks, "load_miniimagenet", lambda _: images)
    assert command("--task miniimagenet --data a", words) == 2
    assert f"a, {reason}" in capsys.readouterr().err


def test_a_picture_names_its_models_whatever_their_files_are_called(glyphs, files, monkeypatch):
    text = pytest.importorskip("matplotlib.text", reason="needs matplotlib")
    monkeypatch.setattr(cli, "save_picture", save := Mock(wraps=cli.save_picture))
    names, few = ("_$1_$2.npz", "\udcff.npz"), "--eval-steps 1 --eval-tasks 2 --plot a.png"
    for kind, module, words in [
        ("good", maml, "--eval-shots 1"),
        ("glyphs", maml, "--data glyphs --alpha 1e38"),
        ("walk", rl, "--eval-trajectories 2"),
    ]:
        for name in names:
            shutil.copy(files / f"{kind}.npz", name)
        assert command("--evaluate", names[0], "--evaluate", names[1], words, few, module=module) == 0
        said = [one.get_text() for one in save.call_args[0][1].findobj(text.Text)]
        for shown in ("./_\\$1_\\$2.npz", "\ufffd.npz"):
            times = 2 if kind != "glyphs" or "_" in shown else 1
            assert sum(one.startswith(shown) for one in said) == times
        assert ("diverged" in said) == (kind == "glyphs")


def test_a_picture_of_any_model_shows_the_tables_and_the_logs_figures(matplotlib, glyphs, monkeypatch):
    monkeypatch.setattr(cli, "save_picture", save := Mock(wraps=cli.save_picture))
    images = [f"{GLYPHS} {x}" for x in ("--baseline nearest", "--baseline random", "--ways 3 --iterations 2")]
    for words in (QUICK, *images):
        Path("a.csv").unlink(missing_ok=True)
        few = "--eval-steps 1 --eval-tasks 8 --log a.csv --results r.csv --plot a.png"
        assert command(words, few) == 0 and Path("a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        os.unlink("a.png")
    figures = [[100 * float(row[key]) for key in ("mean", "ci95")] for row in rows_of("r.csv")]
    (line,) = save.call_args[0][1].axes[-1].lines
    assert np.allclose(line.get_ydata(), np.transpose(figures)[0])
    assert "{:.2f} ± {:.2f}".format(*figures[-1]) in line.get_label().replace("\n", " ")
    row = {"mean": 9.0, "ci95": 5.0, "median": 2.0, "diverged": 1, "tasks": 4}
    curves = [("a", 2 * [row]), ("b", 2 * [row | {"median": 3.0, "diverged": 0}])]
    cli.panel(axes := cli.canvas_of(1, 1).subplots(), curves, experiment_of("--task sinusoid"))
    assert [line.get_ydata().tolist() for line in axes.lines] == [[2, 2], [3, 3]], "medians beside a median"
    assert axes.lines[0].get_label() == "a: median 2.000"
    assert np.ptp(axes.collections[0].get_paths()[0].vertices[:, 1]) == 0, "no interval"
    log = ["iteration,loss,before,after", *(f"{i},0,0,{i}" for i in range(1, 121))]
    Path("a.csv").write_text("\n".join(log))
    maml.learning(axes := cli.canvas_of(1, 1).subplots(), "a.csv", 100)
    assert np.allclose(axes.lines[1].get_xydata()[[0, -1]], [[10, 550], [120, 11550]]), "means of ten"


def test_pictures_show_test_tasks_and_what_is_said_of_them(matplotlib):
    experiment, canvas = image_experiment("--task omniglot --ways 3 --shots 4"), cli.canvas_of(9, 9)
    maml.plot_episode(canvas, experiment, experiment.start().theta)
    grid = np.reshape(canvas.axes, (5, 3))
    (x, _), (xq, _) = experiment.sample("test", 4, 1)(experiment.stream("test"), tasks=1)
    for label, (*images, chances) in enumerate(grid.T):
        for axes, image in zip(images, [*x[0, 4 * label :][:3], xq[0, label]], strict=True):
            assert np.array_equal(axes.images[0].get_array(), 1 - image[..., 0])
        verdict = chances.get_title()
        assert verdict.endswith("right") == verdict.startswith(f"class {label + 1},")
    experiment, row = experiment_of("--task sinusoid"), cli.canvas_of(9, 3).subplots(1, 3)
    maml.plot_fits(row, experiment, experiment.start().theta, "a")
    drawn = {line.get_label(): line.get_ydata() for line in row[0].lines}
    assert not np.array_equal(drawn["after 1 step"], drawn["after 10 steps"])


def test_a_path_is_drawn_to_its_end(matplotlib, monkeypatch):
    monkeypatch.setattr(rl, "test_goals", lambda task, count: np.array([[0.2, 0.1], [0.4, 0.2], [0.1, 0.05]]))
    experiment, canvas = rl_experiment("navigation", "--baseline oracle"), cli.canvas_of(9, 3)
    zeros = experiment.policy.unflatten(np.zeros(experiment.policy.size))
    theta = experiment.policy.flatten(zeros | {"log_std": np.full(2, -30.0), "b3": np.array([1, 0.5])})
    rl.plot_paths(canvas, experiment, theta, "oracle")
    for axes, goal in zip(canvas.axes, rl.test_goals("navigation", 3)):
        path = axes.lines[0].get_xydata()
        assert not path[0].any() and np.allclose(path[-1], goal, atol=1e-4)
        assert np.array_equal(axes.lines[-1].get_xydata(), [goal])


def test_scripts_of_assets_draw_pictures(matplotlib, folder, monkeypatch):
    from assets import curves, idea

    monkeypatch.setattr(idea, "ITERATIONS", 2)
    Path("assets").mkdir()
    idea.main()
    Path("a.csv").write_text("iteration,loss,before,after\n500,1.5,0.2,0.3\n")
    curves.main("assets/curves.png", *5 * ["a.csv"])
    assert curves.published(HERE / "assets/weights/cheetah-dir.npz") == ("293.2", 1, "return", "\nsteps: 1")
    given = curves.published(HERE / "assets/weights/omniglot-5way-1shot.npz")
    assert given == ("98.7 ± 0.4", 100, "accuracy in %", "\nsteps: 1; published: after 3")
    assert curves.published(HERE / "assets/weights/sinusoid.npz")[0] == "", "of K = 5, and training has 10"
    curves.plot_curves(canvas := cli.canvas_of(4, 3), [HERE / "assets/weights/omniglot-20way-5shot-log.csv"])
    assert canvas.axes[0].lines[-1].get_ydata()[0] == 98.9 < canvas.axes[0].get_ylim()[1] - 3, "on the frame"
    shutil.copy(HERE / "assets/weights/cheetah-dir.npz", "a.npz")
    curves.main("assets/curves.png", "a.csv")
    assert sorted(os.listdir("assets")) == ["curves.png", "idea.png"]
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in Path("assets").iterdir())
    Path("torn.csv").write_text("iteration,loss,before,after\n500,1,2\n")
    unpacked(folder, {"bad.npz": b"", "bad.csv": b"", "bad-log.csv": b""})
    for script, words, reason in [
        (curves, ("b.png", "none.csv"), "none.csv: .*No such file"),
        (curves, ("b.png", "torn.csv"), "torn.csv: .*damaged"),
        (curves, ("b.png", "bad-log.csv"), "bad.npz: .*damaged"),
        (curves, ("none/b.png", "a.csv"), "none/b.png: cannot write there"),
        (idea, ("--help",), "--help: this script takes no words"),
        (assets.authors, ("a.npy", "none/b.npz"), "OUT.npz none/b.npz: cannot write there"),
    ]:
        with pytest.raises(cli.Unusable, match=reason):
            script.main(*words)


def test_a_benchmark_finds_its_sides_equal_before_it_times_them(monkeypatch, capsys):
    import bench

    monkeypatch.setattr(bench, "torch", None)
    monkeypatch.setattr(bench, "jax", None)
    monkeypatch.setattr(bench, "milliseconds", lambda sides, *_: dict.fromkeys(sides, 1.0))
    bench.main()
    assert capsys.readouterr().out.count("meta-gradient, ") == 4
    with pytest.raises(AssertionError, match="theirs: relative error"):
        bench.check({"ours": lambda: np.ones(3), "theirs": lambda: np.array([1, 1, 1.01])})


@pytest.mark.parametrize("method, least, most", [("maml", 0, 1.1), ("fomaml", 1.2, np.inf)])
def test_short_training_learns_to_adapt(folder, method, least, most):
    """After 1,500 meta-iterations one step leaves 0.9; first order 1.4, and no adaptation at least 3.0."""
    words = "--iterations 1500 --beta 0.003 --eval-shots 10 --eval-steps 1 --results a.csv"
    assert command("--task sinusoid --method", method, words) == 0
    before, after = (float(row["mean"]) for row in rows_of("a.csv"))
    assert before > 2.5 and least < after < most


def test_short_training_on_drawn_glyphs_beats_chance_by_far(glyphs, capsys):
    """5-way, 1-shot: chance is 20 %, the stated bar 70 %."""
    assert command(GLYPHS, "--iterations 60 --results r.csv") == 0
    table, rows = capsys.readouterr().out, rows_of("r.csv")
    assert "omniglot, 5-way, conv, maml" in table and "98.7 ± 0.4 at K = 1" in table
    assert rows[0]["metric"] == "accuracy" and len(rows) == 11
    assert float(rows[0]["mean"]) < 0.35 and float(rows[3]["mean"]) > 0.7
    assert command(GLYPHS, "--baseline nearest --results n.csv") == 0
    (row,) = rows_of("n.csv")
    assert float(row["mean"]) > 0.3


def test_a_query_alone_is_normalised_with_the_support_set_and_itself():
    network, rng = nets.convnet((8, 8, 1), 3, filters=4), np.random.default_rng(0)
    theta = network.init(rng, np.float64)
    support, queries = rng.uniform(size=(2, 2, 3, 8, 8, 1))
    out = maml.alone(network, np.stack([theta, theta]), queries, support)
    for i in range(3):
        one = np.concatenate([support, queries[:, i : i + 1]], axis=1)
        assert error(out[:, i], network.apply(theta, one)[:, -1]) < 1e-12
    assert error(out, network.apply(theta, queries)) > 1e-3
    assert np.allclose(maml.accuracy(network, 0 * theta, queries, np.stack(2 * [np.eye(3)])), 1 / 3), "ties"


def test_ones_own_images_are_classified(glyphs, capsys):
    image = pytest.importorskip("PIL.Image", reason="needs pillow")
    words = "--ways 2 --iterations 30 --save a.npz --results r.csv --eval-queries alone --dtype float64"
    assert command(GLYPHS, words) == 0 and float(rows_of("r.csv")[3]["mean"]) > 0.7
    words = "--evaluate a.npz --data glyphs --eval-tasks 40 --results t.csv"
    assert command(words) == 0 and rows_of("r.csv") != rows_of("t.csv"), "queries alone and together differ"
    for name in ("bar", "ring", "query"):
        Path("own", name).mkdir(parents=True)
    bar, ring = np.full((2, 56, 56), 255, np.uint8)
    bar[:, 20:28], ring[11:51, 11:41], ring[19:43, 19:33] = 0, 0, 255
    image.fromarray(bar).save("own/2.jpg")
    image.fromarray(ring).save("own/query/3.png")
    Path("own/3.bmp").write_bytes(b"")
    image.fromarray(np.where(bar, np.uint8(7), np.uint8(0))).save("own/bar/1.png", transparency=7)
    image.merge("LA", [image.new("L", (56, 56)), image.fromarray(255 - bar)]).save("own/bar/4.png")
    image.fromarray(ring).save("own/ring/1.png")
    capsys.readouterr()
    x, y = tasks.load_own("own", (28, 28, 1))[1]
    ink = 1 - np.stack([bar, bar, ring]).reshape(3, 28, 2, 28, 2, 1).mean((2, 4)) / 255
    assert y.tolist() == [[[1, 0], [1, 0], [0, 1]]]
    assert np.abs(x[0] - ink).max() < 1 / 255, "paper is transparent"
    os.rename("own/ring", f"own/{'ring' * 7}")
    assert command("--evaluate a.npz --adapt own") == 0
    out, err = capsys.readouterr()
    head, *lines = [line.split() for line in out.splitlines()]
    assert "own: 1 of the files to classify left out" in err
    assert head == ["class", "probability", "query,", "by", "maml"]
    said = [(label, file) for label, _, file in lines]
    assert said == [("bar", "own/2.jpg"), ("ring" * 7, "own/query/3.png")]
    assert all(float(probability) > 0.6 for _, probability, _ in lines)
    assert command("--evaluate a.npz --adapt own --eval-steps 1") == 0 and capsys.readouterr().out != out
    os.unlink("own/2.jpg")
    assert command("--evaluate a.npz --adapt own") == 0
    assert capsys.readouterr().out.splitlines()[1] == out.splitlines()[2], "each query is alone"
    assert command(GLYPHS, "--net mlp --ways 2 --iterations 1 --save b.npz") == 0
    assert command("--evaluate b.npz --adapt own") == 0
    assert command("--evaluate b.npz --adapt own --alpha 1e38") == 1
    assert "diverge within 10 steps: lower" in capsys.readouterr().err
    [*map(shutil.rmtree, ("own/bar", f"own/{'ring' * 7}"))]
    assert command("--evaluate b.npz --adapt own") == 2 and "own: no folders" in capsys.readouterr().err


def test_short_navigation_training_learns_to_adapt(folder):
    """After 30 meta-iterations a step wins 4.6 to 4.8, and ends 3.8 to 4.6 above the untrained one's."""
    words = f"{WALK} --alpha 1 --max-kl 0.02 --trajectories 20 --eval-tasks 40 --results r.csv"
    returns = []
    for more in ("--baseline random", "--iterations 30 --save a.npz --log a.csv"):
        assert command(words, more, module=rl) == 0
        returns.append([float(row["mean"]) for row in rows_of("r.csv")])
    assert returns[1][1] > returns[1][0] + 3.5 and returns[1][1] > returns[0][1] + 2.5
    assert len(rows_of("a.csv")) == 30


# The command does what its methods say ------------------------------------------------------------


def settings_of(*parts, module=maml):
    return cli.settings_of(module.build_parser().parse_args(words_of(*parts)), module)


def experiment_of(*parts, module=maml):
    return module.experiment_of(settings_of(*parts, module=module))


def rl_experiment(task, *parts):
    return experiment_of("--task", task, "--dtype float64 --hidden 3", *parts, module=rl)


def image_experiment(*parts):
    """An experiment on images of three splits that do not look alike."""
    experiment = experiment_of("--filters 3 --dtype float64", *parts)
    rng, shape = np.random.default_rng(0), (8, 20, *experiment.shape)
    spans = {"train": (0, 60), "val": (90, 150), "test": (190, 255)}
    experiment.images = {name: rng.integers(*span, shape).astype(np.uint8) for name, span in spans.items()}
    return experiment


def test_defaults_are_the_papers_and_the_authors():
    """The paper's alpha times the ways, on a mean over examples."""
    for module, words, expected in [
        (maml, "omniglot --ways 5", {"steps": 1, "meta_batch": 32, "query": 1, "alpha": 5 * 0.4}),
        (maml, "omniglot --ways 20", {"steps": 5, "meta_batch": 16, "alpha": 20 * 0.1}),
        (maml, "omniglot --shots 5", {"query": 5, "meta_batch": 32}),
        (maml, "miniimagenet --ways 20", {"steps": 5, "meta_batch": 4}),
        (maml, "omniglot --method reptile", {"steps": 10}),
        (maml, "omniglot --first-order", {"method": "fomaml"}),
        (rl, "navigation --first-order", {"order": 1}),
        (maml, "miniimagenet --shots 5", {"steps": 5, "meta_batch": 2, "query": 15, "alpha": 0.05}),
        (rl, "cheetah-vel --baseline pretrained", {"alpha": 0.02, "steps": 0}),
        (rl, "cheetah-vel --baseline random", {"alpha": 0.1}),
        (rl, "ant-dir --baseline pretrained", {"alpha": 0.2}),
        (rl, "navigation --baseline random", {"alpha": 0.5}),
        (rl, "ant-vel --baseline oracle", {"alpha": 0.1}),
    ]:
        assert expected.items() <= settings_of("--task", words, module=module).items()


def test_every_purpose_has_its_own_classes_and_of_every_seed_its_own_stream():
    experiments = [experiment_of("--task sinusoid --seed", seed) for seed in (0, 1)]
    purposes = ("training", "test", "validation", "init")
    assert len({e.stream(purpose).random() for e in experiments for purpose in purposes}) == 8
    experiment = image_experiment("--task omniglot")
    for purpose, low, high in (("training", 0, 60), ("validation", 90, 150), ("test", 190, 255)):
        (x, _), (xq, _) = experiment.sample(purpose, 2, 3)(np.random.default_rng(0), tasks=4)
        assert low / 255 <= x.min() and max(x.max(), xq.max()) <= high / 255
    sample = image_experiment("--task omniglot --baseline pretrained").meta_batch()["sample"]
    assert sample(np.random.default_rng(0), tasks=1)[0][0].max() <= 60 / 255
    for one in (experiment, experiments[0]):
        theta, one.sample, one.stream = one.start().theta, Mock(wraps=one.sample), Mock(wraps=one.stream)
        for purpose in ("validation", "test"):
            one.curve(theta, purpose, 2, 5, 0)
            assert one.sample.call_args.args == (purpose, 5) and one.stream.call_args.args == (purpose,)


@pytest.mark.parametrize(
    "words, asked", [("sinusoid", (100, 10, 1)), ("omniglot --shots 2 --query 5 --steps 3", (600, 2, 3))]
)
def test_a_score_is_of_validation_tasks_after_adaptation(words, asked):
    experiment, state = experiment_of("--task", words), maml.State.start(np.zeros(1))
    experiment.curve = Mock(return_value=np.array([[-100.0], [-3.0], [-2.0], [-1.0]]))
    row, _, selects = experiment.measure(state, 0.5)
    experiment.curve.assert_called_once_with(state.theta, "validation", *asked)  # tasks, K, steps
    assert dict(zip(experiment.columns, row, strict=True)) == {"loss": 0.5, "before": -100, "after": -1}
    assert selects == (-1 if experiment.keeps_best else None)
    experiment.curve.return_value, experiment.keeps_best = np.array([[0.5, 0.5], [1.0, np.nan]]), True
    row, _, selects = experiment.measure(state, 0.5)
    assert row[2] == (1 + experiment.worst) / 2, "a task that diverged counts as the worst"
    assert selects == (0.5 if experiment.metric_name == "accuracy" else -np.inf), "larger is better"
    experiment.curve.return_value = np.array([[1.0, 101.0]])
    ((_, (summary,)),) = experiment.test(None, {"eval_tasks": 9, "eval_steps": 1, "eval_shots": 7})
    assert experiment.curve.call_args.args == (None, "test", 9, 7, 1)
    assert summary["diverged"] == (experiment.metric_name == "mse")


@pytest.mark.parametrize("method, score", [("--method maml", -2), ("--baseline oracle", -26.5)])
def test_a_score_of_returns_is_of_validation_goals_after_adaptation_where_there_is_some(method, score):
    experiment, state = rl_experiment("navigation", method), maml.State.start(np.zeros(1))
    experiment.curve = Mock(return_value=np.array([[-100.0], [-3.0], [-2.0], [-1.0]]))
    row, text, selects = experiment.measure(state, (1, 2, 0.5, 15, 9.0))
    given = {"before": 1, "after": 2, "kl": 0.5, "backtracks": 15, "validation": score}
    assert dict(zip(experiment.columns, row, strict=True)) == given
    assert selects == score and "no step accepted: theta kept" in text
    assert experiment.measure(state._replace(iteration=6), (1, 2, 0.5, 3, 9.0))[2] is None
    how = 20, 20, 3, 0.5  # tasks, trajectories, and the table's steps and shrink
    experiment.curve.assert_called_once_with(state.theta, "validation", *how)
    experiment.curve.return_value = np.array([[np.nan]])
    ((_, (summary,)),) = experiment.test(None, {"eval_tasks": 9, "eval_trajectories": 7})
    assert experiment.curve.call_args.args == (None, "test", 9, 7) and summary["mean"] == -np.inf


@pytest.mark.parametrize("task, turned", [("omniglot", True), ("miniimagenet", False)])
def test_characters_are_turned_and_photographs_are_not(task, turned):
    experiment = image_experiment("--task", task)
    for purpose, split in maml.SPLITS.items():
        experiment.images[split][...] = 0
        experiment.images[split][:, :, 0] = 255  # a bright first row
        (x, _), _ = experiment.sample(purpose, 1, 1)(np.random.default_rng(0), tasks=9)
        assert (x[:, :, 0].min() == 1) != turned


@pytest.mark.parametrize("method", maml.METHODS)
@pytest.mark.parametrize("task", ["sinusoid", "omniglot"])
def test_each_method_descends_its_own_gradient_with_all_its_steps(method, task):
    """ANIL adapts the last layer alone, and no method batch norm's shift, which all but Reptile learn."""
    words = f"--task {task} --method {method} --steps 3 --alpha 0.05 --dtype float64"
    experiment = image_experiment(words) if task == "omniglot" else experiment_of(words)
    network, shots = experiment.network, experiment.settings["shots"]
    support, query = experiment.sample("training", shots, 2)(np.random.default_rng(0), tasks=2)
    alpha, names = np.full(network.size, 0.05), list(network.shapes)
    for name, part in network.unflatten(alpha).items():
        part[...] *= name in names[-2:] if method == "anil" else not name.startswith("beta")
    theta, rates = np.split(experiment.start().theta, [network.size])
    assert np.array_equal(rates, alpha if method == "meta-sgd" else [])
    theta = theta + 0.1 * np.random.default_rng(1).normal(size=network.size)
    data = hidden(experiment.loss), theta, support, query, alpha, 3
    both = np.concatenate([theta, alpha])
    value, g = {
        "fomaml": lambda: maml.meta_gradient(*data, order=1),
        "reptile": lambda: maml.reptile_gradient(*data),
        "meta-sgd": lambda: maml.meta_sgd_gradient(experiment.loss, both, support, query, 3),
    }.get(method, lambda: maml.meta_gradient_by_definition(*data))()
    found = experiment.outer_gradient()(both if method == "meta-sgd" else theta, support, query)
    assert error(found[0], value) < 1e-9 and error(found[1], g) < 1e-7
    learns = [part.any() for part in network.unflatten(found[1][: network.size]).values()]
    assert all(learns) != (method == "reptile" and task == "omniglot")
    learned, rates = experiment.adaptation(both if method == "meta-sgd" else theta)
    assert np.array_equal(learned, theta) and np.array_equal(rates + np.zeros_like(theta), alpha)


def test_a_table_says_which_iteration_it_is_of(folder, monkeypatch, capsys):
    monkeypatch.setattr(rl.Experiment, "score", lambda *_: 0.0)  # the first one stays the best
    assert command(WALK, "--iterations 6 --save a.npz", module=rl) == 0
    table, err = capsys.readouterr()
    assert command("--evaluate a.best.npz --eval-tasks 6 --eval-trajectories 5", module=rl) == 0
    assert capsys.readouterr().out == table and ", 5 meta-iterations" in table and "of iteration 5" in err


def test_where_no_score_is_finite_the_last_state_is_evaluated(folder):
    table = "--eval-tasks 6 --eval-trajectories 5 --results"
    command(WALK, "--baseline pretrained --alpha 1e30 --iterations 2 --save a.npz", table, "r.csv", module=rl)
    assert command("--evaluate a.npz", table, "s.csv", module=rl) == 0
    assert rows_of("r.csv") == rows_of("s.csv")


def test_the_pretrained_bodys_new_last_layer_starts_from_zero():
    experiment = image_experiment("--task omniglot --baseline pretrained")
    learned = experiment.start().theta
    *body, w, b = experiment.network.unflatten(experiment.adaptation(learned)[0]).values()
    assert not w.any() and not b.any() and experiment.classifier.outputs == (1100,)
    assert all(map(np.array_equal, body, experiment.classifier.unflatten(learned).values()))


@pytest.mark.parametrize("shots, clip", [(1, 10 / 75), (5, 10 / 15)])
def test_miniimagenets_meta_gradient_is_clipped_on_the_authors_scale(shots, clip):
    experiment = image_experiment("--task miniimagenet --shots", shots)
    assert experiment.step.keywords["clip"] == pytest.approx(clip)
    for words in ("omniglot", "miniimagenet --baseline pretrained"):  # a meta-gradient's alone is clipped
        assert experiment_of("--task", words).clip == np.inf
    state = maml.State.start(np.zeros(3))
    steep = partial(maml.adam_step, state, None, lambda *_: (0.0, np.array([9.0, -9.0, 0.01])))
    moments = steep(sample=lambda *_, tasks: (0, 0), tasks=1, beta=0.1, clip=clip)[0].moments
    assert np.allclose(10 * moments[0], [clip, -clip, 0.01])
    for found in ((np.nan, np.ones(3)), (0.0, np.array([1, np.inf, 1])), (0.0, np.full(3, 1e20, np.float32))):
        with np.errstate(over="ignore"), pytest.raises(FloatingPointError, match="at iteration 1"):
            maml.adam_step(state, None, lambda *_, found=found: found, lambda *_, tasks: (0, 0), 1, 0.1)


def test_published_figures_stand_beside_what_is_like_them():
    alike = ("omniglot", 1), ("sinusoid", 5), ("navigation --hidden 16", 40), ("cheetah-dir", 20)
    other = ("omniglot", 5), ("sinusoid --shots 5", 5), ("navigation", 20), ("navigation --horizon 20", 40)
    for words, shots in (*alike, *other, ("navigation --order 1", 40), ("cheetah-dir --frame-skip 5", 20)):
        experiment = experiment_of("--task", words, module=rl if words.split()[0] in rl.TASKS else maml)
        assert bool(experiment.published(shots)) == ((words, shots) in alike)


def test_a_test_task_has_the_papers_queries():
    assert experiment_of("--task sinusoid").sample("test", 5).keywords["query_shots"] == 100
    experiment = image_experiment("--task miniimagenet --shots 5")
    assert [experiment.sample("test", k).keywords["query_shots"] for k in (1, 5)] == [1, 5]
    (x, _), (xq, _) = experiment.meta_batch()["sample"](np.random.default_rng(0), tasks=1)
    assert x.shape[1] == 5 * 5 and xq.shape[1] == 5 * 15
    values = experiment.curve(experiment.start().theta, "test", 2, 5, 0)
    assert np.allclose(values * 25, np.rint(values * 25))


if "MAML_AUTHORS" in os.environ:  # MAML_AUTHORS=authors.npy MAML_DATA=FOLDER, which no test requires

    def test_the_authors_weights_reach_what_they_reached_elsewhere(folder):
        """The paper has 48.7 after 10 steps, another user of the weights 46.9: 200 tasks stray by 3.2."""
        assets.authors.main(os.environ["MAML_AUTHORS"], "a.npz")
        words = "--evaluate a.npz --eval-tasks 200 --results r.csv --data"
        assert command(words, Path(os.environ["MAML_DATA"])) == 0
        after = [float(row["mean"]) for row in rows_of("r.csv")]
        assert abs(after[0] - 0.2) < 0.01 and 0.31 < after[1] < 0.41 and 0.42 < after[10] < 0.52


# Workers and faults -----------------------------------------------------------------------------

MANY_GLYPHS = SMALL_GLYPHS + " --meta-batch 20 --eval-tasks 10 --eval-steps 1"
MANY_WALKS = WALK + " --horizon 5 --meta-batch 12 --eval-steps 1"
WORKERS = f"{MANY_GLYPHS} --workers 2 --iterations 1000000 --save b.npz"
SLOW_END = """  # Python's end finds a pool of processes open, waits, and writes to its pipe
import maml, sys, time
from concurrent.futures import process

def wakeup(pipe):
    if not pipe._closed:
        time.sleep(process._global_shutdown)
        pipe._writer.send_bytes(b"")

process._ThreadWakeup.wakeup = wakeup
sys.exit(maml.main())
"""


@pytest.mark.parametrize("module, run", [(maml, MANY_GLYPHS), (rl, MANY_WALKS)])
def test_any_number_of_workers_gives_the_same_bits_also_after_a_resume(glyphs, monkeypatch, module, run):
    monkeypatch.setattr(cli, "process_pool", pool := Mock(wraps=cli.process_pool))
    part = "--workers 3 --iterations 1 --save part.npz", "--workers 2 --resume part.npz --save parts.npz"
    for words in ("--save none.npz", "--workers 1 --save one.npz", *part):
        assert command(run, "--iterations 2", words, module=module) == 0
    np.testing.assert_equal(arrays("none.npz"), arrays("one.npz"))
    np.testing.assert_equal(arrays("none.npz"), arrays("parts.npz"))
    assert [call.args for call in pool.call_args_list][-3:] == [(1,), (3,), (2,)]


def test_a_dask_cluster_gives_the_same_bits_and_a_line_where_it_is_lost(glyphs, capsys):
    distributed = pytest.importorskip("distributed", reason="needs dask[distributed]")
    with distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=None) as cluster:
        for module, run, iterations in [(maml, MANY_GLYPHS, 50), (rl, MANY_WALKS, 2)]:
            run = f"{run} --iterations {iterations} --save {module.__name__}"
            assert command(f"{run}.npz", module=module) == 0
            words = f"{run}-dask.npz --log {module.__name__}.csv --scheduler {cluster.scheduler_address}"
            dask = process(words, module=module)
            if module is maml:
                wait_for(lambda: os.path.exists("maml.csv"), dask)
                time.sleep(0.5)
                os.kill(next(iter(cluster.workers.values())).pid, signal.SIGKILL)
            assert dask.wait(timeout=300) == 0, dask.stderr.read()
            np.testing.assert_equal(arrays(f"{module.__name__}.npz"), arrays(f"{module.__name__}-dask.npz"))
        cluster.scale(1)
        endless = f"{MANY_GLYPHS} --iterations 1000000 --save b.npz --scheduler {cluster.scheduler_address}"
        dask = process(endless)
        wait_for(lambda: os.path.exists("b.npz") and arrays("b.npz")["iteration"] > 0, dask)
        cluster.scale(0)
        wait_for(lambda: not cluster.scheduler.workers)
        assert command(MANY_GLYPHS, "--scheduler", cluster.scheduler_address) == 2
        assert "it has no workers; start one with dask worker tcp://" in capsys.readouterr().err
    assert dask.wait(timeout=300) == 1, "the scheduler is lost"
    *_, line = (said := dask.stderr.read()).splitlines()
    assert line == "maml.py: a worker was lost; b.npz holds the last checkpoint, --resume it", said


def children(process):
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


def alive(pid):
    return os.path.exists(f"/proc/{pid}/exe")  # which a zombie has not


@pytest.mark.parametrize(
    "words, until, code, line",
    [
        ("--evaluate a.npz --eval-steps 1000000", "evaluating", 130, "--evaluate makes the table"),
        (QUICK + " --eval-steps 1000000", "evaluating", 130, "maml.py: interrupted: the model is not kept"),
        (WORKERS, "workers", 130, "maml.py: interrupted"),
        (WORKERS, "b.npz", 1, "maml.py: a worker was lost; b.npz holds the last checkpoint, --resume it"),
        (WORKERS, "b.npz", -signal.SIGKILL, ""),
    ],
)
def test_a_run_that_loses_its_user_or_a_worker_ends_with_one_line_and_all_workers(
    glyphs, words, until, code, line
):
    """Once stderr, a file or its workers say that it is there; Ctrl-C is for all, also who is starting."""

    def there():
        if until == "b.npz":
            return os.path.exists(until) and arrays(until)["iteration"] > 0
        return until in Path("stderr").read_text() or until == "workers" and len(children(run)) > 1

    command(QUICK, "--save a.npz")
    with open("stderr", "w") as stderr:
        script = SLOW_END if until == "workers" else None
        run = process(words, script=script, start_new_session=True, stderr=stderr)
        try:
            wait_for(there, run)
            workers = [*filter(alive, children(run))]
            assert (len(workers) > 1) == (words == WORKERS)
            if code == 130:
                os.killpg(run.pid, signal.SIGINT)
            else:
                os.kill(int(workers[-1]) if code == 1 else run.pid, signal.SIGKILL)
            assert run.wait(300) == code
        finally:
            run.kill()
    wait_for(lambda: not any(map(alive, workers)))
    said = Path("stderr").read_text()
    assert line in said.splitlines()[-1] and "Traceback" not in said


def test_a_second_ctrl_c_ends_the_wait_for_workers(glyphs):
    """Each of whose parcels takes minutes."""
    assert command(SMALL_GLYPHS, "--iterations 1 --save b.npz") == 0
    with open("stderr", "w") as stderr:
        words = "--evaluate b.npz --data glyphs --eval-tasks 1000 --eval-steps 100000 --workers 2"
        run = process(words, start_new_session=True, stderr=stderr)
        try:
            for line in ("evaluating", "--evaluate makes"):
                wait_for(lambda line=line: line in Path("stderr").read_text() and len(children(run)) > 2, run)
                time.sleep(0.5)
                os.killpg(run.pid, signal.SIGINT)
            assert run.wait(300) == -signal.SIGINT
        finally:
            run.kill()
    assert "Traceback" not in Path("stderr").read_text()


def test_ctrl_c_while_parcels_are_sent_cancels_them(tmp_path, monkeypatch):
    pool = cli.process_pool(1)
    monkeypatch.setattr(signal, "pthread_sigmask", Mock(side_effect=[set(), KeyboardInterrupt]))
    with pytest.raises(KeyboardInterrupt):
        cli.pool_map(pool, Path.touch, [tmp_path / str(i) for i in range(99)])
    pool.shutdown()
    assert len(list(tmp_path.iterdir())) < 9, "but for what the worker had"


def test_killed_at_any_moment_a_run_resumes_to_the_same_bits(folder):
    """MAML_KILLS=100 python -m pytest -k killed_at: as many kill -9, at random moments."""
    script = "import maml, sys; maml.Experiment.save_every = 3; sys.exit(maml.main())"
    goal = "--iterations 90 --eval-shots 2 --eval-tasks 2"
    assert command(QUICK, goal, "--save whole.npz") == 0
    for seconds in np.random.default_rng(0).uniform(0, 0.15, int(os.environ.get("MAML_KILLS", 2))):
        start = "--resume a.npz" if os.path.exists("a.npz") else f"{QUICK} --save a.npz"
        Path("a.csv").unlink(missing_ok=True)
        run = process(start, goal, "--log a.csv", script=script)
        wait_for(lambda: os.path.exists("a.csv"), run)
        time.sleep(seconds)
        run.kill()
        run.communicate()
        assert Path("a.csv").read_bytes().endswith(b"\n")
        if os.path.exists("a.npz") and int(arrays("a.npz")["iteration"]) == 90:
            np.testing.assert_equal(arrays("whole.npz"), arrays("a.npz"))
            os.unlink("a.npz")
    if os.path.exists("a.npz"):
        assert command("--resume a.npz --log a.csv", goal) == 0
        np.testing.assert_equal(arrays("whole.npz"), arrays("a.npz"))


def test_of_two_writers_the_last_leaves_its_file_whole_under_the_old_link_and_permissions(folder):
    Path("real.csv").write_text("task,method,rest\n")
    os.chmod("real.csv", 0o640)
    os.symlink("real.csv", "link.csv")
    assert command(QUICK, "--results link.csv") == 0
    with tasks.replacing("real.csv") as one, tasks.replacing("real.csv") as other:
        one.write(b"one")
        other.write(b"other")
        assert len(rows_of("link.csv")) == 33
    assert os.path.islink("link.csv") and Path("link.csv").read_bytes() == b"one"
    assert os.stat("real.csv").st_mode & 0o777 == 0o640 and sorted(os.listdir()) == ["link.csv", "real.csv"]


def test_a_full_disk_leaves_what_was_there(folder, capsys):
    """A limit on the size of files stands for it."""
    command(QUICK, "--save a.npz")
    zipped(folder, drawn()[0])
    before, (soft, hard) = contents(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))
    try:
        assert command("--resume a.npz --iterations 60") == 1
        assert "File too large; a.npz holds the last checkpoint" in capsys.readouterr().err
        with refused(r"omniglot.npy and .* cannot be written \(File too large\): free"):
            tasks.load_omniglot(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(folder) == before and leftovers() == []


@settings(max_examples=FUZZ)
@given(st.data())
def test_no_damage_to_a_checkpoint_is_more_than_one_line(files, data):
    with harmed(data, files / "good.npz", cli.Unusable):
        cli.load_checkpoint(str(files / "good.npz"), maml)


# Reinforcement learning -------------------------------------------------------------------------


class Policies:
    """A random policy, its theta, and steps of old policies on made-up data.

    A task's trajectories end early, each at a step that is the same for all tasks.
    """

    def __init__(self, rng, inputs=2, actions=2, steps=1, count=2, trajectories=2, horizon=3, width=4):
        self.rng, self.policy = rng, rl.gaussian_policy(inputs, actions, (width, width))
        self.loss = nets.Loss(self.policy, rl.PolicyGradient())
        self.theta = rng.normal(size=self.policy.size) / 3
        shape, self.batches = (count, trajectories, horizon), []
        for _ in range(steps + 1):
            ends = rng.integers(1, horizon + 1, trajectories)
            mask = np.tile(np.arange(horizon) < ends[:, None], (count, 1, 1)).astype(float)
            numbers = (rng.normal(size=(*shape, size)) * mask[..., None] for size in (inputs, actions, 1))
            observations, taken, rewards = numbers
            batch = rl.batch_of(rl.Episodes(observations, taken, rewards[..., 0], mask), 0.9, 0.8)
            self.batches.append(tuple(array[:, mask[0].ravel() > 0] for array in batch))
        thetas = [self.theta]
        for x, y in self.batches[:-1]:
            thetas.append(thetas[-1] - 0.1 * self.loss.grad(thetas[-1], x, y))
        self.points = [(self.policy, theta, x) for theta, (x, _) in zip(thetas, self.batches)]
        self.adapted = thetas[-1] + np.zeros((count, 1))

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
        trial = self.theta + 0.1 * unit(self.rng.normal(size=self.theta.shape))
        assert error(objective(trial), self.objective(trial)) < 1e-12
        at_once = rl.outer_problem(self.loss, 0.1, order, self.theta, [self.batches])
        assert error(at_once[1], g) < 1e-12 and error(at_once[2](g), product(g)) < 1e-12
        return g, product


policies_of = partial(away_from_kinks, Policies)
shapes = {"inputs": st.integers(1, 3), "actions": st.integers(1, 2), "steps": st.integers(0, 2)}
policies = st.builds(policies_of, st.integers(0, 10**6), **shapes)


@given(policies)
def test_policy_loss_equals_autograd_and_finite_differences(p):
    v = unit(p.rng.normal(size=p.adapted.shape))
    check_closed_forms(p.loss, p.adapted, *p.batches[-1], v, 1e-11)
    check_differences(p.loss, p.adapted, *p.batches[-1], v)


def test_log_std_has_a_floor_below_which_nothing_moves_it():
    p = policies_of(0)
    theta, (x, y) = np.array(p.theta), p.batches[0]
    for low in (-20, rl.LOWEST):
        p.policy.unflatten(theta)["log_std"][0] = low
        assert np.allclose(p.policy.apply(theta, x)[..., 2], np.log(1e-6))
        assert error(p.policy.forward(theta, x)[0], p.policy.apply(theta, x)) == 0
        check_closed_forms(p.loss, theta, x, y, p.rng.normal(size=p.adapted.shape), 1e-11)
        for loss in (p.loss, hidden(p.loss)):
            g = p.policy.unflatten(maml.gradient(loss, theta, x, y))["log_std"]
            assert not g[:, 0].any() and g[:, 1].all()


@settings(max_examples=10)
@given(policies)
def test_outer_gradient_and_fisher_product_through_adaptation_equal_autograd_and_differences(p):
    (g, product), v = p.outer(), unit(p.rng.normal(size=p.theta.shape))
    assert error(g, grad(lambda theta: p.objective(theta)[0])(p.theta)) < 1e-9
    assert error(g @ v, difference(lambda theta: p.objective(theta)[0], p.theta, v)) < 1e-7
    value, slope = p.objective(p.theta)[1], grad(lambda theta: p.objective(theta)[1])
    assert abs(value) < 1e-15 and np.abs(slope(p.theta)).max() < 1e-13
    assert error(product(v), grad(lambda theta: anp.dot(slope(theta), v))(p.theta)) < 1e-9
    assert error(product(v), difference(slope, p.theta, v)) < 1e-7
    (first, plain), (x, y) = p.outer(order=1), p.batches[-1]  # adaptation as a constant shift: J is 1
    assert error(first, p.loss.grad(p.adapted, x, y).mean(axis=0)) < 1e-11
    shift, old = p.adapted - p.theta, p.policy.apply(p.adapted, x)
    slope = grad(lambda theta: anp.mean(rl.kl(old, p.policy.apply(theta + shift, x))))
    assert error(plain(v), difference(slope, p.theta, v)) < 1e-7


def test_kl_of_gaussians_has_its_direction_and_the_surrogates_is_from_the_old_policy():
    """KL(N(0, 1) ‖ N(1, 4)) = log 2 + (1 + 1) / 8 - 1/2, and the other way round log 1/2 + 5/2 - 1/2."""
    old, new = np.array([[[0.0, 0.0]]]), np.array([[[1.0, np.log(2)]]])
    assert np.allclose(rl.kl(old, new), np.log(2) - 0.25) and np.allclose(rl.kl(new, old), 2 - np.log(2))
    density = np.exp(rl.log_density(new, np.array([[[3.0]]])))
    assert np.allclose(density, np.exp(-0.5) / np.sqrt(8 * np.pi))
    p = policies_of(0, steps=0)
    theta, (x, y) = p.theta + unit(p.rng.normal(size=p.theta.shape)), p.batches[0]
    old, new = p.policy.apply(p.theta, x), p.policy.apply(theta, x)
    divergence = rl.surrogate(p.policy, p.loss, 0.1, theta, [], (x, y), old)[1]
    assert error(divergence, rl.kl(old, new).mean(axis=1)) < 1e-12


@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_returns_and_advantages_equal_plain_loops_with_early_ends(seed, discount, lam):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 6, (2, 3))
    mask = (np.arange(5) < lengths[..., None]).astype(float)
    rewards, values = rng.normal(size=(2, *mask.shape)) * mask
    found, totals = rl.advantages(rewards, values, mask, discount, lam), rl.discounted(rewards, discount)
    expected = np.zeros(mask.shape)
    for i, j, t in np.argwhere(mask):
        ahead = [*rewards[i, j, t:], 0], [*values[i, j, t:], 0]
        assert np.isclose(totals[i, j, t], sum(discount**k * reward for k, reward in enumerate(ahead[0])))
        deltas = [r + discount * after - v for r, v, after in zip(*ahead, ahead[1][1:])]
        expected[i, j, t] = sum((discount * lam) ** k * delta for k, delta in enumerate(deltas))
    for i in range(2):
        plain = expected[i][mask[i] == 1]
        assert np.allclose(found[i][mask[i] == 1], (plain - plain.mean()) / (plain.std() + 1e-8), rtol=1e-6)
    assert not rl.advantages(*np.ones((3, 1, 1, 1)), discount, lam).any()
    assert not found[mask == 0].any() and rl.discounted(np.array([1, 1]), 0.5)[0] == 1.5
    assert rl.advantages(*single(rewards, values, mask), np.float64(discount), lam).dtype == np.float32


@given(st.integers(0, 10**6))
def test_baseline_equals_one_least_squares_a_task(seed):
    rng = np.random.default_rng(seed)
    mask = (np.arange(6) < rng.integers(1, 7, (3, 5))[..., None]).astype(float)
    observations, targets = rng.normal(size=(3, 5, 6, 2)), rng.normal(size=(3, 5, 6))
    observations[mask == 0] = np.nan
    found = rl.baseline(observations, targets, mask)
    for i in range(3):
        phi = rl.features(observations[i : i + 1])[0][mask[i] == 1]
        ridge = np.sqrt(1e-5) * np.eye(phi.shape[-1])
        rows, right = np.vstack([phi, ridge]), [*targets[i][mask[i] == 1], *np.zeros(len(ridge))]
        w = np.linalg.lstsq(rows, right, rcond=None)[0]
        assert error(found[i][mask[i] == 1], phi @ w) < 1e-6
    assert not found[mask == 0].any()
    counts = rng.integers(9, size=targets.shape)
    assert (rl.baseline(observations, counts, mask) == rl.baseline(observations, 1.0 * counts, mask)).all()


def test_features_and_batches_are_as_the_authors_have_them():
    o = np.zeros((1, 1, 3, 2))
    assert np.allclose(rl.features(o)[0, 0, 2, 4:], [0.02, 0.0004, 0.000008, 1])
    assert rl.features(o + [-20, 20])[0, 0, 0, :4].tolist() == [-10, 10, 100, 100]
    rng, shape = np.random.default_rng(0), (1, 4, 9)
    numbers = (rng.normal(size=(*shape, size)) for size in (2, 1))
    episodes = rl.Episodes(*numbers, rng.normal(size=shape), np.ones(shape))
    values = rl.baseline(episodes.observations, rl.discounted(episodes.rewards, 0.9), episodes.mask)
    expected = rl.advantages(episodes.rewards, values, episodes.mask, 0.9, 0.5) / 36
    assert error(rl.batch_of(episodes, 0.9, 0.5)[1][..., 1].ravel(), expected.ravel()) < 1e-12


def test_conjugate_gradient_solves_and_the_line_search_keeps_theta_where_nothing_helps():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6))
    matrix, b = root @ root.T + np.eye(6), rng.normal(size=6)
    x, residual = rl.conjugate_gradient(lambda v: matrix @ v, b, 6, 0)
    assert error(x, np.linalg.solve(matrix, b)) < 1e-9 > np.linalg.norm(residual)
    assert np.linalg.norm(rl.conjugate_gradient(lambda v: matrix @ v, b, 9)[1]) < 1e-5
    x, residual = rl.conjugate_gradient(lambda v: matrix @ v, b, 3)
    assert error(residual, b - matrix @ x) < 1e-9
    x, residual = rl.conjugate_gradient(lambda v: v, np.zeros(6), 5)
    assert not x.any() and not residual.any(), "nothing to descend is no step"
    constants = 0.02, 3, 0.0, 0.5, 4  # three steps leave a residual
    problem = 0.0, b, lambda v: matrix @ v, lambda x: (b @ x, x @ matrix @ x / 2)
    theta, j, kl = rl.trust_region_step(np.zeros(6), *problem, *constants)
    assert j in (0, 1) and b @ theta < 0 and error(kl, 0.02 / 4**j) < 1e-6
    hopeless = *problem[:3], lambda x: (0.0, 0.0)
    theta, j, kl = rl.trust_region_step(np.ones(6), *hopeless, *constants)
    assert (theta == 1).all() and (j, kl) == (4, 0)


def test_the_line_search_keeps_to_the_limit_and_damping_counts():
    def step(scale, damping, objective):
        problem = 0.0, np.ones(2), lambda v: scale * v, objective
        return rl.trust_region_step(np.zeros(2), *problem, 0.02, 5, damping, 0.5, 9)

    for just, tries in {0.495: 0, 0.505: 1}.items():
        assert step(1, 0.0, lambda trial, just=just: (-1.0, just * float(trial @ trial)))[1] == tries
    plain, damped = (step(*metric, lambda _: (-1.0, 0.0))[0] for metric in ((4, 0.0), (1, 3.0)))
    assert error(damped, plain) < 1e-12


@pytest.mark.parametrize("order", [1, 2])
def test_a_meta_iteration_is_one_step_of_the_outer_problem_of_all_parcels(order):
    words = "--horizon 8 --meta-batch 12 --trajectories 5 --steps 2 --order"
    experiment = rl_experiment("navigation", words, order)
    settings, loss, theta = experiment.settings, experiment.loss, experiment.start().theta
    found, reported = experiment.meta_iteration(theta, np.random.default_rng(0))
    rng = np.random.default_rng(0)
    goals, seeds = rl.drawn_goals("navigation", rng, 12), rng.integers(2**63, size=(3, 2))
    parcels = (goals[:10], seeds[:, 0]), (goals[10:], seeds[:, 1])
    parts = [rl.experience(settings, loss, theta, 5, [0.5, 0.5], *parcel) for parcel in parcels]
    returns = np.concatenate([returns for returns, _ in parts], axis=1).mean(axis=1)
    batches = [*parts[0][1], *parts[1][1]]
    taken = sum(len(x[0]) for batch in batches for x, _ in batch)
    problem = rl.outer_problem(loss, 0.5, order, theta, batches)
    expected, tries, kl = rl.trust_region_step(theta, *problem, 0.01, 10, 1e-5, 0.8, 15)
    assert error(found, expected) < 1e-12 < error(found, theta)
    assert np.allclose(reported, [returns[0], returns[-1], kl, tries, taken]) and taken <= 12 * 5 * 3 * 8


def test_navigation_steps_by_hand():
    environment = rl.Navigation([[0.1, 0.05], [0.5, -0.5]], 1)
    seen = environment.reset(np.random.default_rng(0))
    seen += 1
    assert not environment.position.any(), "what is seen is a copy"
    for shape in ((2, 1, 1), (1, 2, 2)):
        with refused(r"expected \(2, 1, 2\)"):
            environment.step(np.zeros(shape))
    observation, reward, done = environment.step(np.array([[[5.0, 0.0]], [[-0.5, -0.5]]]))
    assert np.allclose(observation[:, 0], [[0.1, 0], [-0.05, -0.05]])
    assert np.allclose(reward[:, 0], [-0.05, -np.hypot(0.55, 0.45)]) and not done.any()
    observation, reward, done = environment.step(np.array([[[0.0, 0.45]], [[0.0, 0.0]]]))
    assert np.allclose(reward[0], -0.005) and done[:, 0].tolist() == [True, False]
    environment.reset(None)
    environment.step(np.array([[[1.0, 0.39]], [[0.0, 0.0]]]))
    assert not environment.step(np.zeros((2, 1, 2)))[2].any(), "0.011 away is not there"
    oracle = rl.Navigation([[0.1, 0.05]], 1, oracle=True).reset(None)
    assert oracle.tolist() == [[[0, 0, 0.1, 0.05]]]


def test_rollout_masks_what_follows_the_end():
    policy = rl.gaussian_policy(2, 2, (3,))
    zeros = policy.unflatten(np.zeros(policy.size))
    theta = policy.flatten(zeros | {"log_std": np.full(2, -30.0), "b2": np.array([1, 0.5])})
    environment = rl.Navigation([[0.2, 0.1], [0.4, -0.4]], 3)
    episodes = rl.rollout(environment, policy, theta, np.random.default_rng(0))
    assert episodes.mask[0].sum(axis=1).tolist() == [2, 2, 2] and episodes.mask[1].all()
    assert np.allclose(episodes.rewards[0, 0, :2], [-np.hypot(0.1, 0.05), 0], atol=1e-5)
    assert not episodes.rewards[0, :, 2:].any() and episodes.rewards.shape == (2, 3, 100)
    assert np.allclose(episodes.returns()[0], -np.hypot(0.1, 0.05), atol=1e-5)
    theta = policy.flatten(zeros | {"log_std": np.array([1.0, -1.0])})
    actions = rl.rollout(rl.Navigation([[9, 9]], 50), policy, theta, np.random.default_rng(0)).actions
    assert np.allclose(actions.std(axis=(0, 1, 2)), np.exp([1, -1]), rtol=0.05)


def test_adaptation_takes_turns_between_trajectories_and_steps_and_leaves_what_follows_an_end():
    experiment = rl_experiment("navigation", "--discount 0.9 --lam 0.6")
    zeros = experiment.policy.unflatten(np.zeros(experiment.policy.size))
    theta = experiment.policy.flatten(zeros | {"log_std": np.full(2, -3.0), "b3": np.array([1, 0.5])})
    goals, rates, seeds = np.array([[0.2, 0.1], [0.4, -0.4]]), [0.5, 0.25], [3, 4, 5]
    given = experiment.settings, experiment.loss, theta, 3, np.array(rates), goals, seeds
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
    _, batches = rl.experience(*given[:2], *single(given[2]), *given[3:])
    problem = rl.outer_problem(experiment.loss, np.float64(0.5), 2, *single(given[2]), batches)
    assert {array.dtype for array in (problem[1], *problem[3](*single(theta[0])))} == {np.dtype("f4")}


def test_goals_are_drawn_over_their_whole_range_and_tests_are_the_authors():
    for task, low, high, authors in [
        ("navigation", -0.5, 0.5, [[-0.082978, 0.220324], [-0.499886, -0.197667]]),
        ("cheetah-vel", 0, 2, [0.834044, 1.440649, 0.000229]),
        ("ant-vel", 0, 3, [1.251066, 2.160973, 0.000343]),
        ("cheetah-dir", -1, 1, [-1, 1, -1, -1]),
        ("ant-dir", -1, 1, [-1, -1, 1, -1]),
    ]:
        goals = rl.drawn_goals(task, np.random.default_rng(0), 4000)
        columns = goals.reshape(4000, -1).T
        for column in columns:
            assert low <= column.min() < low + 0.01 and high - 0.01 < column.max() <= high
        quarters = np.bincount([2, 1][-len(columns) :] @ (columns > (low + high) / 2))
        assert np.abs(quarters / 4000 - 0.5 ** len(columns)).max() < 0.03
        assert not task.endswith("dir") or set(goals) == {-1, 1}
        assert np.allclose(rl.test_goals(task, len(authors)), authors, atol=1e-6)


@pytest.mark.parametrize("purpose, method", [("validation", "maml"), ("test", "oracle"), ("test", "random")])
def test_a_curve_is_of_its_purposes_goals_at_its_rates(purpose, method):
    """alpha, then alpha times --eval-shrink; the oracle is not adapted."""
    which = "--method" if method == "maml" else "--baseline"
    experiment = rl_experiment("navigation", which, method, "--horizon 5")
    rng, theta = experiment.stream(purpose), experiment.start().theta
    goals = rl.test_goals("navigation", 4) if purpose == "test" else rl.drawn_goals("navigation", rng, 4)
    rates = [] if method == "oracle" else [0.5, 0.05, 0.05]
    seeds = rng.integers(2**63, size=len(rates) + 1)
    expected = rl.returns_along(experiment.settings, experiment.loss, theta, 2, rates, goals, seeds)
    found = experiment.curve(theta, purpose, 4, 2, 3, 0.1)
    assert found.shape == (len(rates) + 1, 4) and error(found, expected) < 1e-12


@pytest.fixture
def mujoco():
    return pytest.importorskip("mujoco", reason='needs "gymnasium[mujoco]"')


@pytest.mark.parametrize("name", ["cheetah-vel", "cheetah-dir", "ant-vel", "ant-dir"])
def test_locomotion_equals_gymnasium_and_pays_the_authors_rewards(mujoco, name):
    """A trajectory of a batch equals gymnasium's, bit for bit; v is the centre of mass's, by differences."""
    gymnasium = pytest.importorskip("gymnasium", reason='needs "gymnasium[mujoco]"')
    rng, ant = np.random.default_rng(0), name.startswith("ant")
    settings = rl_experiment(name, "--frame-skip 2").settings
    environment = rl.environment_of(settings, [1.0, -1.0], 1)
    observation = environment.reset(rng)
    assert observation.shape == (2, 1, 125 if ant else 20)
    actions = rng.normal(size=(200, 2, 1, environment.actions))
    model = environment.model
    alone = gymnasium.make("Ant-v5" if ant else "HalfCheetah-v5", frame_skip=2).unwrapped
    alone.model.opt.timestep = 0.02 if ant else 0.01
    alone.set_state(*np.split(environment.states[1, : model.nq + model.nv], [model.nq]))
    alone.data.qacc_warmstart[:] = 0
    for t, action in enumerate(actions):
        observation, reward, ended = environment.step(action)
        alone.do_simulation(np.clip(action[1, 0], -1, 1), 2)
        simulation = environment.simulation  # last of all it was trajectory 1
        assert np.array_equal(simulation.qpos, alone.data.qpos), t
        assert np.array_equal(simulation.qvel, alone.data.qvel)
        moved, h = mujoco.MjData(model), 1e-6
        moved.qpos = simulation.qpos
        mujoco.mj_integratePos(model, moved.qpos, simulation.qvel, h)
        mujoco.mj_kinematics(model, moved)
        mujoco.mj_comPos(model, moved)
        seen, centre = observation[1, 0], observation[1, 0, -3:]
        settled = copy.copy(alone.data)
        mujoco.mj_forward(model, settled)
        mujoco.mj_rnePostConstraint(model, settled)
        contacts = np.clip(settled.cfrc_ext, -1, 1) if ant else np.zeros(0)
        parts = settled.qpos[not ant :], settled.qvel, contacts.ravel(), settled.xmat[1 : 1 + ant].ravel()
        assert np.array_equal(seen, np.concatenate([*parts, centre]))
        velocity = (moved.subtree_com[1] - centre)[0] / h
        expected = -velocity if name.endswith("dir") else -abs(velocity + 1)
        expected -= (0.005 if ant else 0.05) * (np.clip(action[1, 0], -1, 1) ** 2).sum()
        if ant:
            expected += 0.05 + name.endswith("vel") - 0.0005 * (contacts**2).sum()
            assert ended[1, 0] == (not 0.2 <= simulation.qpos[2] <= 1)
        assert abs(reward[1, 0] - expected) < 1e-4
        if ended.any():
            break
    assert t > 10 and (ant or t == 199)


@pytest.mark.parametrize("name, place, start", [("cheetah-vel", 1, 0), ("ant-vel", 2, 0.55)])
def test_locomotion_starts_as_the_authors_do(mujoco, name, place, start):
    environment = rl.Locomotion(name, [1.0, 2.0], 150)
    environment.reset(np.random.default_rng(0))
    first = environment.states.copy()
    nq, nv = environment.model.nq, environment.model.nv
    noise = environment.states[:, : nq + nv].std(axis=0)
    assert np.allclose(noise[:nq], 0.01, rtol=0.2) and np.allclose(noise[nq:], 0.1, rtol=0.2)
    assert abs(environment.states[:, place].mean() - start) < 0.005
    correlations = np.corrcoef(environment.states[:, : nq + nv].T)
    assert np.abs(correlations - np.eye(nq + nv)).max() < 0.4, "each has noise of its own"
    environment.states[...] = first[0]
    _, reward, _ = environment.step(np.zeros((2, 150, environment.actions)))
    assert (reward == reward[:, :1]).all() and reward[0, 0] != reward[1, 0], "each by its task's goal"
    environment.reset(np.random.default_rng(0))
    assert np.array_equal(environment.states, first), "nothing is left of what was before"


def test_an_ant_is_done_by_its_height_or_a_state_not_finite_and_then_stays(mujoco):
    for place, value, done in ((2, 0.16, 1), (2, 0.18, 0), (2, 0.99, 0), (2, 1.01, 1), (15, 1e200, 1)):
        environment = rl.Locomotion("ant-dir", [-1.0], 2, oracle=True)
        environment.reset(np.random.default_rng(0))
        with refused(r"expected \(1, 2, 8\)"):
            environment.step(np.zeros((1, 2, 1)))
        environment.states[0, place] = value
        _, first, ended = environment.step(np.zeros((1, 2, 8)))
        assert ended.tolist() == [[done, False]]
        assert np.isfinite(first).all() and (first[0, 0] != 0) == (place == 2), "nothing is paid for NaN"
        seen, second, _ = environment.step(np.ones((1, 2, 8)))
        again, _, ended = environment.step(np.ones((1, 2, 8)))
        stays = np.array_equal(again[0, 0], seen[0, 0], equal_nan=True)
        assert (second[0, 0] == 0) == stays == ended[0, 0] == done
        assert second[0, 1] != 0 and (again[..., -1] == -1).all()
        inputs = rl_experiment("ant-dir", "--baseline oracle").policy.inputs
        assert again.shape == (1, 2, *inputs) == (1, 2, 126)


@pytest.mark.parametrize("name", ["cheetah-dir", "ant-vel"])
def test_a_body_is_drawn_where_it_was_seen(mujoco, matplotlib, name):
    environment = rl.Locomotion(name, [1.0], 1)
    environment.reset(np.random.default_rng(0))
    observation = environment.step(np.ones((1, 1, environment.actions)))[0][0, 0]
    simulation, parts = environment.simulation, environment.model.geom_bodyid > 0
    places = simulation.geom_xpos[parts, ::2].copy()
    simulation.qpos[0] += 5  # of which an observation tells by the centre of mass
    assert np.allclose(rl.outlines(environment, observation).mean(axis=1), places)
    experiment = rl_experiment(name, "--horizon 8 --trajectories 2 --frame-skip 3")
    rl.plot_bodies(canvas := cli.canvas_of(9, 5), experiment, experiment.start().theta, name)
    (axes,), count = canvas.axes, 4 * parts.sum()
    assert len(axes.patches) == 3 * count
    least, most = axes.patches[count], axes.patches[2 * count]
    assert most.get_label().startswith("after 3 steps")
    assert float(most.get_label().split()[-1]) == rl.test_goals(name, 40).max().round(1)
    assert not np.array_equal(least.get_xy(), most.get_xy())
    assert axes.get_yticklabels()[-1].get_text() == f"{21 * environment.model.opt.timestep:.1f} s"


# The README ------------------------------------------------------------------------------------

README = (HERE / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_readme_quotes_the_source():
    page = next(block for block in blocks("python") if block.startswith("def adapt"))
    source = "\n\n".join(map(inspect.getsource, (maml.adapt, maml.meta_loss, maml.meta_gradient)))
    assert page == re.sub(r' {4}""".*?"""\n', "", source, flags=re.DOTALL), "but for the docstrings"


def globals_of(code):
    found = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return found.union(*(globals_of(inner) for inner in code.co_consts if inspect.iscode(inner)))


def test_a_function_can_be_copied_out_with_what_the_readme_says_it_needs():
    copied, imported = {}, "np anp grad make_hvp value_and_grad partial NamedTuple".split()
    table = README.partition("| functions | need |")[2].partition("\n\n")[0]
    rows = [re.findall(r"`([\w.]+)`", cell) for line in table.splitlines() for cell in line.split("|")[1:3]]
    for names, needs in zip(rows[::2], rows[1::2]):
        used = set()
        for i, function in enumerate(names):
            home, _, name = function.rpartition(".")
            module = sys.modules[home or "maml"]
            before = [part.rpartition(".")[2] for part in names[:i] if part.rpartition(".")[0] == home]
            source = "\n".join(inspect.getsource(getattr(module, part)) for part in [*needs, *before, name])
            copied[function] = {part: getattr(maml, part) for part in imported}
            exec(source, copied[function])
            found = globals_of(compile(source, function, "exec"))
            assert found <= {*copied[function], *dir(builtins), "__annotations__"}, function
            used |= found
        assert set(needs) <= used, names
    assert len(copied) > 25
    shipped = [HERE / f"{name}.py" for name in "bench cli maml nets rl tasks test_maml".split()]
    shipped += (HERE / "assets").glob("*.py")
    assert all(one.read_bytes().startswith(b"# SPDX-License-Identifier: MIT\n") for one in shipped)
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


def test_the_readmes_figures_are_those_of_the_weights_and_tables(folder):
    models, lines = sorted((HERE / "assets/weights").glob("*.npz")), README.splitlines()
    rows = [*map(assets.tables.row, models), *assets.tables.sinusoid_rows()]
    rows += [*assets.tables.settings_rows(maml), *assets.tables.settings_rows(rl)]
    assert all(any(line.startswith(row) for line in lines) for row in rows) and len(rows) > 9
    assert sum(model.stat().st_size for model in models) < 5e6
    authors = "miniimagenet-5way-1shot-authors"
    for name, at in {
        authors: (1, 10),
        f"{authors}-2400": (1, 10),
        "omniglot-5way-1shot-alone": (1, 3),
        "omniglot-20way-1shot-5shots": (5, 5),
        "omniglot-20way-1shot-5shots-2400": (5, 5),
    }.items():
        found = assets.tables.results(HERE / f"assets/weights/{name}.csv")
        assert cli.cell(found[at], 100, 2) in README
    head, *rows = (HERE / "assets/sinusoid.csv").read_text().splitlines()
    parts = {}
    for row in rows:
        seed, _, method = row.split(",")[:3]
        parts.setdefault(f"{method}-{seed}.csv", [head[5:]]).append(row[2:])
    for name, some in parts.items():
        Path(name).write_text("\n".join([*some, ""]))
    assert assets.tables.joined(reversed(parts)) == "\n".join([head, *rows, ""])
    long = '"' + "a" * 200_000  # longer than csv takes
    for old, new, reason in [
        ("tasks", "tasks,model", "one shape"),
        (",20,10,", ",20,11,", "missing"),
        (",mse,", long, "no whole table"),
    ]:
        Path(name).write_text("\n".join([*some, ""]).replace(old, new))
        with pytest.raises(cli.Unusable, match=reason):
            assets.tables.joined(parts)
    for paths, reason in ([*parts][:-1], "one shape"), ([*parts][:1] * 2, "of this name came before"):
        with pytest.raises(cli.Unusable, match=reason):
            assets.tables.joined(paths)
    for end in ("npz", "csv"):
        shutil.copy(HERE / f"assets/weights/sinusoid.{end}", folder)
    Path("sinusoid-2400.csv").write_text("a\nb\n")
    with pytest.raises(cli.Unusable, match="sinusoid.npz: it or its table is damaged"):
        assets.tables.row(Path("sinusoid.npz"))


@pytest.mark.parametrize("module, name", [(maml, "sinusoid"), (rl, "navigation-oracle")])
def test_a_model_of_the_readme_has_its_figures_here_too(folder, module, name):
    """Medians, as rounding changes what a task that diverges ends at."""
    assert command("--evaluate", HERE / f"assets/weights/{name}.npz", "--results r.csv", module=module) == 0
    found, stated = rows_of("r.csv"), rows_of(HERE / f"assets/weights/{name}.csv")
    assert [(row["shots"], row["step"]) for row in found] == [(row["shots"], row["step"]) for row in stated]
    assert all(np.isclose(*(float(row["median"]) for row in rows), rtol=0.01) for rows in zip(found, stated))


def commands_in(page):
    """The module and the parsed flags of each command."""
    for name, words in re.findall(r"python (maml|rl)\.py ([^#&\n]*)", page):
        module = {"maml": maml, "rl": rl}[name]
        yield module, module.build_parser().parse_args(shlex.split(words))


def test_readme_commands_are_understood():
    commands = [*commands_in("\n".join(blocks("bash")))]
    assert len(commands) > 8
    assert all(args.evaluate or args.resume or cli.settings_of(args, module) for module, args in commands)


def test_the_models_have_the_settings_of_the_commands_that_trained_them():
    folder, found = HERE / "assets/weights", {}
    for module, args in commands_in((folder / "README.md").read_text(encoding="utf-8")):
        if args.resume:
            found[args.resume] |= {"beta": args.beta, "iterations": args.iterations}
        elif args.save:
            found[args.save] = cli.settings_of(args, module)
    assert {*found} == {model.name for model in folder.glob("*.npz")}
    for name, stated in found.items():
        assert assets.tables.loaded(folder / name)[0] == stated, name
