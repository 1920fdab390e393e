# SPDX-License-Identifier: MIT
"""The authors' weights of MiniImagenet 5-way 1-shot, as a model: python -m assets.authors IN.npy OUT.npz

IN.npy: float32 [32645], their published checkpoint's arrays in the order of the network's shapes, but for the
convolutions' biases, which batch norm cancels.
"""

import sys

import numpy as np

import cli
import maml
import tasks


def main(*paths):
    """-> exit code."""
    try:
        given, made = paths
        theta = np.asarray(np.load(given))
        settings = maml.settings_of(maml.build_parser().parse_args(["--task", "miniimagenet"]))
        size = maml.experiment_of(settings).network.size
        if (theta.shape, theta.dtype) != ((size,), np.float32):
            raise ValueError(f"{given} is {theta.dtype} {theta.shape}; expected float32 ({size},)")
        cli.save_weights(made, settings, theta, 60_000)
        return 0
    except Exception as error:  # whatever the bytes hold
        text = tasks.one_line(error) if len(paths) == 2 else "name the weights and the model: IN.npy OUT.npz"
    cli.tell(f"authors.py: {text}")
    return 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
