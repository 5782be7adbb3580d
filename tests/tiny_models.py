"""Tiny flows with random weights, shared by the tests."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax import TarFlow, TarFlowConfig, sampling
from tarflow_jax.flow import Conditioning
from tarflow_jax.flow.tokens import random_orders
from tarflow_jax.interop.tensors import unflatten
from tarflow_jax.runtime.parameters import row_of, variables_shapes

TINY = TarFlowConfig(
    image_size=(4, 6), image_channels=3, patch_size=2, width=16, num_blocks=3, layers_per_block=(1, 2, 1),
    num_classes=3, head_dim=8,
)  # fmt: skip
TRIANGULAR = dataclasses.replace(TINY, triangular=True, rotary=True)
VP = dataclasses.replace(TINY, volume_preserving=True, num_classes=0, image_channels=1)


@functools.partial(jax.jit, static_argnums=0)
def _initialised(config, seed):
    conditioning = Conditioning(noise_std=jnp.ones(1))
    variables = TarFlow(config).init(jax.random.key(seed), jnp.zeros((1, *config.data_shape)), conditioning)
    return {name: variables[name] for name in ("params", "prior", "constants") if name in variables}


def new_variables(config, seed=0):
    """Variables as training begins with."""
    # They do not depend on how the flow computes, so one program serves all ways.
    return _initialised(dataclasses.replace(config, dtype="float32", remat="none", attention="plain"), seed)


def _new(name, shape, rng):
    """A variable as training begins with it, but by NumPy: to trace a flow's initialisation takes a second."""
    row, last = row_of(name), name.rpartition("/")[2]
    if row.input_axes and not name.endswith(("project_out/kernel", "project_lower/kernel")):
        bound = math.prod(shape[axis] for axis in row.input_axes) ** -0.5
        return rng.uniform(-bound, bound, shape)
    if last in ("scale", "std", "condition_std", "variance"):
        return np.ones(shape)
    deviation = {"position_embedding": 0.01, "class_embedding": 0.01, "start_token": 1.0}.get(last, 0.0)
    return rng.normal(0, deviation, shape)


def random_variables(config, seed=0, scale=0.1):
    """Variables of a flow that is far from the identity."""
    rng, variables = np.random.default_rng(seed), {}
    for name, shape in variables_shapes(config).items():
        array = _new(name, shape, rng)
        if name == "constants/orders":
            array = random_orders(config)
        elif not name.startswith("constants"):
            array = array + scale * rng.normal(size=shape)
        if "project_lower" in name:  # random triangles of larger numbers are nearly singular
            array = 0.3 * array
        variables[name] = jnp.asarray(np.exp(array) if name == "prior/variance" else array, jnp.float32)
    return unflatten(variables)


@functools.partial(jax.jit, static_argnums=0)
def encode(config, variables, images, labels=None):
    """(latents, log_det)."""
    return TarFlow(config).apply(variables, images, Conditioning(labels))


def decode(config, variables, latents, labels=None, guidance=None, **options):
    """`sampling.decode_trace`."""
    return sampling.decode_trace(
        TarFlow(config), variables, latents, Conditioning(labels), guidance=guidance, **options
    )


def images_of(config, batch_size=3, seed=7):
    return 0.5 * jax.random.normal(jax.random.key(seed), (batch_size, *config.data_shape))


LABELS = np.array([0, -1, 2], np.int32)
