"""A block of a trained flow as the decoders use it: guidance, KV caches, and layers ready for a loop over tokens."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from tarflow_jax.flow import Affine, FlowBlock, Given, KVCache, TarFlow, TarFlowConfig, TransformerLayer, cast_kernels
from tarflow_jax.runtime import gathered
from tarflow_jax.sampling.guidance import Guidance, guided

Caches = tuple[KVCache, ...]  # one a layer


@dataclasses.dataclass(frozen=True)
class BlockInverse:
    """Predicts the affine maps of the next tokens, guidance included.

    With guidance, whatever its weight, the guided and the unguided pass run as one batch of 2B. The two passes of an
    image are neighbours, so that a sharded batch stays where it is.

    Attributes:
      block: the block, unbound.
      params: its parameters.
      layers: those of each layer. A compiled loop over tokens that sliced the stack would copy every slice.
      order: in which it reads the tokens, int32 [1 or B, T]; may be traced.
      given: what the density is conditional on.
      guidance: None for a single pass.
    """

    block: FlowBlock
    params: dict[str, Any]
    layers: list[Any]
    order: jax.Array
    given: Given
    guidance: Guidance | None

    def caches(self, batch_size: int, length: int) -> Caches:
        """Empty caches for `length` tokens."""
        rows = batch_size * (1 if self.guidance is None else 2)
        return tuple(KVCache.zeros(self.block.config, rows, length) for _ in self.layers)

    def __call__(
        self, x: jax.Array, caches: Caches | None = None, start: jax.Array | int = 0
    ) -> tuple[Affine, Caches | None]:
        """Predicts the maps of tokens start + 1 .. start + S from tokens x [B, S, D] at start .. start + S - 1.

        Args:
          x: in block order.
          caches: of the tokens before `start`; without caches, start is 0.

        Returns (affine, caches), the caches with these tokens written.
        """
        given, order, temperature = self.given, self.order, None
        exists = given.exists(start + 1 + jnp.arange(x.shape[1]))
        if self.guidance is not None:
            unguided = jnp.full(len(x), self.guidance.attention_temperature, jnp.float32)
            temperature = _interleave(jnp.ones_like(unguided), unguided)
            given = jax.tree.map(_interleave, given, without_classes(given))
            order = order if len(order) == 1 else _interleave(order, order)
            x = _interleave(x, x)  # [2B, S, D]
        run = functools.partial(self.block.apply, {"params": self.params})
        if caches is None:
            affine = run(x, order, given, temperature, method="affine_of_next")
        else:
            layer, written = TransformerLayer(self.block.config, self.block.kernels, parent=None), []
            h, angles = run(x, order, given, start, method="embed")
            for own, cache in zip(self.layers, caches, strict=True):
                h, cache = layer.apply({"params": own}, h, temperature, angles, cache, start)
                written.append(cache)
            affine, caches = run(h, method="project"), tuple(written)
        if self.guidance is None:
            return affine.where(exists), caches
        pairs = jax.tree.map(lambda both: both.reshape(-1, 2, *both.shape[1:]), affine)
        with_label, without = (jax.tree.map(lambda pair, i=i: pair[:, i], pairs) for i in range(2))
        affine = guided(self.guidance, with_label, without, start, self.block.config.num_tokens)
        return affine.where(exists), caches


def without_classes(given: Given) -> Given:
    """What the unguided pass is given: no class and no condition."""
    labels = None if given.labels is None else jnp.full_like(given.labels, -1)
    return given._replace(
        labels=labels, condition=None if given.condition is None else jnp.full_like(given.condition, jnp.nan)
    )


def _interleave(guided: jax.Array, unguided: jax.Array) -> jax.Array:
    """Two arrays [B, …] as one [2B, …]: the first image's guided row, its unguided row, the next image's."""
    return jnp.stack([guided, unguided], axis=1).reshape(-1, *guided.shape[1:])


def block_inverse(
    flow: TarFlow,
    k: int,
    block_params: dict[str, Any],
    order: jax.Array,
    given: Given,
    guidance: Guidance | None = None,
) -> BlockInverse:
    """Block number k with these parameters, all-gathered and cast to the dtype of their matmuls."""
    config = flow.config
    params = gathered(cast_kernels(block_params, config.compute_dtype))
    if guidance is not None and not guidance.covers(k, config.num_blocks):
        guidance = None
    block = FlowBlock(config, k, flow.kernels, parent=None)
    layers = [jax.tree.map(lambda p, i=i: p[i], params["layers"]) for i in range(config.depths[k])]
    return BlockInverse(block, params, layers, order, given, guidance)


def equal_blocks(config: TarFlowConfig, decoders: tuple[Any, ...], guidance: Guidance | None) -> list[range]:
    """Groups consecutive block numbers whose inverses differ in parameters and order alone."""

    def kind(k: int) -> tuple[Any, ...]:
        limit = config.input_limit if k else config.image_limit
        return config.depths[k], limit, decoders[k], guidance is None or guidance.covers(k, config.num_blocks)

    groups = [list(numbers) for _, numbers in itertools.groupby(range(config.num_blocks), kind)]
    return [range(group[0], group[-1] + 1) for group in groups]
