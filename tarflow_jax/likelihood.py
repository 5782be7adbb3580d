"""log p(x), the training loss, and bits per dimension."""

import functools
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.flow import UNCONDITIONAL, Conditioning, TarFlow, TarFlowConfig, to_tokens, without_padding
from tarflow_jax.noise import Levels, Noise

Array = TypeVar("Array", jax.Array, np.ndarray)
Variables = dict[str, Any]
LOG_2PI = 1.8378770664093453


@functools.partial(jax.jit, static_argnames="flow")
def encode(
    flow: TarFlow, variables: Variables, images: jax.Array, conditioning: Conditioning = UNCONDITIONAL
) -> tuple[jax.Array, jax.Array]:
    """Returns (latents, log_det) of `TarFlow`, compiled."""
    return flow.apply(variables, images, conditioning)


@functools.partial(jax.jit, static_argnames="flow")
def log_prob(
    flow: TarFlow, variables: Variables, images: jax.Array, conditioning: Conditioning = UNCONDITIONAL
) -> jax.Array:
    """Computes log p(x) = Σ log N(latents; 0, 1) + log_det (equation 3 of the paper), float32 [B] in nats.

    See `TarFlow` for the arguments. The sum leaves out padding.
    """
    latents, log_det = flow.apply(variables, images, conditioning)
    return log_det + prior_log_prob(flow.config, latents, lengths=conditioning.lengths)


def prior_log_prob(config: TarFlowConfig, latents: jax.Array, *, lengths: jax.Array | None) -> jax.Array:
    """Sums log N(latents; 0, 1) over all tokens except padding, float32 [B] in nats."""
    latents = without_padding(latents, lengths)
    num_dims = config.num_dims if lengths is None else config.token_dim * lengths.astype(jnp.float32)
    return -0.5 * (jnp.square(latents).sum(range(1, latents.ndim)) + LOG_2PI * num_dims)


@functools.partial(jax.jit, static_argnames="flow")
def patch_log_prob(
    flow: TarFlow, variables: Variables, images: jax.Array, conditioning: Conditioning = UNCONDITIONAL
) -> jax.Array:
    """Splits log p(x) into one term per patch; see `log_prob` for the arguments.

    Both parts of log p are sums over patches. With latents z, log-scales α^k of block k, and patch i,

        log p(x) = Σ_i s_i,    s_i = Σ_d log N(z_id; 0, 1) - Σ_k Σ_d α^k_id    (in VP mode also -½ Σ_d log var_id).

    In a flow of one block s_i = log p(x_i | patches before i), the chain rule. With more blocks it is not a conditional
    density: z_i and α^k_i depend on patches before i and, through the blocks that read backwards, on those after it.
    s_i then shows where the terms of log p arise, not what the patch would cost alone or given all others.

    Returns:
      s, float32 [B, H / P, W / P], nats, whose sum over patches is log p(x).
    """
    config = flow.config
    (latents, _), sown = flow.apply(variables, images, conditioning, mutable=["intermediates"])
    shares = -0.5 * (jnp.square(to_tokens(config, latents)) + LOG_2PI).sum(2)  # [B, T]
    for k in range(config.num_blocks):
        shares = shares + sown["intermediates"][f"block_{k}"]["token_log_det"][0]
    if config.volume_preserving:
        shares = shares - 0.5 * jnp.log(variables["prior"]["variance"]).sum(1)[None]
    return shares.reshape(-1, *config.grid)


@functools.partial(jax.jit, static_argnames=("flow", "noise"))
def noisy_log_prob(
    flow: TarFlow,
    variables: Variables,
    images: jax.Array,
    index: jax.Array,
    conditioning: Conditioning,
    *,
    noise: Noise,
    key: jax.Array,
) -> jax.Array:
    """Adds noise to uint8 or uint16 images or to latents [B, H, W, K]; returns their log p, float32 [B] in nats.

    Image number `index` [B] of a data set gets the noise of fold_in(key, index). `conditioning.noise_std` is the level
    of "levels" noise, and the level at which a noise-conditional flow is evaluated.
    """
    return log_prob(flow, variables, noise.of_numbered(key, images, index, conditioning.noise_std), conditioning)


@functools.partial(jax.jit, static_argnames="flow")
def image_bits_per_dim(
    flow: TarFlow,
    variables: Variables,
    images: jax.Array,
    index: jax.Array,
    conditioning: Conditioning,
    *,
    key: jax.Array,
) -> jax.Array:
    """Returns bits per dimension, float32 [B], under uniform dequantisation; arguments as in `noisy_log_prob`."""
    nats = noisy_log_prob(flow, variables, images, index, conditioning, noise=Noise("uniform"), key=key)
    return bits_per_dim(nats, flow.config.num_dims, flow.config.image_bits)


def training_loss(
    flow: TarFlow,
    variables: Variables,
    images: jax.Array,
    conditioning: Conditioning = UNCONDITIONAL,
    *,
    levels: Levels | None = None,
    block_penalty: float = 0.0,
) -> tuple[jax.Array, tuple[dict[str, jax.Array], jax.Array]]:
    """Averages ½ z² - log_det / (T D) over batch and dimensions: -log p in nats per dimension, less ½ log 2π.

    z is the last block's output. In VP mode the blocks have log_det 0, and the prior variance does not enter the loss.

    Args:
      images: noisy float32 [B, H, W, K].
      conditioning: see `TarFlow`. With `lengths` the mean is over all T tokens, and padding contributes 0.
      levels: those of `conditioning.noise_std`; each image is then weighted by its σ.
      block_penalty: weight of an additional loss Σ_k mean x_k², where x_k is the input of block k.

    Returns:
      (loss, (metrics, z)): metrics are scalars and `block_norms` [F], the root mean square of each block's output; with
      levels also `quarter_losses` and `quarter_shares` [4], whose quotient is the loss in a quarter of the range.
      z [B, T, D] updates the VP prior.
    """
    (_, log_det), sown = flow.apply(variables, images, conditioning, mutable=["intermediates"])
    outputs = sown["intermediates"]["block_outputs"]
    half_square = 0.5 * jnp.square(outputs[-1]).mean()
    log_det_per_dim = log_det.mean() / flow.config.num_dims
    if flow.config.volume_preserving:
        log_det_per_dim = jnp.zeros_like(log_det_per_dim)
    metrics = {
        "loss": half_square - log_det_per_dim,
        "half_mean_z2": half_square,
        "log_det_per_dim": log_det_per_dim,
        "block_norms": jnp.stack([jnp.sqrt(jnp.square(x).mean()) for x in outputs]),
    }
    if levels is not None:
        of_image = 0.5 * jnp.square(outputs[-1]).mean((1, 2)) - log_det / flow.config.num_dims
        metrics["loss"] = (levels.std * of_image).mean()
        metrics["quarter_losses"] = (levels.quarter * of_image[:, None]).mean(0)
        metrics["quarter_shares"] = levels.quarter.mean(0)
    if block_penalty:
        inputs = [*sown["intermediates"]["input"], *outputs[:-1]]
        metrics["loss"] = metrics["loss"] + block_penalty * sum(jnp.square(x).mean() for x in inputs)
    return metrics["loss"], (metrics, outputs[-1])


def unit_prior(variables: Variables) -> Variables:
    """Sets the prior variance to 1, the value that the blocks are trained with; only VP mode has one.

    The prior's running variance is a statistic of the blocks' output that takes no part in their gradient.
    """
    if "prior" not in variables:
        return variables
    return {**variables, "prior": jax.tree.map(jnp.ones_like, variables["prior"])}


def bits_per_dim(log_prob: Array, num_dims: int, bits: int = 8) -> Array:
    """Converts nats [B] to bits per dimension, (-log p(x) / (H W K) + log 2^(bits - 1)) / log 2, in their dtype."""
    return (-log_prob / num_dims + math.log(2 ** (bits - 1))) / math.log(2)  # 2^bits levels span 2 units
