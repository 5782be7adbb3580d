"""Tiny flows with random weights, shared by the tests."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax import TarFlow, TarFlowConfig, sampling
from tarflow_jax.flow import Conditioning

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


@functools.partial(jax.jit, static_argnums=1)
def _normal(key, count):
    return jax.random.normal(key, (count,))


def _moved(variables, seed, scale):
    leaves, structure = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    moved = []
    for key, leaf in zip(keys, leaves, strict=True):
        # The first of a power of two: so all leaves of all flows share a few programs.
        noise = np.asarray(_normal(key, 1 << max(leaf.size - 1, 4095).bit_length()))[: leaf.size]
        moved.append(jnp.asarray(np.asarray(leaf) + np.float32(scale) * noise.reshape(leaf.shape)))
    return jax.tree.unflatten(structure, moved)


def random_variables(config, seed=0, scale=0.1):
    """Variables of a flow that is far from the identity."""
    new = new_variables(config, seed)
    variables = _moved({name: new[name] for name in new if name != "constants"}, seed, scale)
    if "constants" in new:
        variables["constants"] = new["constants"]
    if config.volume_preserving:
        variables["prior"] = jax.tree.map(jnp.exp, variables["prior"])
    if config.triangular:  # random triangles of larger numbers are nearly singular
        for block in variables["params"].values():
            block["project_lower"] = jax.tree.map(lambda p: 0.3 * p, block["project_lower"])
    return variables


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
