"""Decoders, which invert a block token by token or by fixed-point updates of many tokens at once.

The inverse is the fixed point of x <- z scale(x) + shift(x). This map is causal: its token i + 1 depends only on tokens
0 .. i, and token 0 is known. So each update makes at least one more token exact, whatever the others are, and T - 1
updates give the sequential result. A trained model's tokens converge much sooner (arXiv 2505.12849, 2505.24791).

Two cases need care. Far from the fixed point the scale can overflow. One NaN token would then spoil all others, because
attention gives it weight 0, and 0 times NaN is NaN. So updates are clipped to a range far beyond any image, which
leaves fixed points inside it unchanged. And images that have not converged after `max_iterations`, or that are still
clipped, are inverted again by `Sequential`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from tarflow_jax.options import Options, option
from tarflow_jax.sampling.block_inverse import BlockInverse, Caches

INITS = ("latents", "zeros")
DEFAULT_TOLERANCE = 1e-4
_LARGEST = 1e4  # absolute value to which tokens are clipped between updates

# (tokens, state) -> (tokens, their log_det [B], state)
_Update = Callable[[jax.Array, Any], tuple[jax.Array, jax.Array, Any]]


class Inverted(NamedTuple):
    """The inverse of a block for z, in block order."""

    x: jax.Array  # float32 [B, T, D]
    log_det: jax.Array  # log |det dz / dx|, float32 [B] in nats
    updates: jax.Array  # number of updates, int32 [B]
    residual: jax.Array  # largest change in the last update, float32 [B]; 0 if sequential


def _without_updates(x: jax.Array) -> Inverted:
    zeros = jnp.zeros(len(x), jnp.float32)
    return Inverted(x, zeros, jnp.zeros(len(x), jnp.int32), zeros)


@dataclasses.dataclass(frozen=True)
class Sequential:
    """Computes x_i = z_i scale_i + shift_i token by token: exact, in T - 1 steps."""

    def invert(self, block: BlockInverse, z: jax.Array, guess: jax.Array | None = None) -> Inverted:
        """Inverts a block for z [B, T, D] in block order.

        The first token is its own inverse; step i computes token i + 1. Each cache length has its own compiled loop.
        """
        batch_size, num_tokens, _ = z.shape

        def step(i: jax.Array, carry: tuple) -> tuple:
            x, log_det, caches = carry
            affine, caches = block(jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1), caches, i)
            x_next = affine.inverse(jax.lax.dynamic_slice_in_dim(z, i + 1, 1, axis=1))
            x = jax.lax.dynamic_update_slice_in_dim(x, x_next, i + 1, axis=1)
            return x, log_det + affine.token_log_det[:, 0], caches

        carry = z, jnp.zeros(batch_size, jnp.float32), block.caches(batch_size, 0)
        growth = _cache_growth(num_tokens)
        for start in range(0, num_tokens - 1, growth):
            stop = min(start + growth, num_tokens - 1)
            x, log_det, caches = carry
            carry = jax.lax.fori_loop(start, stop, step, (x, log_det, block.grow(caches, stop)))
        updates = jnp.full((batch_size,), num_tokens - 1, jnp.int32)
        return Inverted(*carry[:2], updates, jnp.zeros(batch_size, jnp.float32))


@dataclasses.dataclass(frozen=True)
class Jacobi(Options):
    """Updates all tokens of a block at once, until none changes by more than the tolerance.

    Attributes:
      tolerance: largest change of a value, in [-1, 1] units, at which an image counts as converged; 0 runs until
        nothing changes, which gives the sequential result up to rounding.
      max_iterations: updates after which `Sequential` takes over; None is T - 1, which makes every token exact.
      init: initial guess: the block's input z ("latents"), "zeros", or the "student"'s trajectory.

    Raises ValueError: one line naming the field.
    """

    group: ClassVar[str] = "Jacobi"

    tolerance: float = DEFAULT_TOLERANCE
    max_iterations: int | None = option(None, low=1)
    init: str = option("latents", choices=(*INITS, "student"))

    def invert(self, block: BlockInverse, z: jax.Array, guess: jax.Array | None = None) -> Inverted:
        """Inverts a block for z [B, T, D] in block order; init "student" starts from `guess` [B, T, D]."""
        if z.shape[1] == 1:
            return _without_updates(z)
        first, rest = z[:, :1], z[:, 1:]
        begin = guess[:, 1:] if self.init == "student" and guess is not None else initial_guess(self.init, rest)
        settled, done, _ = _settle(self, begin, lambda x, _: update(block, first, rest, x), None)
        settled = settled._replace(x=jnp.concatenate([first, settled.x], axis=1))
        return _finish(settled, done, block, z)


@dataclasses.dataclass(frozen=True)
class GaussSeidelJacobi(Options):
    """Inverts a block segment by segment, each with `Jacobi` updates that attend to the KV cache of earlier segments.

    Attributes:
      num_segments: maximum number of segments, of equal length but for the first. Shorter ones need fewer updates.
      tolerance, max_iterations, init: as in `Jacobi`, for each segment; init cannot be "student".

    Raises ValueError: one line naming the field.
    """

    group: ClassVar[str] = "GaussSeidelJacobi"

    num_segments: int = option(dataclasses.MISSING, low=1)
    tolerance: float = DEFAULT_TOLERANCE
    max_iterations: int | None = option(None, low=1)
    init: str = option("latents", choices=INITS)

    def invert(self, block: BlockInverse, z: jax.Array, guess: jax.Array | None = None) -> Inverted:
        """Inverts a block for z [B, T, D] in block order; updates are summed over the segments."""
        batch_size, rest = z.shape[0], z.shape[1] - 1
        if rest == 0:
            return _without_updates(z)
        length = -(-rest // self.num_segments)

        def invert_segment(start: jax.Array | int, size: int, carry: tuple) -> tuple:
            """Finds tokens start + 1 .. start + size."""
            found, done, caches = carry
            before = jax.lax.dynamic_slice_in_dim(found.x, start, 1, axis=1)
            own = jax.lax.dynamic_slice_in_dim(z, start + 1, size, axis=1)
            begin = initial_guess(self.init, own)
            segment, settled, caches = _settle(
                self, begin, lambda x, caches: update(block, before, own, x, caches, start), caches
            )
            found = Inverted(
                jax.lax.dynamic_update_slice_in_dim(found.x, segment.x, start + 1, axis=1),
                found.log_det + segment.log_det,
                found.updates + segment.updates,
                jnp.maximum(found.residual, segment.residual),
            )
            return found, done & settled, caches

        # The first segment takes the remainder. The others share one compiled loop per cache length.
        start = (rest - 1) % length + 1
        carry = _without_updates(z), jnp.ones((batch_size,), bool), block.caches(batch_size, start)
        carry = invert_segment(0, start, carry)
        while start < rest:
            count = min(max(_cache_growth(z.shape[1]) // length, 1), (rest - start) // length)
            found, done, caches = carry
            caches = block.grow(caches, start + count * length)
            segment = lambda i, carry, start=start: invert_segment(start + i * length, length, carry)  # noqa: E731
            carry = jax.lax.fori_loop(0, count, segment, (found, done, caches))
            start += count * length
        return _finish(carry[0], carry[1], block, z)


@dataclasses.dataclass(frozen=True)
class Student(Options):
    """Decodes with the network of launch.distill, which makes clean images in one pass.

    Attributes:
      polish: updates of every block, starting from the student's trajectory, that bring images closer to the flow's
        inverse, which is noisy; 0 for the student's clean images.

    Raises ValueError: `polish` is not an integer >= 0.
    """

    group: ClassVar[str] = "Student"

    polish: int = 0

    def invert(self, block: BlockInverse, z: jax.Array, guess: jax.Array | None = None) -> Inverted:
        """Applies `polish` updates to `guess`; z and guess are [B, T, D] in block order."""
        assert guess is not None
        if z.shape[1] == 1:
            return _without_updates(z)
        first, rest = z[:, :1], z[:, 1:]

        def step(_: Any, found: Inverted) -> Inverted:
            x, log_det, _ = update(block, first, rest, found.x)
            x = _bounded(x)
            return Inverted(x, log_det, found.updates + 1, jnp.abs(x - found.x).max((1, 2)))

        found = jax.lax.fori_loop(0, self.polish, step, _without_updates(_bounded(guess[:, 1:])))
        return found._replace(x=jnp.concatenate([first, found.x], axis=1))


@dataclasses.dataclass(frozen=True)
class Tuned:
    """Decodes with the decoders that launch.tune_decoder found fastest, or `Sequential` without a schedule."""


Decoder = Sequential | Jacobi | GaussSeidelJacobi | Student


def initial_guess(init: str, z: jax.Array) -> jax.Array:
    """Returns the tokens before the first update."""
    return z if init == "latents" else jnp.zeros_like(z)


def update(
    block: BlockInverse,
    before: jax.Array,
    z: jax.Array,
    x: jax.Array,
    caches: Caches | None = None,
    start: jax.Array | int = 0,
) -> tuple[jax.Array, jax.Array, Caches | None]:
    """Applies one update x <- z scale(x) + shift(x).

    Args:
      before: the exact token at position `start`, [B, 1, D].
      z, x: the tokens start + 1 .. start + S, [B, S, D] in block order; x may be far from the inverse.
      caches: of the tokens before `start`.

    Returns the new x, its log_det [B], and the caches with tokens start .. start + S - 1 written.
    """
    affine, caches = block(jnp.concatenate([before, x[:, :-1]], axis=1), caches, start)
    return affine.inverse(z), affine.token_log_det.sum(1), caches


def _settle(
    decoder: Jacobi | GaussSeidelJacobi, begin: jax.Array, step: _Update, state: Any
) -> tuple[Inverted, jax.Array, Any]:
    """Updates tokens [B, S, D] until every image changes by at most the tolerance; converged images stay fixed.

    Returns the result, whether it is the inverse (bool [B]), and the state.
    """
    batch_size, length, _ = begin.shape
    tolerance, limit = decoder.tolerance, min(decoder.max_iterations or length, length)

    def unsettled(carry: tuple) -> jax.Array:
        found, _ = carry
        return (found.updates.max() < limit) & (found.residual > tolerance).any()

    def body(carry: tuple) -> tuple:
        found, state = carry
        x, log_det, state = step(found.x, state)
        # A clipped value counts as an infinite change, so that its image does not pass for converged.
        change = jnp.where(jnp.abs(x) <= _LARGEST, jnp.abs(x - found.x), jnp.inf).max((1, 2))
        active = found.residual > tolerance
        found = Inverted(
            jnp.where(active[:, None, None], _bounded(x), found.x),
            jnp.where(active, log_det, found.log_det),
            found.updates + active.astype(jnp.int32),
            jnp.where(active, change, found.residual),
        )
        return found, state

    unsettled_yet = jnp.full((batch_size,), jnp.inf, jnp.float32)
    begin_with = _without_updates(begin)._replace(residual=unsettled_yet)
    found, state = jax.lax.while_loop(unsettled, body, (begin_with, state))
    done = (found.residual <= tolerance) | ((found.updates == length) & jnp.isfinite(found.residual))
    return found, done, state


def _finish(found: Inverted, done: jax.Array, block: BlockInverse, z: jax.Array) -> Inverted:
    """Inverts images that are not done by `Sequential`; keeps the count and residual of their updates."""

    def inverted_again() -> tuple[jax.Array, jax.Array]:
        again = Sequential().invert(block, z)
        return jnp.where(done[:, None, None], found.x, again.x), jnp.where(done, found.log_det, again.log_det)

    x, log_det = jax.lax.cond(done.all(), lambda: (found.x, found.log_det), inverted_again)
    return found._replace(x=x, log_det=log_det)


def with_derivatives(
    decoder: Jacobi | GaussSeidelJacobi, block: BlockInverse, z: jax.Array, guess: jax.Array | None
) -> Inverted:
    """Inverts a block, with implicit derivatives, since reverse mode cannot differentiate a `while_loop`.

    (x, log_det) is the fixed point of a map whose Jacobian is strictly triangular in the tokens. So T fixed-point steps
    solve the linear system of its derivatives exactly.
    """

    def residual(point: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, log_det, _ = update(block, z[:, :1], z[:, 1:], point[0])
        return x - point[0], log_det - point[1]

    def solve(linear: Callable[[Any], Any], right: Any) -> Any:
        def step(_: Any, point: Any) -> Any:
            return jax.tree.map(lambda p, change, b: p + change - b, point, linear(point), right)

        return jax.lax.fori_loop(0, z.shape[1], step, jax.tree.map(jnp.zeros_like, right))

    found = decoder.invert(*jax.lax.stop_gradient((block, z, guess)))
    point = found.x[:, 1:], found.log_det
    x, log_det = jax.lax.custom_root(residual, point, lambda _, point: point, solve)
    return found._replace(x=jnp.concatenate([z[:, :1], x], axis=1), log_det=log_det)


def _bounded(x: jax.Array) -> jax.Array:
    return jnp.clip(jnp.nan_to_num(x), -_LARGEST, _LARGEST)


def _cache_growth(num_tokens: int) -> int:
    """Returns by how many tokens the cache grows at a time, so that early tokens do not attend to empty slots.

    Each cache length compiles separately, so there are at most eight; the mean token then reads 1/8 more than it needs.
    """
    return max(64, -(-num_tokens // 8))
