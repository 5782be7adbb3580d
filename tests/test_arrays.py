"""Flows of arrays that are not images: sequences, masks, conditions, orders, units; and `fit`."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tarflow_jax
from tarflow_jax import Guidance, IterativeDenoising, Noise, TarFlow, TarFlowConfig, TarFlowPipeline
from tarflow_jax.flow import Conditioning, block_orders
from tarflow_jax.flow.tokens import order_within
from tarflow_jax.sampling import GaussSeidelJacobi, Jacobi
from tiny_models import new_variables, random_variables

SEQUENCES = TarFlowConfig(
    sequence_shape=(5, 2), width=16, head_dim=8, num_blocks=3, layers_per_block=1, condition_dim=3, orders="random",
    condition_kind="tokens", rotary=True,
)  # fmt: skip
ODD = 127  # rows in a batch, which one device fits: eight of them wait for each other on fewer cores
SMALL_FIT = {"num_steps": 2, "batch_size": 32, "num_blocks": 1, "width": 8, "head_dim": 8}
LENGTHS = np.array([5, 3, 1, 4])
EXISTS = np.arange(5)[None] < LENGTHS[:, None]


@functools.cache
def pipeline(config=SEQUENCES):
    variables = random_variables(config)
    constants = dict(variables["constants"])
    rng = np.random.default_rng(1)
    for name in ("mean", "condition_mean"):
        constants[name] = jnp.asarray(rng.normal(size=constants[name].shape), jnp.float32)
    for name in ("std", "condition_std"):
        constants[name] = jnp.asarray(rng.uniform(1, 3, constants[name].shape), jnp.float32)
    return TarFlowPipeline(config, {**variables, "constants": constants})


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(4, 5, 2)).astype(np.float32), rng.normal(size=(4, 5, 3)).astype(np.float32)


def test_the_jacobian_of_a_sequence_has_the_log_det_and_decoding_undoes_encoding():
    pipe, (x, condition) = pipeline(), arrays()
    latents, log_det = pipe.encode(x, condition=condition)
    one = lambda x: pipe.encode(x[None], condition=condition[:1])[0].ravel()  # noqa: E731
    jacobian = jax.jit(jax.jacfwd(one))(x[0]).reshape(10, 10)
    np.testing.assert_allclose(np.linalg.slogdet(jacobian)[1], log_det[0], atol=1e-4)
    np.testing.assert_allclose(pipe.decode(latents, condition=condition), x, atol=1e-5)


def test_padding_touches_nothing():
    pipe, (x, condition) = pipeline(), arrays()
    padded, hidden = (np.where(EXISTS[..., None], a, np.nan) for a in (x, condition))
    hidden = np.where(EXISTS[..., None], condition, 7.0)
    expected = pipe.encode(x, condition=condition, mask=EXISTS)
    chex.assert_trees_all_equal(pipe.encode(padded, condition=hidden, mask=LENGTHS), expected)
    assert not np.any(np.asarray(expected[0])[~EXISTS])

    def total(x):
        return pipe.log_prob(x, condition=condition, mask=LENGTHS).sum()

    gradients = np.asarray(jax.jit(jax.grad(total))(padded))
    assert np.all(np.isfinite(gradients[EXISTS]))
    assert np.all(gradients[EXISTS] != 0)
    assert not np.any(gradients[~EXISTS])


def test_a_shorter_sequence_is_a_flow_of_fewer_tokens():
    """With alternating orders, the first n tokens of a longer flow are a flow of n tokens."""
    config = dataclasses.replace(SEQUENCES, orders="alternate")
    short = dataclasses.replace(config, sequence_shape=(3, 2))
    pipe, (x, condition) = pipeline(config), arrays()

    def cut(path, leaf):
        by_token = path[-1].key in ("position_embedding", "mean", "std")
        return leaf[:3] if by_token else leaf

    variables = jax.tree_util.tree_map_with_path(cut, pipe.variables)
    expected = TarFlowPipeline(short, variables).log_prob(x[:, :3], condition=condition[:, :3])
    lengths = np.full(4, 3)
    np.testing.assert_allclose(pipe.log_prob(x, condition=condition, mask=lengths), expected, atol=1e-4)


@pytest.mark.parametrize(
    "decoder",
    [None, *(pytest.param(each, marks=pytest.mark.slow) for each in (Jacobi(), GaussSeidelJacobi(2)))],
    ids=str,
)
def test_log_q_of_a_sample_is_its_log_prob(decoder):
    pipe, condition = pipeline(), arrays()[1]
    x, log_q = pipe.sample(
        jax.random.key(0), 4, condition=condition, mask=LENGTHS, decoder=decoder, return_log_prob=True
    )
    assert not np.any(np.asarray(x)[~EXISTS])
    np.testing.assert_allclose(log_q, pipe.log_prob(x, condition=condition, mask=LENGTHS), atol=1e-4)


def test_units_of_a_thousand_shift_log_prob_by_their_logarithm():
    pipe, (x, condition) = pipeline(), arrays()
    constants = pipe.variables["constants"]
    scaled = constants | {"mean": 1000 * constants["mean"], "std": 1000 * constants["std"]}
    scaled = TarFlowPipeline(SEQUENCES, {**pipe.variables, "constants": scaled})
    for mask, numbers in ((None, 10), (LENGTHS, 2 * LENGTHS)):
        shift = np.asarray(pipe.log_prob(x, condition=condition, mask=mask)) - np.asarray(
            scaled.log_prob(1000 * x, condition=condition, mask=mask)
        )
        np.testing.assert_allclose(shift, numbers * np.log(1000), rtol=1e-5)


def test_a_condition_of_a_token_reaches_that_token_and_the_one_before_it_in_a_block():
    config = dataclasses.replace(SEQUENCES, num_blocks=1)
    pipe, (x, condition) = pipeline(config), arrays()
    order = block_orders(config, jax.device_get(pipe.variables))[0]
    moved = condition.copy()
    moved[:, order[3]] += 1
    changed = np.any(np.asarray(pipe.encode(x, condition=moved)[0] != pipe.encode(x, condition=condition)[0]), (0, 2))
    # The token that is third in order predicts the fourth, and sees its condition; later ones see both.
    np.testing.assert_array_equal(changed[np.asarray(order)], [False, False, False, True, True])


@pytest.mark.slow
def test_no_condition_is_the_null_condition_and_guidance_leads_away_from_it():
    pipe, (x, condition) = pipeline(), arrays()
    null = jnp.full_like(condition, jnp.nan)
    flow, variables = TarFlow(SEQUENCES), pipe.variables
    with_null = flow.apply(variables, x, Conditioning(condition=null))[0]
    chex.assert_trees_all_close(pipe.encode(x)[0], with_null, atol=1e-6)
    latents = pipe.latents(jax.random.key(0), 4)
    unguided, away = (pipe.decode(latents, None, Guidance(w), condition=condition) for w in (0.0, -1.0))
    assert float(jnp.abs(unguided - away).max()) > 0.1
    # At weight -1 in every token, the guided map is the unguided pass's.
    away = pipe.decode(latents, None, Guidance(-1.0, schedule="constant"), condition=condition)
    np.testing.assert_allclose(away, pipe.decode(latents), atol=1e-4)


@pytest.mark.slow
def test_a_flow_that_has_seen_every_condition_is_not_used_without_one():
    rng = np.random.default_rng(0)
    x, condition = rng.normal(size=(64, 2)), rng.normal(size=(64, 1))
    flow = tarflow_jax.fit(x, condition=condition, validation=0, **SMALL_FIT)
    missing = r"condition is missing; expected \(4, 1\), since this flow was fitted without drop_condition"
    with pytest.raises(ValueError, match=missing):
        flow.sample(jax.random.key(0), 4)
    with pytest.raises(ValueError, match=missing):
        flow.log_prob(np.float32(x[:4]))
    with pytest.raises(ValueError, match="guidance needs a flow fitted with drop_condition, or a null_condition"):
        flow.sample(jax.random.key(0), 4, guidance=Guidance(1.0), condition=condition[:4])
    flow = tarflow_jax.fit(x, condition=condition, validation=0, drop_condition=0.5, **SMALL_FIT)
    assert flow.sample(jax.random.key(0), 4).shape == (4, 2)


@pytest.mark.slow
def test_denoising_in_steps_is_conditional_too():
    config = dataclasses.replace(SEQUENCES, noise_conditional=True)
    pipe = TarFlowPipeline(config, pipeline(config).variables, Noise("levels", std_min=0.1, std_max=0.5))
    (x, condition), method = arrays(), IterativeDenoising(2)
    denoise = functools.partial(pipe.denoise, x, noise_std=0.5, method=method)
    assert float(jnp.abs(denoise(condition=condition) - denoise()).max()) > 1e-3
    short = np.asarray(denoise(condition=condition, mask=LENGTHS))
    hidden = np.where(EXISTS[..., None], condition, 7.0)
    np.testing.assert_array_equal(denoise(condition=hidden, mask=LENGTHS)[EXISTS], short[EXISTS])


def test_the_order_of_a_short_sequence_has_its_padding_last():
    order = order_within(np.array([4, 0, 3, 1, 2]), jnp.array([5, 3]))
    np.testing.assert_array_equal(order, [[4, 0, 3, 1, 2], [0, 1, 2, 4, 3]])


def test_a_model_folder_holds_units_and_orders(tmp_path):
    pipe, (x, condition) = pipeline(), arrays()
    pipe.save_pretrained(tmp_path / "model")
    again = TarFlowPipeline.from_pretrained(tmp_path / "model")
    assert again.config == SEQUENCES
    np.testing.assert_allclose(again.log_prob(x, condition=condition), pipe.log_prob(x, condition=condition), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": [[True, False, True, True, True]] * 4}, "mask has a hole in row 0"),
        ({"mask": np.zeros(4, int)}, "row 0 of mask has 0 tokens"),
        ({"mask": np.ones((4, 4), bool)}, r"expected bool \[4, 5\]"),
        ({"condition": np.ones((4, 5, 2))}, r"condition has shape \(4, 5, 2\); expected \(4, 5, 3\)"),
        ({"condition": np.full((4, 5, 3), np.inf)}, "not finite in row 0"),
        ({"images": np.zeros((4, 5, 3))}, r"images have shape \(4, 5, 3\); expected \[B, T, D\] = \[B, 5, 2\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline().log_prob(**{"images": arrays()[0]} | arguments)


def test_a_flow_is_of_images_or_of_sequences():
    for fields in ({}, {"sequence_shape": (3, 2), "patch_size": 2}, {"image_size": 8, "image_channels": 1}):
        with pytest.raises(ValueError, match="sequence_shape"):
            TarFlowConfig(**fields, width=16, head_dim=8, num_blocks=1, layers_per_block=1)


TABLE = np.random.default_rng(0).normal(size=(40, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": np.where(np.arange(40)[:, None] == 7, np.nan, TABLE)}, "x is nan in row 7, column 0"),
        ({"x": TABLE * [1, 0, 1] + 4}, r"x is constant in column 1 \(4\)"),
        ({"x": TABLE[:, 0]}, r"expected floats \[N, F\] or \[N, T, D\]"),
        ({"x": TABLE.astype(int)}, "x is int64"),
        ({"condition": TABLE[:9]}, r"expected \[40, C\] or \[40, 3, C\]"),
        ({"condition": TABLE[:, :1] * np.nan}, "condition is nan in row 0, column 0"),
        ({"mask": np.ones((40, 3), bool)}, "x is a table"),
        ({"labels": np.full(40, -1)}, "expected integers"),
        ({"noise": np.nan}, "noise is nan; expected a standard deviation"),
        ({"noise": -0.1}, "noise is -0.1"),
    ],
)
def test_fit_names_what_is_wrong_with_the_data(arguments, message):
    with pytest.raises(ValueError, match=message):
        tarflow_jax.fit(**{"x": TABLE} | arguments)


@pytest.mark.slow
def test_a_column_is_fitted_behind_a_start_token(tmp_path):
    rng = np.random.default_rng(0)
    condition = rng.normal(size=(2000, 1))
    x = 3 + 2 * condition + 0.5 * rng.normal(size=(2000, 1))
    flow = tarflow_jax.fit(x, condition, num_steps=200, num_blocks=2, width=16, head_dim=16)
    assert flow.config.start_token
    assert abs(flow.card["metrics"]["log p of rows held out (nats)"] + 0.5 * np.log(2 * np.pi * np.e * 0.25)) < 0.1
    flow.save_pretrained(tmp_path / "model")
    drawn = TarFlowPipeline.from_pretrained(tmp_path / "model").sample(
        jax.random.key(0), 1000, condition=np.ones((1000, 1))
    )
    np.testing.assert_allclose([drawn.mean(), drawn.std()], [5, 0.5], atol=0.1)


@pytest.mark.slow
def test_fit_says_what_float32_costs(caplog):
    tarflow_jax.fit(TABLE + 1e5, num_steps=1, batch_size=4, num_blocks=1, width=8, head_dim=8)
    assert "float32 rounds column" in caplog.text


@pytest.mark.slow
def test_importance_weights_of_a_gaussian_find_its_normaliser():
    """A new flow is a standard Gaussian in the units of its set."""
    config = TarFlowConfig(sequence_shape=(2, 0), width=8, head_dim=8, num_blocks=2, layers_per_block=1)
    variables = new_variables(config)
    variables["constants"] = {"mean": jnp.array([[1.0], [2.0]]), "std": jnp.array([[3.0], [0.5]])}
    flow = TarFlowPipeline(config, variables)

    def log_density(x):  # 5 times a narrower Gaussian's density, on the right half alone
        inside = jnp.log(5.0) - 0.5 * jnp.square((x - jnp.array([[1.0, 2.0]])) / jnp.array([[2.0, 0.4]])).sum(1)
        return jnp.where(x[:, 0] > 1, inside, -jnp.inf)

    weighted = tarflow_jax.importance(flow, log_density, jax.random.key(0), 20_000)
    assert weighted.x.shape == (20_000, 2)
    np.testing.assert_allclose(weighted.log_z, np.log(5 * 0.5 * 2 * np.pi * 2.0 * 0.4), atol=0.03)
    # E[w]² / E[w²] is a half, for the half-space, times that of the two Gaussians.
    ratio = np.array([2 / 3, 0.8])
    expected = 0.5 * np.prod(ratio * np.sqrt(2 - ratio**2))
    np.testing.assert_allclose(weighted.effective_sample_size / 20_000, expected, rtol=0.1)
    drawn = weighted.resampled(jax.random.key(1), 5_000)
    assert float(drawn[:, 0].min()) > 1
    with pytest.raises(ValueError, match="nan for sample 0"):
        tarflow_jax.importance(flow, lambda x: x[:, 0] * jnp.nan, jax.random.key(0), 3)
    with pytest.raises(ValueError, match=r"expected \[3\]"):
        tarflow_jax.importance(flow, lambda x: x, jax.random.key(0), 3)
    with pytest.raises(ValueError, match="-inf for every sample"):
        tarflow_jax.importance(flow, lambda x: x[:, 0] - jnp.inf, jax.random.key(0), 3)


@pytest.mark.slow
def test_fit_recovers_the_posteriors_of_a_linear_gaussian():
    rng, weights = np.random.default_rng(0), np.array([[1.0, 0.5], [-0.3, 2.0]])

    def simulate(count):
        parameters = rng.normal(size=(count, 2))
        return parameters, parameters @ weights.T + 0.5 * rng.normal(size=(count, 2))

    parameters, observed = simulate(20_000)
    # The condition in other units: it is standardised.
    flow = tarflow_jax.fit(
        parameters, 100 + 10 * observed, batch_size=ODD, num_steps=500, num_blocks=2, width=32, head_dim=32
    )
    _, observed = simulate(64)
    covariance = np.linalg.inv(np.eye(2) + weights.T @ weights / 0.25)
    means, stds = observed @ (covariance @ weights.T / 0.25).T, np.sqrt(np.diag(covariance))
    conditions = np.repeat(100 + 10 * observed, 500, 0)
    samples = np.asarray(flow.sample(jax.random.key(1), 64 * 500, condition=conditions)).reshape(64, 500, 2)
    errors = np.sqrt(np.square(samples.mean(1) - means).mean(0))  # those of 500 exact draws are 0.045 stds
    assert np.all(errors < 0.1 * stds)
    np.testing.assert_allclose(samples.var(1, ddof=1).mean(0), np.square(stds), rtol=0.05)


@pytest.mark.slow
def test_noise_in_fit_keeps_it_from_learning_few_rows_by_heart():
    rng, size = np.random.default_rng(0), {"num_steps": 200, "num_blocks": 2, "width": 32}
    scale = np.array([1.0, 1000.0])  # of the columns
    x = scale * rng.normal(size=(1000, 2))
    blurred = tarflow_jax.fit(x, validation=0, noise=1.0, batch_size=ODD, **size)  # a Gaussian of twice the variance
    samples = np.asarray(blurred.sample(jax.random.key(1), 4000)) / scale
    np.testing.assert_allclose(samples.var(0), 2.0, rtol=0.2)
    few, others = x[:40], scale * rng.normal(size=(1000, 2))
    overfitted, noisy = (
        tarflow_jax.fit(few, validation=0, noise=noise, batch_size=39, **size)
        .log_prob(others.astype(np.float32))
        .mean()
        for noise in (0.0, 0.3)
    )
    assert noisy > overfitted + 1


@pytest.mark.slow
def test_fit_reaches_the_entropy_of_sequences_of_different_lengths():
    """Gaussian random walks, of 2 to 6 steps, whose density is known."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 7, 6000)
    steps = rng.normal(size=(6000, 6, 1))
    x = np.cumsum(steps, axis=1)
    flow = tarflow_jax.fit(x, mask=lengths, batch_size=ODD, num_steps=300, num_blocks=2, width=32, head_dim=32)
    exists = np.arange(6)[None] < lengths[:, None]
    truth = -0.5 * ((np.square(steps[..., 0]) + np.log(2 * np.pi)) * exists).sum(1)
    found = np.asarray(flow.log_prob(x, mask=lengths))
    assert abs(truth.mean() - found.mean()) < 0.02
    assert np.sqrt(np.square(found - truth).mean()) < 0.3  # of 1.6 between sequences of six steps
