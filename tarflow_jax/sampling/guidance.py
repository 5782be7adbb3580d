"""Guidance: pushing a block's affine map away from an unguided one (section 3.4 of the paper)."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tarflow_jax.errors import UserError
from tarflow_jax.flow import Affine, TarFlowConfig
from tarflow_jax.options import Options, option


@dataclasses.dataclass(frozen=True)
class Guidance(Options):
    """a <- a + w_i (a - a°), for log_scale and shift a of blocks and tokens.

    The unguided a° comes from the same model without a label, and with attention logits divided by
    `attention_temperature`; for an unconditional model the temperature alone makes the difference.

    It is a JAX pytree: weight and temperature are traced, so that another one compiles nothing new.

    Attributes:
      weight: w, 0 for none; a number, or an array that may be traced.
      target: what is guided: "both", "log_scale" or "shift".
      schedule: "linear" grows w_i to w along the tokens, w_i = w (i + 1) / (T - 1); "constant" is w_i = w.
      attention_temperature: τ > 0; 1 leaves attention as it is.
      rule: "log_scale", as above; "scale", which guides s = exp(log_scale) in its place; "product", the product
        p(x | label)^(1 + w) / p(x)^w of the Gaussians, with s / s° clipped at 1 (arXiv 2506.06276), of both parameters.
      blocks: "all", or how many are guided, counted from the noise.

    Raises ValueError: one line naming the field.
    """

    group: ClassVar[str] = "guidance"

    weight: float | jax.Array = option(0.0, "Guidance weight; 0 for no guidance.", low=-math.inf)
    target: str = option("both", "What is guided.", choices=("both", "log_scale", "shift"))
    schedule: str = option("linear", "Weight along the tokens, growing or not.", choices=("linear", "constant"))
    attention_temperature: float | jax.Array = option(
        1.0, "Divides the attention logits of the unguided pass.", low=1e-6
    )
    rule: str = option(
        "log_scale", "Guides log-scales or scales, or multiplies densities.", choices=("log_scale", "scale", "product")
    )
    blocks: int | str = option("all", "Guides all blocks, or this many, counted from the noise.", low=1)

    def __post_init__(self) -> None:
        if isinstance(self.blocks, str) and self.blocks.isdecimal():  # a flag's
            object.__setattr__(self, "blocks", int(self.blocks))
        super().__post_init__()
        if isinstance(self.blocks, str) and self.blocks != "all":
            raise UserError(f"guidance.blocks is {self.blocks!r}; expected 'all' or a number from 1")
        if self.rule == "product" and self.target != "both":
            raise UserError(f"guidance.target is {self.target!r}; rule 'product' guides both")

    def checked_for(self, config: TarFlowConfig) -> "Guidance | None":
        """Itself, or None where its weight is 0; ValueError for guidance that a flow of this config has not."""
        for name in _TRACED:
            if shape := jnp.shape(getattr(self, name)):
                raise UserError(f"guidance.{name} has shape {shape}; expected one number")
        if self.blocks != "all" and int(self.blocks) > config.num_blocks:
            raise UserError(f"guidance.blocks is {self.blocks}; expected 'all' or at most {config.num_blocks}")
        if _equals(self.weight, 0):
            return None
        if not (config.num_classes or config.condition_dim) and _equals(self.attention_temperature, 1):
            raise UserError(
                "guidance by class needs a class-conditional model, this one has no classes; "
                "set an attention temperature other than 1"
            )
        return self

    def covers(self, k: int, num_blocks: int) -> bool:
        """Whether block number k is guided."""
        return self.blocks == "all" or k >= num_blocks - int(self.blocks)

    def weights(self, num_tokens: int) -> jax.Array:
        """w_i of the step that makes token i + 1, float32 [T]; the last is not used.

        The weight may be traced, and an array [B]: then float32 [B, T].
        """
        weight = jnp.asarray(self.weight, jnp.float32)
        steps = jnp.arange(1, num_tokens + 1, dtype=jnp.float32) / max(num_tokens - 1, 1)
        return jnp.multiply.outer(weight, jnp.ones_like(steps) if self.schedule == "constant" else steps)


def _equals(value: float | jax.Array, number: float) -> bool:
    return not isinstance(value, jax.core.Tracer) and bool(value == number)


_TRACED, _STATIC = ("weight", "attention_temperature"), ("target", "schedule", "rule", "blocks")


def _flatten(guidance: Guidance) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return tuple(getattr(guidance, name) for name in _TRACED), tuple(getattr(guidance, name) for name in _STATIC)


def _unflatten(static: tuple[Any, ...], leaves: tuple[Any, ...]) -> Guidance:
    # Without the constructor, whose checks need numbers: the leaves may be anything.
    guidance = object.__new__(Guidance)
    vars(guidance).update(zip((*_TRACED, *_STATIC), (*leaves, *static), strict=True))
    return guidance


jax.tree_util.register_pytree_node(Guidance, _flatten, _unflatten)


def guided(guidance: Guidance, with_label: Affine, without: Affine, start: jax.Array | int, num_tokens: int) -> Affine:
    """The guided map [B, S, D] of tokens start + 1 .. start + S, from those of both passes."""
    weights = jax.lax.dynamic_slice_in_dim(guidance.weights(num_tokens), start, with_label.shift.shape[1], axis=-1)
    weights = weights.reshape(-1, with_label.shift.shape[1], 1)  # [1 or B, S, 1]

    def guide(name: str, a: Any, unguided: Any) -> Any:
        return a + weights * (a - unguided) if guidance.target in ("both", name) else a

    # The lower triangle of a triangular map is guided with its scales.
    lower = None if with_label.lower is None else guide("log_scale", with_label.lower, without.lower)
    if guidance.rule == "product":
        return Affine(*product(with_label, without, weights), lower)
    shift = guide("shift", with_label.shift, without.shift)
    if guidance.rule == "scale":
        return Affine(guide("log_scale", with_label.scale, without.scale), shift, lower)
    log_scale = guide("log_scale", jnp.log(with_label.scale), jnp.log(without.scale))
    return Affine(jnp.exp(log_scale), shift, lower)


def product(with_label: Affine, without: Affine, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scale and shift [B, S, D] of the rule of this name."""
    ratio = jnp.square(jnp.minimum(with_label.scale / without.scale, 1.0))  # of the variances
    precision = 1 + weights - weights * ratio  # relative to the labelled pass
    shift = ((1 + weights) * with_label.shift - weights * ratio * without.shift) / precision
    return with_label.scale * jax.lax.rsqrt(precision), shift
