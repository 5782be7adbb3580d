"""The step, its sharding, the recipe, checkpoints and metrics."""

import functools
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
from damage import cut_short, flip_a_bit, largest_file
from tiny_models import TINY, VP

from configs import digits
from tarflow_jax import Noise, TarFlow
from tarflow_jax.likelihood import training_loss
from tarflow_jax.runtime import make_mesh, shardings
from tarflow_jax.training import Checkpoints, Recipe
from tarflow_jax.training.metrics import MetricsWriter
from tarflow_jax.training.state import initial_state


def test_the_reference_s_training_run(load_golden):
    golden = load_golden("training")
    flow, optimizer = TarFlow(golden.config), optax.adamw(1e-3, b1=0.9, b2=0.95, weight_decay=1e-4)

    @jax.jit
    def step(params, opt_state, images, labels):
        def loss(params):
            return training_loss(flow, {"params": params}, images, labels)[0]

        value, gradients = jax.value_and_grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    params = golden.variables["params"]
    opt_state, losses = optimizer.init(params), []
    for images, labels in zip(golden.images("x"), golden.labels("y"), strict=True):
        params, opt_state, loss = step(params, opt_state, images, labels)
        losses.append(float(loss))
    # Each loss is a difference of two float32 numbers near 1, and some are near 0.
    np.testing.assert_allclose(losses, golden.arrays["loss"], rtol=1e-4, atol=4 * np.finfo(np.float32).eps)


@functools.cache
def on_one_device():
    return runs.figures(make_mesh(devices=jax.devices()[:1]))


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


@pytest.mark.parametrize(("sizes", "accumulation"), [((1, 1, 1), 4), ((8, 1, 1), 2), ((2, 2, 2), 4), ((1, 4, 2), 2)])
def test_accumulation_changes_no_loss(sizes, accumulation):
    mesh = make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    losses, _ = runs.run_steps(runs.SMALL, mesh, 5, accumulation=accumulation)
    np.testing.assert_allclose(losses, on_one_device()["losses"][:5], rtol=1e-5)


def test_vp_prior_and_average_move():
    _, state = runs.run_steps(VP, make_mesh(devices=jax.devices()[:1]), 3, ema_decay=0.9)
    variance = state.variables["prior"]["variance"]
    assert float(jnp.abs(variance - 1).max()) > 0.01
    bias = ("block_0", "project_out", "bias")
    raw = functools.reduce(lambda tree, name: tree[name], bias, state.variables["params"])
    average = functools.reduce(lambda tree, name: tree[name], bias, state.ema_params)
    assert 0 < float(jnp.abs(average).max()) < float(jnp.abs(raw).max())
    assert state.sampling_variables["params"] is state.ema_params


def test_mesh_and_rules_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="does not cover 8 devices"):
        make_mesh(3, 1, 1)
    with pytest.raises(ValueError, match="matches 0 sharding rules"):
        shardings(make_mesh(), {"unheard_of": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"choose a mesh\.tensor that divides it"):
        shardings(make_mesh(1, 1, 8), {"layers": {"qkv": {"bias": jnp.zeros((1, 3, 2, 8))}}})


CONFIG = {"train": {"num_steps": 2}}


def small_state():
    return initial_state(TarFlow(TINY), optax.adam(1e-3), jax.random.key(0), ema=False)


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
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole"):
        restored(folder, state)


def test_a_checkpoint_of_another_shape_is_refused(saved):
    folder, state = saved
    other = state.replace(variables=jax.tree.map(lambda x: jnp.zeros((*x.shape, 2)), state.variables))
    with pytest.raises(ValueError, match="holds another state"):
        restored(folder, other)


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


def test_schedule_and_workdir(tmp_path):
    config = digits.get_config()
    recipe = Recipe(config)
    schedule = recipe.schedule()
    assert float(schedule(0)) == pytest.approx(1e-6, rel=1e-4)
    assert float(schedule(config.optimizer.warmup_steps)) == pytest.approx(1e-3)
    assert float(schedule(config.train.num_steps)) == pytest.approx(1e-6, rel=1e-4)
    recipe.claim(tmp_path)
    config.train.log_every = 7  # free
    Recipe(config).claim(tmp_path)
    config.noise.std = 0.2
    with pytest.raises(ValueError, match=r"another configuration: noise.std \(0.1 there, 0.2 here\)"):
        Recipe(config).claim(tmp_path)
    assert Recipe.from_workdir(tmp_path).noise == Noise("gaussian", 0.1)
    with pytest.raises(FileNotFoundError, match="expected the workdir"):
        Recipe.from_workdir(tmp_path / "none")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("train.batch_size", 0, "batch_size is 0"),
        ("train.accumulation", 3, "not divisible by train.accumulation"),
        ("train.drop_label", 1.5, "expected a probability"),
        ("optimizer.ema_decay", 1.0, "ema_decay is 1.0"),
        ("model.patch_size", 3, "not divisible by patch_size 3"),
        ("noise.kind", "none", "noise kind is 'none'"),
    ],
)
def test_recipes_refuse_what_cannot_be(field, value, message):
    config = digits.get_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message):
        Recipe(config)
