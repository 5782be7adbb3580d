"""The pipeline as a Python object: under JAX's transformations, copied, pickled, printed, misused."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tarflow_jax import Guidance, Noise, TarFlowPipeline, pipeline
from tarflow_jax.runtime import make_mesh
from tarflow_jax.sampling import Jacobi
from tiny_models import LABELS, TINY, images_of, random_variables


@pytest.fixture(scope="module")
def pipe():
    return TarFlowPipeline(TINY, random_variables(TINY, scale=0.03), Noise("gaussian", 0.1))


@pytest.mark.slow
def test_gradients_of_log_prob_are_the_score_time_and_again(pipe):
    images = images_of(TINY)
    score = jax.grad(lambda x: pipe.log_prob(x, LABELS).sum())
    denoised = pipe.denoise(images, LABELS, noise_std=1.0)
    for _ in range(2):
        np.testing.assert_allclose(images + score(images), denoised, atol=1e-4)
    np.testing.assert_allclose(jax.jit(score)(images), score(images), atol=1e-5)


@pytest.mark.slow
def test_methods_under_jit_and_vmap_give_what_they_give_outside(pipe):
    images, labels = np.asarray(images_of(TINY)), jnp.asarray(LABELS)
    expected = pipe.log_prob(images, labels)
    np.testing.assert_allclose(jax.jit(pipe.log_prob)(images, labels), expected, rtol=1e-5)
    one_by_one = jax.vmap(lambda x, y: pipe.log_prob(x[None], y[None])[0])(images, labels)
    np.testing.assert_allclose(one_by_one, expected, rtol=1e-5)
    latents, log_det = jax.jit(pipe.encode)(images, labels)
    np.testing.assert_allclose(log_det, pipe.encode(images, labels)[1], rtol=1e-5, atol=1e-5)

    @jax.jit
    def draw(latents, labels):
        return pipe.decode_trace(latents, labels, Guidance(1.0))

    for found, wanted in zip(draw(latents, labels), pipe.decode_trace(latents, labels, Guidance(1.0)), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    with pytest.raises(ValueError, match="labels are float32"):
        jax.jit(pipe.log_prob)(images, labels.astype(jnp.float32))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_copies_compute_the_same(pipe, duplicate):
    images = images_of(TINY)
    np.testing.assert_array_equal(duplicate(pipe).log_prob(images, LABELS), pipe.log_prob(images, LABELS))


def test_a_pipeline_on_a_mesh_says_what_to_do_instead_of_being_copied(pipe):
    sharded = TarFlowPipeline(TINY, pipe.variables, pipe.noise, mesh=make_mesh())
    with pytest.raises(ValueError, match="on a mesh is not copied or pickled; save_pretrained"):
        copy.deepcopy(sharded)


def test_it_says_what_it_is(pipe):
    number = sum(leaf.size for leaf in jax.tree.leaves(pipe.variables))
    expected = f"4x6x3, 2-16-(1, 2, 1), 3 classes, noise gaussian 0.1, {number:,} parameters on {jax.devices()[0]}"
    assert repr(pipe) == f"TarFlowPipeline({expected})"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe, x: pipe.decode(x, guidance=1.5), "guidance is 1.5; expected Guidance"),
        (lambda pipe, x: pipe.decode(x, decoder=["a", Jacobi(), Jacobi()]), "decoder has 'a'; expected Sequential"),
        (lambda pipe, x: pipe.decode(x, decoder=[Jacobi()]), "1 decoders are given; expected one for each of 3"),
        (lambda pipe, x: pipe.denoise(x, noise_std=-1.0), "noise_std is -1.0; expected a finite number from 0"),
        (lambda pipe, x: pipe.denoise(x, multiplier=float("nan")), "multiplier is nan; expected a finite number"),
        (lambda pipe, x: pipe.denoise(x, multiplier=float("inf")), "multiplier is inf; expected a finite number"),
        (lambda pipe, x: pipe.log_prob(x[:0]), r"images have shape \(0, 4, 6, 3\); expected"),
        (lambda pipe, x: pipe.sample(jax.random.key(0), -1), "num_images is -1; expected a positive number"),
        (lambda pipe, x: pipe.sample(jax.random.key(0), 1, guidance=Guidance(float("nan"))), "weight is nan"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(pipe, call, message):
    with pytest.raises(ValueError, match=message) as refused:
        call(pipe, images_of(TINY))
    assert "\n" not in str(refused.value)


def test_images_of_another_range_are_told_of_once(pipe, caplog):
    pipeline._warn_of_range.cache_clear()
    for _ in range(2):
        pipe.log_prob(255 * np.abs(images_of(TINY)), LABELS)
    assert [record.message.partition(";")[0] for record in caplog.records] == ["images reach far outside [-1, 1]"]
