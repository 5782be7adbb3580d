"""AdamW and Muon: the parameters that each updates, its update rule, and the same updates on every mesh."""

import dataclasses
import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

import runs
from tarflow_jax.runtime import leaf_name, make_mesh, shardings
from tarflow_jax.runtime.parameters import params_shapes
from tarflow_jax.training.optimizer import Optimizer, orthogonalized
from tiny_models import TINY, new_variables

ADAMW = Optimizer(10, 1e-2, 1e-3, 2, 0.9, 0.95, 0.1, 0.0, 0.0, "adamw", 0.0)
MUON = dataclasses.replace(ADAMW, name="muon", muon_learning_rate=3e-2)
HIDDEN = ("qkv/kernel", "attention_out/kernel", "mlp_in/kernel", "mlp_out/kernel")


def updated(optimizer):
    """The parameters of TINY, random gradients, the first update after the warm-up, and the state."""
    params = new_variables(TINY)["params"]
    random = np.random.default_rng(0)
    gradients = jax.tree.map(lambda p: random.normal(size=p.shape).astype(np.float32), params)
    transformation = optimizer.transformation()
    with jax.numpy_dtype_promotion("standard"):
        state = transformation.init(params)
        for _ in range(3):  # past the warm-up
            updates, state = jax.jit(transformation.update)(gradients, state, params)
    return params, gradients, updates, state


def test_muon_orthogonalizes_the_hidden_matrices_and_adamw_updates_the_rest():
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
        found = matrices(name, np.asarray(update + rate * MUON.weight_decay * value) / -rate)
        # Every step had the same gradient, so its singular vectors are the momentum's. Five Newton-Schulz steps bring
        # singular values near 1, and the scale makes the root mean square of the numbers about 0.2.
        left, values, right = np.linalg.svd(matrices(name, gradient), full_matrices=False)
        scale = 0.2 * math.sqrt(max(found.shape[1:]))
        diagonal = np.einsum("lik,lio,lko->lk", left, found, right) / scale
        np.testing.assert_allclose(found, scale * (left * diagonal[:, None]) @ right, atol=1e-3, err_msg=name)
        well_conditioned = diagonal[values > 0.1 * values.max(axis=1, keepdims=True)]
        assert np.all((well_conditioned > 0.6) & (well_conditioned < 1.3)), (name, well_conditioned)


def matrices(name, kernels):
    """Stacked kernels as [layers, inputs, outputs]."""
    num_inputs = math.prod(kernels.shape[1:3] if "attention_out" in name else kernels.shape[1:2])
    return kernels.reshape(len(kernels), num_inputs, -1)


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


def directions_on(mesh, depths, dtype="float32"):
    """Random kernels of blocks of these depths, and the compiled `orthogonalized` for them."""
    config, rng = dataclasses.replace(TINY, num_blocks=len(depths), layers_per_block=depths), np.random.default_rng(0)
    shapes = {name: shape for name, shape in params_shapes(config).items() if name.endswith(HIDDEN)}
    kernels = traverse_util.unflatten_dict({name: rng.normal(size=shape) for name, shape in shapes.items()}, sep="/")
    kernels = jax.tree.map(jnp.float32, kernels)
    places = shardings(mesh, kernels)
    program = jax.jit(lambda blocks: orthogonalized(blocks, dtype), in_shardings=(places,), out_shardings=places)
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        return kernels, program.lower(kernels).compile()


# Layers that the devices do not divide, fewer layers than devices, and every axis of the mesh.
@pytest.mark.parametrize(
    ("depths", "sizes"),
    [
        ((5, 4), (8, 1, 1)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (((1, 2), (4, 1, 2)), ((1, 2), (2, 2, 2)), ((2,), (1, 8, 1)))
        ),
    ],
)
def test_directions_are_those_of_optax_for_each_matrix_on_every_mesh(depths, sizes):
    mesh = make_mesh(*sizes)
    kernels, program = directions_on(mesh, depths)
    found = program(jax.device_put(kernels, shardings(mesh, kernels)))
    for path, stack in jax.tree_util.tree_leaves_with_path(kernels):
        name = leaf_name(path)
        actual = matrices(name, np.asarray(functools.reduce(lambda t, k: t[k], name.split("/"), found)))
        with jax.numpy_dtype_promotion("standard"):
            expected = np.stack([optax_direction(matrix) for matrix in matrices(name, stack)])
        np.testing.assert_allclose(actual, math.sqrt(max(actual.shape[1:])) * expected, atol=1e-5, err_msg=name)


@jax.jit
def optax_direction(matrix):
    """The first update that optax makes of one matrix, without momentum."""
    newton_schulz = optax.contrib.scale_by_muon(
        beta=0.0, nesterov=False, weight_dimension_numbers=optax.contrib.MuonDimensionNumbers()
    )
    return newton_schulz.update(matrix, newton_schulz.init(matrix))[0]


@pytest.mark.parametrize(
    ("sizes", "collective"), [((8, 1, 1), "all-gather"), ((1, 8, 1), "all-to-all"), ((1, 4, 2), "all-to-all")]
)
def test_devices_share_the_layers_and_send_each_matrix_once(sizes, collective):
    depths = (4, 4)
    _, on_one = directions_on(make_mesh(devices=jax.devices()[:1]), depths)
    _, shared = directions_on(make_mesh(*sizes), depths)
    assert shared.cost_analysis()["flops"] < 1.1 * on_one.cost_analysis()["flops"] / 8
    found = re.findall(
        r" (all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)(?:-start)?\(", shared.as_text()
    )
    assert set(found) == {collective}


def test_directions_are_rounded_to_the_dtype_of_the_matmuls():
    mesh = make_mesh(8, 1, 1)
    kernels, program = directions_on(mesh, (4, 4), "bfloat16")
    found = program(jax.device_put(kernels, shardings(mesh, kernels)))
    chex.assert_trees_all_equal(found, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), found))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "sgd"}, "optimizer.name is 'sgd'; expected one of adamw, muon"),
        ({"name": "muon"}, "muon_learning_rate is 0.0 with optimizer.name 'muon'; expected a positive number"),
        ({"muon_learning_rate": 0.1}, "muon_learning_rate is 0.1 with optimizer.name 'adamw'"),
        ({"beta2": 1.0}, "beta2 is 1.0"),
    ],
)
def test_invalid_fields_are_rejected(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ADAMW, **fields)
