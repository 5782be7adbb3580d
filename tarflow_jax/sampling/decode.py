"""Decodes latents to images by inverting the flow with decoders; and encodes images under guidance."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tarflow_jax.flow import (
    UNCONDITIONAL,
    BlockInverse,
    Conditioning,
    FlowBlock,
    Inversion,
    TarFlow,
    block_orders,
    from_tokens,
    inverse,
    permute,
    to_tokens,
    unpermute,
    without_padding,
)
from tarflow_jax.likelihood import Variables, prior_log_prob
from tarflow_jax.sampling.decoders import Block, Decoder, GaussSeidelJacobi, Jacobi, Sequential, with_derivatives
from tarflow_jax.sampling.guidance import Guidance, GuidedBlock
from tarflow_jax.student import Student, StudentConfig


class Decoded(NamedTuple):
    """Result of `decode_trace`. F is the number of blocks; the trajectory of sequences is standardized."""

    images: jax.Array  # float32 [B, H, W, K]
    log_det: jax.Array | None  # log |det d latents / d images| of the map that was inverted, float32 [B] in nats
    trajectory: jax.Array  # the images after 0, 1, … F inverted blocks, float32 [B, F + 1, H, W, K]
    updates: jax.Array | None  # updates of each block, int32 [B, F], by block number
    residuals: jax.Array | None  # largest change in each block's last update, float32 [B, F]; 0 if sequential


@functools.partial(jax.jit, static_argnames=("flow", "decoders"))
def decode_trace(
    flow: TarFlow,
    variables: Variables,
    latents: jax.Array,
    conditioning: Conditioning = UNCONDITIONAL,
    guess: jax.Array | None = None,
    guidance: Guidance | None = None,
    *,
    decoders: tuple[Decoder, ...] | None = None,
) -> Decoded:
    """Inverts the flow.

    Args:
      flow: static, as in `likelihood`.
      variables: its variables.
      latents: float32 [B, H, W, K] or [B, T, D], standard normal for samples, 0 in padding.
      conditioning: see `TarFlow`; `null_condition` is what guidance pushes away from.
      guess: initial guess of each block's input in encoding, as images [B, F, H, W, K] by block number, for
        `decoders` that start from a student's trajectory.
      guidance: None for one pass per block; otherwise there are two, even if its weight is 0.
      decoders: one per block, by block number; None is `Sequential` for all.
    """
    config = flow.config
    decoders = decoders or (Sequential(),) * config.num_blocks
    covered = [guidance is not None and guidance.covers(k, config.num_blocks) for k in range(config.num_blocks)]

    def invert_block(strategy: tuple[Decoder, bool], block: Block, z: jax.Array, guess: jax.Array | None) -> Inversion:
        decoder, is_guided = strategy
        if guidance is not None and is_guided:
            block = GuidedBlock.of(block, guidance, len(z))
        if isinstance(decoder, Jacobi | GaussSeidelJacobi):
            return with_derivatives(decoder, block, z, guess)
        return decoder.invert(block, z, guess)

    strategies = tuple(zip(decoders, covered, strict=True))
    images, log_det, inversions = inverse(
        flow, variables, latents, conditioning, guess, strategies=strategies, invert_block=invert_block
    )
    path = [without_padding(latents, conditioning.lengths), *(from_tokens(config, x) for x in inversions.x[::-1])]
    return Decoded(images, log_det, jnp.stack(path, axis=1), inversions.updates.T, inversions.residual.T)


@functools.partial(jax.jit, static_argnames=("flow", "decoders"))
def decode(flow: TarFlow, variables: Variables, latents: jax.Array, *args: Any, **options: Any) -> jax.Array:
    """Returns only the images [B, H, W, K] of `decode_trace`; takes the same arguments."""
    return decode_trace(flow, variables, latents, *args, **options).images


@functools.partial(jax.jit, static_argnames=("flow", "decoders"))
def decode_log_prob(
    flow: TarFlow,
    variables: Variables,
    latents: jax.Array,
    conditioning: Conditioning = UNCONDITIONAL,
    *args: Any,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """Returns the images of `decode_trace` and their log q for latents drawn from N(0, I), float32 [B] in nats."""
    decoded = decode_trace(flow, variables, latents, conditioning, *args, **options)
    return decoded.images, decoded.log_det + prior_log_prob(flow.config, latents, lengths=conditioning.lengths)


@functools.partial(jax.jit, static_argnames=("flow", "config"))
def decode_by_student(
    flow: TarFlow,
    variables: Variables,
    latents: jax.Array,
    labels: jax.Array | None,
    weights: jax.Array,
    *,
    config: StudentConfig,
) -> tuple[jax.Array, jax.Array]:
    """Returns the clean images and the trajectory of a student, see `student.Student`, with the kernels of `flow`."""
    return Student(config, flow.kernels).apply(variables, latents, labels, weights)


def guided_trajectory(
    flow: TarFlow,
    variables: Variables,
    images: jax.Array,
    conditioning: Conditioning,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Encodes images to the latents that `decode` maps back to them with `Guidance(weight)`.

    The guided shift and scale of a token depend only on the tokens before it, like the unguided ones. So one pass
    over an image computes all of them.

    Args:
      flow: static, as in `likelihood`.
      variables: its variables.
      images: float32 [B, H, W, K].
      conditioning: see `TarFlow`.
      weights: guidance weights of the images, float32 [B]; None without guidance.

    Returns (latents [B, H, W, K], trajectory [B, F, H, W, K]); the trajectory holds each block's input as an image.
    """
    config, conditioning = flow.config, conditioning.standardized(variables, len(images))
    tokens, read = to_tokens(config, images.astype(jnp.float32)), []
    for k, order in enumerate(jnp.asarray(block_orders(config, variables))[:, None]):
        read.append(from_tokens(config, tokens))
        x = permute(tokens, order)
        module = FlowBlock(config, k, flow.kernels, parent=None)
        block: Block = BlockInverse.of(module, variables["params"][f"block_{k}"], order, conditioning)
        known = block.prepend_start_token(x)[:, : x.shape[1]]
        if weights is not None:
            block = GuidedBlock.of(block, Guidance(weights), len(x))
        affine, _ = block.predict(known)
        affine = affine if config.start_token else affine.shift_right()
        tokens = unpermute(affine.forward(x), order)
    if config.volume_preserving:
        tokens = tokens * jax.lax.rsqrt(variables["prior"]["variance"])[None]
    return from_tokens(config, tokens), jnp.stack(read, axis=1)
