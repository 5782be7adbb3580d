"""latents -> images, from a guess of what every block's inverse is: a student's trajectory, polished."""

from typing import Any

import jax
import jax.numpy as jnp

from tarflow_jax.flow import TarFlowConfig, permute, to_images, to_tokens
from tarflow_jax.sampling.blocks import guided_block
from tarflow_jax.sampling.decode import Decoded, Decoder
from tarflow_jax.sampling.fixed_point import STUDENT, Jacobi, bounded, update
from tarflow_jax.sampling.guidance import Guidance, GuidedBlock
from tarflow_jax.sampling.inverse import Inverted, unchanged


def decode_from(
    config: TarFlowConfig,
    variables: dict[str, Any],
    latents: jax.Array,
    guess: jax.Array,
    labels: jax.Array | None = None,
    guidance: Guidance | None = None,
    noise_std: jax.Array | None = None,
    num_updates: jax.Array | int = 0,
    *,
    trajectory: bool = False,
    decoders: tuple[Decoder, ...] | None = None,
) -> Decoded:
    """`decode`, which begins at a guess.

    Args:
      latents, labels, guidance, noise_std, trajectory: as of `decode`.
      guess: of what each block reads, as images [B, F, H, W, K] by block number; the first one is the noisy image.
      num_updates: that every block takes from there, after which it is taken for inverted; where there are no decoders.
      decoders: by block number, of which those `Jacobi(init="student")` begin at the guess.
    """
    tokens = to_tokens(config, latents)
    images, found = [latents], []
    if config.volume_preserving:
        tokens = tokens * jnp.sqrt(variables["prior"]["variance"])[None]
    for k in reversed(range(config.num_blocks)):
        block = guided_block(config, variables["params"], k, labels, guidance, noise_std)
        z, start = permute(tokens, k), permute(to_tokens(config, guess[:, k]), k)
        decoder = decoders[k] if decoders else None
        if decoder is None:
            inverted = _updated(block, z, start, num_updates)
        elif isinstance(decoder, Jacobi) and decoder.init == STUDENT:
            inverted = decoder.invert(block, z, start)
        else:
            inverted = decoder.invert(block, z)
        tokens = permute(inverted.x, k)
        images.append(to_images(config, tokens))
        found.append(inverted)
    found.reverse()
    return Decoded(
        images[-1],
        jnp.stack(images, axis=1) if trajectory else None,
        jnp.stack([inverted.iterations for inverted in found], axis=1),
        jnp.stack([inverted.residual for inverted in found], axis=1),
    )


def _updated(block: GuidedBlock, z: jax.Array, start: jax.Array, count: jax.Array | int) -> Inverted:
    """z's inverse after `count` updates from `start`, both [B, T, D] in block order."""
    if z.shape[1] == 1:
        return unchanged(z)
    first, following = z[:, :1], z[:, 1:]

    def step(_: Any, found: Inverted) -> Inverted:
        x = bounded(update(block, first, following, found.x)[0])
        return Inverted(x, found.iterations + 1, jnp.abs(x - found.x).max((1, 2)))

    found = jax.lax.fori_loop(0, count, step, unchanged(bounded(start[:, 1:])))
    return found._replace(x=jnp.concatenate([first, found.x], axis=1))
