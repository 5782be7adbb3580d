"""Guidance: pushing a block's affine map away from an unguided one (section 3.4 of the paper)."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tarflow_jax.errors import UserError
from tarflow_jax.flow import Affine, Caches, FlowBlock, KVCache, StackedCache, solve_unit_lower
from tarflow_jax.options import option

TARGETS = ("both", "log_scale", "shift")
SCHEDULES = ("linear", "constant")
RULES = ("log_scale", "scale", "product")


@dataclasses.dataclass(frozen=True)
class Guidance:
    """a <- a + w_i (a - a°), for log_scale and shift a of blocks and tokens.

    The unguided a° comes from the same model without a label, and with attention logits divided by
    `attention_temperature`; for an unconditional model the temperature alone makes the difference.

    It is a JAX pytree: weight and temperature are traced, so that another one compiles nothing new.

    Attributes:
      weight: w, 0 for none.
      target: what is guided: "both", "log_scale" or "shift".
      schedule: "linear" grows w_i to w along the tokens, w_i = w (i + 1) / (T - 1); "constant" is w_i = w.
      attention_temperature: τ > 0; 1 leaves attention as it is.
      rule: "log_scale", as above; "scale", which guides s = exp(log_scale) in its place; "product", the product
        p(x | label)^(1 + w) / p(x)^w of the Gaussians, with s / s° clipped at 1 (arXiv 2506.06276), of both parameters.
      blocks: "all", or how many are guided, counted from the noise.

    Raises ValueError: one line naming the field.
    """

    weight: float = option(0.0, "Guidance weight; 0 for no guidance.")
    target: str = option("both", "What is guided: both, log_scale or shift.")
    schedule: str = option("linear", "Weight along the tokens: linear (growing) or constant.")
    attention_temperature: float = option(1.0, "Divides the attention logits of the unguided pass.")
    rule: str = option(
        "log_scale", "Guides log-scales (log_scale) or scales (scale), or multiplies densities (product)."
    )
    blocks: int | str = option("all", "Guides all blocks, or this many, counted from the noise.")

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise UserError(f"guidance weight is {self.weight}; expected a finite number")
        if self.target not in TARGETS:
            raise UserError(f"guidance target is {self.target!r}; expected one of {', '.join(TARGETS)}")
        if self.schedule not in SCHEDULES:
            raise UserError(f"guidance schedule is {self.schedule!r}; expected one of {', '.join(SCHEDULES)}")
        if not 0 < self.attention_temperature < math.inf:
            raise UserError(f"attention temperature is {self.attention_temperature}; expected a positive number")
        if self.rule not in RULES:
            raise UserError(f"guidance rule is {self.rule!r}; expected one of {', '.join(RULES)}")
        if self.rule == "product" and self.target != "both":
            raise UserError(f"guidance target is {self.target!r}; rule 'product' guides both")
        if isinstance(self.blocks, str) and self.blocks.isdecimal():  # a flag's
            object.__setattr__(self, "blocks", int(self.blocks))
        if self.blocks != "all" and not (isinstance(self.blocks, int) and self.blocks > 0):
            raise UserError(f"guidance blocks is {self.blocks!r}; expected 'all' or a positive number")

    def covers(self, k: int, num_blocks: int) -> bool:
        """Whether block number k is guided."""
        return self.blocks == "all" or k >= num_blocks - int(self.blocks)

    def weights(self, num_tokens: int) -> jax.Array:
        """w_i of the step that makes token i + 1, float32 [T]; the last has no use. The weight may be traced."""
        if self.schedule == "constant":
            return jnp.full((num_tokens,), self.weight, jnp.float32)
        return linear_weights(self.weight, num_tokens)


def linear_weights(weight: jax.Array | float, num_tokens: int) -> jax.Array:
    """Of weights w [...], the w (i + 1) / (T - 1) of `Guidance.weights`, float32 [..., T]."""
    steps = jnp.arange(1, num_tokens + 1, dtype=jnp.float32)
    return jnp.multiply.outer(jnp.asarray(weight, jnp.float32), steps) / max(num_tokens - 1, 1)


_TRACED, _STATIC = ("weight", "attention_temperature"), ("target", "schedule", "rule", "blocks")


def _flatten(guidance: Guidance) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return tuple(getattr(guidance, name) for name in _TRACED), tuple(getattr(guidance, name) for name in _STATIC)


def _unflatten(static: tuple[Any, ...], leaves: tuple[Any, ...]) -> Guidance:
    # Without the constructor, whose checks need numbers: the leaves may be traced, or no arrays at all.
    guidance = object.__new__(Guidance)
    vars(guidance).update(zip((*_TRACED, *_STATIC), (*leaves, *static), strict=True))
    return guidance


jax.tree_util.register_pytree_node(Guidance, _flatten, _unflatten)


@dataclasses.dataclass(frozen=True)
class GuidedBlock:
    """A block's map from tokens to the inverse of the affine map of the tokens that follow, guidance included.

    With guidance, whatever its weight, the guided and the unguided pass run as one batch of 2B. An image's two are
    neighbours, so that a batch that is sharded over devices stays where it is.
    """

    block: FlowBlock  # for decoding
    params: dict  # its own (see `FlowBlock.decoding`)
    labels: jax.Array | None  # int32 [B]
    noise_std: jax.Array | None  # float32 [B], of a flow that is conditional on it
    guidance: Guidance | None  # None for a single pass

    def caches(self, batch_size: int, length: int) -> Caches:
        """Empty caches for `length` tokens."""
        config, rows = self.block.config, batch_size * (1 if self.guidance is None else 2)
        depth = config.depths[self.block.index]
        if self.block.decoding == "looped":
            return StackedCache.zeros(config, depth, rows, length)
        return tuple(KVCache.zeros(config, rows, length) for _ in range(depth))

    def __call__(
        self, x: jax.Array, caches: Caches | None = None, start: jax.Array | int = 0
    ) -> tuple["Inverse", Caches | None]:
        """The map to tokens start + 1 .. start + S, from tokens x [B, S, D] at start .. start + S - 1."""
        labels, noise_std, temperature = self.labels, self.noise_std, None
        if self.guidance is not None:
            if labels is not None:
                labels = _in_turns(labels, jnp.full_like(labels, -1))
            if noise_std is not None:
                noise_std = _in_turns(noise_std, noise_std)
            unguided = jnp.full(len(x), self.guidance.attention_temperature, jnp.float32)
            temperature = _in_turns(jnp.ones_like(unguided), unguided)
            x = _in_turns(x, x)  # [2B, S, D]
        affine, caches = self.block.apply(
            {"params": self.params}, x, labels, temperature, noise_std, caches, start, method="following_affine"
        )
        if self.guidance is None:
            return Inverse(jnp.exp(affine.log_scale), affine.shift, affine.lower), caches
        return _guided(self.guidance, affine, start, self.block.config.num_tokens), caches


def _in_turns(guided: jax.Array, unguided: jax.Array) -> jax.Array:
    """[B, …] of each pass as [2B, …]: an image's guided one, its unguided one, the next image's."""
    return jnp.stack([guided, unguided], axis=1).reshape(-1, *guided.shape[1:])


class Inverse(NamedTuple):
    """x = u scale + shift with z = (I + L) u, of tokens z; see `Affine`. Guidance may turn a scale's sign."""

    scale: jax.Array  # float32 [B, S, D]
    shift: jax.Array  # float32 [B, S, D]
    lower: jax.Array | None  # float32 [B, S, D (D - 1) / 2]

    def __call__(self, z: jax.Array) -> jax.Array:
        return solve_unit_lower(self.lower, z) * self.scale + self.shift


def _guided(guidance: Guidance, passes: Affine, start: jax.Array | int, num_tokens: int) -> Inverse:
    """The guided map [B, S, D] to tokens start + 1 .. start + S, from those of both passes in turns, [2B, S, D]."""
    pairs = jax.tree.map(lambda both: both.reshape(-1, 2, *both.shape[1:]), passes)
    guided, unguided = (jax.tree.map(lambda pair, i=i: pair[:, i], pairs) for i in range(2))
    weights = guidance.weights(num_tokens)
    weights = jax.lax.dynamic_slice_in_dim(weights, start, guided.shift.shape[1])[None, :, None]  # [1, S, 1]

    def guide(name: str, a: jax.Array, of_unguided: jax.Array) -> jax.Array:
        return a + weights * (a - of_unguided) if guidance.target in ("both", name) else a

    # With the scales, a triangular map's other numbers make up its matrix.
    lower = None if passes.lower is None else guide("log_scale", guided.lower, unguided.lower)
    if guidance.rule == "product":
        return Inverse(*product(guided, unguided, weights), lower)
    shift = guide("shift", guided.shift, unguided.shift)
    if guidance.rule == "scale":
        return Inverse(guide("log_scale", jnp.exp(guided.log_scale), jnp.exp(unguided.log_scale)), shift, lower)
    return Inverse(jnp.exp(guide("log_scale", guided.log_scale, unguided.log_scale)), shift, lower)


def product(guided: Affine, unguided: Affine, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scale and shift [B, S, D] of the rule of this name, from both passes' maps."""
    ratio = jnp.exp(2 * jnp.minimum(guided.log_scale - unguided.log_scale, 0))  # of the variances
    precision = 1 + weights - weights * ratio  # relative to that with the label
    shift = ((1 + weights) * guided.shift - weights * ratio * unguided.shift) / precision
    return jnp.exp(guided.log_scale) * jax.lax.rsqrt(precision), shift
