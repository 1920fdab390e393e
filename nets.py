# SPDX-License-Identifier: MIT
"""Networks and losses as functions of one flat parameter vector.

Axes: T tasks, n examples of one task, P parameters. Data is x [T, n, ...]; theta is [P], shared by
all tasks, or [T, P]. The dtype of theta, float32 or float64, is the dtype of everything.

Everything is written twice: `apply` and `value` are the definition, on autograd.numpy, `forward` and `expand`
the closed form, in NumPy: four passes, each returning its result and the next one. For a layer out = f(w, x):

    out, backward   = forward(w, x)
    below, tangent  = backward(u, g)     u = dL/d out;  below = dL/d x, and dL/d w is written into g
    d_out, finish   = tangent(v, dx)     the change of out as w moves along v and x along dx
    d_below         = finish(du, h)      the change of below, and that of dL/d w is written into h

What the last pass writes, for v in parameter space, is the Hessian-vector product H v: forward over
reverse, at the cost of two gradients and with no pass repeated. w is [*view], shared, or [T, *view]; g and v
are [T, *view], and so is h, or [*view], a sum over tasks. A pass may overwrite its dx and du, but in its u,
which the layer above may read again, only set numbers to 0.
"""

import itertools
import math
from functools import partial, reduce
from operator import iadd

import autograd.numpy as anp
import numpy as np
from autograd.extend import defvjp, primitive

EPSILON = 0.001  # added to the variance, as in the authors' code
BLOCK = 1 << 19  # numbers that stay in the cache

# The network -----------------------------------------------------------------------------------


class Network:
    """f_theta(x): a chain of layers as a function of one flat theta.

    shapes   {name: shape} in the order of theta, each array row-major
    size     P, the number of parameters
    inputs   the shape of one example; outputs, that of its output
    """

    def __init__(self, layers, inputs, outputs):
        self.layers, self.inputs, self.outputs = layers, inputs, outputs
        self.shapes = {name: shape for layer in layers for name, shape in layer.shapes.items()}
        stops = [*itertools.accumulate(math.prod(layer.view or (0,)) for layer in layers)]
        self.parts = [(slice(i, j), layer.view) for i, j, layer in zip([0, *stops], stops, layers)]
        self.size = stops[-1]
        if sum(map(math.prod, self.shapes.values())) != self.size:
            raise ValueError(f"layers share a name among {', '.join(self.shapes)}; give each its own")

    def init(self, rng, dtype=np.float32):
        """theta [P] at the start of training: weights as their layer draws them, vectors zero."""
        starts = {
            name: layer.draw(rng, shape) if len(shape) > 1 else np.zeros(shape)
            for layer in self.layers
            for name, shape in layer.shapes.items()
        }
        return self.flatten(starts).astype(dtype)

    def flatten(self, arrays):
        """{name: array [*shape]} -> theta [P], the inverse of `unflatten`."""
        found = {name: arrays[name].shape for name in self.shapes}
        if found != self.shapes:
            raise ValueError(f"the arrays have shapes {found}; expected {self.shapes}")
        return np.concatenate([arrays[name].ravel() for name in self.shapes])

    def unflatten(self, theta):
        """theta [P] or [T, P] -> {name: array [..., *shape]}, views of theta; autograd can trace it."""
        stops = [*itertools.accumulate(map(math.prod, self.shapes.values()))]
        parts = zip(self.shapes.items(), anp.split(theta, stops[:-1], axis=-1))
        return {name: anp.reshape(part, theta.shape[:-1] + shape) for (name, shape), part in parts}

    def apply(self, theta, x):
        """f_theta(x), the definition: x [T, n, *inputs] -> [T, n, *outputs]."""
        x = self._checked(theta, x)
        arrays = self.unflatten(theta)
        for layer in self.layers:
            x = layer.apply(x, *[arrays[name] for name in layer.shapes])
        return x

    def forward(self, theta, x):
        """Equals `apply`, and is the first of the four passes: -> outputs, backward.

        backward(u)     u [T, n, *outputs] -> Jᵀu [T, P], tangent; u, as du below, may be overwritten
        tangent(v)      v [T, P] -> J v [T, n, *outputs], finish
        finish(du, h)   -> h = Jᵀdu + (dJ)ᵀu, [T, P], or its sum over tasks where h is [P]
        """
        out, backwards = self._checked(theta, x), []
        for layer, w in zip(self.layers, self._views(theta)):
            out, back = layer.forward(w, out)
            backwards.append(back)

        def backward(u):
            gradient, tangents = np.empty((len(x), self.size), theta.dtype), []
            for back, g in zip(reversed(backwards), reversed(self._views(gradient))):
                u, forth = back(u, g)
                tangents.append(forth)

            def tangent(v):
                dx, finishes = np.zeros((*x.shape[:2], *self.inputs), v.dtype), []
                for forth, w in zip(reversed(tangents), self._views(v)):
                    dx, back = forth(w, dx)
                    finishes.append(back)

                def finish(du, h):
                    for back, part in zip(reversed(finishes), reversed(self._views(h))):
                        du = back(du, part)
                    return h

                return dx, finish

            return gradient, tangent

        return out, backward

    def _views(self, theta):
        """theta [P] or [T, P] -> the parameters of each layer as its closed form wants them."""
        return [view and theta[..., cut].reshape(theta.shape[:-1] + view) for cut, view in self.parts]

    def _checked(self, theta, x):
        flat = 1 in (x.ndim - 2, len(self.inputs)) and math.prod(x.shape[2:]) == math.prod(self.inputs)
        if x.ndim < 3 or 0 in x.shape or x.shape[2:] != self.inputs and not flat:
            raise ValueError(f"x has shape {x.shape}; expected (tasks, examples, *{self.inputs}), not empty")
        if theta.shape not in ((self.size,), (len(x), self.size)):
            expected = f"({self.size},) or (tasks, {self.size})"
            raise ValueError(f"theta has shape {theta.shape}, x {x.shape}; expected theta {expected}")
        if theta.dtype.kind != "f" or x.dtype != theta.dtype:
            raise ValueError(f"x is {x.dtype} and theta {theta.dtype}; expected one floating-point dtype")
        return x.reshape(x.shape[:2] + self.inputs)


def mlp(sizes, normalize=False, draw=None, activation=None):
    """Multi-layer perceptron, sizes = (inputs, hidden, ..., outputs), hidden layers with `Relu` or `Tanh`.

    theta is w1 b1 w2 b2 ...; with `normalize` (batch norm before the activation) all but the last b are beta.
    Weights start as draw(rng, shape), by default the authors' `truncated_normal`; the rest zero.
    """
    draw, activation = draw or truncated_normal, activation or Relu
    layers, last = [], len(sizes) - 1
    for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes), 1):
        normal = normalize and i < last
        layers += [Dense(inputs, outputs, (f"w{i}",) if normal else (f"w{i}", f"b{i}"), draw, first=i == 1)]
        layers += [BatchNorm(outputs, f"beta{i}"), activation()] if normal else [activation()]
    return Network(layers[:-1], (sizes[0],), (sizes[-1],))


def convnet(shape, ways, filters=64, pool=False):
    """Four blocks of convolution, batch norm and ReLU, then a linear layer; shape (height, width, channels).

    Without `pool` (Omniglot) the convolutions have stride 2, and the last block's output is averaged over
    space. With `pool` (MiniImagenet) they have stride 1, a 2x2 max pool comes before each ReLU, and the last
    layer reads all that is left. theta is conv1 beta1 ... conv4 beta4 w b. Initial weights are the authors':
    Glorot uniform, but standard normal in the layer after the mean over space; the rest zero.
    """
    height, width, channels = shape
    if pool and min(height, width) < 16:
        raise ValueError(f"images are {shape}; four 2x2 pools need 16x16 pixels or more")
    layers, stride = [], 1 if pool else 2
    for i, inputs in enumerate((channels, filters, filters, filters), 1):
        conv, norm = Conv(inputs, filters, f"conv{i}", stride), BatchNorm(filters, f"beta{i}")
        layers += [conv, norm] if layers else [FirstBlock(conv, norm)]
        layers += [MaxPool(), Relu()] if pool else [Relu()]
    if pool:
        pixels = (height // 16) * (width // 16)
        layers += [Flatten(), Dense(pixels * filters, ways, ("w", "b"), glorot_uniform)]
    else:
        layers += [SpatialMean(), Dense(filters, ways, ("w", "b"), np.random.Generator.standard_normal)]
    return Network(layers, tuple(shape), (ways,))


def truncated_normal(rng, shape):
    """Draws of N(0, 0.01²), those beyond two deviations drawn again (which leaves a deviation of 0.0088)."""
    draws = rng.normal(size=shape)
    while (far := np.abs(draws) > 2).any():
        draws[far] = rng.normal(size=far.sum())
    return 0.01 * draws


def glorot_uniform(rng, shape):
    """Draws of U(-a, a), a² = 6 / (fan in + fan out), shape = (*receptive field, inputs, outputs)."""
    fans = np.prod(shape[:-2]) * (shape[-2] + shape[-1])
    return rng.uniform(-1, 1, shape) * np.sqrt(6 / fans)


# Layers ----------------------------------------------------------------------------------------
# The parameters of a layer are consecutive in theta, so that its closed form sees them as one array
# of shape `view`, without a copy. A weight is [in, out], shared, or [T, in, out].


def _times(a, w):
    """a w: a [T, m, in] -> [T, m, out]; a shared w takes one product for all tasks."""
    if a.shape[-1] == 1:
        return a * w
    if w.ndim == 3:
        return a @ w
    return (_flat(a) @ w).reshape(a.shape[:-1] + w.shape[-1:])


def _transposed_times(a, u, out):
    """aᵀ u: a [T, m, in], u [T, m, out] -> [T, in, out], or its sum over tasks where out is [in, out]."""
    return np.matmul(_flat(a).T, _flat(u), out=out) if out.ndim == 2 else np.matmul(a.mT, u, out=out)


def _flat(x):
    """x [..., c] -> [m, c]."""
    return x.reshape(-1, x.shape[-1])


class Dense:
    """out = x w + b; in closed form out = [x, 1] [w; b], so that biases need no code of their own.

    x [T, n, inputs]; names (w, b), or (w,) for no bias. `first` marks the layer that reads the data: it
    takes no gradient of x.
    """

    def __init__(self, inputs, outputs, names, draw=truncated_normal, first=False):
        self.draw, self.first = draw, first
        self.shapes = dict(zip(names, [(inputs, outputs), (outputs,)]))
        self.view = (inputs + len(names) - 1, outputs)

    def apply(self, x, w, b=None):
        out = anp.matmul(x, w)
        return out if b is None else out + b[..., None, :]

    def forward(self, w, x):
        inputs = x.shape[-1]
        a = np.empty(x.shape[:-1] + self.view[:1], x.dtype)
        a[..., :inputs], a[..., inputs:] = x, 1
        wt = w[..., :inputs, :].mT

        def backward(u, g):
            _transposed_times(a, u, g)

            def tangent(v, dx):
                d_out = _times(a, v)
                if not self.first:
                    d_out += _times(dx, w[..., :inputs, :])

                def finish(du, h):
                    _transposed_times(a, du, h)
                    if self.first:
                        return None
                    part = h[..., :inputs, :]
                    part += _transposed_times(dx, u, np.empty_like(part))
                    below = _times(du, wt)
                    below += _times(u, v[..., :inputs, :].mT)
                    return below

                return d_out, finish

            return None if self.first else _times(u, wt), tangent

        return _times(a, w), backward


def _linear(out, times, transposed):
    """The four passes of a layer out = M x with no parameters: M, Mᵀ, M and Mᵀ again."""
    return out, lambda u, _: (transposed(u), lambda _, dx: (times(dx), lambda du, _: transposed(du)))


class _Fixed:
    """A layer with no parameters."""

    shapes, view = {}, None


class Relu(_Fixed):
    """out = max(x, 0): linear between its kinks, where M multiplies by the mask x > 0."""

    def apply(self, x):
        return x * (x > 0)  # anp.maximum has slope 1/2 at 0

    def forward(self, _, x):
        mask = (x > 0).astype(x.dtype)

        def masked(u):  # in place: the layer above may hold u, but reads it only where this mask comes again
            u *= mask
            return u

        return _linear(x * mask, masked, masked)


class Tanh(_Fixed):
    """out = tanh x, with slope 1 - out² and bend -2 out (1 - out²): d_below = slope du + bend dx u."""

    def apply(self, x):
        return anp.tanh(x)

    def forward(self, _, x):
        out = np.tanh(x)
        slope = 1 - out * out
        bend = -2 * out * slope

        def backward(u, _):
            return slope * u, lambda _, dx: (slope * dx, lambda du, _: slope * du + bend * dx * u)

        return out, backward


class MaxPool(_Fixed):
    """out = the largest of each 2x2 block, stride 2; a last odd row or column is dropped.

    x [T, n, h, w, c] -> [T, n, ⌊h/2⌋, ⌊w/2⌋, c]. Linear between ties, which share the gradient.
    """

    def apply(self, x):
        return anp.max(anp.stack(_quads(x)), axis=0)

    def forward(self, _, x):
        shape, out = x.shape, np.empty_like(_quads(x)[0])
        masks = np.empty((4, *out.shape), bool)
        for cut in _blocks(x):
            quads, part = _quads(x[:, cut]), out[:, cut]
            np.maximum(np.maximum(quads[0], quads[1]), np.maximum(quads[2], quads[3]), out=part)
            for mask, q in zip(masks, quads):
                np.equal(q, part, out=mask[:, cut])
        share = np.reciprocal(masks.sum(axis=0, dtype=np.uint8), dtype=x.dtype)

        def gather(dx):
            return reduce(iadd, (mask * q for mask, q in zip(masks, _quads(dx)))) * share

        def scatter(u):
            below, u = np.empty(shape, u.dtype), u * share
            for cut in _blocks(below):
                below[:, cut] = 0
                for mask, q in zip(masks, _quads(below[:, cut])):
                    np.multiply(mask[:, cut], u[:, cut], out=q)
            return below

        return _linear(out, gather, scatter)


def _blocks(x, copies=1):
    """Slices of images, each so short that `copies` copies of its part of x [T, n, ...] fit into cache."""
    size = max(1, BLOCK // (copies * x[:, 0].size))
    return [slice(start, start + size) for start in range(0, x.shape[1], size)]


def _quads(x):
    """The four corners of x's 2x2 blocks, as views."""
    h, w = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    return [x[:, :, i:h:2, j:w:2] for i in range(2) for j in range(2)]


class SpatialMean(_Fixed):
    """out = mean of x over space: [T, n, h, w, c] -> [T, n, c]."""

    def apply(self, x):
        return anp.mean(x, axis=(2, 3))

    def forward(self, _, x):
        shape, area = x.shape, x.shape[2] * x.shape[3]
        return _linear(self.apply(x), self.apply, lambda u: (u / area).repeat(area, axis=1).reshape(shape))


class Flatten(_Fixed):
    """out = x with its axes of space and channels as one: [T, n, h, w, c] -> [T, n, h·w·c]."""

    def apply(self, x):
        return anp.reshape(x, x.shape[:2] + (-1,))

    def forward(self, _, x):
        shape = x.shape
        return _linear(self.apply(x), self.apply, lambda u: u.reshape(shape))


class BatchNorm:
    """out = z + beta, z = (x - mean x) / sqrt(var x + 0.001), with the statistics of the given set.

    x [T, ..., channels]; mean and (biased) variance of each channel over all the other axes of a task's
    set, in training and at test alike; a shift and no scale (reference: the authors' code). With
    s = sqrt(var x + 0.001), dz = B(dx) where B(u) = (u - mean u - z mean(u z)) / s, and B is symmetric.
    """

    def __init__(self, channels, name):
        self.shapes, self.view = {name: (channels,)}, (channels,)

    def apply(self, x, beta):
        axes = tuple(range(1, x.ndim - 1))
        centred = x - anp.mean(x, axis=axes, keepdims=True)
        z = centred / anp.sqrt(anp.mean(centred**2, axis=axes, keepdims=True) + EPSILON)
        return z + anp.reshape(beta, beta.shape[:-1] + (1,) * len(axes) + beta.shape[-1:])

    def forward(self, beta, x):
        shape = x.shape
        z = _rows(x) - _mean(_rows(x))
        s = np.sqrt(_mean(z * z) + EPSILON)
        z /= s

        def project(u):
            """B(u), and mean(u z)."""
            p = _mean(u * z)
            return (u - _mean(u) - z * p) / s, p

        def backward(u, g):
            u = _rows(u)
            g[...] = u.sum(axis=1)
            below, p = project(u)

            def tangent(v, dx):
                dz, ds = project(_rows(dx))

                def finish(du, h):
                    du = _rows(du)
                    h[...] = du.sum(axis=1) if h.ndim == 2 else du.sum(axis=(0, 1))
                    d_below, _ = project(du)
                    d_below -= dz * (p / s) + z * (_mean(u * dz) / s) + below * (ds / s)
                    return d_below.reshape(shape)

                return (dz + v[:, None]).reshape(shape), finish

            return below.reshape(shape), tangent

        return (z + beta[..., None, :]).reshape(shape), backward


def _rows(x):
    """x [T, ..., c] -> [T, m, c]."""
    return x.reshape(len(x), -1, x.shape[-1])


def _mean(x):
    """Mean over axis 1, kept, as a matrix product: faster than NumPy's reduction of it."""
    return np.full((1, x.shape[1]), 1 / x.shape[1], x.dtype) @ x


class Conv:
    """out = the 3x3 convolution of x with w at stride 1 or 2, "SAME" zero padding, no bias.

    x [T, n, h, w, inputs] -> [T, n, ⌈h / stride⌉, ⌈w / stride⌉, outputs]; w [3, 3, inputs, outputs]. The
    closed form is out = a w with a = unfold(x), the patches of 3x3 pixels as rows; dL/dx = unfoldᵀ(u wᵀ).
    """

    def __init__(self, inputs, outputs, name, stride):
        self.draw, self.stride = glorot_uniform, stride
        self.shapes, self.view = {name: (3, 3, inputs, outputs)}, (9 * inputs, outputs)

    def apply(self, x, w):
        x = anp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), "constant")
        patches = anp.concatenate(_taps(x, self.stride), axis=-1)
        w = anp.reshape(w, w.shape[:-4] + (1,) * (w.ndim - 4) * 2 + self.view)
        return anp.matmul(patches, w)

    def forward(self, w, x):
        stride, a = self.stride, _Patches(x, self.stride)

        def backward(u, g):
            a.correlate(u, g)

            def tangent(v, dx):
                da = _Patches(dx, stride)
                d_out = a.convolve(v)
                d_out += da.convolve(w)

                def finish(du, h):
                    a.correlate(du, h)
                    h += da.correlate(u, np.empty_like(h))
                    return a.transposed((du, w), (u, v))

                return d_out, finish

            return a.transposed((u, w)), tangent

        return a.convolve(w), backward


class _Patches:
    """The 3x3 patches of x as rows, a [T, rows, 9 c], and its products.

    At stride 2 they are kept. At stride 1 they are nine times as many numbers as x has, and are made anew for
    each product, for as many images at a time as fit the cache.
    """

    def __init__(self, x, stride):
        self.stride, self.x_shape = stride, x.shape
        self.shape = (*x.shape[:2], *(-(-size // stride) for size in x.shape[2:4]))
        self.x, self.kept = (x, None) if stride == 1 else (None, [(slice(None), _unfold(x, stride))])

    def blocks(self):
        """Slices of the images, each with its patches."""
        return self.kept or ((cut, _unfold(self.x[:, cut], 1)) for cut in _blocks(self.x, copies=9))

    def convolve(self, w):
        """a w, [T, n, h', w', outputs]."""
        out = np.empty((*self.shape, w.shape[-1]), w.dtype)
        for cut, a in self.blocks():
            np.matmul(a, w, out=_rows(out[:, cut]))
        return out

    def correlate(self, u, out):
        """Writes aᵀ u into out, [T, 9 c, outputs], or its sum over tasks where out is [9 c, outputs]."""
        blocks = ((a, _rows(u[:, cut])) for cut, a in self.blocks())
        _transposed_times(*next(blocks), out)
        for a, part in blocks:
            out += _transposed_times(a, part, np.empty_like(out))
        return out

    def transposed(self, *pairs):
        """Σ over pairs (u, w) of unfoldᵀ(u wᵀ): dL/dx. At stride 1 it is itself a convolution."""
        if self.stride == 1:
            return reduce(iadd, (_Patches(u, 1).convolve(_turned(w)) for u, w in pairs))
        patches = reduce(iadd, (_times(_rows(u), w.mT) for u, w in pairs)).reshape(*self.shape, 9, -1)
        tasks, n, height, width, c = self.x_shape
        padded = np.zeros((tasks, n, height + 2, width + 2, c), patches.dtype)
        for k, tap in enumerate(_taps(padded, self.stride)):  # a pixel sums what the patches hold of it
            np.add(tap, patches[..., k, :], out=tap)
        return padded[:, :, 1:-1, 1:-1]


def _turned(w):
    """The filters [..., 9 in, out] of dL/dx: taps in reverse, [..., 9 out, in]."""
    taps = w.reshape(*w.shape[:-2], 9, -1, w.shape[-1])[..., ::-1, :, :].swapaxes(-1, -2)
    return taps.reshape(*w.shape[:-2], 9 * w.shape[-1], -1)


def _taps(padded, stride):
    """What each tap of a 3x3 filter reads of x in its border of zeros: nine views [T, n, out h, out w, c].

    TensorFlow's "SAME" padding: at stride 2 the border before an even size is not read.
    """
    sizes = padded.shape[2] - 2, padded.shape[3] - 2
    rows, columns = ([slice(i + (size - 1) % stride, i + size, stride) for i in range(3)] for size in sizes)
    return [padded[:, :, i, j] for i in rows for j in columns]


def _padded(x):
    """x [T, n, h, w, c] in a border of zeros, one pixel wide."""
    tasks, n, h, w, c = x.shape
    padded = np.zeros((tasks, n, h + 2, w + 2, c), x.dtype)
    padded[:, :, 1:-1, 1:-1] = x
    return padded


def _unfold(x, stride):
    """x [T, n, h, w, c] -> its zero-padded 3x3 patches as rows, [T, n·out h·out w, 9 c]."""
    padded = _padded(x)
    first = _taps(padded, stride)[0]
    (*size, c), (*steps, number) = first.shape, first.strides
    patches = np.lib.stride_tricks.as_strided(first, (*size, 3, 3 * c), (*steps, padded.strides[2], number))
    return patches.reshape(len(x), -1, 9 * c)


class FirstBlock:
    """BatchNorm of Conv of the data, as one layer: no pass over the convolution's output, the largest array.

    Of the patches a, which theta does not change, it needs the mean and covariance C alone, for which float32
    has digits enough in data of order 1. With a centred, ones for beta as in `Dense`, x·y = Σ x y by column,

        s = sqrt(w·Cw + 0.001), w̃ = w / s        out = a w̃ + beta         G = aᵀu          q = G·w̃
        dL/dw = (G - q C w̃) / s       dL/dbeta = 1ᵀu

        ds = C w̃·v                    dw̃ = (v - w̃ ds) / s      dG = aᵀdu        dq = dG·w̃ + G·dw̃
        h = (dG - dq C w̃ - q C dw̃ - ds dL/dw) / s
    """

    def __init__(self, conv, norm):
        self.conv, self.norm, self.draw = conv, norm, conv.draw
        self.shapes, (rows, outputs) = conv.shapes | norm.shapes, conv.view
        self.view = (rows + 1, outputs)

    def apply(self, x, w, beta):
        return self.norm.apply(self.conv.apply(x, w), beta)

    def forward(self, w, x):
        a, shape = _centred_patches(x, self.conv.stride)
        moments = (a @ a.mT[..., :-1]).sum(axis=1)  # not a @ a.mT, whose symmetric product is slower
        covariance = moments[:, :-1] / math.prod(shape[1:])
        w, beta = w[..., :-1, :], w[..., -1:, :]
        cw = covariance @ w
        s = np.sqrt(_dot(w, cw) + EPSILON)
        w, cw = w / s, cw / s

        def times(w, beta):
            beta = np.broadcast_to(beta, (len(w), *beta.shape[-2:]))
            return (a.mT @ np.concatenate([w, beta], axis=1)[:, None]).reshape(*shape, -1)

        def transposed_times(u):
            return (a @ u.reshape(*a.mT.shape[:3], -1)).sum(axis=1)

        def backward(u, g):
            u = transposed_times(u)
            q = _dot(u[:, :-1], w)
            slope = (u[:, :-1] - q * cw) / s
            g[:, :-1], g[:, -1:] = slope, u[:, -1:]

            def tangent(v, _):
                ds = _dot(cw, v[:, :-1])
                dw = (v[:, :-1] - w * ds) / s

                def finish(du, h):
                    du = transposed_times(du)
                    dq = _dot(du[:, :-1], w) + _dot(u[:, :-1], dw)
                    du[:, :-1] -= dq * cw + q * (covariance @ dw) + ds * slope
                    du[:, :-1] /= s
                    h[...] = du if h.ndim == 3 else du.sum(axis=0)

                return times(dw, v[:, -1:]), finish

            return None, tangent

        return times(w, beta), backward


def _dot(x, y):
    """Σ x y down the columns of [T, m, c], kept."""
    return (x * y).sum(axis=-2, keepdims=True)


def _centred_patches(x, stride):
    """x [T, n, h, w, c] -> `_unfold` of it, centred, as columns one after the other, then one of ones.

    -> [T, pieces, 9 c + 1, rows], (T, n, out h, out w). For few channels this order of memory is the faster
    one, and BLAS has a faster way with pieces of up to about 1000 rows.
    """
    tasks, n, h, w, c = x.shape
    taps = _taps(_padded(np.moveaxis(x, -1, 1).reshape(tasks, c * n, h, w, 1)), stride)
    height, width = taps[0].shape[2:4]
    a = np.empty((tasks, 9 * c + 1, n * height * width), x.dtype)
    np.stack(taps, axis=1, out=a[:, :-1].reshape(tasks, 9, *taps[0].shape[1:]))
    a[:, :-1] -= a[:, :-1].mean(axis=-1, keepdims=True)
    a[:, -1] = 1
    lines = max(size for size in range(1, 2 + 1000 // width) if n * height % size == 0)
    return a.reshape(*a.shape[:2], -1, lines * width).swapaxes(1, 2), (tasks, n, height, width)


# Losses ----------------------------------------------------------------------------------------
# An output loss maps outputs and targets, [T, n, ...] both, to a number per task: `value` by definition;
# `expand` its value, its derivative u by out, and the derivative of u along a change of out.


class SquaredError:
    """L = mean over examples and outputs of (out - y)²: eq. (2), as a mean: alpha suits any n."""

    def value(self, out, y):
        return anp.mean((out - y) ** 2, axis=tuple(range(1, y.ndim)))

    def expand(self, out, y):
        residual = out - y
        scale = 2 / residual[0].size
        u = scale * residual
        value = np.vecdot(u.reshape(len(y), -1), residual.reshape(len(y), -1)) / 2
        return value, u, lambda d_out: scale * d_out


class CrossEntropy:
    """L = mean over examples of -Σ_c y_c log p_c, p = softmax(out), y [T, n, ways], one-hot: eq. (3), N-way.

    dL/d out = (w p - y) / n with w = Σ_c y_c, and along d_out it changes by w p (d_out - p·d_out) / n.
    """

    def value(self, out, y):
        top = anp.max(out, axis=-1, keepdims=True)
        logs = out - top - anp.log(anp.sum(anp.exp(out - top), axis=-1, keepdims=True))
        return -anp.mean(anp.sum(y * logs, axis=-1), axis=1)

    def expand(self, out, y):
        n, w = y.shape[1], y.sum(axis=-1, keepdims=True)  # w is 1, or an example's weight
        logs = out - out.max(axis=-1, keepdims=True)
        p = np.exp(logs)
        total = p.sum(axis=-1, keepdims=True)
        logs -= np.log(total)
        p /= total
        value = -np.vecdot(y, logs).mean(axis=1)
        return value, (w * p - y) / n, lambda d_out: w * p * (d_out - np.vecdot(p, d_out)[..., None]) / n


class Loss:
    """loss(theta, x, y) -> [T]: an output loss on a network's outputs, and its closed forms.

    theta [P] or [T, P]; x [T, n, *inputs]; y [T, n, *outputs]; all of one dtype, else ValueError. Calling
    it is the definition, which autograd can trace; `expand` and `grad` are plain NumPy.
    """

    def __init__(self, network, output):
        self.network, self.output = network, output

    def __call__(self, theta, x, y):
        return self.output.value(*_matching(self.network.apply(theta, x), y))

    def expand(self, theta, x, y):
        """L(theta + v) = value + g·v + v·H v / 2 + ...: -> value [T], g [T, P], v ↦ H v.

        v is [T, P] and so is H v, or [P], summed over tasks, with product(v, total=True). The
        Hessian-vector product reads theta, x and this call's activations, and costs about two gradients.
        """
        out, backward = self.network.forward(theta, x)
        value, u, second = self.output.expand(*_matching(out, y))
        gradient, tangent = backward(u)

        def product(v, total=False):
            if (v.shape, v.dtype) != (gradient.shape, gradient.dtype):
                raise ValueError(f"v is {v.dtype} {v.shape}; expected {gradient.dtype} {gradient.shape}")
            d_out, finish = tangent(v)
            return finish(second(d_out), np.empty(v.shape[1:] if total else v.shape, v.dtype))

        return value, gradient, product

    @primitive
    def grad(self, theta, x, y):
        """∇L [T, P]. Autograd may differentiate it once more by theta: it then takes the product."""
        return self.expand(theta, x, y)[1]


defvjp(
    Loss.grad,
    lambda g, loss, theta, x, y: lambda v: loss.expand(theta, x, y)[2](v, total=theta.ndim == 1),
    argnums=(1,),
)


mean_squared_error = partial(Loss, output=SquaredError())  # mean_squared_error(network) -> Loss, eq. (2)
cross_entropy = partial(Loss, output=CrossEntropy())  # cross_entropy(network) -> Loss, eq. (3)


def _matching(out, y):
    if y.shape != out.shape or y.dtype != out.dtype:
        raise ValueError(f"y is {y.dtype} {y.shape}; expected {out.dtype} {out.shape}, as the outputs")
    return out, y
