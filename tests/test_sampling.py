"""The inverse, guidance and noise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tarflow_jax import Guidance, Noise, TarFlow
from tarflow_jax.flow import (
    BlockInverse,
    Conditioning,
    FlowBlock,
    TarFlowConfig,
    block_orders,
    from_tokens,
    permute,
    to_tokens,
    unpermute,
)
from tarflow_jax.flow.tarflow import equal_blocks
from tarflow_jax.noise import to_float
from tarflow_jax.sampling import GaussSeidelJacobi, Sequential, guided_trajectory
from tiny_models import LABELS, TINY, TRIANGULAR, VP, decode, encode, images_of, new_variables, random_variables

UNCONDITIONAL = dataclasses.replace(TINY, num_classes=0)


@functools.partial(jax.jit, static_argnums=0)
def decode_by_recomputing(config, variables, latents, labels, guidance):
    """The inverse as the equations say it: no cache, the whole sequence again for every token."""
    tokens = to_tokens(config, latents)
    batch_size, weights = latents.shape[0], guidance.weights(config.num_tokens)
    for k in reversed(range(config.num_blocks)):
        order = block_orders(config, {})[k][None]

        def affine(x, labels, temperature, k=k, order=order):
            params = {"params": variables["params"][f"block_{k}"]}
            scale = None if temperature is None else jnp.full(batch_size, temperature)
            block = FlowBlock(config, k)
            return block.apply(params, x, order, Conditioning(labels), scale, method="predict")[0].shift_right()

        def guide(guided, unguided, w):
            logs = (affine._replace(scale=jnp.log(affine.scale)) for affine in (guided, unguided))
            found = jax.tree.map(lambda a, u: a + w * (a - u), *logs)
            return found._replace(scale=jnp.exp(found.scale))

        z = permute(tokens, order)
        x = z
        for i in range(1, config.num_tokens):
            guided, unguided = affine(x, labels, None), affine(x, None, guidance.attention_temperature)
            x = x.at[:, i].set(guide(guided, unguided, weights[i - 1]).inverse(z)[:, i])
        tokens = unpermute(x, order)
    return from_tokens(config, tokens)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "temperature", "config"),
    [("constant", 0.6, TINY), ("linear", 1.0, TRIANGULAR)],
    ids=lambda value: None if isinstance(value, str | float) else "triangular" if value.triangular else "diagonal",
)
def test_the_cached_inverse_equals_the_one_that_recomputes(schedule, temperature, config):
    variables, latents = random_variables(config), images_of(config)
    guidance = Guidance(0.7, "both", schedule, temperature)
    expected = decode_by_recomputing(config, variables, latents, LABELS, guidance)
    actual, *_ = decode(config, variables, latents, LABELS, guidance)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_which_blocks_are_equal_blocks():
    config = dataclasses.replace(TINY, num_blocks=6, layers_per_block=(2, 2, 2, 2, 1, 1))
    sequential = (Sequential(),) * 6
    assert equal_blocks(config, sequential) == [range(4), range(4, 6)]
    partly_guided = tuple((one, k >= 2) for k, one in enumerate(sequential))
    assert equal_blocks(config, partly_guided) == [range(2), range(2, 4), range(4, 6)]
    limited = dataclasses.replace(config, image_limit=1.0)
    assert equal_blocks(limited, sequential) == [range(1), range(1, 4), range(4, 6)]
    mixed = (*sequential[:3], GaussSeidelJacobi(2), GaussSeidelJacobi(2), GaussSeidelJacobi(3))
    assert equal_blocks(config, mixed) == [range(3), range(3, 4), range(4, 5), range(5, 6)]


@pytest.mark.slow
def test_blocks_in_one_loop_give_what_each_gives_by_itself():
    config = dataclasses.replace(TRIANGULAR, layers_per_block=1)
    variables, latents = random_variables(config, scale=0.05), images_of(config)
    assert equal_blocks(config, (Sequential(),) * 3) == [range(3)]
    actual = decode(config, variables, latents, LABELS)

    @jax.jit
    def one_by_one(variables, latents):
        tokens, images = to_tokens(config, latents), [latents]
        for k in reversed(range(3)):
            order, params = jnp.asarray(block_orders(config, {})[k])[None], variables["params"][f"block_{k}"]
            block = BlockInverse.of(FlowBlock(config, k), params, order, Conditioning(LABELS))
            tokens = unpermute(Sequential().invert(block, permute(tokens, order)).x, order)
            images.append(from_tokens(config, tokens))
        return jnp.stack(images, 1)

    np.testing.assert_allclose(actual.trajectory, one_by_one(variables, latents), atol=1e-5)
    np.testing.assert_array_equal(actual.updates, np.full((3, 3), config.num_tokens - 1))


def test_twice_as_many_blocks_are_no_larger_a_program():
    def products(num_blocks):
        config = dataclasses.replace(TINY, num_blocks=num_blocks, layers_per_block=1)
        variables = jax.eval_shape(lambda: new_variables(config))
        return str(jax.make_jaxpr(functools.partial(decode, config))(variables, images_of(config))).count("dot_general")

    assert products(8) == products(4) > 0


def test_guidance_weights():
    np.testing.assert_allclose(Guidance(2.0, schedule="linear").weights(5)[:4], [0.5, 1.0, 1.5, 2.0])
    np.testing.assert_allclose(Guidance(2.0, schedule="constant").weights(3), [2, 2, 2])


def test_another_weight_or_temperature_compiles_nothing_new():
    @jax.jit
    def weights(guidance):
        return guidance.weights(4) / guidance.attention_temperature

    first = weights(Guidance(1.0))
    np.testing.assert_allclose(weights(Guidance(3.0, attention_temperature=0.5)), 6 * first)
    assert weights._cache_size() == 1
    weights(Guidance(1.0, "shift"))
    weights(Guidance(1.0, schedule="constant"))
    assert weights._cache_size() == 3
    guidance = Guidance(1.5, "shift", "constant", 0.7)
    assert jax.tree.map(lambda x: x, guidance) == guidance
    assert jax.tree.map(jnp.isfinite, guidance).target == "shift"  # no check of what is no number


@pytest.mark.parametrize(
    ("config", "weight", "temperature"),
    [(TINY, 0.0, 0.5), pytest.param(UNCONDITIONAL, 3.0, 1.0, marks=pytest.mark.slow)],
    ids=["weight-0", "unconditional-temperature-1"],
)
def test_guidance_that_changes_nothing(config, weight, temperature):
    variables, latents = random_variables(config), images_of(config)
    labels = LABELS if config.num_classes else None
    plain, *_ = decode(config, variables, latents, labels)
    guidance = Guidance(weight, attention_temperature=temperature)
    guided, *_ = decode(config, variables, latents, labels, guidance)
    np.testing.assert_allclose(guided, plain, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config", [TRIANGULAR, dataclasses.replace(VP, num_classes=3)], ids=["triangular", "vp"])
def test_guided_decoding_undoes_guided_encoding(config):
    variables, images, labels = random_variables(config), images_of(config), jnp.asarray(LABELS)
    weights = jnp.array([1.5, 1.5, 0.7])
    latents, read = jax.jit(guided_trajectory, static_argnums=0)(
        TarFlow(config), variables, images, Conditioning(labels), weights
    )
    for i, weight in enumerate((1.5, 0.0, 0.7)):  # the second image has no label
        row = slice(i, i + 1)
        drawn = decode(config, variables, latents[row], labels[row], Guidance(weight))
        np.testing.assert_allclose(drawn.images, images[row], atol=1e-4)
        np.testing.assert_allclose(drawn.trajectory[0, :0:-1], read[i], atol=1e-4)
    assert float(jnp.abs(latents - encode(config, variables, images, labels)[0]).max((1, 2, 3))[0]) > 0.01


def test_targets_differ_and_unlabelled_images_are_not_guided_by_class():
    variables, latents = random_variables(TINY), images_of(TINY)
    plain, *_ = decode(TINY, variables, latents, LABELS)
    drawn = {
        target: decode(TINY, variables, latents, LABELS, Guidance(1.0, target))[0]
        for target in ("both", "log_scale", "shift")
    }
    for images in drawn.values():
        np.testing.assert_allclose(images[1], plain[1], atol=2e-5)  # label -1
        assert float(jnp.abs(images[0] - plain[0]).max()) > 0.01
    assert float(jnp.abs(drawn["log_scale"] - drawn["shift"]).max()) > 0.01


@pytest.mark.slow
def test_single_token_images():
    config = TarFlowConfig(2, 1, 2, 8, 2, 1, head_dim=8)
    variables, latents = random_variables(config), images_of(config)
    np.testing.assert_array_equal(decode(config, variables, latents)[0], latents)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": float("nan")}, "weight is nan"),
        ({"target": "scale"}, "target is 'scale'"),
        ({"schedule": "cosine"}, "schedule is 'cosine'"),
        ({"attention_temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_impossible_guidance_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**fields)


def test_noise():
    images = jnp.full((2, 64, 64, 1), 255, jnp.uint8)
    key = jax.random.key(0)
    np.testing.assert_array_equal(to_float(images), 1)
    noisy = Noise("gaussian", 0.2)(key, images)
    assert abs(float(noisy.mean()) - 1) < 0.01
    assert abs(float(noisy.std()) - 0.2) < 0.01
    uniform = Noise("uniform")(key, images)
    assert 1 - 2 / 256 <= float(uniform.min()) < float(uniform.max()) <= 1
    for fields in (("gaussian", 0.0), ("uniform", 0.1), ("laplace", 0.1)):
        with pytest.raises(ValueError, match="noise"):
            Noise(*fields)
