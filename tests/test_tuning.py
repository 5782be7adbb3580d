"""The tuner's choices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tarflow_jax import Guidance, Noise, TarFlow, TarFlowPipeline
from tarflow_jax.flow import Given, block_orders, permute, to_tokens
from tarflow_jax.sampling import GaussSeidelJacobi, Jacobi, Sequential, tuning
from tarflow_jax.sampling.block_inverse import block_inverse
from tiny_models import LABELS, TINY, random_variables

MILLISECOND = 1e-3


@pytest.mark.parametrize(("log_scale", "better"), [(-3.0, "zeros"), (0.0, "latents")])
def test_the_better_init_is_nearer_after_one_update(log_scale, better):
    variables = random_variables(TINY)
    bias = variables["params"]["block_1"]["project_out"]["bias"]
    # x = z exp(log_scale) + shift: far smaller than z, or about z.
    variables["params"]["block_1"]["project_out"]["bias"] = bias.at[: TINY.token_dim].add(log_scale)
    order = jnp.asarray(block_orders(TINY, {})[1][None])
    z = permute(to_tokens(TINY, jax.random.normal(jax.random.key(0), (3, *TINY.image_shape))), order)
    block = block_inverse(TarFlow(TINY), 1, variables["params"]["block_1"], order, Given(LABELS))
    exact = jax.jit(lambda z: Sequential().invert(block, z).x)(z)

    begin = {"latents": z, "zeros": jnp.zeros_like(z).at[:, 0].set(z[:, 0])}
    distances = {
        init: float(jnp.linalg.norm(block(x)[0].of_next_token().inverse(z) - exact)) for init, x in begin.items()
    }
    assert min(distances, key=distances.get) == better
    assert max(distances.values()) > 1.2 * min(distances.values())
    assert tuning.better_init(block, z, exact) == better


def report(number, decoder, seconds, error, sequential_seconds=10 * MILLISECOND):
    trials = [
        tuning.Trial(Sequential(), 5, sequential_seconds, 0.0),
        tuning.Trial(decoder, 3, seconds, error),
    ]
    return tuning.BlockReport(number, 1.0, "latents", trials, trials[-1])


REPORTS = [
    report(0, Jacobi(), 1 * MILLISECOND, 3e-3),  # gains 9 ms, 3 seconds an error: the largest error
    report(1, Jacobi(), 8 * MILLISECOND, 1e-3),  # gains 2 ms, 2 seconds an error
    report(2, GaussSeidelJacobi(2), 9 * MILLISECOND, 0.0),  # gains 1 ms for nothing
    report(3, Sequential(), 10 * MILLISECOND, 0.0),
]


def test_the_block_of_the_least_gain_goes_back():
    assert tuning.least_worth(REPORTS, per_error=True) == 1
    assert tuning.least_worth(REPORTS, per_error=False) == 2
    assert tuning.least_worth(REPORTS[3:], per_error=True) is None


@pytest.fixture(scope="module")
def pipe():
    return TarFlowPipeline(TINY, random_variables(TINY, scale=0.05), Noise("gaussian", 0.1))


LATENTS = np.random.default_rng(0).standard_normal((2, *TINY.image_shape), np.float32)


def tune(monkeypatch, pipe, seconds_of, max_error, guidance=None):
    """`tuning.tune` with invented seconds: `seconds_of(decoders)`, one decoder for a block, a tuple for all."""
    timed = tuning._timed
    monkeypatch.setattr(
        tuning, "_timed", lambda decoder, *args, **options: (timed(decoder, *args)[0], seconds_of(decoder))
    )
    monkeypatch.setattr(tuning, "_seconds", lambda run, *args, **options: seconds_of(args[0]))

    def decode_with(decoders):
        return pipe.decode(LATENTS, LABELS[:2], guidance, decoder=decoders)

    found = tuning.tune(
        decode_with, TarFlow(TINY), pipe.variables, LATENTS, LABELS[:2], guidance, tolerance=1e-2, max_error=max_error
    )
    return found, float(jnp.abs(decode_with(found.decoders) - decode_with(None)).max())


@pytest.mark.slow
def test_the_fastest_decoders_are_chosen_where_they_are_close(monkeypatch, pipe):
    def seconds_of(decoder):
        return 1.0 if isinstance(decoder, Jacobi) else 2.0

    guidance = Guidance(0.5)
    found, error = tune(monkeypatch, pipe, seconds_of, 0.5, guidance)
    assert [type(decoder) for decoder in found.decoders] == [Jacobi] * 3
    assert error == pytest.approx(found.error, rel=1e-3)
    assert 0 < found.error <= 0.5
    strict, error = tune(monkeypatch, pipe, seconds_of, found.error / 2, guidance)
    assert strict.error <= found.error / 2
    assert strict.decoders != found.decoders
    assert error <= found.error / 2


@pytest.mark.slow
def test_blocks_go_back_while_all_together_take_longer(monkeypatch, pipe):
    def seconds_of(decoders):
        if not isinstance(decoders, tuple):
            return 1.0 if isinstance(decoders, Jacobi) else 2.0
        return 1.0 + sum(isinstance(decoder, Jacobi) for decoder in decoders)

    found, _ = tune(monkeypatch, pipe, lambda d: 2.0 if d is None else seconds_of(d), 0.5)
    assert sum(decoder != Sequential() for decoder in found.decoders) == 1
    assert found.seconds == found.sequential_seconds
