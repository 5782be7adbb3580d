"""The front door."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tarflow_jax import Guidance, Noise, TarFlowPipeline
from tarflow_jax.likelihood import bits_per_dim
from tarflow_jax.noise import dequantise, to_float
from tiny_models import LABELS, TINY, encode, images_of, random_variables

GAUSSIAN = Noise("gaussian", 0.1)


@pytest.fixture(scope="module")
def pipe():
    return TarFlowPipeline(TINY, random_variables(TINY), GAUSSIAN)


def test_encode_decode_and_log_prob(pipe):
    images = np.asarray(images_of(TINY))
    latents, log_det = pipe.encode(images, LABELS)
    np.testing.assert_allclose(pipe.decode(latents, LABELS), images, atol=2e-5)
    gaussian = -0.5 * (np.square(latents) + np.log(2 * np.pi)).sum((1, 2, 3))
    np.testing.assert_allclose(pipe.log_prob(images, LABELS), gaussian + log_det, rtol=1e-5)


def test_samples_are_denoised_along_the_score(pipe):
    key = jax.random.key(3)
    raw = pipe.sample(key, 3, LABELS, denoise=False)
    np.testing.assert_array_equal(raw, pipe.decode(pipe.latents(key, 3), LABELS))
    score = jax.jit(jax.grad(lambda x: pipe.log_prob(x, LABELS).sum()))(raw)
    np.testing.assert_allclose(pipe.sample(key, 3, LABELS), raw + 0.1**2 * score, atol=1e-5)
    denoised = pipe.denoise(raw, LABELS, noise_std=0.2, multiplier=2.0)
    np.testing.assert_allclose(denoised, raw + 2 * 0.2**2 * score, atol=1e-5)


def test_bits_per_dim_is_that_of_dequantised_images(pipe):
    images = np.random.default_rng(0).integers(0, 256, (3, *TINY.image_shape), np.uint8)
    key = jax.random.key(0)
    keys = [jax.random.fold_in(jax.random.fold_in(key, 0), i) for i in range(3)]  # draw 0 of image i
    uniform = np.stack([jax.random.uniform(key, TINY.image_shape) for key in keys])
    latents, log_det = encode(TINY, pipe.variables, (images.astype(np.float32) + uniform) / 128 - 1, LABELS)
    log_prob = log_det - 0.5 * (jnp.square(latents) + jnp.log(2 * jnp.pi)).sum((1, 2, 3))
    expected = bits_per_dim(log_prob, TINY.num_dims)
    np.testing.assert_allclose(pipe.bits_per_dim(key, images, LABELS), expected, rtol=1e-4)


def test_bits_per_dim_of_16_bits(pipe, tmp_path):
    """Bits of 65,536 levels: of the same density, log2 256 more than of 256 levels."""
    TarFlowPipeline(dataclasses.replace(TINY, image_bits=16), pipe.variables).save_pretrained(tmp_path / "model")
    deep = TarFlowPipeline.from_pretrained(tmp_path / "model")
    images = np.random.default_rng(0).integers(0, 65536, (3, *TINY.image_shape), np.uint16)
    np.testing.assert_allclose(to_float(images), 2 * (images / 65535) - 1, atol=1e-7)
    np.testing.assert_array_equal(to_float(np.array([0, 65535], np.uint16)), [-1, 1])
    key, bytes_ = jax.random.key(0), jnp.asarray(images >> 8, jnp.uint8)
    keys = [jax.random.fold_in(jax.random.fold_in(key, 0), i) for i in range(3)]
    np.testing.assert_allclose(GAUSSIAN(key, 257 * bytes_.astype(jnp.uint16)), GAUSSIAN(key, bytes_), atol=1e-6)
    noisy = np.stack([dequantise(*each) for each in zip(keys, jnp.asarray(images), strict=True)])
    # The noise of a number fills its own level alone, but for float32's rounding.
    np.testing.assert_allclose((noisy.astype(np.float64) + 1) * 32768 - 0.5, images, atol=0.5 + 2**-8)
    expected = -np.asarray(pipe.log_prob(noisy, LABELS)) / TINY.num_dims / np.log(2) + 15
    np.testing.assert_allclose(deep.bits_per_dim(key, images, LABELS), expected, rtol=1e-4)
    for model, wrong, wanted in ((deep, np.uint8, "uint16"), (pipe, np.uint16, "uint8")):
        with pytest.raises(ValueError, match=f"images are {np.dtype(wrong)}; expected {wanted}"):
            model.bits_per_dim(key, images.astype(wrong))
    with pytest.raises(ValueError, match=r"16-bit v is v / 32767.5 - 1"):
        deep.log_prob(images)


def test_a_saved_model_draws_the_same_samples(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    again = TarFlowPipeline.from_pretrained(tmp_path / "model")
    assert (again.config, again.noise, again.noise_std) == (TINY, GAUSSIAN, 0.1)
    key = jax.random.key(0)
    np.testing.assert_array_equal(again.sample(key, 2, [0, 1]), pipe.sample(key, 2, [0, 1]))


def test_what_does_not_fit_is_refused(pipe):
    images = np.asarray(images_of(TINY))
    with pytest.raises(ValueError, match="label 3 is out of range; expected -1"):
        pipe.encode(images, [0, 1, 3])
    with pytest.raises(ValueError, match="labels are float64"):
        pipe.encode(images, [0.0, 1.0, 2.0])
    with pytest.raises(ValueError, match="images are uint8; expected floats"):
        pipe.log_prob(images.astype(np.uint8))
    with pytest.raises(ValueError, match="expected uint8"):
        pipe.bits_per_dim(jax.random.key(0), images)
    with pytest.raises(ValueError, match=r"images have shape \(3, 4, 4, 3\)"):
        pipe.encode(images[:, :, :4])
    uniform = TarFlowPipeline(dataclasses.replace(TINY, num_classes=0), pipe.variables, Noise("uniform"))
    with pytest.raises(ValueError, match="guidance by class needs a class-conditional model"):
        uniform.decode(images, guidance=Guidance(1.0))
    for refused in (
        lambda: uniform.denoise(images),
        lambda: uniform.sample(jax.random.key(0), 1, denoise=True),
    ):
        with pytest.raises(ValueError, match="denoising needs a model trained with gaussian noise"):
            refused()
    with pytest.raises(ValueError, match="the model has no classes"):
        uniform.encode(images, [0, 0, 0])
