# SPDX-License-Identifier: MIT
"""Task distributions p(T), each drawn a whole meta-batch at once.

A sampler takes a numpy.random.Generator first and returns support, query: two pairs (x, y) of arrays
[tasks, examples, ...], cut from one draw.
"""

import numpy as np


def sinusoid(rng, tasks, shots, query_shots, oracle=False, dtype=np.float32):
    """y = A sin(x - phase), with A ~ U[0.1, 5], phase ~ U[0, pi] a task and x ~ U[-5, 5] (section 5.1).

    x [tasks, shots, 1] and y [tasks, shots, 1], query_shots in the query set. With `oracle` x is
    [tasks, shots, 3], (x, A, phase): what the paper's oracle is told.
    """
    if min(tasks, shots, query_shots) < 1:
        raise ValueError(
            f"tasks, shots, query_shots = {tasks}, {shots}, {query_shots}; expected 1 or more of each"
        )
    amplitude = rng.uniform(0.1, 5, (tasks, 1, 1))
    phase = rng.uniform(0, np.pi, (tasks, 1, 1))
    x = rng.uniform(-5, 5, (tasks, shots + query_shots, 1))
    y = (amplitude * np.sin(x - phase)).astype(dtype)
    if oracle:
        x = np.concatenate(np.broadcast_arrays(x, amplitude, phase), axis=2)
    x = x.astype(dtype)
    return (x[:, :shots], y[:, :shots]), (x[:, shots:], y[:, shots:])
