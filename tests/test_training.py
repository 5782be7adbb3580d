"""The step, its sharding, checkpoints and metrics."""

import dataclasses
import functools
import gzip
import json
import math
import struct

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import runs
from configs import defaults, digits
from damage import cut_short, flip_a_bit, largest_file
from tarflow_jax import Noise, TarFlow
from tarflow_jax.flow import cast_kernels
from tarflow_jax.likelihood import training_loss
from tarflow_jax.runtime import make_mesh, replicated, shardings
from tarflow_jax.scoring import loss_of
from tarflow_jax.training import Checkpoints, FlowTask, Recipe, TrainConfig, train
from tarflow_jax.training.loop import evaluate_loss, run_keys
from tarflow_jax.training.metrics import MetricsWriter
from tarflow_jax.training.optimizer import Optimizer
from tarflow_jax.training.step import compiled_step, initial_state, new_state
from tiny_models import TINY, VP, random_variables


class AsGiven(Noise):
    """For images that are noisy already."""

    def __call__(self, key, images, noise_std=None):
        return images


@pytest.mark.slow
def test_the_reference_s_training_run(load_golden):
    golden = load_golden("training")
    config = defaults.get_config()
    config.model.update(golden.config.to_dict())
    config.optimizer.update(defaults.PAPER_OPTIMIZER, learning_rate=1e-3, final_learning_rate=1e-3)
    config.train.update({"num_steps": 30, "batch_size": 16})
    given = Recipe(config).train_config
    train_config = dataclasses.replace(given, task=dataclasses.replace(given.task, noise=AsGiven("gaussian", 0.1)))
    mesh = make_mesh(devices=jax.devices()[:1])
    state = new_state(train_config, mesh, jax.random.key(0)).replace(
        variables=jax.device_put({"params": golden.variables["params"]}, replicated(mesh))
    )
    step, losses = compiled_step(train_config, mesh), []
    for images, labels in zip(golden.images("x"), golden.labels("y"), strict=True):
        state, metrics = step(state, images, labels, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    # Each loss is a difference of two float32 numbers near 1, and some are near 0.
    np.testing.assert_allclose(losses, golden.arrays["loss"], rtol=1e-4, atol=4 * np.finfo(np.float32).eps)


@pytest.mark.slow
def test_gradients_of_products_are_those_of_their_dtype():
    """Kernels that are cast before the gradient is taken give what casting them within it gives."""
    flow = TarFlow(dataclasses.replace(TINY, dtype="bfloat16"))
    variables = random_variables(TINY)
    images = jax.random.normal(jax.random.key(1), (4, *TINY.image_shape))

    def gradients(params):
        return jax.grad(lambda params: training_loss(flow, {"params": params}, images)[0])(params)

    cast = gradients(cast_kernels(variables["params"], jnp.bfloat16))
    assert cast["block_0"]["layers"]["qkv"]["kernel"].dtype == jnp.bfloat16
    assert cast["block_0"]["position_embedding"].dtype == jnp.float32
    expected = gradients(variables["params"])
    chex.assert_trees_all_equal(jax.tree.map(lambda g, e: g.astype(e.dtype), cast, expected), expected)


@functools.cache
def on_one_device():
    return runs.figures(make_mesh(devices=jax.devices()[:1]))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 4, 2)], ids=["data", "fsdp", "fsdp and tensor"])
def test_figures_do_not_depend_on_the_mesh(sizes):
    runs.assert_same(runs.figures(make_mesh(*sizes)), on_one_device())


def test_optimizer_state_lies_where_its_parameters_lie():
    state = jax.eval_shape(small_state)
    layout = shardings(make_mesh(2, 2, 2), state)
    kernel = state.variables["params"]["block_0"]["layers"]["mlp_in"]["kernel"]
    sharding = layout.variables["params"]["block_0"]["layers"]["mlp_in"]["kernel"]
    assert math.prod(sharding.shard_shape(kernel.shape)) == kernel.size // 4
    assert layout.opt_state[0].mu["block_0"]["layers"]["mlp_in"]["kernel"] == sharding


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "accumulation"), [((1, 1, 1), 4), ((8, 1, 1), 2), ((2, 2, 2), 4), ((1, 4, 2), 2)])
def test_accumulation_changes_no_loss(sizes, accumulation):
    mesh = make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    losses, _ = runs.run_steps(runs.SMALL, mesh, 5, accumulation=accumulation)
    np.testing.assert_allclose(losses, on_one_device()["losses"][:5], rtol=1e-5)


@pytest.mark.slow
def test_vp_prior_and_average_move():
    _, state = runs.run_steps(VP, make_mesh(devices=jax.devices()[:1]), 3, ema_decay=0.999)
    variance = state.variables["prior"]["variance"]
    assert float(jnp.abs(variance - 1).max()) > 0.01
    bias = ("block_0", "project_out", "bias")
    raw = functools.reduce(lambda tree, name: tree[name], bias, state.variables["params"])
    average = functools.reduce(lambda tree, name: tree[name], bias, state.ema_params)
    assert 0.5 < float(jnp.abs(average).max() / jnp.abs(raw).max()) < 1  # the initial bias, 0, does not linger
    assert state.sampling_variables["params"] is state.ema_params


def test_mesh_and_rules_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="does not cover 8 devices"):
        make_mesh(3, 1, 1)
    with pytest.raises(ValueError, match="matches no row"):
        shardings(make_mesh(), {"unheard_of": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"choose a mesh\.tensor that divides it"):
        shardings(make_mesh(1, 1, 8), {"layers": {"qkv": {"bias": jnp.zeros((1, 3, 2, 8))}}})


CONFIG = {"train": {"num_steps": 2}}


def small_state():
    optimizer = Optimizer(2, 1e-3, 1e-3, 0, 0.9, 0.999, 0.0, 0.0, 0.0, "adamw", 0.0)
    return initial_state(TrainConfig(FlowTask(TINY, Noise("gaussian", 0.1)), optimizer), jax.random.key(0))


@pytest.fixture
def saved(tmp_path):
    """A workdir's checkpoints of steps 1 and 2, and the state they hold."""
    state = jax.jit(small_state)()
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        checkpoints.save(step, state.replace(step=jnp.int32(step)), CONFIG, 1 / step)
    checkpoints.close()
    return tmp_path / "checkpoints", state


def restored(folder, state):
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.restore(jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        ))  # fmt: skip
    finally:
        checkpoints.close()


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short])
def test_checkpoints_restore_bit_for_bit_and_pass_over_damaged_ones(saved, caplog, damage):
    folder, state = saved
    step, found = restored(folder, state)
    assert step == 2
    chex.assert_trees_all_equal(found, state.replace(step=jnp.int32(2)))
    damage(folder / "2")
    step, found = restored(folder, state)
    assert step == 1
    assert "skipping checkpoint" in caplog.text
    chex.assert_trees_all_equal(found.variables, state.variables)
    largest_file(folder / "1").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is intact"):
        restored(folder, state)


@pytest.mark.slow
def test_a_checkpoint_of_another_shape_is_refused(saved):
    folder, state = saved
    other = state.replace(variables=jax.tree.map(lambda x: jnp.zeros((*x.shape, 2)), state.variables))
    with pytest.raises(ValueError, match="holds another state"):
        restored(folder, other)


def events_in(path):
    """The events in a file for TensorBoard: after each one's length are 4 bytes, after each event 4 more."""
    from tensorboardX.proto.event_pb2 import Event

    content, events = path.read_bytes(), []
    while content:
        (length,) = struct.unpack_from("<Q", content)
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return events


def test_metrics_are_cut_where_a_run_continues(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.write(step, {"loss": np.float32(step), "block_norms": np.ones(2)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # as a crash leaves it
    writer = MetricsWriter(tmp_path, 2)
    writer.write(3, {"loss": 9.0})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 9.0)]
    assert lines[0]["block_norms"] == [1.0, 1.0]
    first, *_ = sorted((tmp_path / "tensorboard").iterdir())
    assert [(e.step, [(v.tag, v.simple_value) for v in e.summary.value]) for e in events_in(first)[2:5]] == [
        (1, [("loss", 1.0)]),
        (1, [("block_norms/0", 1.0)]),
        (1, [("block_norms/1", 1.0)]),
    ]


@pytest.mark.slow
def test_test_loss_and_training_loss_are_the_same_quantity():
    config = digits.get_config("smoke")
    config.model.update({"volume_preserving": True, "num_classes": 0})
    recipe = Recipe(config)
    variables = random_variables(recipe.model)  # its prior is far from 1
    test = recipe.source("test")
    images, _ = test.read(np.arange(len(test)))
    noisy = np.stack(
        [recipe.noise(jax.random.fold_in(jax.random.key(0), i), jnp.asarray(x)) for i, x in enumerate(images)]
    )
    loss = jax.jit(functools.partial(training_loss, TarFlow(recipe.model)))(variables, noisy)[0]
    assert evaluate_loss(recipe, variables) == pytest.approx(float(loss), rel=1e-5)


def test_means_are_float64():
    log_probs = np.float32([-1.1, -2.2, -3.7]) * 1000
    expected = -log_probs.astype(np.float64).mean() / 7 - 0.5 * math.log(2 * math.pi)
    assert loss_of(log_probs, 7) == pytest.approx(expected, rel=1e-14)


def test_no_key_serves_two_purposes():
    init, steps = (jax.random.key_data(key).tolist() for key in run_keys(0))
    evaluation = jax.random.key(0)  # of the test loss; also what commands make of --seed=0
    images = jax.vmap(jax.random.fold_in, (None, 0))(evaluation, jnp.arange(70_000))
    taken = {tuple(data) for data in jax.random.key_data(images).tolist()}
    taken.add(tuple(jax.random.key_data(evaluation).tolist()))
    assert init != steps
    assert not taken & {tuple(init), tuple(steps)}


@pytest.mark.slow
def test_profile_of_some_steps(tmp_path):
    config = digits.get_config("smoke")
    config.train.update({"num_steps": 3, "profile_steps": (2, 2)})
    train(config, tmp_path)
    traces = list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1
    text = gzip.decompress(next((tmp_path / "profile").rglob("*.trace.json.gz")).read_bytes()).decode()
    names = {event["name"] for event in json.loads(text)["traceEvents"] if event.get("name") == "train"}
    assert names == {"train"}
    config.train.profile_steps = (3, 2)
    with pytest.raises(ValueError, match=r"train.profile_steps is \(3, 2\); expected \(first, last\)"):
        train(config, tmp_path / "other")


@pytest.mark.slow
def test_closing_goes_through_all_although_one_fails(tmp_path, monkeypatch):
    closed, close_checkpoints = [], Checkpoints.close

    def fail(self):
        close_checkpoints(self)
        closed.append("checkpoints")
        raise OSError("no disk")

    monkeypatch.setattr(Checkpoints, "close", fail)
    close = MetricsWriter.close
    monkeypatch.setattr(MetricsWriter, "close", lambda self: (closed.append("metrics"), close(self)))
    config = digits.get_config("smoke")
    config.train.num_steps = 1
    with pytest.raises(OSError, match="no disk"):
        train(config, tmp_path)
    assert sorted(closed) == ["checkpoints", "metrics"]
