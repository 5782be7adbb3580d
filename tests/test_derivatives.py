"""Every mode of differentiation of a flow, and the flow on a mesh that is not ours."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tarflow_jax import TarFlow, TarFlowPipeline
from tarflow_jax.flow import Conditioning, to_tokens
from tarflow_jax.likelihood import log_prob
from test_flow import affine_flow
from tiny_models import TINY, TRIANGULAR, images_of, random_variables

SMALL = dataclasses.replace(TRIANGULAR, num_blocks=2, layers_per_block=1)


def test_the_hessian_of_an_affine_flow_of_a_gaussian_has_the_closed_form():
    config = dataclasses.replace(TINY, num_blocks=1, layers_per_block=1, num_classes=0, image_channels=1)
    log_scale = jnp.linspace(-0.7, 0.4, 4)
    variables = affine_flow(config, log_scale, jnp.linspace(-1.0, 1.0, 4))
    pipe = TarFlowPipeline(config, variables)
    image = images_of(config)[0]
    found = jax.hessian(lambda x: pipe.log_prob(x[None])[0])(image).reshape(config.num_dims, config.num_dims)
    of_tokens = jnp.concatenate([jnp.ones((1, 1, 4)), jnp.tile(jnp.exp(-2 * log_scale), (1, 5, 1))], axis=1)
    order = to_tokens(config, jnp.arange(config.num_dims, dtype=jnp.float32).reshape(1, *config.image_shape))
    expected = np.zeros(config.num_dims)
    expected[np.asarray(order, int).ravel()] = -np.asarray(of_tokens).ravel()
    np.testing.assert_allclose(found, np.diag(expected), atol=1e-5)


@pytest.mark.slow
def test_a_flow_works_on_a_mesh_of_other_axes():
    devices = np.array(jax.devices()[:8]).reshape(4, 2)
    mesh = Mesh(devices, ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
    variables, images = random_variables(TINY), images_of(TINY, 4)
    labels = jnp.array([0, 1, 2, -1])
    expected = log_prob(TarFlow(TINY), variables, images, Conditioning(labels))
    placed = jax.device_put(images, NamedSharding(mesh, PartitionSpec("rows")))

    def of_placed(images):
        return jax.jit(lambda x: log_prob(TarFlow(TINY), variables, x, Conditioning(labels)))(images)

    with jax.set_mesh(mesh):
        np.testing.assert_allclose(of_placed(placed), expected, rtol=1e-5)
        with nn.logical_axis_rules((("batch", "rows"), ("heads", "columns"), ("hidden", "columns"))):
            text = jax.jit(lambda x: TarFlow(TINY).apply(variables, x, Conditioning(labels))).lower(placed).as_text()
            assert "rows" in text
            assert "columns" in text
            np.testing.assert_allclose(of_placed(placed), expected, rtol=1e-5)
