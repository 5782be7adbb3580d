"""STARFlow's block, prefix and weights compute what its reference computed; each option also works by itself."""

import functools

import numpy as np
import pytest

from tarflow_jax import Guidance, TarFlowPipeline
from tarflow_jax.sampling import GaussSeidelJacobi, Jacobi
from test_interop_goldens import assert_close

CASES = ("starflow_plain", "starflow_label", "starflow_text")
DECODERS = (None, Jacobi(tolerance=0), GaussSeidelJacobi(3, tolerance=0))


@functools.cache
def pipeline(load_golden, name):
    """The golden, the pipeline of its weights, and what it is conditional on."""
    golden = load_golden(name)
    config, prefix = golden.config, golden.arrays.get("prefix")
    pipe = TarFlowPipeline.from_torch(
        golden.path, config.image_size, config.image_channels, config.patch_size, noise_std=0.3
    )
    return golden, pipe, {} if prefix is None else {"condition": prefix}


@pytest.mark.parametrize("name", CASES)
def test_encoding_likelihood_and_denoising(load_golden, name):
    golden, pipe, given = pipeline(load_golden, name)
    images = golden.images("x")
    latents, log_det = pipe.encode(images, **given)
    assert_close(latents, golden.images("z"))
    assert_close(log_det, golden.arrays["logdet_per_dim"] * golden.config.num_dims)
    assert_close(pipe.log_prob(images, **given), golden.arrays["log_prob"])
    assert_close(pipe.denoise(images, **given), golden.images("denoised"))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("decoder", DECODERS, ids=str)
def test_samples(load_golden, name, decoder):
    golden, pipe, given = pipeline(load_golden, name)
    noise = golden.images("noise")
    trace = pipe.decode_trace(noise, decoder=decoder, **given)
    assert_close(trace.images, golden.images("sample"))
    assert_close(np.moveaxis(trace.trajectory, 1, 0)[1:], golden.images("sample_sequence"))
    if given:
        guidance = Guidance(3.6, rule="product", schedule="constant", blocks=1 if name == "starflow_text" else "all")
        null = golden.arrays["prefix_null"][0]
        guided = pipe.decode(noise, guidance=guidance, decoder=decoder, null_condition=null, **given)
        assert_close(guided, golden.images("sample_w3.6"))
