"""Training at many noise levels: the reference's losses, what is drawn, and what a trained flow does."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import commands
from configs import digits
from tarflow_jax import Noise, TarFlow, TarFlowPipeline
from tarflow_jax.flow import Conditioning
from tarflow_jax.likelihood import training_loss
from tarflow_jax.noise import Levels
from tarflow_jax.runtime import make_mesh
from tarflow_jax.training import Recipe, train
from tarflow_jax.training.optimizer import Optimizer


@pytest.mark.slow
def test_the_reference_s_training_run(load_golden):
    golden = load_golden("noise_training")
    flow, optimizer = (
        TarFlow(golden.config),
        Optimizer(20, 1e-3, 1e-3, 0, 0.9, 0.95, 1e-4, 0.0, 0.0, "adamw", 0.0).transformation(),
    )

    @jax.jit
    def step(params, state, images, labels, std):
        given, levels = Conditioning(labels, std), Levels(std, jnp.zeros((len(std), 4)))
        loss = functools.partial(training_loss, flow, images=images, conditioning=given, levels=levels)
        value, gradients = jax.value_and_grad(lambda params: loss({"params": params})[0])(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradients, state, params)
        return jax.tree.map(jnp.add, params, updates), state, value

    params, losses = golden.variables["params"], []
    state = optimizer.init(params)
    for batch in zip(golden.images("x"), golden.labels("y"), golden.arrays["t"], strict=True):
        params, state, loss = step(params, state, *batch)
        losses.append(float(loss))
    np.testing.assert_allclose(losses, golden.arrays["losses"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("draw", ["uniform", "variance"])
def test_levels_are_drawn_from_their_range(draw):
    noise = Noise("levels", std_min=0.1, std_max=0.5, draw=draw)
    levels = noise.levels(jax.random.key(0), 4000)
    assert float(levels.std.min()) >= 0.1
    assert float(levels.std.max()) <= 0.5
    np.testing.assert_array_equal(levels.quarter.sum(1), 1)
    np.testing.assert_array_equal(levels.quarter.argmax(1), np.clip((np.asarray(levels.std) - 0.1) / 0.1, 0, 3) // 1)
    drawn = np.quantile(np.asarray(levels.std), (np.arange(8) + 0.5) / 8)
    np.testing.assert_allclose(noise.quantiles(8), drawn, atol=0.015)
    assert Noise.from_dict(noise.to_dict()) == noise
    assert Noise.from_dict({"kind": "gaussian", "std": 0.1}) == Noise("gaussian", 0.1)


@pytest.mark.slow
def test_a_trained_flow_is_surer_of_cleaner_images_and_shows_every_step(tmp_path, monkeypatch):
    monkeypatch.setattr(Recipe, "mesh", lambda self: make_mesh(devices=jax.devices()[:1]))
    config = digits.get_config()
    config.model.update({"noise_conditional": True, "width": 64, "num_blocks": 2, "layers_per_block": 1})
    config.noise.update({"kind": "levels", "std": 0.0, "std_min": 0.05, "std_max": 0.5})
    config.train.update({"num_steps": 150, "batch_size": 32, "sample_every": 0, "log_every": 50, "accumulation": 2})
    state = train(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(len(line["level_losses"]) == 4 for line in lines)
    pipe = TarFlowPipeline.from_pretrained(tmp_path)
    images, labels = Recipe(config).source("test").read(np.arange(64))
    images = jnp.asarray(images, jnp.float32) / 127.5 - 1
    noise = jax.random.normal(jax.random.key(0), images.shape)
    low, high = (pipe.log_prob(images + std * noise, labels, std).mean() for std in (0.05, 0.5))
    assert low > high + 10
    assert int(state.step) == 150

    flags = (f"--workdir={tmp_path}", f"--out={tmp_path}", "--num_images=2")
    frames = []
    for steps in ("2", "5"):
        code, _, err = commands.run("-m", "launch.sample", *flags, f"--denoise_steps={steps}")
        assert code == 0, err
        with Image.open(tmp_path / "trajectory.gif") as gif:
            frames.append(gif.n_frames)
    assert frames[1] == frames[0] + 3  # an image after every step
