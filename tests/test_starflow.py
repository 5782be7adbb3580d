"""STARFlow's block, prefix and weights compute what its reference computed; each option also works by itself."""

import functools

import jax
import numpy as np
import pytest

from tarflow_jax import Guidance, TarFlowPipeline
from tarflow_jax.runtime import Rows, make_mesh
from tarflow_jax.sampling import GaussSeidelJacobi, Jacobi
from tarflow_jax.training.optimizer import Optimizer
from tarflow_jax.training.step import TrainConfig, compiled_step, new_state
from tarflow_jax.training.task import Arrays, ArrayTask
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


@pytest.mark.slow
def test_the_reference_s_training_run_on_a_mesh(load_golden):
    golden = load_golden("starflow_training")
    optimizer = Optimizer(20, 1e-3, 1e-3, 0, 0.9, 0.95, 1e-4, 0.0, 0.0, "adamw", 0.0)
    train_config = TrainConfig(ArrayTask(golden.config, block_penalty=1e-4), optimizer)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    state, put = new_state(train_config, mesh, jax.random.key(0)), Rows(mesh, 8).put
    given = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), golden.variables, state.variables)
    state, step, losses = state.replace(variables=given), compiled_step(train_config, mesh), []
    for batch in zip(golden.images("x"), golden.arrays["prefix"], strict=True):
        state, metrics = step(state, Arrays(*map(put, batch)), None, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, golden.arrays["losses"], rtol=2e-4)
