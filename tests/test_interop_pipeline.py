"""The front door's way in and out: what goes out comes back, bit for bit."""

import numpy as np

from tarflow_jax import Noise, TarFlowPipeline
from tarflow_jax.interop.layout import flatten


def assert_same(pipe, other):
    assert (other.config, other.noise_std) == (pipe.config, pipe.noise_std)
    ours, theirs = flatten(pipe.variables), flatten(other.variables)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(theirs[name], ours[name])


def test_to_torch_and_back(load_golden, tmp_path):
    golden = load_golden("cond")
    pipe = TarFlowPipeline(golden.config, golden.variables, Noise("gaussian", 0.1))
    pipe.to_torch(tmp_path / "model.pth")
    other = TarFlowPipeline.from_torch(tmp_path / "model.pth", 12, 1, 3, noise_std=0.1)
    assert_same(pipe, other)
