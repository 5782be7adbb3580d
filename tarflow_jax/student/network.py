"""The student's network: bidirectional transformers from latents to a clean image."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from tarflow_jax.flow import to_images, to_tokens
from tarflow_jax.flow.block import class_vectors, embedding_init, position_init, rotary_angles, scanned_layers
from tarflow_jax.flow.product import dense_product
from tarflow_jax.flow.transformer import kernel_init
from tarflow_jax.student.config import StudentConfig

NUM_WAVES = 16  # numbers that a guidance weight becomes


class Student(nn.Module):
    """Latents -> clean images, and the flow's trajectory between the two (see `StudentConfig.method`).

    Block number j stands for the inverse of flow block F - 1 - j; the last one denoises. Variables: `params`.
    """

    config: StudentConfig

    @nn.compact
    def __call__(
        self, latents: jax.Array, labels: jax.Array | None = None, weights: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Inverts and denoises.

        Args:
          latents: float32 [B, H, W, K], as `TarFlow` returns them.
          labels: int32 [B], -1 for no class; None for no class anywhere.
          weights: of guidance, float32 [B] in [0, max_guidance]; None for 0.

        Returns (images, trajectory): float32 [B, H, W, K], clean; and [B, F, H, W, K], what flow block k = 0 … F - 1
        reads, whose first is the noisy image; None for a "naive" student.
        """
        config, shape = self.config, self.config.shape
        tokens, hidden, outputs = to_tokens(shape, latents.astype(jnp.float32)), None, []
        for j in range(shape.num_blocks):
            block = StudentBlock(config, j, name=f"block_{j}")
            hidden, out = block(tokens if config.reads_tokens(j) else hidden, labels, weights)
            if out is not None:
                tokens = out
                outputs.append(to_images(shape, out))
        *between, images = outputs
        return images, jnp.stack(between[::-1], axis=1) if between else None


class StudentBlock(nn.Module):
    """Transformer layers that see all tokens, told the label and the guidance weight; `index` is j of `Student`."""

    config: StudentConfig
    index: int

    @nn.compact
    def __call__(
        self, x: jax.Array, labels: jax.Array | None, weights: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Tokens [B, T, D], or the hidden state [B, T, C] before -> the hidden state, and the head's tokens if any."""
        shape, dtype = self.config.shape, self.config.shape.compute_dtype
        h = x
        if self.config.reads_tokens(self.index):
            project = nn.Dense(
                shape.width, dtype=dtype, kernel_init=kernel_init, dot_general=dense_product, name="project_in"
            )
            h = project(x.astype(dtype)).astype(jnp.float32)
            h = h + self.param("position_embedding", position_init, shape)[None]
        if shape.num_classes:
            embedding = self.param("class_embedding", embedding_init, (shape.num_classes, shape.width))
            h = h + class_vectors(embedding, labels, len(x))[:, None]
        if self.config.max_guidance:
            guide = nn.Dense(
                shape.width, use_bias=False, dtype=dtype, kernel_init=nn.initializers.zeros, name="guidance"
            )
            given = jnp.zeros(len(x), jnp.float32) if weights is None else weights
            h = h + guide(waves(given / self.config.max_guidance).astype(dtype)).astype(jnp.float32)[:, None]
        angles = jnp.asarray(rotary_angles(shape)) if shape.rotary else None
        layers = scanned_layers(shape, shape.depths[self.index], causal=False, name="layers")
        h, _ = layers(h, None, angles)
        if not self.config.has_head(self.index):
            return h, None
        head = nn.Dense(
            shape.token_dim, dtype=dtype, kernel_init=nn.initializers.zeros, dot_general=dense_product, name="head"
        )
        return h, head(h.astype(dtype)).astype(jnp.float32)


def waves(shares: jax.Array) -> jax.Array:
    """Sines and cosines [B, NUM_WAVES] of numbers [B] in [0, 1]; zeros of 0."""
    angles = jnp.pi * shares[:, None] * jnp.arange(1, NUM_WAVES // 2 + 1, dtype=jnp.float32)[None]
    return jnp.concatenate([jnp.sin(angles), 1 - jnp.cos(angles)], axis=1)
