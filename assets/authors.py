# SPDX-License-Identifier: MIT
"""The authors' weights of MiniImagenet 5-way 1-shot, as a model: python -m assets.authors IN.npy OUT.npz

IN.npy: float32 [32645], their published checkpoint's arrays in the order of the network's shapes, but for the
convolutions' biases, which batch norm cancels.
"""

import os
import sys

import numpy as np

import cli
import maml
import tasks


def main(given=None, made=None, *more):
    if not made or more or os.path.exists(made):
        raise cli.Unusable("name the weights, and a model that is not there yet: IN.npy OUT.npz")
    cli.check_writable("OUT.npz", made)
    try:
        theta = np.asarray(np.load(given))
        settings = cli.settings_of(maml.build_parser().parse_args(["--task", "miniimagenet"]), maml)
        size = maml.experiment_of(settings).network.size
        if (theta.shape, theta.dtype) != ((size,), np.float32):
            raise ValueError(f"{given} is {theta.dtype} {theta.shape}; expected float32 ({size},)")
    except Exception as error:  # whatever the bytes hold
        raise cli.Unusable(tasks.one_line(error))
    cli.save_weights(made, settings, theta, 59_000)


if __name__ == "__main__":
    sys.exit(cli.guarded("authors.py", lambda: main(*sys.argv[1:])))
