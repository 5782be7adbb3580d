"""AdamW and Muon: what each updates, and that neither depends on the devices."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
from jax.sharding import NamedSharding
from tiny_models import TINY, new_variables

from tarflow_jax.planning.traffic import traffic
from tarflow_jax.runtime import leaf_name, make_mesh
from tarflow_jax.runtime.parameters import params_shapes, rows_of
from tarflow_jax.training.muon import orthogonalised
from tarflow_jax.training.optimizer import Optimizer

ADAMW = Optimizer(10, 1e-2, 1e-3, 2, 0.9, 0.95, 0.1, 0.0, 0.0, "adamw", 0.0)
MUON = dataclasses.replace(ADAMW, name="muon", muon_learning_rate=3e-2)
HIDDEN = ("qkv/kernel", "attention_out/kernel", "mlp_in/kernel", "mlp_out/kernel")


def updated(optimizer):
    """The parameters of TINY, random gradients, and the first update at full rate."""
    params = new_variables(TINY)["params"]
    random = np.random.default_rng(0)
    gradients = jax.tree.map(lambda p: random.normal(size=p.shape).astype(np.float32), params)
    transformation = optimizer.transformation()
    with jax.numpy_dtype_promotion("standard"):
        state = transformation.init(params)
        for _ in range(3):  # past the warm-up
            updates, state = jax.jit(transformation.update)(gradients, state, params)
    return params, gradients, updates, state


def test_adamw_is_optax_s():
    params, gradients, updates, _ = updated(ADAMW)
    rate = optax.warmup_cosine_decay_schedule(1e-3, 1e-2, 2, 10, 1e-3)
    expected = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.1)
    with jax.numpy_dtype_promotion("standard"):
        state = expected.init(params)
        for _ in range(3):
            wanted, state = jax.jit(expected.update)(gradients, state, params)
    chex.assert_trees_all_equal(updates, wanted)


def test_muon_orthogonalises_the_hidden_matrices_and_adamw_updates_the_rest():
    params, gradients, updates, _ = updated(MUON)
    adamw = updated(ADAMW)[2]
    rate = float(MUON.schedule(MUON.muon_learning_rate)(2))
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name = leaf_name(path)
        value, gradient, other = (
            functools.reduce(lambda t, k: t[k], name.split("/"), tree) for tree in (params, gradients, adamw)
        )
        if not name.endswith(HIDDEN):
            np.testing.assert_array_equal(update, other, err_msg=name)
            continue
        num_rows = math.prod(value.shape[1:3] if "attention_out" in name else value.shape[1:2])
        for of_layer, direction in zip(np.asarray(update + rate * 0.1 * value) / -rate, gradient, strict=True):
            found, expected = of_layer.reshape(num_rows, -1), five_steps(direction.reshape(num_rows, -1))
            scale = 0.2 * math.sqrt(max(found.shape))  # so that the numbers' RMS is about 0.2
            np.testing.assert_allclose(found, scale * expected, atol=1e-3, err_msg=name)


def five_steps(matrix):
    """Five Newton-Schulz steps of a matrix, in float64 (Jordan et al. 2024). All gradients of the test are the same, so
    their momentum points where they do."""
    x = matrix.astype(np.float64) / np.linalg.norm(matrix)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.775 * square @ x + 2.0315 * square @ square @ x
    return x


@functools.cache
def on_one_device():
    return runs.run_steps(runs.SMALL, make_mesh(devices=jax.devices()[:1]), 5, name="muon", muon_learning_rate=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 4, 2)], ids=["data", "fsdp", "fsdp and tensor"])
def test_muon_does_not_depend_on_the_mesh(sizes):
    losses, state = runs.run_steps(runs.SMALL, make_mesh(*sizes), 5, name="muon", muon_learning_rate=1e-3)
    expected, _ = on_one_device()
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    moments = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if leaf_name(path).endswith("mlp_in/kernel")
    ]
    of_parameter = state.variables["params"]["block_0"]["layers"]["mlp_in"]["kernel"].sharding
    assert moments
    assert all(leaf.sharding.is_equivalent_to(of_parameter, leaf.ndim) for leaf in moments)


def compiled_directions(depths, sizes, dtype="float32"):
    """The orthogonalisation of random kernels of blocks of some depths, compiled for a mesh; the kernels."""
    config = dataclasses.replace(TINY, num_blocks=len(depths), layers_per_block=depths)
    mesh, rng = make_mesh(*sizes), np.random.default_rng(0)
    hidden = {name: shape for name, shape in params_shapes(config).items() if name.endswith(HIDDEN)}
    kernels = {name: rng.normal(size=shape).astype(np.float32) for name, shape in hidden.items()}
    places = {name: NamedSharding(mesh, rows_of(name)[0].spec) for name in hidden}
    program = jax.jit(lambda tree: orthogonalised(tree, tree, dtype), in_shardings=(places,), out_shardings=places)
    with jax.set_mesh(mesh):
        return program.lower(kernels).compile(), jax.device_put(kernels, places)


# More layers than devices, some of which have none; groups of 2 and of 4 for a layer, some idle; along every axis.
@pytest.mark.parametrize(
    ("depths", "sizes"),
    [((5, 4), (8, 1, 1)), ((1, 2), (8, 1, 1)), ((1, 1), (4, 1, 2)), ((1, 2), (2, 2, 2)), ((2,), (1, 8, 1))],
)
def test_directions_do_not_depend_on_the_mesh(depths, sizes):
    program, kernels = compiled_directions(depths, sizes)
    expected = jax.jit(lambda tree: orthogonalised(tree, tree, "float32"))(jax.device_get(kernels))
    chex.assert_trees_all_close(program(kernels), expected, atol=1e-5)


@pytest.mark.parametrize(("depths", "parts"), [((4, 4), 1), ((1, 1), 4)])
def test_what_all_devices_have_is_sent_once_in_the_dtype_of_the_products(depths, parts):
    program, kernels = compiled_directions(depths, (8, 1, 1), "bfloat16")
    sent = traffic(program.as_text(), 8).collectives
    count = sum(kernel.size for kernel in kernels.values())
    # XLA's CPU backend gathers bfloat16 as float32.
    assert sent["all-gather"].bytes == count * 7 // 8 * 4
    squares = 5 * len(HIDDEN) * TINY.width**2 * 4 if parts > 1 else 0
    norms = len(HIDDEN) * 4 if parts > 1 else 0
    assert sum(c.bytes for c in sent.values()) - sent["all-gather"].bytes == 2 * (squares + norms) * (parts - 1) / parts
    found = program(kernels)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), found)
    chex.assert_trees_all_equal(found, rounded)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "sgd"}, "optimizer.name is 'sgd'; expected one of adamw, muon"),
        ({"name": "muon"}, "muon_learning_rate is 0.0 with optimizer.name 'muon'; expected a positive number"),
        ({"muon_learning_rate": 0.1}, "muon_learning_rate is 0.1 with optimizer.name 'adamw'"),
        ({"beta2": 1.0}, "beta2 is 1.0"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ADAMW, **fields)
