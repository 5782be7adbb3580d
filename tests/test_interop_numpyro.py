"""A flow as a NumPyro distribution: a prior of NUTS, a guide, and samples."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazy import Lazy
from tarflow_jax import Noise, TarFlowConfig, TarFlowPipeline
from test_arrays import SEQUENCES, pipeline
from tiny_models import LABELS, TINY, images_of, new_variables, random_variables

numpyro, interop = Lazy("numpyro"), Lazy("tarflow_jax.interop.numpyro")
MEAN, STD = np.array([1.0, -2.0], np.float32), np.array([0.5, 2.0], np.float32)


@pytest.fixture(autouse=True)
def promotion():
    """NumPyro adds integers to floats."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@functools.cache
def gaussian():
    """A new flow is a standard Gaussian in the units of its set."""
    config = TarFlowConfig(sequence_shape=(2, 0), width=8, head_dim=8, num_blocks=2, layers_per_block=1)
    constants = {"mean": jnp.asarray(MEAN[:, None]), "std": jnp.asarray(STD[:, None])}
    return TarFlowPipeline(config, {**new_variables(config), "constants": constants})


@pytest.mark.slow
def test_log_prob_and_samples_are_the_pipelines():
    conditions = jax.random.normal(jax.random.key(1), (3, 1, 5, 3))
    flow = pipeline(SEQUENCES)
    prior = interop.FlowDistribution(flow, conditions)
    assert (prior.batch_shape, prior.event_shape) == ((3, 1), (5, 2))
    drawn = jax.jit(lambda key: prior.sample(key, (4,)))(jax.random.key(0))
    assert drawn.shape == (4, 3, 1, 5, 2)
    np.testing.assert_allclose(drawn, prior.sample(jax.random.key(0), (4,)), atol=1e-5)
    found = prior.log_prob(drawn)
    for i in range(3):
        rows = jnp.tile(conditions[i], (4, 1, 1))
        np.testing.assert_allclose(found[:, i, 0], flow.log_prob(drawn[:, i, 0], condition=rows), atol=1e-4)
    # The distribution is a pytree: conditions may be traced.
    again = jax.jit(lambda d, x: d.log_prob(x))(prior, drawn)
    np.testing.assert_allclose(again, found, atol=1e-4)
    one = jax.vmap(lambda c, x: interop.FlowDistribution(flow, c).log_prob(x))(conditions[:, 0], drawn[0, :, 0])
    np.testing.assert_allclose(one, found[0, :, 0], atol=1e-4)


@pytest.mark.slow
def test_the_parameters_of_the_flow_are_leaves_of_the_distribution():
    prior, x = interop.FlowDistribution(gaussian()), jnp.zeros((3, 2))
    np.testing.assert_allclose(jax.jit(interop.FlowDistribution.log_prob)(prior, x), prior.log_prob(x), atol=1e-5)
    gradient = jax.grad(lambda prior: prior.log_prob(x).sum())(prior)
    leaves = jax.tree.leaves(gradient.flow.variables["params"])
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert any(np.abs(leaf).max() > 0 for leaf in leaves)


@pytest.mark.slow
def test_classes_and_images_and_what_does_not_fit():
    flow = TarFlowPipeline(TINY, random_variables(TINY), Noise("gaussian", 0.1))
    images = images_of(TINY)
    of_classes = interop.FlowDistribution(flow, labels=LABELS)
    assert (of_classes.batch_shape, of_classes.event_shape) == ((3,), (4, 6, 3))
    np.testing.assert_allclose(of_classes.log_prob(images), flow.log_prob(images, LABELS), atol=1e-4)
    np.testing.assert_allclose(
        of_classes.sample(jax.random.key(0)), flow.sample(jax.random.key(0), 3, LABELS, denoise=False), atol=1e-5
    )
    score = jax.grad(interop.FlowDistribution(flow).log_prob)(images[0])
    np.testing.assert_allclose(score, jax.grad(lambda x: flow.log_prob(x[None])[0])(images[0]), atol=1e-4)
    with pytest.raises(ValueError, match=r"condition has shape \(1, 4\); expected \(1, 5, 3\)"):
        interop.FlowDistribution(pipeline(SEQUENCES), jnp.zeros(4)).log_prob(jnp.zeros((5, 2)))
    with pytest.raises(ValueError, match="this model has no condition"):
        interop.FlowDistribution(flow, jnp.zeros(3)).log_prob(images)


def test_without_numpyro_one_line_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "tarflow_jax.interop.numpyro", raising=False)
    monkeypatch.setitem(sys.modules, "numpyro.distributions", None)
    with pytest.raises(ImportError, match="needs NumPyro; pip install numpyro"):
        import tarflow_jax.interop.numpyro  # noqa: F401


@pytest.mark.slow
def test_nuts_recovers_the_posterior_of_a_gaussian_prior():
    weights, sigma, observed = np.array([[1.0, 0.3], [-0.5, 1.0]], np.float32), 0.7, np.array([0.4, -1.0], np.float32)

    def model(observed=None):
        x = numpyro.sample("x", interop.FlowDistribution(gaussian()))
        numpyro.sample("y", numpyro.distributions.Normal(weights @ x, sigma).to_event(1), obs=observed)

    mcmc = numpyro.infer.MCMC(numpyro.infer.NUTS(model), num_warmup=300, num_samples=2000, progress_bar=False)
    mcmc.run(jax.random.key(0), observed)
    samples = np.asarray(mcmc.get_samples()["x"], np.float64)
    precision = np.diag(1 / np.square(STD)) + weights.T @ weights / sigma**2
    covariance = np.linalg.inv(precision)
    mean = covariance @ (MEAN / np.square(STD) + weights.T @ observed / sigma**2)
    effective = numpyro.diagnostics.effective_sample_size(samples[None])
    errors = np.sqrt(np.diag(covariance) / effective)
    assert effective.min() > 300
    assert np.all(np.abs(samples.mean(0) - mean) < 4 * errors)
    np.testing.assert_allclose(np.cov(samples.T), covariance, atol=6 * np.diag(covariance).max() / np.sqrt(300))

    drawn = numpyro.infer.Predictive(model, num_samples=2000)(jax.random.key(1))
    np.testing.assert_allclose(drawn["x"].mean(0), MEAN, atol=4 * STD.max() / np.sqrt(2000))
    np.testing.assert_allclose(drawn["x"].std(0), STD, rtol=0.1)
    np.testing.assert_allclose(drawn["y"].mean(0), weights @ MEAN, atol=0.25)

    # With the prior as the guide, the evidence bound is E log p(y | x) under the prior.
    def guide(observed):
        numpyro.sample("x", interop.FlowDistribution(gaussian()))

    bound = -numpyro.infer.Trace_ELBO(num_particles=4000).loss(jax.random.key(2), {}, model, guide, observed)
    residual = observed - weights @ MEAN
    spread = np.square(weights @ np.diag(STD)).sum()
    expected = -0.5 * (np.square(residual).sum() + spread) / sigma**2 - np.log(2 * np.pi * sigma**2)
    np.testing.assert_allclose(bound, expected, rtol=0.1)
