"""TarFlowPipeline saved and loaded again: the copy samples the same images, bit for bit."""

import jax
import numpy as np
import pytest

from configs import digits
from tarflow_jax import Noise, TarFlowPipeline
from tarflow_jax.interop import load_model
from tarflow_jax.interop.tensors import flatten
from tarflow_jax.runtime import make_mesh
from tarflow_jax.training import Recipe, train


def assert_same(pipe, other):
    assert (other.config, other.noise_std) == (pipe.config, pipe.noise_std)
    ours, theirs = flatten(pipe.variables), flatten(other.variables)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(theirs[name], ours[name])


@pytest.mark.slow
def test_trained_run_saved_and_opened_samples_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(Recipe, "mesh", lambda self: make_mesh(devices=jax.devices()[:1]))
    config = digits.get_config("smoke")
    config.train.num_steps = 2
    config.optimizer.ema_decay = 0.5
    config.data.data_dir = str(tmp_path / "data")
    train(config, tmp_path / "run", lambda step, variables: None)
    pipe = TarFlowPipeline.from_pretrained(tmp_path / "run")
    pipe.save_pretrained(tmp_path / "saved")
    other = TarFlowPipeline.from_pretrained(tmp_path / "saved")
    assert_same(pipe, other)
    saved = load_model(tmp_path / "saved")
    raw, average = flatten(saved.variables["params"]), flatten(saved.ema_params)
    assert any(not np.array_equal(raw[name], average[name]) for name in raw)
    np.testing.assert_array_equal(
        other.variables["params"]["block_0"]["project_out"]["bias"], average["block_0/project_out/bias"]
    )
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "datasets:\n- digits\n" in card
    assert "| steps | 2 |" in card
    images, again = (p.sample(jax.random.key(0), 4, np.arange(4)) for p in (pipe, other))
    np.testing.assert_array_equal(again, images)


def test_to_torch_and_back(load_golden, tmp_path):
    golden = load_golden("cond")
    pipe = TarFlowPipeline(golden.config, golden.variables, Noise("gaussian", 0.1))
    pipe.to_torch(tmp_path / "model.pth")
    other = TarFlowPipeline.from_torch(tmp_path / "model.pth", 12, 1, 3, noise_std=0.1)
    assert_same(pipe, other)
