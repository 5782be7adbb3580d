"""What a flow is asked of an image."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runs import SMALL, random_images
from tarflow_jax import Noise, TarFlowPipeline, inspection
from tarflow_jax.flow import Conditioning, FlowBlock, block_orders, permute, to_tokens, unpermute
from tarflow_jax.likelihood import LOG_2PI, bits_per_dim
from tiny_models import images_of, random_variables

GAUSSIAN, UNIFORM = Noise("gaussian", 0.1), Noise("uniform")
LEVELS = Noise("levels", std_min=0.1, std_max=0.5)
CONDITIONAL = dataclasses.replace(SMALL, noise_conditional=True)
ONE_BLOCK = dataclasses.replace(SMALL, num_blocks=1, num_classes=0)
TRIANGULAR = dataclasses.replace(SMALL, triangular=True, num_classes=0)
VP = dataclasses.replace(SMALL, volume_preserving=True, num_classes=0)
KEY = jax.random.key(5)


def pipeline(config, noise):
    return TarFlowPipeline(config, random_variables(config), noise)


@pytest.mark.parametrize("config", [TRIANGULAR, VP], ids=["triangular", "vp"])
def test_the_shares_of_the_patches_add_up_to_log_p(config):
    pipe, images = pipeline(config, None), images_of(config, 1)
    shares = pipe.patch_log_prob(images)
    chex.assert_shape(shares, (1, 2, 3))
    np.testing.assert_allclose(shares.sum(), pipe.log_prob(images)[0], rtol=1e-5)


def test_a_patch_pays_for_its_latents_and_for_its_log_scales_in_every_block():
    pipe, images, labels = pipeline(SMALL, None), images_of(SMALL, 1), np.array([2])

    @functools.partial(jax.jit, static_argnums=0)
    def through(k, params, tokens):
        """Block k's tokens, and the log-scales of its affine map."""
        apply = functools.partial(FlowBlock(SMALL, k).apply, {"params": params})
        order, given = block_orders(SMALL, {})[k][None], Conditioning(labels)
        following = apply(permute(tokens, order), order, given, method="predict")[0]
        return apply(tokens, order, given)[0], jnp.log(following.shift_right().scale)

    tokens, expected = to_tokens(SMALL, images), 0.0
    for k in range(SMALL.num_blocks):
        tokens, log_scale = through(k, pipe.variables["params"][f"block_{k}"], tokens)
        expected = expected - unpermute(log_scale, block_orders(SMALL, {})[k][None]).sum(2)
    expected = expected - 0.5 * (jnp.square(tokens) + LOG_2PI).sum(2)
    np.testing.assert_allclose(pipe.patch_log_prob(images, labels).reshape(1, -1), expected, atol=1e-4)


def test_in_a_flow_of_one_block_a_share_is_the_conditional_density_of_the_chain_rule():
    pipe, images = pipeline(ONE_BLOCK, None), images_of(ONE_BLOCK, 1)
    later = jnp.zeros(images.shape).at[:, 2:].set(1)  # patches 3 to 5, the second row
    shares, others = (pipe.patch_log_prob(x) for x in (images, images + later))
    np.testing.assert_allclose(shares[:, 0], others[:, 0], rtol=1e-5)
    assert (np.abs(shares - others)[:, 1] > 1e-3).all()


@pytest.mark.parametrize("noise", [GAUSSIAN, UNIFORM, None], ids=["gaussian", "uniform", "unknown"])
def test_inspection_reports_one_image_by_one_noise(noise):
    pipe, (image, *_) = pipeline(SMALL, noise), random_images(SMALL, 1)[0]
    found = inspection.inspect(pipe, image, KEY, label=2)
    np.testing.assert_allclose(found.log_prob, pipe.log_prob(found.noisy[None], np.array([2]))[0], rtol=1e-5)
    np.testing.assert_allclose(found.patch_bits.mean(), found.bits_per_dim, rtol=1e-6)
    np.testing.assert_allclose(found.bits_per_dim, bits_per_dim(found.log_prob, SMALL.num_dims), rtol=1e-6)
    np.testing.assert_allclose(found.class_log_probs[2], found.log_prob, rtol=1e-5)
    assert found.error < 2e-5
    assert (np.abs(found.noisy - (image / 127.5 - 1)).max() > 1e-6) == (noise is not None)


@pytest.mark.slow
def test_bits_per_dim_of_an_inspection_are_those_of_the_pipeline():
    pipe, (image, *_) = pipeline(SMALL, UNIFORM), random_images(SMALL, 1)[0]
    found = inspection.inspect(pipe, image, KEY)
    np.testing.assert_allclose(found.bits_per_dim, pipe.bits_per_dim(KEY, image[None])[0], rtol=1e-5)


def test_posterior_is_bayes_rule_and_a_temperature_evens_it_out():
    found = inspection.Inspection(*[None] * 6, class_log_probs=np.log([0.2, 0.6, 0.8]) - 1000)
    np.testing.assert_allclose(found.posterior(), [0.125, 0.375, 0.5])
    np.testing.assert_allclose(found.posterior(1e9), [1 / 3] * 3)
    with pytest.raises(ValueError, match="no classes"):
        found._replace(class_log_probs=None).posterior()


@pytest.mark.slow
def test_an_image_has_the_noise_of_the_level_that_a_flow_of_many_is_asked_at():
    pipe, (image, *_) = pipeline(CONDITIONAL, LEVELS), random_images(CONDITIONAL, 1)[0]
    noise = inspection.inspect(pipe, image, KEY, noise_std=0.4).noisy - (image / 127.5 - 1)
    assert 0.3 < np.std(noise) < 0.5
    with pytest.raises(ValueError, match="many noise levels"):
        inspection.inspect(pipe, image, KEY)


@pytest.mark.slow
def test_inspection_of_a_flow_without_classes_has_no_class():
    (image, *_) = random_images(ONE_BLOCK, 1)[0]
    assert inspection.inspect(pipeline(ONE_BLOCK, GAUSSIAN), image, KEY).class_log_probs is None


def test_inspection_refuses_an_image_of_another_shape():
    with pytest.raises(ValueError, match=r"the image is uint8 \(2, 2, 3\); expected uint8 \(4, 6, 3\)"):
        inspection.inspect(pipeline(SMALL, GAUSSIAN), np.zeros((2, 2, 3), np.uint8), KEY)


@pytest.mark.slow
def test_a_model_that_has_diverged_is_told_of():
    (image, *_) = random_images(SMALL, 1)[0]
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, random_variables(SMALL))
    with pytest.raises(ValueError, match="is not finite: the model has diverged"):
        inspection.inspect(TarFlowPipeline(SMALL, broken, GAUSSIAN), image, KEY)
