"""The parallel inverses: exact when asked, close when not, whatever the guidance."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tarflow_jax import Guidance, Noise, TarFlowConfig, TarFlowPipeline
from tarflow_jax.flow import Conditioning, FlowBlock, block_orders, to_tokens
from tarflow_jax.runtime import make_mesh
from tarflow_jax.sampling import GaussSeidelJacobi, Jacobi, Sequential
from tiny_models import LABELS, TINY, VP, decode, encode, images_of, random_variables

EXACT = [Jacobi(tolerance=0), GaussSeidelJacobi(3, tolerance=0)]
LONGER = dataclasses.replace(TINY, image_size=(8, 10))  # 20 tokens
NOISE = Noise("gaussian", 0.1)


def run(config, variables, decoder, guidance=None):
    latents = jax.random.normal(jax.random.key(3), (3, *config.image_shape))
    labels = LABELS if config.num_classes else None
    decoders = (decoder,) * config.num_blocks
    return decode(config, variables, latents, labels, guidance, decoders=decoders)


SLOW = (
    (LONGER, None),
    (LONGER, Guidance(0.7, attention_temperature=0.6)),
    (LONGER, Guidance(0.7, "shift", "constant")),
    (VP, Guidance(0.7, attention_temperature=0.6)),
)


@pytest.mark.parametrize(
    ("config", "guidance"), [(TINY, None), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_tolerance_0_is_the_sequential_inverse_in_every_mode(config, guidance):
    variables = random_variables(config, scale=0.05)
    expected = run(config, variables, Sequential(), guidance)
    assert np.isfinite(expected.images).all()
    for decoder in EXACT:
        actual = run(config, variables, decoder, guidance)
        np.testing.assert_allclose(actual.images, expected.images, atol=1e-5)
        np.testing.assert_allclose(actual.trajectory, expected.trajectory, atol=1e-5)
        np.testing.assert_allclose(actual.log_det, expected.log_det, atol=1e-4)
        assert int(actual.updates.max()) <= config.num_tokens
        assert actual.updates.shape == actual.residuals.shape == (3, config.num_blocks)


@pytest.mark.slow
def test_slow_convergence_is_exact_in_at_most_t_updates():
    variables = random_variables(LONGER, scale=0.09)
    expected = run(LONGER, variables, Sequential())
    actual = run(LONGER, variables, Jacobi(tolerance=0))
    assert np.isfinite(expected.images).all()
    assert int(actual.updates.max()) > 10
    assert int(actual.updates.max()) <= LONGER.num_tokens - 1
    np.testing.assert_allclose(actual.images, expected.images, atol=1e-5)


@pytest.mark.slow
def test_a_settled_image_changes_no_more():
    variables, key = random_variables(LONGER, seed=5, scale=0.09), jax.random.key(3)
    latents = jax.random.normal(key, (3, *LONGER.image_shape)) * jnp.array([0.01, 1.0, 1.0])[:, None, None, None]
    decoders = (Jacobi(tolerance=1e-2),) * LONGER.num_blocks
    together = decode(LONGER, variables, latents, LABELS, decoders=decoders)
    assert np.isfinite(together.images).all()
    alone = decode(LONGER, variables, latents[:1], LABELS[:1], decoders=decoders)
    assert int(alone.updates.sum()) < int(together.updates[1:].sum(1).max())
    np.testing.assert_array_equal(together.updates[0], alone.updates[0])
    np.testing.assert_allclose(together.images[0], alone.images[0], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Jacobi, functools.partial(GaussSeidelJacobi, 3)])
def test_where_max_iterations_comes_first_sequential_finishes(kind):
    variables = random_variables(LONGER, scale=0.09)
    found = run(LONGER, variables, kind(tolerance=0, max_iterations=2))
    assert int(found.updates.max()) <= 2 * 3
    assert float(found.residuals.min()) > 0
    expected = run(LONGER, variables, Sequential())
    assert np.isfinite(expected.images).all()
    np.testing.assert_allclose(found.images, expected.images, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Jacobi, functools.partial(GaussSeidelJacobi, 2)])
def test_overflow_on_the_way_leaves_the_inverse_as_it_is(kind):
    config = dataclasses.replace(LONGER, num_blocks=1, layers_per_block=2)
    variables = random_variables(config, scale=0.1)
    bias = variables["params"]["block_0"]["project_out"]["bias"]
    # Latents are some e⁶ as large as the images, and from them exp(log_scale) overflows.
    variables["params"]["block_0"]["project_out"]["bias"] = bias.at[: config.token_dim].add(-6)
    images = images_of(config)
    latents, _ = encode(config, variables, images, LABELS)
    params = {"params": variables["params"]["block_0"]}
    order = block_orders(config, {})[0][None]
    affine = FlowBlock(config, 0).apply(
        params, to_tokens(config, latents), order, Conditioning(LABELS), method="predict"
    )[0]
    assert np.isinf(affine.scale).any()
    found = decode(config, variables, latents, LABELS, decoders=(kind(tolerance=0),))
    np.testing.assert_allclose(found.images, images, atol=1e-5)


@pytest.mark.slow
def test_nan_weights_give_nan_images():
    variables = jax.tree.map(lambda x: x * jnp.nan, random_variables(LONGER))
    found = run(LONGER, variables, Jacobi(tolerance=1e-3))
    assert not np.isfinite(found.residuals).any()
    np.testing.assert_array_equal(found.updates, LONGER.num_tokens - 1)
    assert np.isnan(found.images).any()


@pytest.mark.slow
def test_decoders_of_the_pipeline():
    variables = random_variables(LONGER, scale=0.05)
    latents = images_of(LONGER, 5)
    labels = [0, 1, 2, -1, 0]
    mixed = (Sequential(), Jacobi(1e-3), GaussSeidelJacobi(4, 1e-3))
    pipe, guidance = TarFlowPipeline(LONGER, variables, NOISE), Guidance(0.5)
    found = pipe.decode_trace(latents, labels, decoder=mixed)
    np.testing.assert_allclose(found.images, pipe.decode(latents, labels), atol=1e-2)
    assert found.updates.shape == found.residuals.shape == (5, 3)
    sharded = TarFlowPipeline(LONGER, variables, NOISE, mesh=make_mesh(data=4, fsdp=2), memory_bound=1)
    images = sharded.decode(latents, labels, guidance, decoder=GaussSeidelJacobi(3, tolerance=0))
    np.testing.assert_allclose(images, pipe.decode(latents, labels, guidance), atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Jacobi(tolerance=-1.0), "tolerance is -1.0"),
        (lambda: Jacobi(max_iterations=0), "max_iterations is 0"),
        (lambda: Jacobi(init="ones"), "init is 'ones'"),
        (lambda: GaussSeidelJacobi(0), "num_segments is 0"),
    ],
)
def test_impossible_decoders_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.slow
def test_a_long_sequence_is_inverted_in_segments_of_cache():
    config = TarFlowConfig((2, 140), 1, 1, 8, 2, 1, head_dim=8)  # 280 tokens
    variables = random_variables(config, scale=0.02)
    latents = jax.random.normal(jax.random.key(0), (2, *config.image_shape))
    decoders = (Jacobi(tolerance=0),) * 2
    np.testing.assert_allclose(
        decode(config, variables, latents).images,
        decode(config, variables, latents, decoders=decoders).images,
        atol=1e-4,
    )
