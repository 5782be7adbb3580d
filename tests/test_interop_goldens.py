"""The reference's weights through the converter compute what the reference computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tarflow_jax.flow import Conditioning, TarFlow, from_tokens
from tarflow_jax.likelihood import bits_per_dim, log_prob
from tarflow_jax.sampling import GaussSeidelJacobi, Jacobi, Sequential
from tarflow_jax.sampling.denoise import denoise
from tarflow_jax.sampling.guidance import Guidance
from tiny_models import decode

CASES = ("cond", "vp")
GUIDED = {
    "sample_cfg1.5_ab": Guidance(1.5, "both", "constant"),
    "sample_cfg1.5_a": Guidance(1.5, "log_scale", "constant"),
    "sample_cfg1.5_b": Guidance(1.5, "shift", "constant"),
    "sample_cfg2_annealed": Guidance(2.0, "both", "linear"),
    "sample_temp0.7_w1_annealed": Guidance(1.0, "both", "linear", 0.7),
    "sample_temp1.4_w0.5": Guidance(0.5, "both", "constant", 1.4),
}


def assert_close(ours, reference, tolerance=2e-4):
    assert np.shape(ours) == np.shape(reference)
    error = np.abs(np.asarray(ours) - reference) / np.maximum(np.abs(reference), 1)
    assert error.max() <= tolerance


@pytest.mark.parametrize("name", CASES)
def test_encode_and_likelihood(load_golden, name):
    golden = load_golden(name)
    flow, arrays = TarFlow(golden.config), golden.arrays
    images, given = golden.images("x"), Conditioning(golden.labels("y"))
    latents, log_det = jax.jit(flow.apply)(golden.variables, images, given)
    reference, reference_log_det = golden.latents("z"), arrays["logdet_per_dim"] * golden.config.num_dims
    if golden.config.volume_preserving:  # the reference leaves the prior's variance to its sampler
        variance = np.asarray(golden.variables["prior"]["variance"])
        reference = reference / np.asarray(from_tokens(golden.config, jnp.sqrt(variance)[None]))
        reference_log_det = reference_log_det - 0.5 * np.log(variance).sum()
    assert_close(latents, reference)
    assert_close(log_det, reference_log_det)
    nats = jax.jit(functools.partial(log_prob, flow))(golden.variables, images, given)
    assert_close(nats, arrays["log_prob"])
    assert_close(bits_per_dim(nats, golden.config.num_dims), arrays["bits_per_dim_8bit"])


@pytest.mark.parametrize("name", CASES)
def test_denoise(load_golden, name):
    golden = load_golden(name)
    denoised = jax.jit(functools.partial(denoise, TarFlow(golden.config)))(
        golden.variables, golden.images("x"), Conditioning(golden.labels("y")), noise_std=golden.arrays["sigma"]
    )
    assert_close(denoised, golden.images("denoised"))


@pytest.mark.parametrize("name", CASES)
def test_decode(load_golden, name):
    golden = load_golden(name)
    config, latents, labels = golden.config, golden.latents("noise"), golden.labels("sample_y")
    images, _, trajectory, *_ = decode(config, golden.variables, latents, labels)
    assert_close(images, golden.images("sample"))
    assert_close(jnp.moveaxis(trajectory, 1, 0), golden.images("sample_sequence"))


QUICK = [("cond", "sample_cfg1.5_ab", Sequential()), ("vp", "sample_temp0.7_w1_annealed", Sequential())]
SLOW = [
    *(("cond", mode, Sequential()) for mode in GUIDED if mode != QUICK[0][1]),
    ("vp", "sample_temp1.4_w0.5", Sequential()),
    *((*case[:2], decoder) for case in QUICK for decoder in (Jacobi(tolerance=0), GaussSeidelJacobi(3, tolerance=0))),
]


@pytest.mark.parametrize(
    ("name", "mode", "decoder"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_guided_decode(load_golden, name, mode, decoder):
    golden, guidance = load_golden(name), GUIDED[mode]
    images, *_ = decode(
        golden.config,
        golden.variables,
        golden.latents("noise"),
        golden.labels("sample_y"),
        guidance,
        decoders=(decoder,) * golden.config.num_blocks,
    )
    assert_close(images, golden.images(mode))
