"""The student's network: bidirectional transformers from latents to a clean image."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from tarflow_jax.flow import Affine, Kernels, from_tokens, to_tokens
from tarflow_jax.flow.block import class_vectors, embedding_init, position_init, rotary_angles
from tarflow_jax.flow.transformer import kernel_init, stacked_layers
from tarflow_jax.student.config import StudentConfig

NUM_WAVES = 16  # features of a guidance weight
MAX_LOG_SCALE = 2.0


class Student(nn.Module):
    """Maps latents to clean images, and predicts the flow's trajectory between the two.

    Block j approximates the inverse of flow block F - 1 - j; the last block denoises. Variables: `params`.
    """

    config: StudentConfig
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(
        self, latents: jax.Array, labels: jax.Array | None = None, weights: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Decodes and denoises.

        Args:
          latents: float32 [B, H, W, K], as `TarFlow` returns them.
          labels: int32 [B], -1 for no class; None is all -1.
          weights: guidance weights, float32 [B] in [0, max_guidance]; None for 0.

        Returns (images, trajectory): float32 [B, H, W, K], clean; and [B, F, H, W, K], the inputs of flow blocks
        0 … F - 1, the first of which is the noisy image.
        """
        config, shape = self.config, self.config.shape
        tokens, hidden, outputs = to_tokens(shape, latents.astype(jnp.float32)), None, []
        for j in range(shape.num_blocks):
            block = StudentBlock(config, shape.depths[j], self.kernels, name=f"block_{j}")
            hidden, tokens = block(hidden, tokens, labels, weights)
            outputs.append(from_tokens(shape, tokens))
        *between, images = outputs
        return images, jnp.stack(between[::-1], axis=1)


class StudentBlock(nn.Module):
    """Bidirectional transformer layers, conditioned on label and guidance weight, and an affine map of each token."""

    config: StudentConfig
    depth: int
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(
        self, hidden: jax.Array | None, x: jax.Array, labels: jax.Array | None, weights: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Maps the previous block's hidden state [B, T, C] (at first None) and tokens [B, T, D] to this block's."""
        shape, dtype = self.config.shape, self.config.shape.compute_dtype
        dense = functools.partial(nn.Dense, dtype=dtype, dot_general=self.kernels.dot_general)
        project = dense(shape.width, kernel_init=kernel_init, name="project_in")
        h = project(x.astype(dtype)).astype(jnp.float32)
        h = h + self.param("position_embedding", position_init, shape)[None]
        if hidden is not None:
            h = h + hidden
        if shape.num_classes:
            embedding = self.param("class_embedding", embedding_init, (shape.num_classes, shape.width))
            h = h + class_vectors(embedding, labels, len(x))[:, None]
        if self.config.max_guidance:
            guide = dense(shape.width, use_bias=False, kernel_init=nn.initializers.zeros, name="guidance")
            weights = jnp.zeros(len(x), jnp.float32) if weights is None else weights
            h = h + guide(waves(weights / self.config.max_guidance).astype(dtype)).astype(jnp.float32)[:, None]
        angles = jnp.asarray(rotary_angles(shape))[None] if shape.rotary else None
        layers = stacked_layers(shape, self.depth, self.kernels, causal=False, name="layers")
        h, _ = layers(h, None, angles)
        head = dense(2 * shape.token_dim, kernel_init=nn.initializers.zeros, name="project_out")
        shift, log_scale = jnp.split(head(h.astype(dtype)).astype(jnp.float32), 2, axis=-1)
        log_scale = MAX_LOG_SCALE * jnp.tanh(log_scale / MAX_LOG_SCALE)
        return h, Affine(jnp.exp(log_scale), shift).inverse(x)


def waves(shares: jax.Array) -> jax.Array:
    """Returns sines and cosines [B, NUM_WAVES] of numbers [B] in [0, 1]; 0 maps to zeros."""
    angles = jnp.pi * shares[:, None] * jnp.arange(1, NUM_WAVES // 2 + 1, dtype=jnp.float32)[None]
    return jnp.concatenate([jnp.sin(angles), 1 - jnp.cos(angles)], axis=1)
