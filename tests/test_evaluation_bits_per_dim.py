import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from tarflow_jax.data import ArraySource
from tarflow_jax.flow import TarFlow, TarFlowConfig
from tarflow_jax.noise import dequantise
from tarflow_jax.runtime import BatchRunner, make_mesh
from tarflow_jax.scoring import image_bits_per_dim

CONFIG = TarFlowConfig((4, 4), 1, patch_size=2, width=64, num_blocks=2, layers_per_block=1)


@pytest.fixture(scope="module")
def affine():
    """A flow whose blocks are constant affine maps: the last weight is zero at the start, so only its bias acts."""
    random = np.random.default_rng(0)
    params = jax.jit(TarFlow(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))["params"]
    biases = random.normal(0, 0.3, (2, 8)).astype(np.float32)
    for k in range(2):
        assert not np.asarray(params[f"block_{k}"]["project_out"]["kernel"]).any()
        params[f"block_{k}"]["project_out"]["bias"] = jnp.asarray(biases[k])
    return {"params": params}, biases.astype(np.float64)


def numpy_log_prob(biases, images):
    """The same flow in float64: in block order every token but the first gets (x - shift) * exp(-log_scale)."""
    tokens = images.reshape(-1, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 4, 4)
    log_det = 0.0
    for k, bias in enumerate(biases):
        order = slice(None, None, -1 if k % 2 else 1)
        tokens = tokens[:, order].copy()
        tokens[:, 1:] = (tokens[:, 1:] - bias[4:]) * np.exp(-bias[:4])
        tokens = tokens[:, order]
        log_det -= 3 * bias[:4].sum()
    return scipy.stats.norm.logpdf(tokens).sum((1, 2)) + log_det


@pytest.mark.parametrize("num_samples", [1, 3])
def test_bits_per_dim_of_an_affine_flow(affine, num_samples):
    variables, biases = affine
    images = np.random.default_rng(1).integers(0, 256, (37, 4, 4, 1), dtype=np.uint8)
    key = jax.random.key(5)
    runner, source = BatchRunner(make_mesh()), ArraySource("noise", images)
    result = image_bits_per_dim(runner, CONFIG, variables, source, key, num_samples)
    draws = []
    for draw in (jax.random.fold_in(key, k) for k in range(num_samples)):
        noisy = [dequantise(jax.random.fold_in(draw, i), jnp.asarray(image)) for i, image in enumerate(images)]
        draws.append(numpy_log_prob(biases, np.array(noisy, np.float64)))
    log_prob = scipy.special.logsumexp(draws, axis=0) - np.log(num_samples)
    bits = (-log_prob / 16 + np.log(128)) / np.log(2)
    np.testing.assert_allclose(result, bits, rtol=1e-5)
    assert result.mean() == pytest.approx(bits.mean(), rel=1e-6)


def test_result_does_not_depend_on_devices_or_batches(affine):
    variables, _ = affine
    images = np.random.default_rng(2).integers(0, 256, (21, 4, 4, 1), dtype=np.uint8)
    source, key = ArraySource("noise", images), jax.random.key(0)
    runners = BatchRunner(make_mesh()), BatchRunner(None), BatchRunner(None, memory_bound=1)
    results = [image_bits_per_dim(runner, CONFIG, variables, source, key) for runner in runners]
    assert results[0].dtype == np.float64
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=1e-6)
