"""Guidance: pushing a block's affine map away from an unguided one (section 3.4 of the paper)."""

import dataclasses
import math
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp

from tarflow_jax.errors import UserError
from tarflow_jax.flow import Affine, BlockInverse, TarFlowConfig
from tarflow_jax.flow.block import Caches
from tarflow_jax.options import Options, option


@dataclasses.dataclass(frozen=True)
class Guidance(Options):
    """Replaces a by a + w_i (a - a°), where a is the log_scale or shift of a token in a block.

    The unguided a° comes from the same model without a label, and with attention logits divided by
    `attention_temperature`; for an unconditional model only the temperature differs.

    Guidance is a JAX pytree: weight and temperature are traced, so that changing them does not recompile.

    Attributes:
      weight: w, 0 for none; a number, or an array that may be traced.
      target: what is guided: "both", "log_scale" or "shift".
      schedule: "linear" raises w_i to w along the tokens, w_i = w (i + 1) / (T - 1); "constant" is w_i = w.
      attention_temperature: τ > 0; 1 leaves attention as it is.
      rule: "log_scale" as above; "scale" guides s = exp(log_scale) instead; "product" takes the product of Gaussians
        p(x | label)^(1 + w) / p(x)^w, with s / s° clipped at 1 (arXiv 2506.06276), and needs target "both".
      blocks: "all", or how many blocks are guided, counted from the latents.

    Raises ValueError: one line naming the field.
    """

    group: ClassVar[str] = "guidance"

    weight: float | jax.Array = option(0.0, "Guidance weight; 0 for no guidance.", low=-math.inf)
    target: str = option("both", "Parameters to guide.", choices=("both", "log_scale", "shift"))
    schedule: str = option("linear", "Growth of the weight along the tokens.", choices=("linear", "constant"))
    attention_temperature: float | jax.Array = option(
        1.0, "Divides the attention logits of the unguided pass.", low=1e-6
    )
    rule: str = option(
        "log_scale", "Guides log-scales or scales, or multiplies densities.", choices=("log_scale", "scale", "product")
    )
    blocks: int | str = option("all", "Guides all blocks, or this many, counted from the latents.", low=1)

    def __post_init__(self) -> None:
        if isinstance(self.blocks, str) and self.blocks.isdecimal():  # from a flag
            object.__setattr__(self, "blocks", int(self.blocks))
        super().__post_init__()
        if isinstance(self.blocks, str) and self.blocks != "all":
            raise UserError(f"guidance.blocks is {self.blocks!r}; expected 'all' or a number from 1")
        if self.rule == "product" and self.target != "both":
            raise UserError(f"guidance.target is {self.target!r}; rule 'product' guides both")

    def checked_for(self, config: TarFlowConfig) -> "Guidance | None":
        """Returns itself, or None if its weight is 0; raises ValueError if a flow of this config cannot use it."""
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
        """Returns w_i of the step that computes token i + 1, float32 [T]; the last one is unused.

        The weight may be traced. For a weight [B] the result is float32 [B, T].
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
    # Skips the constructor, whose checks need numbers: the leaves of a pytree may be anything.
    guidance = object.__new__(Guidance)
    vars(guidance).update(zip((*_TRACED, *_STATIC), (*leaves, *static), strict=True))
    return guidance


jax.tree_util.register_pytree_node(Guidance, _flatten, _unflatten)


class GuidedBlock(flax.struct.PyTreeNode):
    """A block under guidance, with the `predict`, `caches` and `grow` of a `BlockInverse`.

    The guided and unguided passes run as one batch of 2B, whatever the weight. The two rows of an image are adjacent,
    so that a sharded batch stays where it is.
    """

    passes: BlockInverse  # of 2B rows
    guidance: Guidance

    @classmethod
    def of(cls, block: BlockInverse, guidance: Guidance, batch_size: int) -> "GuidedBlock":
        """Doubles the rows of a block for a batch of B."""
        unguided = jnp.full(batch_size, guidance.attention_temperature, jnp.float32)
        conditional = block.conditioning.replace(null_condition=None)
        unconditional = block.conditioning.unconditional().replace(null_condition=None)
        passes = block.replace(
            order=block.order if len(block.order) == 1 else _interleave(block.order, block.order),
            conditioning=jax.tree.map(_interleave, conditional, unconditional),
            temperature=_interleave(jnp.ones_like(unguided), unguided),
        )
        return cls(passes, guidance)

    def caches(self, batch_size: int, length: int) -> Caches:
        return self.passes.caches(2 * batch_size, length)

    def grow(self, caches: Caches, length: int) -> Caches:
        return self.passes.grow(caches, length)

    def predict(
        self, x: jax.Array, caches: Caches | None = None, start: jax.Array | int = 0
    ) -> tuple[Affine, Caches | None]:
        """Predicts guided maps from tokens [B, S, D], see `BlockInverse.predict`."""
        affine, caches = self.passes.predict(_interleave(x, x), caches, start)
        pairs = jax.tree.map(lambda both: both.reshape(-1, 2, *both.shape[1:]), affine)
        with_label, without = (jax.tree.map(lambda pair, i=i: pair[:, i], pairs) for i in range(2))
        return guided(self.guidance, with_label, without, start, self.passes.block.config.sequence_length), caches


def _interleave(guided: jax.Array, unguided: jax.Array) -> jax.Array:
    """Interleaves two arrays [B, …] as [2B, …]: each image's guided row, then its unguided row."""
    return jnp.stack([guided, unguided], axis=1).reshape(-1, *guided.shape[1:])


def guided(guidance: Guidance, with_label: Affine, without: Affine, start: jax.Array | int, num_tokens: int) -> Affine:
    """Combines the maps of both passes into the guided map [B, S, D] of tokens start + 1 .. start + S."""
    weights = jax.lax.dynamic_slice_in_dim(guidance.weights(num_tokens), start, with_label.shift.shape[1], axis=-1)
    weights = weights.reshape(-1, with_label.shift.shape[1], 1)  # [1 or B, S, 1]

    def guide(name: str, a: Any, unguided: Any) -> Any:
        return a + weights * (a - unguided) if guidance.target in ("both", name) else a

    # The lower triangle of a triangular map is guided like its scales.
    lower = None if with_label.lower is None else guide("log_scale", with_label.lower, without.lower)
    if guidance.rule == "product":
        return Affine(*product(with_label, without, weights), lower)
    shift = guide("shift", with_label.shift, without.shift)
    if guidance.rule == "scale":
        return Affine(guide("log_scale", with_label.scale, without.scale), shift, lower)
    log_scale = guide("log_scale", jnp.log(with_label.scale), jnp.log(without.scale))
    return Affine(jnp.exp(log_scale), shift, lower)


def product(with_label: Affine, without: Affine, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns scale and shift [B, S, D] under the rule "product"."""
    ratio = jnp.square(jnp.minimum(with_label.scale / without.scale, 1.0))  # of the variances
    precision = 1 + weights - weights * ratio  # relative to the labelled pass
    shift = ((1 + weights) * with_label.shift - weights * ratio * without.shift) / precision
    return with_label.scale * jax.lax.rsqrt(precision), shift
