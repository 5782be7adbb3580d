"""A student's training: the same loop, meshes and checkpoints as a flow's."""

import dataclasses
import functools
import importlib
import json
import math
import os
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import runs
from configs import digits
from configs.defaults import with_flow
from configs.student import digits as student_digits
from tarflow_jax import Guidance, Noise
from tarflow_jax.noise import to_float
from tarflow_jax.runtime import LocalBatch, Preempted, make_mesh
from tarflow_jax.runtime.parameters import params_shapes, student_shapes
from tarflow_jax.student import Perception, StudentConfig
from tarflow_jax.training import Frozen, Recipe, StudentTask, TrainConfig, train
from tarflow_jax.training.optimizer import Optimizer
from tarflow_jax.training.step import compiled_step, jitted_step, new_state
from tiny_models import TINY, decode, random_variables

GAUSSIAN = Noise("gaussian", 0.1)


@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "imagenet64_uncond"])
def test_recipes_fit_their_flows_and_are_hardly_larger(name):
    flow, student = (importlib.import_module(f"configs.{folder}{name}").get_config() for folder in ("", "student."))
    recipe = Recipe(with_flow(student, flow))
    shapes = (student_shapes(recipe.student), params_shapes(recipe.model))
    sizes = [sum(map(math.prod, of_one.values())) for of_one in shapes]
    assert sizes[0] <= 1.2 * sizes[1]


def test_a_student_s_recipe_alone_is_no_flow_s():
    with pytest.raises(ValueError, match=r"no model: it is a student's, for launch\.distill"):
        Recipe(student_digits.get_config())
    with pytest.raises(ValueError, match="is no student's recipe"):
        with_flow(digits.get_config(), digits.get_config())


@pytest.mark.slow
@pytest.mark.parametrize("max_guidance", [0.0, 2.0])
def test_guided_or_not_it_learns_what_the_flow_makes_of_the_latents_and_clean_images(monkeypatch, max_guidance):
    seen = {}

    def record(_, __, *batch):
        seen.update(zip(("clean", "latents", "trajectory", "labels", "weights", "perception"), batch, strict=True))
        return jnp.zeros(()), {}

    monkeypatch.setattr("tarflow_jax.training.task.distillation_loss", record)
    task = StudentTask(StudentConfig(TINY, layers_per_block=(1,), max_guidance=max_guidance), GAUSSIAN)
    images, labels = runs.random_images(TINY, 8, 0)
    frozen, labels = random_variables(TINY), np.where(np.arange(8) < 2, -1, labels)
    batch = task.prepare(jax.random.key(1), jnp.asarray(images), jnp.asarray(labels))
    task.loss({}, batch, Frozen(frozen))
    assert len(np.unique(seen["weights"])) > 3 or not max_guidance
    assert float(seen["weights"].max()) <= max_guidance
    assert not seen["weights"][:2].any()  # without a label there is nothing to guide by
    np.testing.assert_allclose(seen["clean"], to_float(images), atol=1e-6)
    for i, weight in enumerate(np.asarray(seen["weights"])):
        drawn = decode(TINY, frozen, seen["latents"][i : i + 1], labels[i : i + 1], Guidance(weight))
        np.testing.assert_allclose(drawn.trajectory[0, :0:-1], seen["trajectory"][i], atol=1e-4)
    noise = np.asarray(seen["trajectory"][:, 0]) - np.asarray(seen["clean"])
    assert 0.08 < noise.std() < 0.12


def run_steps(mesh, accumulation=1, count=3):
    """Losses of a tiny student's first steps."""
    flow = dataclasses.replace(TINY, num_blocks=1, layers_per_block=1)
    student = StudentConfig(flow, layers_per_block=(1,), max_guidance=1.0, perceptual=0.5)
    perception = Perception(flow.num_classes).init(jax.random.key(2), jnp.zeros((1, *flow.image_shape)))["params"]
    optimizer = Optimizer(count, 1e-3, 1e-3, 0, 0.9, 0.999, 1e-4, 0.0, 0.0, "adamw", 0.0)
    config = TrainConfig(StudentTask(student, GAUSSIAN, drop_label=0.2), optimizer, accumulation)
    state, step = new_state(config, mesh, jax.random.key(0)), compiled_step(config, mesh)
    rows, losses = LocalBatch(mesh, runs.BATCH_SIZE), []
    frozen = random_variables(flow)
    for i in range(count):
        batch = (rows.put(values[rows.local]) for values in runs.random_images(flow, runs.BATCH_SIZE, i))
        state, metrics = step(state, *batch, jax.random.key(1), Frozen(frozen, perception))
        losses.append(float(metrics["loss"]))
    assert jitted_step(config, mesh)._cache_size() <= 2  # the state's first placement, and a step's
    assert set(metrics) == {"loss", "image_error", "block_errors", "perceptual", "grad_norm"}
    return losses


@functools.cache
def on_one_device():
    return run_steps(make_mesh(devices=jax.devices()[:1]))


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "accumulation"), [((8, 1, 1), 2), ((2, 2, 2), 1)])
def test_losses_do_not_depend_on_the_mesh(sizes, accumulation):
    mesh = make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    np.testing.assert_allclose(run_steps(mesh, accumulation), on_one_device(), rtol=1e-5)


@pytest.mark.slow
def test_stopped_and_resumed_it_ends_bit_for_bit_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(Recipe, "mesh", lambda self, devices=None: make_mesh(devices=jax.devices()[:1]))
    flow = digits.get_config("smoke")
    flow.model.num_blocks = 1
    config = with_flow(student_digits.get_config("smoke"), flow)
    config.student.flow = "0" * 16
    config.train.update({"num_steps": 4, "checkpoint_every": 2, "evaluate_every": 2, "log_every": 1, "sample_every": 3})
    teacher = Frozen(random_variables(Recipe(flow).model))
    whole = train(config, tmp_path / "whole", frozen=teacher)

    def stop(step, variables):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted, match="stop at step 3"):
        train(config, tmp_path / "stopped", stop, teacher)
    resumed = train(config, tmp_path / "stopped", frozen=teacher)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, resumed), jax.tree.map(np.asarray, whole))
    lines = [json.loads(line) for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert {"image_error", "block_errors", "loss"} <= lines[0].keys()
    assert sum("test_loss" in line for line in lines) == 2
    config.student.flow = "1" * 16  # another flow's
    with pytest.raises(ValueError, match=r"holds another configuration: student\.flow"):
        train(config, tmp_path / "stopped", frozen=teacher)
