"""Guidance: pushing a block's affine map away from an unguided one (section 3.4 of the paper)."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from tarflow_jax.errors import UserError
from tarflow_jax.flow import Affine, FlowBlock, KVCache

TARGETS = ("both", "log_scale", "shift")
SCHEDULES = ("linear", "constant")


@dataclasses.dataclass(frozen=True)
class Guidance:
    """a <- a + w_i (a - a°), for log_scale and shift a of every block and token.

    The unguided a° comes from the same model without a label, and with attention logits divided by
    `attention_temperature`; for an unconditional model the temperature alone makes the difference.

    It is a JAX pytree: weight and temperature are traced, so that another one compiles nothing new.

    Attributes:
      weight: w, 0 for none.
      target: what is guided: "both", "log_scale" or "shift".
      schedule: "linear" grows w_i to w along the tokens, w_i = w (i + 1) / (T - 1); "constant" is w_i = w.
      attention_temperature: τ > 0; 1 leaves attention as it is.

    Raises ValueError: one line naming the field.
    """

    weight: float = 0.0
    target: str = "both"
    schedule: str = "linear"
    attention_temperature: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise UserError(f"guidance weight is {self.weight}; expected a finite number")
        if self.target not in TARGETS:
            raise UserError(f"guidance target is {self.target!r}; expected one of {', '.join(TARGETS)}")
        if self.schedule not in SCHEDULES:
            raise UserError(f"guidance schedule is {self.schedule!r}; expected one of {', '.join(SCHEDULES)}")
        if not 0 < self.attention_temperature < math.inf:
            raise UserError(f"attention temperature is {self.attention_temperature}; expected a positive number")

    def weights(self, num_tokens: int) -> jax.Array:
        """w_i of the step that makes token i + 1, float32 [T]; the last has no use. The weight may be traced."""
        if self.schedule == "constant":
            return jnp.full((num_tokens,), self.weight, jnp.float32)
        return self.weight * jnp.arange(1, num_tokens + 1, dtype=jnp.float32) / max(num_tokens - 1, 1)


def _flatten(guidance: Guidance) -> tuple[tuple[Any, ...], tuple[str, str]]:
    return (guidance.weight, guidance.attention_temperature), (guidance.target, guidance.schedule)


def _unflatten(static: tuple[str, str], leaves: tuple[Any, ...]) -> Guidance:
    # Without the constructor, whose checks need numbers: the leaves may be traced, or no arrays at all.
    guidance = object.__new__(Guidance)
    names = ("weight", "attention_temperature", "target", "schedule")
    vars(guidance).update(zip(names, (*leaves, *static), strict=True))
    return guidance


jax.tree_util.register_pytree_node(Guidance, _flatten, _unflatten)


@dataclasses.dataclass(frozen=True)
class GuidedBlock:
    """A block's map from tokens to the affine map of the tokens that follow, guidance included.

    With guidance, whatever its weight, the guided and the unguided pass run as one batch of 2B.
    """

    block: FlowBlock  # unrolled
    params: dict  # its own (see `unstack_layers`)
    labels: jax.Array | None  # int32 [B]
    guidance: Guidance | None  # None for a single pass

    def caches(self, batch_size: int, length: int) -> tuple[KVCache, ...]:
        """Empty caches for `length` tokens, one a layer."""
        passes = 1 if self.guidance is None else 2
        depth = self.block.config.depths[self.block.index]
        return tuple(KVCache.zeros(self.block.config, passes * batch_size, length) for _ in range(depth))

    def __call__(
        self, x: jax.Array, caches: tuple[KVCache, ...] | None = None, start: jax.Array | int = 0
    ) -> tuple[Affine, tuple[KVCache, ...] | None]:
        """The affine map of tokens start + 1 .. start + S, from tokens x [B, S, D] at start .. start + S - 1."""
        labels, temperature = self.labels, None
        if self.guidance is not None:
            batch_size = x.shape[0]
            x = jnp.concatenate([x, x])  # [2B, S, D]
            if labels is not None:
                labels = jnp.concatenate([labels, jnp.full_like(labels, -1)])
            unguided = jnp.float32(self.guidance.attention_temperature)
            temperature = jnp.repeat(jnp.stack([jnp.ones_like(unguided), unguided]), batch_size)
        affine, caches = self.block.apply(
            {"params": self.params}, x, labels, temperature, caches, start, method="following_affine"
        )
        if self.guidance is not None:
            affine = _guided(self.guidance, affine, start, self.block.config.num_tokens)
        return affine, caches


def _guided(guidance: Guidance, passes: Affine, start: jax.Array | int, num_tokens: int) -> Affine:
    """The guided map [B, S, D] of tokens start + 1 .. start + S, from those of both passes, [2B, S, D]."""
    weights = guidance.weights(num_tokens)
    weights = jax.lax.dynamic_slice_in_dim(weights, start, passes.shift.shape[1])[None, :, None]  # [1, S, 1]

    def guide(name: str, both: jax.Array) -> jax.Array:
        guided, unguided = jnp.split(both, 2)
        return guided + weights * (guided - unguided) if guidance.target in ("both", name) else guided

    # With the scales, a triangular map's other numbers make up its matrix.
    lower = None if passes.lower is None else guide("log_scale", passes.lower)
    return Affine(guide("log_scale", passes.log_scale), guide("shift", passes.shift), lower)
