"""Finds the fastest decoder of each block of a trained model by timing candidates."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.flow import Given, TarFlow, block_orders, conditions, permute, to_tokens
from tarflow_jax.runtime import progress
from tarflow_jax.sampling.block_inverse import BlockInverse, block_inverse
from tarflow_jax.sampling.decode import decode_trace
from tarflow_jax.sampling.decoders import INITS, Decoder, GaussSeidelJacobi, Jacobi, Sequential, initial_guess, update
from tarflow_jax.sampling.guidance import Guidance

_SEGMENT_LENGTHS = (32, 16, 8, 4, 2)
_REPEATS = 3
_HOPELESS = 1.5  # times the fastest so far, beyond which one run is enough
_NO_ERROR = 1e-30  # avoids a division by 0


class Trial(NamedTuple):
    """A decoder tried on a block."""

    decoder: Decoder
    updates: float  # mean over the images
    seconds: float
    error: float  # largest error of a value


class BlockReport(NamedTuple):
    """The trials of a block, `Sequential` first, and the chosen one."""

    block: int
    crm: float  # convergence ranking metric (arXiv 2505.12849)
    init: str  # `better_init`
    trials: list[Trial]
    chosen: Trial


class Tuning(NamedTuple):
    """Result of `tune`, for all blocks together."""

    reports: list[BlockReport]  # by block number
    sequential_seconds: float
    seconds: float
    error: float  # largest error of a pixel

    @property
    def decoders(self) -> tuple[Decoder, ...]:
        return tuple(report.chosen.decoder for report in self.reports)


def tune(
    decode_with: Callable[[tuple[Decoder, ...] | None], jax.Array],
    flow: TarFlow,
    variables: dict[str, Any],
    latents: jax.Array,
    labels: jax.Array | None = None,
    guidance: Guidance | None = None,
    noise_std: jax.Array | None = None,
    *,
    tolerance: float,
    max_error: float,
) -> Tuning:
    """Times candidate decoders on every block, and picks the fastest that is close enough.

    Args:
      decode_with: decoders -> images of `latents`, drawn as users will draw; the choice is timed and checked with it.
      latents, labels, guidance, noise_std: as in `decode`, with the batch size to tune for.
      tolerance: of the candidates.
      max_error: largest difference of a pixel from `Sequential`, in [-1, 1] units. Blocks that exceed it, alone or
        together, stay sequential.
    """
    config, reports = flow.config, []
    path = decode_trace(flow, variables, latents, labels, noise_std, guidance=guidance).trajectory
    for k in progress(range(config.num_blocks), f"decoders of {len(latents)} images", unit="block"):
        order, params = jnp.asarray(block_orders(config, variables))[k][None], variables["params"][f"block_{k}"]
        given = Given(labels, noise_std, conditions(variables, None, None, len(latents))[0])
        block = block_inverse(flow, k, params, order, given, guidance)
        step = config.num_blocks - k  # index in the trajectory once this block is inverted
        z, x = (permute(to_tokens(config, path[:, i]), order) for i in (step - 1, step))
        if k == config.num_blocks - 1 and config.volume_preserving:
            z = z * permute(jnp.sqrt(variables["prior"]["variance"])[None], order)
        z, x = block.behind_start(z), block.behind_start(x)
        reports.append(_tune_block(block, z, x, tolerance, max_error))

    exact, sequential_seconds = decode_with(None), _seconds(decode_with, None)
    while True:
        decoders = tuple(report.chosen.decoder for report in reports)
        images, seconds = decode_with(decoders), _seconds(decode_with, decoders)
        error = float(jnp.abs(images - exact).max())
        if error <= max_error and seconds <= sequential_seconds:
            return Tuning(reports, sequential_seconds, seconds, error)
        least = least_worth(reports, per_error=not error <= max_error)
        if least is None:  # all blocks are sequential: the same program twice
            return Tuning(reports, sequential_seconds, sequential_seconds, 0.0)
        reports[least] = reports[least]._replace(chosen=reports[least].trials[0])


def least_worth(reports: Sequence[BlockReport], per_error: bool) -> int | None:
    """Returns the parallel block that gains the least over `Sequential`, or None if no block is parallel.

    The gain is the seconds saved; with `per_error`, the seconds saved per unit of error.
    """

    def gain(i: int) -> float:
        sequential, chosen = reports[i].trials[0], reports[i].chosen
        return (sequential.seconds - chosen.seconds) / (max(chosen.error, _NO_ERROR) if per_error else 1.0)

    parallel = [i for i, report in enumerate(reports) if report.chosen.decoder != Sequential()]
    return min(parallel, key=gain, default=None)


def _tune_block(block: BlockInverse, z: jax.Array, exact: jax.Array, tolerance: float, max_error: float) -> BlockReport:
    """Tries the candidates on one block; `exact` is its inverse of z, both [B, T, D] in block order."""
    _, seconds = _timed(Sequential(), block, z)
    init, num_tokens = better_init(block, z, exact), z.shape[1]
    trials = [Trial(Sequential(), num_tokens - 1, seconds, 0.0)]
    for decoder in _candidates(num_tokens, tolerance, init):
        fastest = min(trial.seconds for trial in trials)
        found, seconds = _timed(decoder, block, z, give_up=_HOPELESS * fastest)
        error = float(jnp.abs(found.x - exact).max())
        trials.append(Trial(decoder, float(found.updates.mean()), seconds, error))
        if isinstance(trials[-2].decoder, GaussSeidelJacobi) and seconds > trials[-2].seconds:
            break  # still shorter segments only add more of them
    close = [trial for trial in trials if trial.error <= max_error]
    chosen = min(close, key=lambda trial: trial.seconds)
    return BlockReport(block.block.index, _crm(block, exact), init, trials, chosen)


def _candidates(num_tokens: int, tolerance: float, init: str) -> Iterator[Decoder]:
    yield Jacobi(tolerance, init=init)
    for length in _SEGMENT_LENGTHS:
        if length < num_tokens - 1:
            yield GaussSeidelJacobi(-(-(num_tokens - 1) // length), tolerance, init=init)


def _timed(decoder: Decoder, block: BlockInverse, z: jax.Array, give_up: float = math.inf) -> tuple[Any, float]:
    run = jax.jit(decoder.invert)
    return run(block, z), _seconds(run, block, z, give_up=give_up)


def _seconds(run: Any, *args: Any, give_up: float = math.inf) -> float:
    """Returns the median of a few runs, of fewer once one takes longer than `give_up`."""
    times: list[float] = []
    while len(times) < _REPEATS and max(times, default=0.0) <= give_up:
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def better_init(block: BlockInverse, z: jax.Array, exact: jax.Array) -> str:
    """Returns the init that one update brings closer to `exact`, the inverse of z [B, T, D] (IGM, arXiv 2505.12849)."""

    def distance(init: str) -> float:
        found, *_ = update(block, z[:, :1], z[:, 1:], initial_guess(init, z[:, 1:]))
        return float(jnp.nan_to_num(jnp.linalg.norm(found - exact[:, 1:]), nan=jnp.inf))

    return min(INITS, key=distance)


def _crm(block: BlockInverse, x: jax.Array) -> float:
    """Returns |mean(exp(-log_scale) x)| |W_s| + |W_u|, Frobenius norms of the halves of the output projection."""
    affine, _ = block(x[:, :-1])
    kernel = block.params["project_out"]["kernel"].astype(jnp.float32)
    if block.block.config.volume_preserving:
        return float(jnp.linalg.norm(kernel))
    scale_half, shift_half = jnp.split(kernel, 2, axis=1)
    mean = jnp.abs((x[:, 1:] / affine.scale).mean())
    return float(mean * jnp.linalg.norm(scale_half) + jnp.linalg.norm(shift_half))
