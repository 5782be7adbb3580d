"""The parts of a block: attention and its kernels, position embeddings, GELU, the dense product."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tarflow_jax.flow.block import rotary_angles
from tarflow_jax.flow.transformer import attend, gelu, rotate
from tarflow_jax.runtime import make_mesh, use_mesh
from tarflow_jax.runtime.kernels import dot_general_of_training, splash
from tiny_models import TINY, new_variables


def test_gelu_and_its_gradient():
    x = jnp.linspace(-5, 5, 101)
    exact = lambda x: jax.nn.gelu(x, approximate=False)  # noqa: E731
    np.testing.assert_allclose(gelu(x), exact(x), atol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(gelu))(x), jax.vmap(jax.grad(exact))(x), atol=1e-6)


def test_position_embeddings_that_begin_as_waves_tell_rows_and_columns_apart():
    config = dataclasses.replace(TINY, width=64, head_dim=64, position_init="grid")
    rows, columns = (side // config.patch_size for side in config.image_size)
    table = np.asarray(new_variables(config)["params"]["block_1"]["position_embedding"])
    by_row, by_column = np.split(table.reshape(rows, columns, 64), 2, axis=-1)
    np.testing.assert_array_equal(by_row, np.broadcast_to(by_row[:, :1], by_row.shape))
    np.testing.assert_array_equal(by_column, np.broadcast_to(by_column[:1], by_column.shape))
    # Half sines, half cosines, of wavelengths from 2 π to nearly 200 π patches.
    for vectors in (by_row[:, 0], by_column[0]):
        angles = np.arange(len(vectors))[:, None] / 100 ** (np.arange(16) / 16)
        np.testing.assert_allclose(vectors, 0.5 * np.concatenate([np.sin(angles), np.cos(angles)], 1), atol=1e-6)
    with pytest.raises(ValueError, match="position_init 'grid' a width, that is a multiple of 4"):
        dataclasses.replace(config, width=66, head_dim=2)


def test_rotary_attention_tells_distances_not_places():
    config = dataclasses.replace(TINY, image_size=(4, 8), rotary=True)
    angles = rotary_angles(config)
    assert angles.shape == (8, 4)  # half the pairs by row, half by column
    chex.assert_trees_all_equal(angles[:, :2], np.repeat(angles[[0, 4], :2], 4, axis=0))
    chex.assert_trees_all_equal(angles[:, 2:], np.tile(angles[:4, 2:], (2, 1)))
    x = jax.random.normal(jax.random.key(0), (2, 8))
    rotated = rotate(x[None, :, None].repeat(8, 2), angles[None])[0]  # the same query and key everywhere
    products = jnp.einsum("SH,RH->SR", *rotated)
    np.testing.assert_allclose(jnp.diag(products), x[0] @ x[1], rtol=1e-5)
    np.testing.assert_allclose(products[:4, :4], products[4:, 4:], rtol=1e-5)
    np.testing.assert_allclose(jnp.diag(products, 1)[:3], jnp.full(3, products[0, 1]), rtol=1e-5)
    assert abs(products[0, 1] - products[0, 4]) > 0.01  # a column away, a row away
    with pytest.raises(ValueError, match=r"rotary needs a head_dim, .* that is a multiple of 4"):
        dataclasses.replace(config, head_dim=2)


@pytest.mark.slow
def test_splash_attention_is_attention_forwards_and_backwards():
    query, key, value = jax.random.normal(jax.random.key(0), (3, 8, 2, 128, 64))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)

    def gradients(attention):
        def loss(*inputs):
            return jnp.sin(attention(*inputs)).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(query, key, value)

    expected = gradients(attend)
    splash_interpreted = functools.partial(splash, interpret=True)
    chex.assert_trees_all_close(gradients(splash_interpreted), expected, atol=2e-4, rtol=2e-4)
    with use_mesh(mesh):
        chex.assert_trees_all_close(gradients(splash_interpreted), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.slow
def test_the_dot_general_of_training_has_the_gradients_of_a_plain_product():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    dimensions = (((2, 3), (0, 1)), ((), ()))
    for features in (6, 40):  # narrower and wider than x
        kernel = jax.random.normal(jax.random.key(1), (4, 5, features))

        def loss(product, x, kernel):
            return jnp.sin(product(x, kernel, dimensions)).sum()

        gradients = jax.grad(loss, argnums=(1, 2))
        expected = gradients(jax.lax.dot_general, x, kernel)
        chex.assert_trees_all_close(gradients(dot_general_of_training, x, kernel), expected, rtol=1e-5, atol=1e-6)
