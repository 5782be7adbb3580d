"""Parallel inverses of a block: the fixed point of x <- z exp(log_scale(x)) + shift(x).

The map is causal: token i + 1 of its value depends on tokens 0 .. i alone, and token 0 is known. So each update makes
at least one more token exact, whatever the others hold, and T - 1 updates give the sequential result; a trained
model's tokens settle much sooner (arXiv 2505.12849, 2505.24791).

Two cases need care. Far from the fixed point exp(log_scale) can overflow, and one NaN token would spoil all others,
because attention gives it weight 0 and 0 NaN is NaN: so updates are clipped to numbers beyond any image, which moves no
fixed point within them. And where `max_iterations` comes first, or a result is still clipped, the images that are
not settled are inverted again by `Sequential`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tarflow_jax.errors import UserError
from tarflow_jax.flow import Caches, grown
from tarflow_jax.sampling.guidance import GuidedBlock
from tarflow_jax.sampling.inverse import Inverted, Sequential, cache_growth, unchanged

INITS = ("latents", "zeros")
STUDENT = "student"  # an init that the caller gives
DEFAULT_TOLERANCE = 1e-4
_LARGEST = 1e4  # of a token's numbers between updates

# (tokens, anything) -> (tokens, anything)
_Update = Callable[[jax.Array, Any], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class Jacobi:
    """All tokens of a block at once, until none changes by more than the tolerance.

    Attributes:
      tolerance: the largest change of a token's numbers, in the images' [-1, 1] units, at which an image is done; 0
        runs until nothing changes, which is the sequential result up to rounding.
      max_iterations: updates at most, then `Sequential` takes over; None is T - 1, after which every token is exact.
      init: tokens to begin with: the block's own input ("latents"), "zeros", or what a "student" says (`decode_from`).

    Raises ValueError: one line naming the field.
    """

    tolerance: float = DEFAULT_TOLERANCE
    max_iterations: int | None = None
    init: str = "latents"

    def __post_init__(self) -> None:
        _check(self, (*INITS, STUDENT))

    def invert(self, block: GuidedBlock, z: jax.Array, start: jax.Array | None = None) -> Inverted:
        """Inverts a block for z [B, T, D] in block order; from `start`, of that shape, where that is given."""
        if z.shape[1] == 1:
            return unchanged(z)
        first, following = z[:, :1], z[:, 1:]
        begin = initial(self.init, following) if start is None else start[:, 1:]
        settled, done, _ = _settle(self, begin, lambda x, _: update(block, first, following, x), None)
        settled = settled._replace(x=jnp.concatenate([first, settled.x], axis=1))
        return _finish(settled, done, block, z)


@dataclasses.dataclass(frozen=True)
class GaussSeidelJacobi:
    """Segments of a block in order, each by `Jacobi` updates behind the cached keys and values of those before it.

    Attributes:
      num_segments: at most, of equal length but for the first; more of them mean fewer updates of fewer tokens, but in
        turn.
      tolerance, max_iterations, init: as `Jacobi` has them, for each segment.

    Raises ValueError: one line naming the field.
    """

    num_segments: int
    tolerance: float = DEFAULT_TOLERANCE
    max_iterations: int | None = None
    init: str = "latents"

    def __post_init__(self) -> None:
        _check(self, INITS)
        if self.num_segments < 1:
            raise UserError(f"num_segments is {self.num_segments}; expected a positive number")

    def invert(self, block: GuidedBlock, z: jax.Array) -> Inverted:
        """Inverts a block for z [B, T, D] in block order; iterations are summed over the segments."""
        batch_size, following = z.shape[0], z.shape[1] - 1
        if following == 0:
            return unchanged(z)
        length = -(-following // self.num_segments)

        def invert_segment(start: jax.Array | int, size: int, carry: _Progress) -> _Progress:
            """Finds tokens start + 1 .. start + size."""
            inverted, done, caches = carry
            before = jax.lax.dynamic_slice_in_dim(inverted.x, start, 1, axis=1)
            own = jax.lax.dynamic_slice_in_dim(z, start + 1, size, axis=1)
            settled, settled_done, caches = _settle(
                self, initial(self.init, own), lambda x, caches: update(block, before, own, x, caches, start), caches
            )
            x = jax.lax.dynamic_update_slice_in_dim(inverted.x, settled.x, start + 1, axis=1)
            iterations = inverted.iterations + settled.iterations
            residual = jnp.maximum(inverted.residual, settled.residual)
            return _Progress(Inverted(x, iterations, residual), done & settled_done, caches)

        # The first segment is what is left over. The others share one compiled loop for each size of the cache.
        start = (following - 1) % length + 1
        progress = _Progress(unchanged(z), jnp.ones((batch_size,), bool), block.caches(batch_size, start))
        progress = invert_segment(0, start, progress)
        while start < following:
            count = min(max(cache_growth(z.shape[1]) // length, 1), (following - start) // length)
            caches = grown(progress.caches, start + count * length)
            segment = lambda i, progress, start=start: invert_segment(start + i * length, length, progress)  # noqa: E731
            progress = jax.lax.fori_loop(0, count, segment, progress._replace(caches=caches))
            start += count * length
        return _finish(progress.inverted, progress.done, block, z)


class _Progress(NamedTuple):
    """What is inverted so far, whether each example's is the inverse (bool [B]), and the caches."""

    inverted: Inverted
    done: jax.Array
    caches: Caches


def initial(init: str, z: jax.Array) -> jax.Array:
    """What z's tokens are taken for before the first update."""
    return z if init == "latents" else jnp.zeros_like(z)


def bounded(x: jax.Array) -> jax.Array:
    """Tokens between updates, clipped to numbers beyond any image."""
    return jnp.clip(jnp.nan_to_num(x), -_LARGEST, _LARGEST)


def update(
    block: GuidedBlock,
    before: jax.Array,
    z: jax.Array,
    x: jax.Array,
    caches: Caches | None = None,
    start: jax.Array | int = 0,
) -> tuple[jax.Array, Caches | None]:
    """x <- z exp(log_scale(x)) + shift(x), once.

    Args:
      before: the exact token number `start`, [B, 1, D].
      z, x: the tokens start + 1 .. start + S, [B, S, D] in block order; x may be far from the inverse.
      caches: of the tokens before `start`.

    Returns the new x, and the caches with tokens start .. start + S - 1 written.
    """
    inverse, caches = block(jnp.concatenate([before, x[:, :-1]], axis=1), caches, start)
    return inverse(z), caches


def _settle(
    decoder: Jacobi | GaussSeidelJacobi, begin: jax.Array, step: _Update, state: Any
) -> tuple[Inverted, jax.Array, Any]:
    """Takes steps from tokens [B, S, D] until each example changes by at most the tolerance; then it changes no more.

    Returns what was found, whether it is the inverse (bool [B]), and the state.
    """
    batch_size, length, _ = begin.shape
    tolerance, limit = decoder.tolerance, min(decoder.max_iterations or length, length)

    def unsettled(carry: tuple) -> jax.Array:
        (_, iterations, residual), _ = carry
        return (iterations.max() < limit) & (residual > tolerance).any()

    def body(carry: tuple) -> tuple:
        (x, iterations, residual), state = carry
        new, state = step(x, state)
        # A clipped number is an infinite change: its example goes on instead of passing for settled.
        change = jnp.where(jnp.abs(new) <= _LARGEST, jnp.abs(new - x), jnp.inf).max((1, 2))
        new = bounded(new)
        active = residual > tolerance
        x = jnp.where(active[:, None, None], new, x)
        residual = jnp.where(active, change, residual)
        return Inverted(x, iterations + active.astype(jnp.int32), residual), state

    unsettled_yet = jnp.full((batch_size,), jnp.inf, jnp.float32)
    found, state = jax.lax.while_loop(unsettled, body, (unchanged(begin)._replace(residual=unsettled_yet), state))
    done = (found.residual <= tolerance) | ((found.iterations == length) & jnp.isfinite(found.residual))
    return found, done, state


def _finish(found: Inverted, done: jax.Array, block: GuidedBlock, z: jax.Array) -> Inverted:
    """`Sequential`'s result for the images that are not done; iterations and residual stay those of the updates."""
    x = jax.lax.cond(done.all(), lambda: found.x, lambda: Sequential().invert(block, z).x)
    return found._replace(x=jnp.where(done[:, None, None], found.x, x))


def _check(decoder: Jacobi | GaussSeidelJacobi, inits: tuple[str, ...]) -> None:
    if not 0 <= decoder.tolerance < math.inf:
        raise UserError(f"tolerance is {decoder.tolerance}; expected a number from 0")
    if decoder.max_iterations is not None and decoder.max_iterations < 1:
        raise UserError(f"max_iterations is {decoder.max_iterations}; expected a positive number or None")
    if decoder.init not in inits:
        raise UserError(f"init is {decoder.init!r}; expected one of {', '.join(inits)}")
