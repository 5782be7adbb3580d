"""Decoders, which invert a block token by token or by fixed-point updates of many tokens at once.

A fixed-point update, x <- z scale(x) + shift(x), makes at least one more token exact, whatever the others are
(`flow.inverse`), and T - 1 updates give the sequential result. A trained model's tokens converge much sooner (arXiv
2505.12849, 2505.24791).

Two cases need care. Far from the fixed point the scale can overflow. One NaN token would then spoil all others, because
attention gives it weight 0, and 0 times NaN is NaN. So updates are clipped to a range far beyond any image, which
leaves fixed points inside it unchanged. And images that have not converged after `max_iterations`, or that are still
clipped, are inverted again token by token.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tarflow_jax.flow import BlockInverse, Inversion
from tarflow_jax.flow.block import Caches
from tarflow_jax.flow.inverse import cache_growth, invert
from tarflow_jax.options import Options, option
from tarflow_jax.sampling.guidance import GuidedBlock

DEFAULT_TOLERANCE = 1e-4
_LARGEST = 1e4  # absolute value to which tokens are clipped between updates
Block = BlockInverse | GuidedBlock


@dataclasses.dataclass(frozen=True)
class Sequential:
    """Computes x_i = z_i scale_i + shift_i token by token: exact, in T - 1 steps."""

    def invert(self, block: Block, z: jax.Array, guess: jax.Array | None = None) -> Inversion:
        """Inverts a block for z [B, T, D] in block order; see `flow.inverse.invert`."""
        return invert(block, z)


@dataclasses.dataclass(frozen=True)
class Jacobi(Options):
    """Updates all tokens of a block at once, until none changes by more than the tolerance.

    Attributes:
      tolerance: largest change of a value, in [-1, 1] units, at which an image counts as converged; 0 runs until
        nothing changes, which gives the sequential result up to rounding.
      max_iterations: updates after which `Sequential` takes over; None is T - 1, which makes every token exact.
      init: initial guess: the block's input z ("latents"), or the "student"'s trajectory.

    Raises ValueError: one line naming the field.
    """

    group: ClassVar[str] = "Jacobi"

    tolerance: float = DEFAULT_TOLERANCE
    max_iterations: int | None = option(None, low=1)
    init: str = option("latents", choices=("latents", "student"))

    def invert(self, block: Block, z: jax.Array, guess: jax.Array | None = None) -> Inversion:
        """Inverts a block for z [B, T, D] in block order; init "student" starts from `guess` [B, T, D]."""
        if z.shape[1] == 1:
            return Inversion.begin(z)
        first, rest = z[:, :1], z[:, 1:]
        begin = guess[:, 1:] if self.init == "student" and guess is not None else rest
        result = _converge(self, block, first, rest, begin)
        return _or_sequential(result.replace(x=jnp.concatenate([first, result.x], axis=1)), block, z)


@dataclasses.dataclass(frozen=True)
class GaussSeidelJacobi(Options):
    """Inverts a block segment by segment, each with `Jacobi` updates that attend to the KV cache of earlier segments.

    Attributes:
      num_segments: maximum number of segments, of equal length but for the first. Shorter ones need fewer updates.
      tolerance, max_iterations: as in `Jacobi`, for each segment.

    Raises ValueError: one line naming the field.
    """

    group: ClassVar[str] = "GaussSeidelJacobi"

    num_segments: int = option(dataclasses.MISSING, low=1)
    tolerance: float = DEFAULT_TOLERANCE
    max_iterations: int | None = option(None, low=1)

    def invert(self, block: Block, z: jax.Array, guess: jax.Array | None = None) -> Inversion:
        """Inverts a block for z [B, T, D] in block order; updates are summed over the segments."""
        rest = z.shape[1] - 1
        if rest == 0:
            return Inversion.begin(z)
        length = -(-rest // self.num_segments)

        def invert_segment(start: jax.Array | int, size: int, state: Inversion) -> Inversion:
            """Computes tokens start + 1 … start + size."""
            before = jax.lax.dynamic_slice_in_dim(state.x, start, 1, axis=1)
            z_segment = jax.lax.dynamic_slice_in_dim(z, start + 1, size, axis=1)
            segment = _converge(self, block, before, z_segment, z_segment, state.caches, start)
            return Inversion(
                jax.lax.dynamic_update_slice_in_dim(state.x, segment.x, start + 1, axis=1),
                state.log_det + segment.log_det,
                state.updates + segment.updates,
                jnp.maximum(state.residual, segment.residual),
                state.converged & segment.converged,
                segment.caches,
            )

        # The first segment takes the remainder. The others share one compiled loop per cache length.
        start = (rest - 1) % length + 1
        state = invert_segment(0, start, Inversion.begin(z, block.caches(len(z), start)))
        while start < rest:
            count = min(max(cache_growth(z.shape[1]) // length, 1), (rest - start) // length)

            def invert_next(i: jax.Array, state: Inversion, start: int = start) -> Inversion:
                return invert_segment(start + i * length, length, state)

            assert state.caches is not None
            state = state.replace(caches=block.grow(state.caches, start + count * length))
            state = jax.lax.fori_loop(0, count, invert_next, state)
            start += count * length
        return _or_sequential(state, block, z)


@dataclasses.dataclass(frozen=True)
class StudentDecoder(Options):
    """Decodes with the network of launch.distill, which makes clean images in one pass.

    Attributes:
      polish: updates of every block, starting from the student's trajectory, that bring images closer to the flow's
        inverse, which is noisy; 0 for the student's clean images.

    Raises ValueError: `polish` is not an integer >= 0.
    """

    group: ClassVar[str] = "Student"

    polish: int = 0

    def invert(self, block: Block, z: jax.Array, guess: jax.Array | None = None) -> Inversion:
        """Applies `polish` updates to `guess`; z and guess are [B, T, D] in block order."""
        assert guess is not None
        if z.shape[1] == 1:
            return Inversion.begin(z)
        first, rest = z[:, :1], z[:, 1:]

        def step(_: Any, state: Inversion) -> Inversion:
            x, log_det, _ = update(block, first, rest, state.x)
            x = _bounded(x)
            residual = jnp.abs(x - state.x).max((1, 2))
            return state.replace(x=x, log_det=log_det, updates=state.updates + 1, residual=residual)

        result = jax.lax.fori_loop(0, self.polish, step, Inversion.begin(_bounded(guess[:, 1:])))
        return result.replace(x=jnp.concatenate([first, result.x], axis=1))


Decoder = Sequential | Jacobi | GaussSeidelJacobi | StudentDecoder


def update(
    block: Block,
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
    affine, caches = block.predict(jnp.concatenate([before, x[:, :-1]], axis=1), caches, start)
    return affine.inverse(z), affine.token_log_det.sum(1), caches


def _converge(
    decoder: Jacobi | GaussSeidelJacobi,
    block: Block,
    before: jax.Array,
    z: jax.Array,
    x: jax.Array,
    caches: Caches | None = None,
    start: jax.Array | int = 0,
) -> Inversion:
    """Updates tokens x until every image changes by at most the tolerance; converged images stay fixed.

    Arguments are those of `update`.
    """
    tolerance, length = decoder.tolerance, x.shape[1]
    limit = min(decoder.max_iterations or length, length)

    def changes(state: Inversion) -> jax.Array:
        return (state.updates.max() < limit) & (state.residual > tolerance).any()

    def body(state: Inversion) -> Inversion:
        x, log_det, caches = update(block, before, z, state.x, state.caches, start)
        # A clipped value counts as an infinite change, so that its image does not pass for converged.
        change = jnp.where(jnp.abs(x) <= _LARGEST, jnp.abs(x - state.x), jnp.inf).max((1, 2))
        active = state.residual > tolerance
        return state.replace(
            x=jnp.where(active[:, None, None], _bounded(x), state.x),
            log_det=jnp.where(active, log_det, state.log_det),
            updates=state.updates + active.astype(jnp.int32),
            residual=jnp.where(active, change, state.residual),
            caches=caches,
        )

    state = Inversion.begin(x, caches).replace(residual=jnp.full(len(x), jnp.inf, jnp.float32))
    state = jax.lax.while_loop(changes, body, state)
    exact = (state.updates == length) & jnp.isfinite(state.residual)
    return state.replace(converged=(state.residual <= tolerance) | exact)


def _or_sequential(state: Inversion, block: Block, z: jax.Array) -> Inversion:
    """Inverts images that did not converge token by token; keeps the count and residual of their updates."""

    def inverted_again() -> tuple[jax.Array, jax.Array]:
        again, converged = invert(block, z), state.converged
        return jnp.where(converged[:, None, None], state.x, again.x), jnp.where(converged, state.log_det, again.log_det)

    x, log_det = jax.lax.cond(state.converged.all(), lambda: (state.x, state.log_det), inverted_again)
    return state.replace(x=x, log_det=log_det, caches=None)


def with_derivatives(
    decoder: Jacobi | GaussSeidelJacobi, block: Block, z: jax.Array, guess: jax.Array | None
) -> Inversion:
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

    result = decoder.invert(*jax.lax.stop_gradient((block, z, guess)))
    point = result.x[:, 1:], result.log_det
    x, log_det = jax.lax.custom_root(residual, point, lambda _, point: point, solve)
    return result.replace(x=jnp.concatenate([z[:, :1], x], axis=1), log_det=log_det)


def _bounded(x: jax.Array) -> jax.Array:
    return jnp.clip(jnp.nan_to_num(x), -_LARGEST, _LARGEST)
