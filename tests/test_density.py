"""`fit_density`: a flow of an unnormalised density, by reverse KL."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tarflow_jax

SMALL = {"num_blocks": 2, "width": 16, "head_dim": 16}


@pytest.mark.slow
def test_fit_density_finds_a_correlated_gaussian():
    covariance = 0.8 ** np.abs(np.subtract.outer(np.arange(4), np.arange(4)))
    precision, mean = np.linalg.inv(covariance).astype(np.float32), np.array([0.5, -0.5, 0.2, 0.0], np.float32)

    def log_density(x):
        centred = x - mean[None]
        return 3.0 - 0.5 * jnp.einsum("bi,ij,bj->b", centred, precision, centred)

    flow = tarflow_jax.fit_density(log_density, 4, num_steps=400, batch_size=125, **SMALL)
    log_z = 3.0 + 0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1]
    x, log_q = flow.sample(jax.random.key(1), 20_000, return_log_prob=True)
    assert float((log_q - log_density(x)).mean()) + log_z < 0.01  # KL(q || p)
    assert flow.card["metrics"]["KL - log Z (nats)"] + log_z < 0.01
    weighted = tarflow_jax.importance(flow, log_density, jax.random.key(2), 20_000)
    np.testing.assert_allclose(weighted.log_z, log_z, atol=0.01)
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.15)


@pytest.mark.slow
def test_fit_density_of_sequences_says_where_the_density_is_no_number():
    def wrong(x):  # 0 outside the unit ball
        return jnp.where(jnp.square(x).sum((1, 2)) < 1, 0.0, -jnp.inf)

    with pytest.raises(ValueError, match=r"the loss is not finite at step 1; look .* where p is 0"):
        tarflow_jax.fit_density(wrong, (3, 2), num_steps=2, batch_size=8, **SMALL | {"num_blocks": 1})


@pytest.mark.parametrize("log_density", [lambda x: x.sum(), lambda x: x, lambda x: None])
def test_a_density_of_another_shape_is_refused(log_density):
    with pytest.raises(ValueError, match=r"log_density returned .*; expected an array of shape \[256\]"):
        tarflow_jax.fit_density(log_density, 4)


@pytest.mark.slow
def test_a_density_of_one_number_is_fitted_behind_a_start_token():
    flow = tarflow_jax.fit_density(
        lambda x: -0.5 * jnp.square((x[:, 0] - 2) / 0.5), 1, num_steps=200, batch_size=255, **SMALL
    )
    drawn = flow.sample(jax.random.key(0), 1000)
    np.testing.assert_allclose([drawn.mean(), drawn.std()], [2, 0.5], atol=0.1)
