"""A block of a trained flow as decoders use it: with guidance, KV caches, and layers ready for a loop over tokens."""

import itertools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from tarflow_jax.flow import Affine, FlowBlock, Given, KVCache, TarFlow, TarFlowConfig, TransformerLayer, cast_kernels
from tarflow_jax.runtime import gathered
from tarflow_jax.sampling.guidance import Guidance, guided

Caches = tuple[KVCache, ...]  # one per layer


class BlockInverse(flax.struct.PyTreeNode):
    """Predicts the affine maps of the next tokens, guidance included. A JAX pytree.

    With guidance, whatever its weight, the guided and unguided passes run as one batch of 2B. The two rows of an
    image are adjacent, so that a sharded batch stays where it is.

    Attributes:
      block: the block, unbound.
      params: its parameters.
      layers: the parameters of each layer; slicing the stack inside a compiled loop would copy every slice.
      order: block order, int32 [1 or B, T]; may be traced.
      given: what the density is conditioned on.
      guidance: None for a single pass.
    """

    block: FlowBlock = flax.struct.field(pytree_node=False)
    params: dict[str, Any]
    layers: list[Any]
    order: jax.Array
    given: Given
    guidance: Guidance | None

    def caches(self, batch_size: int, length: int) -> Caches:
        """Allocates caches for `length` tokens after the prefix, and writes the prefix if there is one."""
        rows = batch_size * (1 if self.guidance is None else 2)
        empty = tuple(KVCache.zeros(self.block.config, rows, self.prefix_length + length) for _ in self.layers)
        if not self.prefix_length:
            return empty
        given, _, temperature = self._passes(batch_size)
        h, angles = self._apply(given, method="embed_prefix")
        return self._through_layers(h, temperature, angles, empty, 0)[1]

    def grow(self, caches: Caches, length: int) -> Caches:
        """Pads caches to `length` tokens after the prefix."""
        return tuple(cache.grow(self.prefix_length + length) for cache in caches)

    @property
    def prefix_length(self) -> int:
        return self.block.config.prefix_length(self.block.index)

    def behind_start(self, x: jax.Array) -> jax.Array:
        """Prepends the start token, as `FlowBlock` does. Decoders take tokens with it, so they know the first one."""
        return self._apply(x, method="behind_start")

    def __call__(
        self, x: jax.Array, caches: Caches | None = None, start: jax.Array | int = 0
    ) -> tuple[Affine, Caches | None]:
        """Predicts the maps of tokens start + 1 .. start + S from tokens x [B, S, D] at start .. start + S - 1.

        Args:
          x: in block order.
          caches: of the tokens before `start`; without caches, start is 0.

        Returns (affine, caches), the caches with these tokens written.
        """
        config = self.block.config
        exists = self.given.exists(start + (0 if config.start_token else 1) + jnp.arange(x.shape[1]))
        given, order, temperature = self._passes(len(x))
        if self.guidance is not None:
            x = _interleave(x, x)  # [2B, S, D]
        if caches is None:
            affine = self._apply(x, order, given, temperature, method="affine_of_next")
        else:
            h, angles = self._apply(x, order, given, start, method="embed")
            h, caches = self._through_layers(h, temperature, angles, caches, self.prefix_length + start)
            affine = self._apply(h, method="project")
        if self.guidance is None:
            return affine.where(exists), caches
        pairs = jax.tree.map(lambda both: both.reshape(-1, 2, *both.shape[1:]), affine)
        with_label, without = (jax.tree.map(lambda pair, i=i: pair[:, i], pairs) for i in range(2))
        affine = guided(self.guidance, with_label, without, start, config.sequence_length)
        return affine.where(exists), caches

    def _passes(self, batch_size: int) -> tuple[Given, jax.Array, jax.Array | None]:
        """Returns (given, order, temperature) for the B rows, or for the 2B rows of both passes."""
        if self.guidance is None:
            return self.given, self.order, None
        unguided = jnp.full(batch_size, self.guidance.attention_temperature, jnp.float32)
        temperature = _interleave(jnp.ones_like(unguided), unguided)
        given = jax.tree.map(_interleave, self.given, self.given.without_classes())
        return given, self.order if len(self.order) == 1 else _interleave(self.order, self.order), temperature

    def _apply(self, *args: Any, method: str) -> Any:
        return self.block.apply({"params": self.params}, *args, method=method)

    def _through_layers(
        self, h: jax.Array, temperature: jax.Array | None, angles: jax.Array | None, caches: Caches, start: Any
    ) -> tuple[jax.Array, Caches]:
        layer, written = TransformerLayer(self.block.config, self.block.kernels, parent=None), []
        for own, cache in zip(self.layers, caches, strict=True):
            h, cache = layer.apply({"params": own}, h, temperature, angles, cache, start)
            written.append(cache)
        return h, tuple(written)


def _interleave(guided: jax.Array, unguided: jax.Array) -> jax.Array:
    """Interleaves two arrays [B, …] as [2B, …]: each image's guided row, then its unguided row."""
    return jnp.stack([guided, unguided], axis=1).reshape(-1, *guided.shape[1:])


def block_inverse(
    flow: TarFlow,
    k: int,
    block_params: dict[str, Any],
    order: jax.Array,
    given: Given,
    guidance: Guidance | None = None,
) -> BlockInverse:
    """Builds the inverse of block k; all-gathers its parameters and casts them to the dtype of their matmuls."""
    config = flow.config
    params = gathered(cast_kernels(block_params, config.compute_dtype))
    if guidance is not None and not guidance.covers(k, config.num_blocks):
        guidance = None
    block = FlowBlock(config, k, flow.kernels, parent=None)
    layers = [jax.tree.map(lambda p, i=i: p[i], params["layers"]) for i in range(config.depths[k])]
    return BlockInverse(block, params, layers, order, given, guidance)


def equal_blocks(config: TarFlowConfig, decoders: tuple[Any, ...], guidance: Guidance | None) -> list[range]:
    """Groups consecutive block numbers whose inverses differ only in parameters and order."""

    def kind(k: int) -> tuple[Any, ...]:
        limit = config.input_limit if k else config.image_limit
        guided = guidance is None or guidance.covers(k, config.num_blocks)
        return config.depths[k], limit, decoders[k], guided, config.is_conditioned(k)

    groups = [list(numbers) for _, numbers in itertools.groupby(range(config.num_blocks), kind)]
    return [range(group[0], group[-1] + 1) for group in groups]
