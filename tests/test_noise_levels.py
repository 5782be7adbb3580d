"""Flows of many noise levels: the reference's figures, guidance, iterative denoising, training."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import DATA
from tarflow_jax import Guidance, IterativeDenoising, Noise, TarFlow, TarFlowPipeline, arguments, sampling
from tarflow_jax.flow import Conditioning
from tarflow_jax.interop import load_torch
from tarflow_jax.likelihood import training_loss
from tarflow_jax.noise import Levels
from tarflow_jax.sampling import GaussSeidelJacobi, Jacobi, Sequential
from tarflow_jax.sampling.guidance import product
from tarflow_jax.training import FlowTask
from tiny_models import LABELS, TINY, images_of, new_variables, random_variables

LEVELS = Noise("levels", std_min=0.01, std_max=0.3)
CONDITIONAL = dataclasses.replace(TINY, noise_conditional=True)


def assert_close(ours, reference, tolerance=2e-4):
    assert np.shape(ours) == np.shape(reference)
    assert (np.abs(np.asarray(ours) - reference) / np.maximum(np.abs(reference), 1)).max() <= tolerance


@pytest.fixture(scope="module")
def golden(load_golden):
    return load_golden("noise_cond")


@pytest.fixture(scope="module")
def pipe(golden):
    return TarFlowPipeline(golden.config, golden.variables, LEVELS)


@pytest.fixture(scope="module")
def given():
    return json.loads((DATA / "noise_cond.json").read_text())


def test_the_reference_s_encoding_and_likelihood(golden, pipe):
    images, labels, levels = golden.images("x"), golden.labels("y"), golden.arrays["t"]
    latents, log_det = pipe.encode(images, labels, levels)
    assert_close(latents, golden.latents("z"))
    assert_close(log_det, golden.arrays["logdet_per_dim"] * golden.config.num_dims)
    assert_close(pipe.log_prob(images, labels, levels), golden.arrays["log_prob"])
    std = jnp.asarray(levels)
    loss, _ = jax.jit(training_loss, static_argnums=0)(
        TarFlow(golden.config),
        golden.variables,
        images,
        Conditioning(labels, std),
        levels=Levels(std, jnp.zeros((len(std), 4))),
    )
    assert_close(loss, golden.arrays["loss_weighted_t"])


def test_the_reference_s_denoising(golden, pipe, given):
    images, labels = golden.images("x"), golden.labels("sample_y")
    assert_close(pipe.denoise(images, labels, given["t1"]), golden.images("denoised_t1"))
    for name, clip in (("iterated", False), ("iterated_clip", True)):
        method = IterativeDenoising(given["steps"], given["t0"], clip=clip)
        assert_close(pipe.denoise(images, labels, given["t1"], method=method), golden.images(name))


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        *(pytest.param(each, marks=pytest.mark.slow) for each in (Sequential(), Jacobi(0), GaussSeidelJacobi(3, 0))),
    ],
    ids=str,
)
def test_the_reference_s_samples(golden, pipe, given, decoder):
    latents, labels = golden.latents("noise"), golden.labels("sample_y")
    names = [name for name in golden.arrays if name.startswith("sample") and name != "sample_y"]
    assert len(names) == 9
    for name in names if decoder == Sequential() else names[::4]:
        guidance = None
        if name != "sample":
            rule, weight, temperature, schedule, blocks = re.fullmatch(
                r"sample_(\w+?)_w([\d.]+)(?:_temp([\d.]+))?_([a-z]+)_([a-z]+)", name
            ).groups()
            guidance = Guidance(
                float(weight),
                schedule=schedule,
                attention_temperature=float(temperature or 1),
                rule={"tarflow": "scale", "starflow": "product"}[rule],
                blocks={"last": 1, "all": "all"}[blocks],
            )
        images = pipe.decode(latents, labels, guidance, decoder=decoder, noise_std=given["t1"])
        if "starflow" in name:  # the others' shifts have the first image's ratio of variances there, see below
            assert_close(images[:1], golden.images(name)[:1])
        else:
            assert_close(images, golden.images(name))


@pytest.mark.slow
def test_the_reference_s_product_rule_mixes_images_and_is_ours_otherwise(golden, given, monkeypatch):
    def of_the_release(guided, unguided, weights):
        scale, _ = product(guided, unguided, weights)
        # Its scales lack the axis of the tokens that its shifts have, and so image b meets the ratio of image 0.
        ratio = (guided.scale / unguided.scale)[:1]
        mixed = guided._replace(scale=jnp.broadcast_to(ratio, guided.scale.shape))
        return scale, product(mixed, unguided._replace(scale=jnp.ones_like(mixed.scale)), weights)[1]

    monkeypatch.setattr(sampling.guidance, "product", of_the_release)
    latents, labels = golden.latents("noise"), golden.labels("sample_y")
    conditioning = Conditioning(labels, jnp.full(len(latents), given["t1"]))
    flow, decode_trace = TarFlow(golden.config), sampling.decode_trace.__wrapped__  # not compiled by another test
    for schedule in ("constant", "linear"):
        guidance = Guidance(1.5, schedule=schedule, rule="product", blocks=1)
        decode = jax.jit(lambda z: decode_trace(flow, golden.variables, z, conditioning, guidance=guidance).images)  # noqa: B023
        assert_close(decode(latents), golden.images(f"sample_starflow_w1.5_{schedule}_last"))


def test_weights_go_to_pytorch_and_back_bit_for_bit(golden, pipe, tmp_path):
    pipe.to_torch(tmp_path / "model.pth")
    config, variables = load_torch(tmp_path / "model.pth", 8, 3, 2)
    assert config == golden.config
    assert config.depths == (1, 1, 3)
    jax.tree.map(np.testing.assert_array_equal, variables, golden.variables)


@functools.cache
def gaussian_flow():
    """A flow whose density of noisy images is, at every level, N(0, s²) in all but the first token."""
    config = dataclasses.replace(
        CONDITIONAL, num_blocks=1, layers_per_block=1, num_classes=0, image_channels=1, width=64, head_dim=64
    )
    params = jax.tree.map(jnp.zeros_like, new_variables(config)["params"])
    params["block_0"]["project_out"]["bias"] = jnp.concatenate([jnp.full(4, jnp.log(0.5)), jnp.zeros(4)])
    return TarFlowPipeline(config, {"params": params}, LEVELS)


@pytest.mark.slow
def test_steps_follow_the_flow_of_a_gaussian_with_the_order_they_say():
    pipe = gaussian_flow()
    images = images_of(pipe.config)[:1]
    # dy/dσ = (y - x̂) / σ = σ y / s², so y goes as exp(σ² / 2 s²); s = 0.5 at all levels.
    exact = np.asarray(images[0, 2:]) * np.exp((0.01**2 - 1.0**2) / (2 * 0.25)) * (1 - 0.01**2 / 0.25)

    def error(num_steps, order):
        method = IterativeDenoising(num_steps, order=order)
        return float(np.abs(pipe.denoise(images, None, 1.0, method=method)[0, 2:] - exact).max())

    for order in (1, 2):
        errors = [error(num_steps, order) for num_steps in (9, 17, 33)]
        orders = np.log2(np.divide(errors[:-1], errors[1:]))
        np.testing.assert_allclose(orders, order, atol=0.2)
    single = pipe.denoise(images, None, 0.3, method=IterativeDenoising(1))
    np.testing.assert_allclose(single, pipe.denoise(images, None, 0.3), atol=1e-6)


def test_other_levels_compile_nothing_new():
    pipe, images = gaussian_flow(), images_of(CONDITIONAL)[..., :1]
    found = [pipe.denoise(images, None, 0.3, method=IterativeDenoising(3))]
    before = sampling.iterate._cache_size()
    found.append(pipe.denoise(images, None, 0.2, method=IterativeDenoising(3, 0.02)))
    assert sampling.iterate._cache_size() == before
    assert all(np.isfinite(images).all() for images in found)


def test_a_trajectory_has_the_image_after_every_step():
    pipe, images = gaussian_flow(), images_of(CONDITIONAL)[..., :1]
    method = IterativeDenoising(3, levels="log")
    last, path = pipe.denoise(images, None, 0.3, method=method, return_trajectory=True)
    assert path.shape == (4, *images.shape)
    np.testing.assert_array_equal(path[0], images)
    np.testing.assert_array_equal(path[-1], last)
    np.testing.assert_allclose(last, pipe.denoise(images, None, 0.3, method=method), atol=1e-6)
    middle = pipe.denoise(path[1], None, np.sqrt(0.3 * LEVELS.std_min), method=IterativeDenoising(2, levels="log"))
    np.testing.assert_allclose(middle, last, atol=1e-6)  # the second level is between the first and the last


@pytest.mark.slow
def test_the_sde_draws_by_its_key():
    pipe, images = gaussian_flow(), images_of(CONDITIONAL)[..., :1]
    method = IterativeDenoising(4, kind="sde")
    drawn = [pipe.denoise(images, None, 0.3, method=method, key=jax.random.key(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert float(jnp.abs(drawn[0] - drawn[2]).max()) > 0.01
    with pytest.raises(ValueError, match="key is None; expected one key"):
        pipe.denoise(images, None, 0.3, method=method)


@pytest.mark.slow
def test_samples_are_drawn_at_the_highest_level_and_denoised_to_none():
    pipe = TarFlowPipeline(CONDITIONAL, random_variables(CONDITIONAL, scale=0.05), LEVELS)
    key, method = jax.random.key(0), IterativeDenoising(2)
    noisy = pipe.sample(key, 3, LABELS, denoise=False)
    np.testing.assert_array_equal(noisy, pipe.decode(pipe.latents(key, 3), LABELS, noise_std=0.3))
    expected = pipe.denoise(noisy, LABELS, 0.3, method=method)
    np.testing.assert_array_equal(pipe.sample(key, 3, LABELS, denoise=method), expected)
    latents, _ = pipe.encode(noisy, LABELS, 0.3)
    np.testing.assert_allclose(latents, pipe.latents(key, 3), atol=1e-4)
    assert float(jnp.abs(pipe.encode(noisy, LABELS, 0.1)[0] - latents).max()) > 1e-3


@pytest.mark.slow
def test_what_leaves_the_range_is_clipped_on_the_way():
    pipe = TarFlowPipeline(CONDITIONAL, random_variables(CONDITIONAL, scale=0.05), LEVELS)
    key = jax.random.key(0)
    unclipped = pipe.sample(key, 3, LABELS, denoise=IterativeDenoising(4, levels="log"))
    assert float(jnp.abs(unclipped).max()) > 1.1
    assert float(jnp.abs(pipe.sample(key, 3, LABELS)).max()) <= 1
    of_latents = TarFlowPipeline(dataclasses.replace(CONDITIONAL, image_bits=0), pipe.variables, LEVELS)
    drawn = of_latents.sample(key, 3, LABELS, denoise=False)
    np.testing.assert_array_equal(of_latents.sample(key, 3, LABELS), of_latents.denoise(drawn, LABELS, 0.3))


@pytest.mark.slow
def test_bits_per_dim_are_asked_at_a_level():
    pipe = TarFlowPipeline(CONDITIONAL, random_variables(CONDITIONAL), LEVELS)
    images, key = np.random.default_rng(0).integers(0, 256, (3, *TINY.image_shape), np.uint8), jax.random.key(0)
    at_low, at_high = (pipe.bits_per_dim(key, images, LABELS, std) for std in (0.01, 0.3))
    assert float(jnp.abs(at_low - at_high).min()) > 1e-4
    keys = [jax.random.fold_in(jax.random.fold_in(key, 0), i) for i in range(3)]
    noisy = (images + np.stack([jax.random.uniform(key, TINY.image_shape) for key in keys])) / 128 - 1
    nats = pipe.log_prob(noisy.astype(np.float32), LABELS, 0.01)
    np.testing.assert_allclose(at_low, (-nats / TINY.num_dims + np.log(128)) / np.log(2), rtol=1e-5)
    with pytest.raises(ValueError, match="say at which"):
        pipe.bits_per_dim(key, images, LABELS)


@pytest.mark.slow
def test_guidance_leaves_the_blocks_it_does_not_cover():
    config = dataclasses.replace(CONDITIONAL, num_blocks=2, layers_per_block=1)
    pipe = TarFlowPipeline(config, random_variables(config), LEVELS)
    latents = pipe.latents(jax.random.key(0), 3)
    images = {
        blocks: pipe.decode(latents, LABELS, Guidance(1.0, blocks=blocks), noise_std=0.3) for blocks in (1, 2, "all")
    }
    np.testing.assert_array_equal(images[2], images["all"])
    assert float(jnp.abs(images[1] - images[2]).max()) > 1e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe, x: pipe.encode(x), "say at which, noise_std"),
        (lambda pipe, x: pipe.log_prob(x, None, -1.0), "noise_std is -1.0; expected positive"),
        (lambda pipe, x: pipe.decode(x, noise_std=[0.1, 0.2]), r"noise_std has shape \(2,\); expected"),
        (lambda pipe, x: pipe.denoise(x), "say at which, noise_std"),
        (lambda pipe, x: pipe.denoise(x, method=IterativeDenoising(2)), "expected one number"),
        (lambda _, x: one_level().encode(x, noise_std=0.1), "this model is of one noise level"),
        (lambda _, x: one_level().denoise(x, return_trajectory=True), "a trajectory is of a method's steps"),
        (lambda _, x: one_level().denoise(x, method=IterativeDenoising(2)), "needs a model of many noise levels"),
        (
            lambda pipe, x: pipe.denoise(x, None, 0.005, method=IterativeDenoising(2)),
            "noise_std is 0.005; expected at least std_min, 0.01, where the steps end",
        ),
        (
            lambda pipe, x: pipe.denoise(x, None, 0.3, 0.5, method=IterativeDenoising(2)),
            "multiplier is 0.5; expected 1 with a method",
        ),
        (lambda pipe, x: pipe.encode(x, None, "high"), "noise_std is 'high'; expected a number or"),
        (
            lambda pipe, x: pipe.denoise(x, None, 0.3, method=IterativeDenoising(2, kind="sde"), key=0),
            "key is 0; expected one key",
        ),
        (lambda *_: IterativeDenoising(0), "num_steps is 0"),
        (lambda *_: IterativeDenoising(2, kind="sde", order=2), "steps of order 1 alone"),
        (lambda *_: Guidance(1.0, "shift", rule="product"), "rule 'product' guides both"),
        (lambda *_: Guidance(1.0, blocks=0), "guidance.blocks is 0"),
        (lambda *_: Noise("levels", std_min=0.3, std_max=0.1), "expected 0 < std_min < std_max"),
        (lambda *_: FlowTask(TINY, LEVELS), "expected True with 'levels'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(call, message):
    pipe = TarFlowPipeline(CONDITIONAL, random_variables(CONDITIONAL), LEVELS)
    with pytest.raises(ValueError, match=message) as error:
        call(pipe, images_of(TINY))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_levels_far_outside_the_training_s_are_told_of_once(caplog):
    pipe, images = gaussian_flow(), images_of(CONDITIONAL)[..., :1]
    arguments.warn_once.cache_clear()
    for std in (0.01, 0.3, 0.32, [0.01, 0.02, 0.009]):
        pipe.encode(images, None, std)
    assert caplog.records == []
    for std in (5.0, [0.1, 0.1, 0.001]):
        pipe.encode(images, None, std)
    told = "noise_std is far outside the levels of this flow's training, 0.01 to 0.3"
    assert [record.message for record in caplog.records] == [told]


@pytest.mark.slow
def test_one_step_may_begin_below_the_lowest_level():
    pipe, images = gaussian_flow(), images_of(CONDITIONAL)[..., :1]
    single = pipe.denoise(images, None, 0.005, method=IterativeDenoising(1))
    np.testing.assert_allclose(single, pipe.denoise(images, None, 0.005), atol=1e-6)


def one_level():
    return TarFlowPipeline(TINY, random_variables(TINY), Noise("gaussian", 0.1))
