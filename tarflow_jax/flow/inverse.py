"""The inverse of one flow block: its parameters ready for a loop over tokens, and token by token decoding.

The inverse of z is the fixed point of x <- z scale(x) + shift(x). This map is causal: its token i + 1 depends only on
tokens 0 … i, and token 0 is known. `invert` computes one token after another; `sampling.decoders` has other ways.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from tarflow_jax.flow.block import Affine, Caches, FlowBlock, Layers
from tarflow_jax.flow.conditioning import Conditioning
from tarflow_jax.flow.transformer import KVCache, cast_kernels


class BlockInverse(flax.struct.PyTreeNode):
    """A block with its parameters, order and conditioning; predicts maps from the KV caches of earlier tokens.

    Attributes:
      block: unbound.
      params: its parameters.
      layers: the parameters of each layer.
      order: block order, int32 [1 or B, T]; may be traced.
      conditioning: standardized.
      temperature: divides the attention logits, float32 [B]; None for 1.
    """

    block: FlowBlock = flax.struct.field(pytree_node=False)
    params: dict[str, Any]
    layers: Layers
    order: jax.Array
    conditioning: Conditioning
    temperature: jax.Array | None = None

    @classmethod
    def of(
        cls, block: FlowBlock, params: dict[str, Any], order: jax.Array, conditioning: Conditioning
    ) -> "BlockInverse":
        """Takes the parameters apart, layer by layer; all-gathers them and casts kernels to their matmuls' dtype."""
        params = block.kernels.gather(cast_kernels(params, block.config.compute_dtype))
        numbers = range(block.config.depths[block.index])
        layers = [jax.tree.map(lambda p, i=i: p[i], params["layers"]) for i in numbers]
        return cls(block, params, layers, order, conditioning)

    def caches(self, batch_size: int, length: int) -> Caches:
        """Allocates caches for `length` tokens after the prefix, and writes the prefix if there is one."""
        config, prefix_length = self.block.config, self.block.config.prefix_length(self.block.index)
        empty = tuple(KVCache.zeros(config, batch_size, prefix_length + length) for _ in self.layers)
        if not prefix_length:
            return empty
        return self._apply(self.conditioning, self.temperature, self.layers, empty, method="write_prefix")

    def grow(self, caches: Caches, length: int) -> Caches:
        """Pads caches to `length` tokens after the prefix."""
        prefix_length = self.block.config.prefix_length(self.block.index)
        return tuple(cache.grow(prefix_length + length) for cache in caches)

    def prepend_start_token(self, x: jax.Array) -> jax.Array:
        """Prepends the start token, as `FlowBlock` does. Decoders take tokens with it, so they know the first one."""
        return self._apply(x, method="prepend_start_token")

    def predict(
        self, x: jax.Array, caches: Caches | None = None, start: jax.Array | int = 0
    ) -> tuple[Affine, Caches | None]:
        """Predicts the maps of tokens start + 1 … start + S from tokens x [B, S, D]; see `FlowBlock.predict`.

        The maps of padding are the identity.
        """
        affine, caches = self._apply(
            x, self.order, self.conditioning, self.temperature, self.layers, caches, start, method="predict"
        )
        first = start + (0 if self.block.config.start_token else 1)
        return affine.masked(self.conditioning.exists(first + jnp.arange(x.shape[1]))), caches

    def _apply(self, *args: Any, method: str) -> Any:
        return self.block.apply({"params": self.params}, *args, method=method)


class Inversion(flax.struct.PyTreeNode):
    """The inverse of a block for z in block order, finished or as far as a decoder's loop has come."""

    x: jax.Array  # the tokens, float32 [B, T, D]
    log_det: jax.Array  # log |det dz / dx| of the tokens that are done, float32 [B] in nats
    updates: jax.Array  # number of updates, int32 [B]
    residual: jax.Array  # largest change in the last update, float32 [B]; 0 if sequential
    converged: jax.Array  # whether x is the inverse, bool [B]
    caches: Caches | None = None  # of the tokens that are done, while a loop needs them

    @classmethod
    def begin(cls, x: jax.Array, caches: Caches | None = None) -> "Inversion":
        """Starts from tokens x without updates."""
        batch_size = len(x)
        zeros, updates = jnp.zeros(batch_size, jnp.float32), jnp.zeros(batch_size, jnp.int32)
        return cls(x, zeros, updates, zeros, jnp.ones(batch_size, bool), caches)


def invert(block: Any, z: jax.Array) -> Inversion:
    """Inverts a block token by token: x_i = z_i scale_i + shift_i, exact in T - 1 steps.

    Step i computes token i + 1. Each cache length has its own compiled loop.

    Args:
      block: a `BlockInverse`, or what has its `predict`, `caches` and `grow`.
      z: float32 [B, T, D] in block order; its first token is its own inverse.
    """
    batch_size, num_tokens, _ = z.shape

    def step(i: jax.Array, state: Inversion) -> Inversion:
        affine, caches = block.predict(jax.lax.dynamic_slice_in_dim(state.x, i, 1, axis=1), state.caches, i)
        x_next = affine.inverse(jax.lax.dynamic_slice_in_dim(z, i + 1, 1, axis=1))
        x = jax.lax.dynamic_update_slice_in_dim(state.x, x_next, i + 1, axis=1)
        return state.replace(x=x, log_det=state.log_det + affine.token_log_det[:, 0], caches=caches)

    state = Inversion.begin(z, block.caches(batch_size, 0))
    growth = cache_growth(num_tokens)
    for start in range(0, num_tokens - 1, growth):
        stop = min(start + growth, num_tokens - 1)
        state = jax.lax.fori_loop(start, stop, step, state.replace(caches=block.grow(state.caches, stop)))
    return state.replace(updates=jnp.full((batch_size,), num_tokens - 1, jnp.int32), caches=None)


def cache_growth(num_tokens: int) -> int:
    """Returns by how many tokens the cache grows at a time, so that early tokens do not attend to empty slots.

    Each cache length compiles separately, so there are at most eight; the mean token then reads 1/8 more than it needs.
    """
    return max(64, -(-num_tokens // 8))
