# SPDX-License-Identifier: MIT
"""Networks and losses as functions of one flat parameter vector.

Axes: T tasks, n examples of one task, P parameters. Data is x [T, n, ...]; theta is [P], shared by
all tasks, or [T, P]. The dtype of theta, float32 or float64, is the dtype of everything.

Everything is written twice. `apply` and `value` are the definition, on autograd.numpy. `forward`
and `expand` are its closed form in plain NumPy: a chain of four passes, each returning its result
and the next pass, a closure over what has been computed so far. For a layer out = f(w, x) they are

    out, backward   = forward(w, x)
    below, tangent  = backward(u, g)     u = dL/d out;  below = dL/d x, and dL/d w is written into g
    d_out, finish   = tangent(v, dx)     the change of out as w moves along v and x along dx
    d_below         = finish(du, h)      the change of below, and that of dL/d w is written into h

What the last pass writes, for v in parameter space, is the Hessian-vector product H v: forward over
reverse, at the cost of two gradients and with no pass repeated.
"""

import itertools
import math
from functools import partial

import autograd.numpy as anp
import numpy as np
from autograd.extend import defvjp, primitive

# glibc returns freed memory above its thresholds to the system, and page faults then take a fifth of
# a gradient's time; it raises the thresholds to the largest block (up to 32 MB) that it sees freed.
np.empty((32 << 20) - (1 << 16), np.uint8)


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

    def init(self, rng, dtype=np.float32):
        """theta [P] at the start of training, drawn as each layer says."""
        return np.concatenate([layer.init(rng) for layer in self.layers]).astype(dtype)

    def unflatten(self, theta):
        """theta [P] or [T, P] -> {name: array [..., *shape]}, views of theta; autograd can trace it."""
        arrays, start = {}, 0
        for name, shape in self.shapes.items():
            stop = start + math.prod(shape)
            arrays[name] = anp.reshape(theta[..., start:stop], theta.shape[:-1] + shape)
            start = stop
        return arrays

    def apply(self, theta, x):
        """f_theta(x), the definition: x [T, n, *inputs] -> [T, n, *outputs]."""
        x = self._checked(theta, x)
        arrays = self.unflatten(theta)
        for layer in self.layers:
            x = layer.apply(x, *[arrays[name] for name in layer.shapes])
        return x

    def forward(self, theta, x):
        """Equals `apply`, and is the first of the four passes: -> outputs, backward.

        backward(u)     u [T, n, *outputs] -> Jᵀu [T, P], tangent
        tangent(v)      v [T, P] -> J v [T, n, *outputs], finish
        finish(du, h)   -> h = Jᵀdu + (dJ)ᵀu, [T, P], or its sum over tasks where h is [P]
        """
        out, backwards = self._forward(theta, x)

        def backward(u):
            gradient, tangents = np.empty((len(x), self.size), theta.dtype), []
            for back, g in zip(reversed(backwards), reversed(self._views(gradient))):
                u, forth = back(u, g)
                tangents.append(forth)

            def tangent(v):
                dx, finishes = None, []
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

    def pull(self, theta, x, derivative):
        """Jᵀu [T, P] alone, u = derivative(outputs): `forward` and its backward, lighter in memory.

        What a layer has kept is let go as soon as it has been read.
        """
        out, backwards = self._forward(theta, x)
        u, gradient = derivative(out), np.empty((len(x), self.size), theta.dtype)
        for g in reversed(self._views(gradient)):
            u, _ = backwards.pop()(u, g)
        return gradient

    def _forward(self, theta, x):
        x, backwards = self._checked(theta, x), []
        for layer, w in zip(self.layers, self._views(theta)):
            x, back = layer.forward(w, x)
            backwards.append(back)
        return x, backwards

    def _views(self, theta):
        """theta [P] or [T, P] -> the parameters of each layer as its closed form wants them."""
        lead = theta.shape[:-1]
        return [view and theta[..., cut].reshape(lead + view) for cut, view in self.parts]

    def _checked(self, theta, x):
        if theta.ndim not in (1, 2) or theta.shape[-1] != self.size:
            raise ValueError(
                f"theta has shape {theta.shape}; expected ({self.size},) or (tasks, {self.size})"
            )
        if x.ndim < 3 or math.prod(x.shape[2:]) != math.prod(self.inputs):
            raise ValueError(f"x has shape {x.shape}; expected (tasks, examples, *{self.inputs})")
        if theta.ndim == 2 and len(theta) != len(x):
            raise ValueError(f"theta has shape {theta.shape} and x {x.shape}: different numbers of tasks")
        if theta.dtype.kind != "f" or x.dtype != theta.dtype:
            raise ValueError(
                f"x is {x.dtype} and theta {theta.dtype}; expected the same floating-point dtype"
            )
        return x.reshape(x.shape[:2] + self.inputs)


def mlp(sizes, normalize=False, draw=None):
    """Multi-layer perceptron, sizes = (inputs, hidden, ..., outputs), ReLU after each hidden layer.

    theta is w1 b1 w2 b2 ...; with `normalize` (batch norm before each ReLU) w1 beta1 ... w b. Weights
    start as draw(rng, shape), by default the authors' `truncated_normal`; the rest zero.
    """
    draw = draw or truncated_normal
    layers, last = [], len(sizes) - 1
    for i in range(1, last):
        bias = () if normalize else (f"b{i}",)
        layers += [Dense(sizes[i - 1], sizes[i], (f"w{i}", *bias), draw, first=i == 1)]
        layers += [BatchNorm(sizes[i], f"beta{i}"), Relu()] if normalize else [Relu()]
    layers += [Dense(sizes[-2], sizes[-1], (f"w{last}", f"b{last}"), draw, first=last == 1)]
    return Network(layers, (sizes[0],), (sizes[-1],))


def convnet(shape, ways, filters=64, pool=False):
    """Four blocks of convolution, batch norm and ReLU, then a linear layer; shape (height, width, channels).

    Without `pool` (Omniglot) the convolutions have stride 2, and the last block's output is averaged over
    space. With `pool` (MiniImagenet) they have stride 1, each block ends in a 2x2 max pool, and the last
    layer reads all that is left. theta is conv1 beta1 ... conv4 beta4 w b. Initial weights are the authors':
    Glorot uniform, but a standard normal after the mean over space; the rest zero.
    """
    height, width, inputs = shape
    layers = []
    for i in range(1, 5):
        if pool:
            conv = UnitConv if i > 1 else FirstConv
            layers += [conv(inputs, filters, f"conv{i}", stride=1), PooledBatchNorm(filters, f"beta{i}")]
            height, width = height // 2, width // 2
        else:
            conv = Conv if i > 1 else FirstConv
            layers += [conv(inputs, filters, f"conv{i}", stride=2), BatchNorm(filters, f"beta{i}")]
        layers += [Relu()]
        inputs = filters
    if pool:
        layers += [Flatten(), Dense(height * width * filters, ways, ("w", "b"), glorot_uniform)]
    else:
        layers += [SpatialMean(), Dense(filters, ways, ("w", "b"), standard_normal)]
    return Network(layers, tuple(shape), (ways,))


def truncated_normal(rng, shape):
    """Draws of N(0, 0.01²), those beyond two deviations drawn again (so theirs is 0.0088)."""
    draws = rng.normal(size=shape)
    while (far := np.abs(draws) > 2).any():
        draws[far] = rng.normal(size=far.sum())
    return 0.01 * draws


def standard_normal(rng, shape):
    """Draws of N(0, 1)."""
    return rng.normal(size=shape)


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
    return (a.reshape(-1, a.shape[-1]) @ w).reshape(a.shape[:-1] + w.shape[-1:])


def _transposed_times(a, u, out):
    """aᵀ u: a [T, m, in], u [T, m, out] -> [T, in, out], or its sum over tasks where out is [in, out].

    The sum takes one product per group of tasks, of about 64 rows: many rows to a small result are slow.
    """
    if out.ndim == 3:
        return np.matmul(a.mT, u, out=out)
    tasks, n = a.shape[:2]
    group = max(size for size in range(1, 2 + 64 // n) if tasks % size == 0)
    a, u = (array.reshape(tasks // group, group * n, -1) for array in (a, u))
    return np.matmul(a.mT, u).sum(axis=0, out=out)


def _append_one(x):
    """[x, 1]: a column of ones more."""
    a = np.empty(x.shape[:-1] + (x.shape[-1] + 1,), x.dtype)
    a[..., :-1] = x
    a[..., -1] = 1
    return a


class Dense:
    """out = x w + b; in closed form out = [x, 1] [w; b], so that biases need no code of their own.

    x [T, n, inputs]; names (w, b), or (w,) for no bias. `first` marks the layer that reads the data: it
    takes no gradient of x.
    """

    def __init__(self, inputs, outputs, names, draw=truncated_normal, first=False):
        self.bias, self.draw, self.first = len(names) == 2, draw, first
        self.shapes = dict(zip(names, [(inputs, outputs), (outputs,)]))
        self.view = (inputs + self.bias, outputs)

    def init(self, rng):
        w, *b = self.shapes.values()
        return np.concatenate([self.draw(rng, w).ravel(), *map(np.zeros, b)])

    def apply(self, x, w, b=None):
        out = anp.matmul(x, w)
        return out + b[..., None, :] if self.bias else out

    def forward(self, w, x):
        inputs = x.shape[-1]
        a = _append_one(x) if self.bias else x
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


class Relu:
    """out = max(x, 0). Piecewise linear, so that every pass multiplies by the mask x > 0."""

    shapes, view = {}, None

    def init(self, rng):
        return np.zeros(0)

    def apply(self, x):
        return anp.maximum(x, 0)

    def forward(self, _, x):
        mask = (x > 0).astype(x.dtype)

        def tangent(_, dx):
            return dx * mask, lambda du, _: du * mask

        return x * mask, lambda u, _: (u * mask, tangent)


class BatchNorm:
    """out = z + beta, z = (x - mean x) / sqrt(var x + 0.001), with the statistics of the given set.

    x [T, ..., channels]; mean and (biased) variance of each channel over all the other axes of a task's
    set, in training and at test alike; a shift and no scale (reference: the authors' code). With
    s = sqrt(var x + 0.001), dz = B(dx) where B(u) = (u - mean u - z mean(u z)) / s, and B is symmetric.
    """

    def __init__(self, channels, name):
        self.shapes, self.view = {name: (channels,)}, (channels,)

    def init(self, rng):
        return np.zeros(self.view)

    def apply(self, x, beta):
        axes = tuple(range(1, x.ndim - 1))
        centred = x - anp.mean(x, axis=axes, keepdims=True)
        z = centred / anp.sqrt(anp.mean(centred**2, axis=axes, keepdims=True) + 0.001)
        return z + anp.reshape(beta, beta.shape[:-1] + (1,) * len(axes) + beta.shape[-1:])

    def forward(self, beta, x):
        shape = x.shape
        x = x.reshape(shape[0], -1, shape[-1])
        centred = x - _mean(x)
        s = np.sqrt(_mean(centred * centred) + x.dtype.type(0.001))
        z = centred / s

        def backward(u, g):
            u = u.reshape(z.shape)
            g[...] = u.sum(axis=1)
            p = _mean(u * z)
            below = (u - _mean(u) - z * p) / s

            def tangent(v, dx):
                dx = dx.reshape(z.shape)
                ds = _mean(dx * z)
                dz = (dx - _mean(dx) - z * ds) / s

                def finish(du, h):
                    du = du.reshape(z.shape)
                    h[...] = du.sum(axis=1) if h.ndim == 2 else du.sum(axis=(0, 1))
                    dp = _mean(du * z) + _mean(u * dz)
                    return ((du - _mean(du) - dz * p - z * dp - below * ds) / s).reshape(shape)

                return (dz + v[:, None]).reshape(shape), finish

            return below.reshape(shape), tangent

        return (z + beta[..., None, :]).reshape(shape), backward


def _mean(x):
    return _sum(x) * x.dtype.type(1 / x.shape[1])


def _dot(x, y):
    """Σ x y over axis 1, kept, without an array of products."""
    return np.einsum("tmc,tmc->tc", x, y)[:, None]


def _sum(x):
    """Over axis 1, kept, as a matrix product: faster than NumPy's reduction of this axis."""
    return np.ones((1, x.shape[1]), x.dtype) @ x


class Conv:
    """out = the 3x3 convolution of x with w, "SAME" zero padding, no bias.

    x [T, n, h, w, inputs] -> [T, n, ⌈h / stride⌉, ⌈w / stride⌉, outputs]; w [3, 3, inputs, outputs]. The
    closed form is out = a w with a = unfold(x), the patches of 3x3 pixels as rows; dL/dx = unfoldᵀ(u wᵀ).
    """

    def __init__(self, inputs, outputs, name, stride):
        self.stride = stride
        self.shapes, self.view = {name: (3, 3, inputs, outputs)}, (9 * inputs, outputs)

    def init(self, rng):
        return np.concatenate([glorot_uniform(rng, shape).ravel() for shape in self.shapes.values()])

    def apply(self, x, w):
        (height, top, bottom), (width, left, right) = (_same(size, self.stride) for size in x.shape[2:4])
        x = anp.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right), (0, 0)), "constant")
        rows = [slice(i, i + self.stride * (height - 1) + 1, self.stride) for i in range(3)]
        columns = [slice(j, j + self.stride * (width - 1) + 1, self.stride) for j in range(3)]
        patches = anp.concatenate([x[:, :, i, j] for i in rows for j in columns], axis=-1)
        w = anp.reshape(w, w.shape[:-4] + (1,) * (w.ndim - 4) * 2 + self.view)
        return anp.matmul(patches, w)

    def forward(self, w, x):
        a, wt, stride, shape = _unfold(x, self.stride), w.swapaxes(-1, -2), self.stride, x.shape
        rows, out_shape = (*a.shape[:2], w.shape[-1]), self._out_shape(w, x)

        def backward(u, g):
            u = u.reshape(rows)
            _transposed_times(a, u, g)

            def tangent(v, dx):
                da = _unfold(dx, stride)
                d_out = _times(a, v)
                d_out += _times(da, w)

                def finish(du, h):
                    du = du.reshape(rows)
                    _transposed_times(a, du, h)
                    h += _transposed_times(da, u, np.empty_like(h))
                    below = _times(du, wt)
                    below += _times(u, v.swapaxes(-1, -2))
                    return _fold(below, shape, stride)

                return d_out.reshape(out_shape), finish

            return _fold(_times(u, wt), shape, stride), tangent

        return _times(a, w).reshape(out_shape), backward

    def _out_shape(self, w, x):
        return (*x.shape[:2], *(-(-size // self.stride) for size in x.shape[2:4]), w.shape[-1])


class FirstConv(Conv):
    """Conv of the data: no gradient of x, and patches that are made anew for every product."""

    def forward(self, w, x):
        unfold = partial(_unfold_planes, stride=self.stride)

        def gradient(u, g):
            _correlate(unfold, [(x, u)], g)

        def backward(u, g):
            gradient(u, g)
            return None, lambda v, _: (_convolve(unfold, [(x, v)], shape), gradient)

        shape = self._out_shape(w, x)
        return _convolve(unfold, [(x, w)], shape), backward


class UnitConv(Conv):
    """Conv with stride 1, not the first layer: patches are made anew for every product.

    dL/dx is the same convolution of u, with w's taps turned round and its channels swapped, so that nothing
    is folded back.
    """

    def forward(self, w, x):
        unfold, shape = partial(_unfold, stride=1), self._out_shape(w, x)

        def backward(u, g):
            _correlate(unfold, [(x, u)], g)

            def tangent(v, dx):
                def finish(du, h):
                    _correlate(unfold, [(x, du), (dx, u)], h)
                    return _convolve(unfold, [(u, _turned(v)), (du, _turned(w))], x.shape)

                return _convolve(unfold, [(x, v), (dx, w)], shape), finish

            return _convolve(unfold, [(u, _turned(w))], x.shape), tangent

        return _convolve(unfold, [(x, w)], shape), backward


def _turned(w):
    """The filters [..., 9 in, out] of dL/dx: taps in reverse, [..., 9 out, in]."""
    taps = w.reshape(*w.shape[:-2], 9, -1, w.shape[-1])[..., ::-1, :, :].swapaxes(-1, -2)
    return np.ascontiguousarray(taps).reshape(*w.shape[:-2], 9 * w.shape[-1], -1)


def _convolve(unfold, pairs, shape):
    """Σ over pairs of unfold(x) w, of `shape`."""
    (x, w), *others = pairs
    out, pixels = np.empty(shape, x.dtype).reshape(shape[0], -1, shape[-1]), math.prod(shape[2:-1])
    for cut in _image_cuts(x, 9):
        part = out[:, cut.start * pixels : cut.stop * pixels]
        np.matmul(unfold(x[:, cut]), w, out=part)
        for dx, v in others:
            part += unfold(dx[:, cut]) @ v
    return out.reshape(shape)


def _correlate(unfold, pairs, out):
    """Writes Σ over pairs of unfold(x)ᵀ u, or that summed over tasks, into out."""
    out[...] = 0
    for cut in _image_cuts(pairs[0][0], 9):
        for x, u in pairs:
            out += _transposed_times(unfold(x[:, cut]), _pixels(u[:, cut]), np.empty_like(out))


def _same(size, stride):
    """TensorFlow's "SAME" padding for three taps: -> output size, zeros before, zeros after."""
    out = -(-size // stride)
    total = max((out - 1) * stride + 3 - size, 0)
    return out, total // 2, total - total // 2


def _unfold(x, stride):
    """x [T, n, h, w, c] -> its zero-padded 3x3 patches as rows, [T, n·out h·out w, 9 c]."""
    tasks, n, h, w, c = x.shape
    (height, top, bottom), (width, left, right) = _same(h, stride), _same(w, stride)
    padded = np.zeros((tasks, n, top + h + bottom, left + w + right, c), x.dtype)
    padded[:, :, top : top + h, left : left + w] = x
    st = padded.strides
    patches = np.lib.stride_tricks.as_strided(
        padded,
        (tasks, n, height, width, 3, 3 * c),
        (st[0], st[1], stride * st[2], stride * st[3], st[2], st[4]),
    )
    return patches.reshape(tasks, n * height * width, 9 * c)


def _unfold_planes(x, stride):
    """`_unfold` for few channels: the same array in another order of memory, a column after the other."""
    tasks, n, h, w, c = x.shape
    (_, top, bottom), (_, left, right) = _same(h, stride), _same(w, stride)
    padded = np.zeros((tasks, c, n, top + h + bottom, left + w + right), x.dtype)
    padded[:, :, :, top : top + h, left : left + w] = np.moveaxis(x, -1, 1)
    taps = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (3, 4))[:, :, :, ::stride, ::stride]
    return taps.transpose(0, 5, 6, 1, 2, 3, 4).reshape(tasks, 9 * c, -1).mT


def _fold(a, shape, stride):
    """The adjoint of `_unfold`: each pixel of x's shape sums what the patches hold of it."""
    tasks, n, h, w, c = shape
    (height, top, bottom), (width, left, right) = _same(h, stride), _same(w, stride)
    padded = np.zeros((tasks, n, top + h + bottom, left + w + right, c), a.dtype)
    a = a.reshape(tasks, n, height, width, 3, 3, c)
    for i in range(3):
        for j in range(3):
            stop, end = i + stride * (height - 1) + 1, j + stride * (width - 1) + 1
            padded[:, :, i:stop:stride, j:end:stride] += a[..., i, j, :]
    return padded[:, :, top : top + h, left : left + w]


class PooledBatchNorm:
    """out = the 2x2 max pool of BatchNorm(x), stride 2, a last odd row or column dropped.

    x [T, n, h, w, channels] -> [T, n, ⌊h/2⌋, ⌊w/2⌋, channels]. Batch norm increases in x, so that the pool
    may come first and the normalisation touch a quarter of the numbers. Ties share the gradient.
    """

    def __init__(self, channels, name):
        self.norm = BatchNorm(channels, name)
        self.shapes, self.view = self.norm.shapes, self.norm.view

    def init(self, rng):
        return np.zeros(self.view)

    def apply(self, x, beta):
        x = self.norm.apply(x, beta)
        tasks, n, h, w, c = x.shape
        quads = anp.reshape(x[:, :, : h // 2 * 2, : w // 2 * 2], (tasks, n, h // 2, 2, w // 2, 2, c))
        return anp.max(quads, axis=(3, 5))

    def forward(self, beta, x):
        tasks, n, h, w, c = shape = x.shape
        x, size, count = _lines(x), (tasks, n, h // 2, w // 2, c), x.dtype.type(n * h * w)
        cuts, wide = _image_cuts(x), partial(_wide, w)
        near = _mean(x[:, 0].reshape(tasks, -1, c))  # sums of numbers about it keep their digits
        pools, first, second = [], 0, 0
        for cut in cuts:
            part = x[:, cut] - wide(near)
            pools.append(_Pool(part.reshape(tasks, -1, h, w, c)))
            part = part.reshape(tasks, -1, c)
            first, second = first + _sum(part), second + _dot(part, part)
        offset = first / count
        mean, r = near + offset, 1 / np.sqrt(second / count - offset**2 + x.dtype.type(0.001))
        m = np.concatenate([pool.out for pool in pools], axis=1).reshape(tasks, -1, c) - offset

        def scatter(u, constant, *terms):
            """r ⊙ (the pool's adjoint of u) + constant + Σ coefficient ⊙ array."""
            out, constant, u = np.empty_like(x), wide(constant), (r * u).reshape(size)
            terms = [(wide(coefficient), array) for coefficient, array in terms]
            for cut, pool in zip(cuts, pools):
                part = out[:, cut]
                pool.scatter(u[:, cut], part.reshape(tasks, -1, h, w, c))
                part += constant
                for coefficient, array in terms:
                    part += coefficient * array[:, cut]
            return out

        def backward(u, g):
            u = u.reshape(m.shape)
            total = _sum(u)
            g[...] = total[:, 0]
            q = _dot(u, m) * (r * r / count)
            below = scatter(u, r * (q * mean - total / count), (-r * q, x))

            def tangent(v, dx):
                dx, first, second, dm = _lines(dx), 0, 0, []
                for cut, pool in zip(cuts, pools):
                    part = dx[:, cut].reshape(tasks, -1, c)
                    first = first + _sum(part)
                    second = second + _dot(part, (x[:, cut] - wide(mean)).reshape(part.shape))
                    dm.append(pool.gather(dx[:, cut].reshape(tasks, -1, h, w, c)))
                dm = np.concatenate(dm, axis=1).reshape(m.shape) - first / count
                e = second * (r * r / count)
                d_out = r * (dm - e * m)

                def finish(du, h):
                    du = du.reshape(m.shape)
                    total = _sum(du)
                    h[...] = total[:, 0] if h.ndim == 2 else total.sum(axis=(0, 1))
                    dq = (_dot(du, m) + _dot(u, dm)) * (r * r / count) - 2 * e * q
                    constant = r * (q * first / count + dq * mean - total / count)
                    terms = (-r * q, dx), (-r * dq, x), (-e, below)
                    return scatter(du, constant, *terms).reshape(shape)

                return (d_out + v[:, None]).reshape(size), finish

            return below.reshape(shape), tangent

        return (m * r + beta[..., None, :]).reshape(size), backward


def _pixels(x):
    return x.reshape(len(x), -1, x.shape[-1])


def _lines(x):
    """x [T, n, h, w, c] -> [T, n, h, w·c]: long runs of numbers, which NumPy multiplies faster than short."""
    return x.reshape(*x.shape[:3], -1)


def _wide(w, a):
    """a [T, 1, c] -> [T, 1, 1, w·c], to go with `_lines`."""
    return np.tile(a, w)[:, None]


BLOCK = 1 << 19  # numbers that stay in the cache


def _image_cuts(x, times=1):
    """Cuts of axis 1 into images so few that `times` their numbers stay in the cache."""
    size = max(1, BLOCK // (times * x[:, 0].size))
    return [slice(start, start + size) for start in range(0, x.shape[1], size)]


class _Pool:
    """Where the maxima of x's 2x2 blocks are: they share a block's gradient."""

    def __init__(self, x):
        self.shape = x.shape
        quads = self._quads(x)
        self.out = np.maximum(np.maximum(quads[0], quads[1]), np.maximum(quads[2], quads[3]))
        self.masks = [q == self.out for q in quads]
        ties = sum(mask.view(np.uint8) for mask in self.masks)
        self.share = np.reciprocal(ties, dtype=x.dtype)

    def _quads(self, x):
        h, w = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
        return [x[:, :, i:h:2, j:w:2] for i in range(2) for j in range(2)]

    def gather(self, x):
        return sum(mask * q for mask, q in zip(self.masks, self._quads(x))) * self.share

    def scatter(self, u, out):
        out[:, :, self.shape[2] // 2 * 2 :] = 0
        out[:, :, :, self.shape[3] // 2 * 2 :] = 0
        u = u * self.share
        for mask, q in zip(self.masks, self._quads(out)):
            np.multiply(mask, u, out=q)


class SpatialMean:
    """out = mean of x over space: [T, n, h, w, c] -> [T, n, c]. Linear, and so is every pass."""

    shapes, view = {}, None

    def init(self, rng):
        return np.zeros(0)

    def apply(self, x):
        return anp.mean(x, axis=(2, 3))

    def forward(self, _, x):
        area = x.shape[2] * x.shape[3]

        def spread(u, _):
            return np.broadcast_to((u / area)[:, :, None, None], x.shape)

        def tangent(_, dx):
            return dx.mean(axis=(2, 3)), spread

        return x.mean(axis=(2, 3)), lambda u, _: (spread(u, _), tangent)


class Flatten:
    """out = x with its axes of space and channels as one: [T, n, h, w, c] -> [T, n, h·w·c]."""

    shapes, view = {}, None

    def init(self, rng):
        return np.zeros(0)

    def apply(self, x):
        return anp.reshape(x, x.shape[:2] + (-1,))

    def forward(self, _, x):
        def tangent(_, dx):
            return self.apply(dx), lambda du, _: du.reshape(x.shape)

        return self.apply(x), lambda u, _: (u.reshape(x.shape), tangent)


# Losses ----------------------------------------------------------------------------------------
# An output loss maps outputs and targets, [T, n, ...] both, to a number per task: `value` by definition;
# `expand` its value, its derivative u by out, and the derivative of u along a change of out.


class SquaredError:
    """L = mean over examples and outputs of (out - y)²."""

    def value(self, out, y):
        return anp.mean((out - y) ** 2, axis=tuple(range(1, y.ndim)))

    def expand(self, out, y):
        residual = out - y
        scale = 2 / residual[0].size
        u = scale * residual
        value = np.vecdot(u.reshape(len(y), -1), residual.reshape(len(y), -1)) / 2
        return value, u, lambda d_out: scale * d_out


class CrossEntropy:
    """L = mean over examples of -Σ_c y_c log p_c, p = softmax(out), y one-hot [T, n, ways].

    dL/d out = (p - y) / n, and along d_out it changes by p (d_out - p·d_out) / n.
    """

    def value(self, out, y):
        top = anp.max(out, axis=-1, keepdims=True)
        logs = out - top - anp.log(anp.sum(anp.exp(out - top), axis=-1, keepdims=True))
        return -anp.mean(anp.sum(y * logs, axis=-1), axis=1)

    def expand(self, out, y):
        n = y.shape[1]
        logs = out - out.max(axis=-1, keepdims=True)
        p = np.exp(logs)
        total = p.sum(axis=-1, keepdims=True)
        logs -= np.log(total)
        p /= total

        def second(d_out):
            return p * (d_out - np.vecdot(p, d_out)[..., None]) / n

        return -np.vecdot(y, logs).mean(axis=1), (p - y) / n, second


class Loss:
    """loss(theta, x, y) -> [T]: an output loss on a network's outputs, and its closed forms.

    theta [P] or [T, P]; x [T, n, *inputs]; y [T, n, *outputs]; all of one dtype, else ValueError. Calling
    it is the definition, which autograd can trace; `expand`, `grad` and `hvp` are plain NumPy.
    """

    def __init__(self, network, output):
        self.network, self.output = network, output

    def __call__(self, theta, x, y):
        return self.output.value(*_matching(self.network.apply(theta, x), y))

    def expand(self, theta, x, y):
        """L(theta + v) = value + g·v + v·H v / 2 + ...: -> value [T], g [T, P], v ↦ H v.

        v is [T, P] and so is H v, or [P], summed over tasks, with hvp(v, total=True). The Hessian-vector
        product keeps the activations of this call and costs about two gradients.
        """
        out, backward = self.network.forward(theta, x)
        value, u, second = self.output.expand(*_matching(out, y))
        gradient, tangent = backward(u)

        def hvp(v, total=False):
            if v.shape != gradient.shape:
                raise ValueError(f"v has shape {v.shape}; expected that of the gradient, {gradient.shape}")
            d_out, finish = tangent(v)
            return finish(second(d_out), np.empty(v.shape[1:] if total else v.shape, v.dtype))

        return value, gradient, hvp

    def value_and_grad(self, theta, x, y):
        """-> value [T], ∇L [T, P]; keeps nothing for a product."""
        value = None

        def derivative(out):
            nonlocal value
            value, u, _ = self.output.expand(*_matching(out, y))
            return u

        gradient = self.network.pull(theta, x, derivative)
        return value, gradient

    def grad_and_hvp(self, theta, x, y):
        """∇L [T, P] and v [T, P] ↦ H v [T, P], a closure over the gradient's passes."""
        return self.expand(theta, x, y)[1:]

    def grad(self, theta, x, y):
        """∇L [T, P]. Autograd may differentiate it once more by theta: it then calls `hvp`."""
        return _grad(self, theta, x, y)

    def hvp(self, theta, x, y, v):
        """H v [T, P] for v [T, P]."""
        return self.expand(theta, x, y)[2](v)


@primitive
def _grad(loss, theta, x, y):
    return loss.value_and_grad(theta, x, y)[1]


defvjp(
    _grad,
    lambda g, loss, theta, x, y: lambda v: loss.expand(theta, x, y)[2](v, total=theta.ndim == 1),
    argnums=(1,),
)


def mean_squared_error(network):
    """L = mean over examples and outputs of (f_theta(x) - y)²; a mean, so alpha means the same for any n."""
    return Loss(network, SquaredError())


def cross_entropy(network):
    """L = mean over a task's examples of -log softmax(f_theta(x)) at the class that y [T, n, ways] marks."""
    return Loss(network, CrossEntropy())


def _matching(out, y):
    if y.shape != out.shape or y.dtype != out.dtype:
        raise ValueError(f"y is {y.dtype} {y.shape}; expected {out.dtype} {out.shape}, as the outputs")
    return out, y
