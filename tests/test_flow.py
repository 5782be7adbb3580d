"""What must always hold of the flow: round trips, Jacobians, causality, the reference's figures."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from tarflow_jax import TarFlow, TarFlowConfig
from tarflow_jax.flow import (
    BlockInverse,
    Conditioning,
    FlowBlock,
    block_orders,
    from_tokens,
    permute,
    to_tokens,
    unpermute,
)
from tarflow_jax.flow.block import Affine, solve_unit_lower
from tarflow_jax.likelihood import bits_per_dim, log_prob, training_loss
from tarflow_jax.sampling import denoise
from tarflow_jax.training.task import updated_prior
from tiny_models import LABELS, TINY, TRIANGULAR, VP, decode, encode, images_of, new_variables, random_variables


def test_tokens_are_row_major_and_channels_last():
    config = dataclasses.replace(TINY, image_channels=1)
    image = jnp.arange(24.0).reshape(1, 4, 6, 1)
    tokens = to_tokens(config, image)
    np.testing.assert_array_equal(tokens[0, 0], [0, 1, 6, 7])
    np.testing.assert_array_equal(tokens[0, 1], [2, 3, 8, 9])
    np.testing.assert_array_equal(tokens[0, 3], [12, 13, 18, 19])
    np.testing.assert_array_equal(from_tokens(config, tokens), image)


def test_permutations_alternate_and_undo_themselves():
    forwards, backwards, _ = block_orders(TINY, {})[:, None]
    x = jnp.arange(24).reshape(1, 6, 4)
    np.testing.assert_array_equal(permute(x, forwards), x)
    np.testing.assert_array_equal(permute(x, backwards), x[:, ::-1])
    np.testing.assert_array_equal(unpermute(permute(x, backwards), jnp.asarray(backwards)), x)


@pytest.mark.parametrize("config", [TINY, TRIANGULAR], ids=["diagonal", "triangular"])
def test_a_new_flow_is_the_identity(config):
    config = dataclasses.replace(config, num_classes=0)
    images = images_of(config)
    latents, log_det = encode(config, new_variables(config), images)
    np.testing.assert_array_equal(latents, images)
    np.testing.assert_array_equal(log_det, 0)


def uniform(fan_in):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as PyTorch has it."""
    return scipy.stats.uniform(-(fan_in**-0.5), 2 * fan_in**-0.5)


def test_initial_values():
    config = dataclasses.replace(TINY, width=128, head_dim=64, num_classes=50, layers_per_block=2)
    params = new_variables(config)["params"]["block_1"]
    layers, shapes = (
        params["layers"],
        {"qkv": 3 * 128, "attention_out": 128, "mlp_in": 4 * 128, "mlp_out": 128},
    )
    normal = scipy.stats.norm(0, 0.01)
    drawn = [(params[name], normal) for name in ("class_embedding", "position_embedding")]
    drawn.append((params["project_in"]["kernel"], uniform(config.token_dim)))
    for name, outputs in shapes.items():
        kernel, fan_in = layers[name]["kernel"], 4 * 128 if name == "mlp_out" else 128
        assert kernel.shape[0] == 2
        assert kernel.size == 2 * fan_in * outputs
        drawn += [(layer, uniform(fan_in)) for layer in kernel]
    for values, law in drawn:
        # A right initialiser fails one such test in 10⁴ seeds, and the seed is fixed; one 3% too wide fails.
        assert scipy.stats.kstest(np.asarray(values).ravel(), law.cdf).pvalue > 1e-4
    assert not np.asarray(params["project_out"]["kernel"]).any()


@pytest.mark.parametrize("config", [TINY, VP, TRIANGULAR], ids=["nvp-conditional", "vp", "triangular"])
def test_round_trip_and_log_det_of_the_full_jacobian(config):
    variables, images = random_variables(config), images_of(config)
    labels = LABELS if config.num_classes else None
    latents, log_det = encode(config, variables, images, labels)
    assert float(jnp.abs(log_det).min()) > 0.1
    decoded, inverse_log_det, trajectory, *_ = decode(config, variables, latents, labels)
    np.testing.assert_allclose(decoded, images, atol=2e-5)
    np.testing.assert_allclose(inverse_log_det, log_det, atol=1e-4)
    chex.assert_shape(trajectory, (3, config.num_blocks + 1, *config.image_shape))
    np.testing.assert_array_equal(trajectory[:, 0], latents)
    np.testing.assert_array_equal(trajectory[:, -1], decoded)

    def forward(x):
        return encode(config, variables, x[None], labels if labels is None else labels[:1])[0].ravel()

    jacobian = jax.jit(jax.jacrev(forward))(images[0]).reshape(config.num_dims, config.num_dims)
    np.testing.assert_allclose(np.linalg.slogdet(jacobian)[1], log_det[0], atol=1e-4)


@pytest.mark.parametrize("k", [0, 1])
def test_a_block_is_causal_in_its_own_order(k):
    config = dataclasses.replace(TINY, num_classes=0)
    order = block_orders(config, {})[k][None]
    params = random_variables(config)["params"]["block_1"]

    def forward(x):
        z, _ = FlowBlock(config, 1).apply({"params": params}, unpermute(x[None], order), order, Conditioning())
        return permute(z, order)[0]

    jacobian = jax.jit(jax.jacrev(forward))(to_tokens(config, images_of(config))[0])
    size = jnp.abs(jacobian).max((1, 3))  # [T, T]
    assert float(jnp.triu(size, 1).max()) == 0
    assert float(jnp.tril(size, -1)[1:, 0].min()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("k", [0, 1])
def test_layers_behind_a_cache_equal_the_whole_sequence(k):
    params = random_variables(TRIANGULAR)["params"]["block_1"]
    x, order, given = (
        to_tokens(TINY, images_of(TINY)),
        jnp.asarray(block_orders(TINY, {})[k][None]),
        Conditioning(LABELS),
    )
    expected = FlowBlock(TRIANGULAR, 1).apply({"params": params}, x, order, given, method="predict")[0]
    block = BlockInverse.of(FlowBlock(TRIANGULAR, 1), params, order, given)
    actual, caches = block.predict(x)
    assert caches is None
    chex.assert_trees_all_close(actual, expected, atol=1e-5)

    caches = block.caches(len(x), 0)
    for i in range(x.shape[1]):
        affine, caches = block.predict(x[:, i : i + 1], tuple(cache.grow(i + 1) for cache in caches), i)
        chex.assert_trees_all_close(affine, jax.tree.map(lambda a, i=i: a[:, i : i + 1], expected), atol=1e-5)


def test_a_limit_of_the_inputs_changes_what_the_map_is_a_function_of_alone():
    config, variables = dataclasses.replace(TINY, image_limit=2.0, input_limit=3), random_variables(TINY)
    images = images_of(TINY)
    assert float(jnp.abs(images).max()) < 2
    far = images.at[:, 0, 0].multiply(1000.0)

    def affine(config, k, images):
        params = variables["params"][f"block_{k}"]
        tokens = to_tokens(config, images)
        order = block_orders(config, {})[0][None]
        return FlowBlock(config, k).apply({"params": params}, tokens, order, Conditioning(LABELS), method="predict")[0]

    chex.assert_trees_all_equal(affine(config, 0, far), affine(config, 0, jnp.clip(far, -2, 2)))
    chex.assert_trees_all_equal(affine(config, 0, images), affine(TINY, 0, images))
    chex.assert_trees_all_equal(affine(config, 1, far), affine(config, 1, jnp.clip(far, -3, 3)))
    latents, _ = encode(config, variables, far, LABELS)
    decoded, *_ = decode(config, variables, latents, LABELS)
    np.testing.assert_allclose(decoded, far, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_no_class_is_the_mean_embedding():
    variables, images = random_variables(TINY), images_of(TINY)
    none = encode(TINY, variables, images, None)
    chex.assert_trees_all_close(encode(TINY, variables, images, jnp.full(3, -1)), none, atol=1e-5)
    merged = jax.tree.map(jnp.copy, variables)
    for k in range(TINY.num_blocks):
        embedding = merged["params"][f"block_{k}"]["class_embedding"]
        merged["params"][f"block_{k}"]["class_embedding"] = jnp.broadcast_to(embedding.mean(0), embedding.shape)
    chex.assert_trees_all_close(encode(TINY, merged, images, jnp.array([0, 1, 2])), none, atol=1e-5)
    assert float(jnp.abs(encode(TINY, variables, images, LABELS)[0][0] - none[0][0]).max()) > 0.01


def affine_flow(config, log_scale, shift):
    """A flow that maps every token but the first of its one block by the same affine map."""
    params = new_variables(config)["params"]
    params["block_0"]["project_out"]["bias"] = jnp.concatenate([log_scale, shift])
    return {"params": params}


def test_an_affine_flow_of_a_gaussian_has_the_closed_form():
    config = dataclasses.replace(TINY, num_blocks=1, layers_per_block=1, num_classes=0, image_channels=1)
    log_scale, shift = jnp.linspace(-0.7, 0.4, 4), jnp.linspace(-1.0, 1.0, 4)
    variables, flow = affine_flow(config, log_scale, shift), TarFlow(config)
    scales = np.exp(np.concatenate([np.zeros((1, 4)), np.tile(log_scale, (5, 1))])).astype(np.float64)
    means = np.concatenate([np.zeros((1, 4)), np.tile(shift, (5, 1))])
    images = images_of(config)
    tokens = np.asarray(to_tokens(config, images), np.float64)
    expected = (-0.5 * ((tokens - means) / scales) ** 2 - np.log(scales) - 0.5 * np.log(2 * np.pi)).sum((1, 2))
    actual = jax.jit(log_prob, static_argnums=0)(flow, variables, images)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    bits = (-expected / config.num_dims + np.log(128)) / np.log(2)
    np.testing.assert_allclose(bits_per_dim(actual, config.num_dims), bits, rtol=1e-6)
    # Tweedie: the posterior mean of a Gaussian under Gaussian noise, with p(y) of variance scale².
    sigma = 0.3
    posterior = tokens - sigma**2 * (tokens - means) / scales**2
    denoised = jax.jit(denoise, static_argnums=0)(flow, variables, images, Conditioning(), noise_std=sigma)
    np.testing.assert_allclose(to_tokens(config, denoised), posterior, atol=1e-5)


def test_vp_prior_is_a_running_mean_of_squares():
    variance, z = jnp.array([[1.0, 2.0]]), jnp.array([[[3.0, 0.0]], [[1.0, 2.0]]])
    np.testing.assert_allclose(updated_prior(variance, z), [[1 + 0.1 * (5 - 1), 2 + 0.1 * (2 - 2)]], rtol=1e-6)


def test_bfloat16_keeps_log_det_and_loss_in_float32():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    variables, images = random_variables(config), images_of(config)
    latents, log_det = encode(config, variables, images, LABELS)
    exact, exact_log_det = encode(TINY, variables, images, LABELS)
    loss = jax.eval_shape(lambda: training_loss(TarFlow(config), variables, images, Conditioning(LABELS))[0])
    assert latents.dtype == log_det.dtype == loss.dtype == jnp.float32
    assert 0 < float(jnp.abs(latents - exact).max()) < 0.3
    np.testing.assert_allclose(log_det, exact_log_det, atol=0.2)  # of 72 terms


@pytest.mark.slow
def test_remat_changes_no_gradient():
    variables, images = random_variables(TINY), images_of(TINY)

    def gradient(config):
        return jax.jit(jax.grad(lambda v: training_loss(TarFlow(config), v, images, Conditioning(LABELS))[0]))(
            variables
        )

    chex.assert_trees_all_close(gradient(dataclasses.replace(TINY, remat="full")), gradient(TINY), atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("patch_size", 5, "not divisible by patch_size 5"),
        ("width", 20, "not a multiple of head_dim 8"),
        ("layers_per_block", (1, 2), "lists 2 blocks"),
        ("num_blocks", 0, "num_blocks is 0"),
        ("num_classes", -1, "num_classes is -1"),
        ("input_limit", -1, "input_limit is -1; expected a number from 0"),
        ("dtype", "float16", "dtype is 'float16'"),
        ("remat", "some", "remat is 'some'"),
    ],
)
def test_impossible_shapes_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **{field: value})


def test_config_survives_json_and_refuses_what_it_does_not_know():
    assert TarFlowConfig.from_dict(TINY.to_dict()) == TINY
    with pytest.raises(ValueError, match="unknown model field 'widht'; did you mean 'width'"):
        TarFlowConfig.from_dict({**TINY.to_dict(), "widht": 1})
    with pytest.raises(ValueError, match="width is '16'; expected int"):
        TarFlowConfig.from_dict({**TINY.to_dict(), "width": "16"})
    with pytest.raises(ValueError, match="width is 0; expected a number from 1"):
        TarFlowConfig.from_dict({name: value for name, value in TINY.to_dict().items() if name != "width"})


def test_triangular_maps_are_inverted_on_a_cpu_without_lapack_whose_threads_would_wait_for_each_other():
    keys = jax.random.split(jax.random.key(0), 2)
    z, lower = jax.random.normal(keys[0], (3, 5, 6)), jax.random.normal(keys[1], (3, 5, 15))
    affine = Affine(jnp.ones_like(z), jnp.zeros_like(z), lower)
    np.testing.assert_allclose(affine.forward(solve_unit_lower(lower, z)), z, atol=1e-4)
    assert "custom-call" not in jax.jit(solve_unit_lower).lower(lower, z).compile().as_text()
    on_tpu = jax.jit(solve_unit_lower).trace(lower, z).lower(lowering_platforms=("tpu",)).as_text()
    assert "triangular_solve" in on_tpu
    assert "while" not in on_tpu
