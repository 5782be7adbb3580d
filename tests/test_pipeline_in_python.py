"""The pipeline as a Python object: under JAX's transformations, copied, pickled, printed, misused."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runs import SMALL
from tarflow_jax import Guidance, IterativeDenoising, Noise, TarFlowPipeline, arguments
from tarflow_jax.errors import UserError
from tarflow_jax.sampling import GaussSeidelJacobi, Jacobi, Student
from tiny_models import LABELS, TINY, VP, images_of, random_variables


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


def test_it_says_what_it_is(pipe):
    number = sum(leaf.size for leaf in jax.tree.leaves(pipe.variables))
    expected = f"4x6x3, 2-16-(1, 2, 1), 3 classes, noise gaussian 0.1, {number:,} parameters on {jax.devices()[0]}"
    assert repr(pipe) == f"TarFlowPipeline({expected})"


@pytest.mark.slow
def test_arrays_may_be_closed_over_where_others_are_traced(pipe):
    images, labels = images_of(TINY), jnp.asarray(LABELS)
    expected = pipe.log_prob(images, labels)
    np.testing.assert_allclose(jax.jit(lambda y: pipe.log_prob(images, y))(labels), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda x: pipe.log_prob(x, LABELS))(images), expected, rtol=1e-5)
    by_class = jax.lax.map(lambda y: pipe.log_prob(images, jnp.full(3, y)), jnp.arange(TINY.num_classes))
    for y, found in enumerate(by_class):
        np.testing.assert_allclose(found, pipe.log_prob(images, np.full(3, y)), rtol=1e-5)


@pytest.mark.slow
def test_a_guidance_weight_may_be_traced(pipe):
    latents = images_of(TINY)
    draw = jax.jit(lambda weight: pipe.decode(latents, LABELS, Guidance(weight)))
    weights = jnp.array([0.5, 1.5])
    expected = jnp.stack([pipe.decode(latents, LABELS, Guidance(float(weight))) for weight in weights])
    np.testing.assert_allclose(jnp.stack([draw(weight) for weight in weights]), expected, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(draw)(weights), expected, atol=1e-5)
    temperature = lambda t: pipe.decode(latents, None, Guidance(1.0, attention_temperature=t))  # noqa: E731
    np.testing.assert_allclose(jax.jit(temperature)(0.7), temperature(0.7), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", [Jacobi(), GaussSeidelJacobi(2, tolerance=0)], ids=str)
def test_decoders_have_derivatives_in_latents_and_guidance_weight(decoder):
    pipe = TarFlowPipeline(SMALL, random_variables(SMALL, scale=0.03))
    latents, direction = images_of(SMALL), images_of(SMALL, seed=8)

    def total(latents, weight, decoder):
        found = pipe.decode_trace(latents, LABELS, Guidance(weight), decoder)
        return (found.images * direction).sum() + found.log_det.sum()

    by_latents, by_weight = jax.grad(total, (0, 1))(latents, 0.5, decoder)
    _, slope = jax.jvp(lambda *point: total(*point, decoder), (latents, 0.5), (direction, 1.0))
    np.testing.assert_allclose(slope, (by_latents * direction).sum() + by_weight, rtol=1e-4)
    step = 1e-2
    difference = [total(latents + sign * step * direction, 0.5 + sign * step, None) for sign in (1, -1)]
    np.testing.assert_allclose(slope, (difference[0] - difference[1]) / (2 * step), rtol=0.01)


REFUSED = [
    (lambda pipe, x: pipe.decode(x, guidance=1.5), "guidance is 1.5; expected Guidance"),
    (lambda pipe, x: pipe.decode(x, guidance=Guidance(1.0, blocks=99)), "blocks is 99; expected 'all' or at most 3"),
    (lambda pipe, x: pipe.decode(x, guidance=Guidance(jnp.ones(3))), r"weight has shape \(3,\); expected one number"),
    (lambda pipe, x: pipe.decode(x, decoder=["a", Jacobi(), Jacobi()]), "decoder has 'a'; expected Sequential"),
    (lambda pipe, x: pipe.decode(x, decoder=[Jacobi()]), "1 decoders are given; expected one for each of 3"),
    (lambda pipe, x: pipe.decode(x, decoder=5), "decoder is 5; expected a decoder"),
    (lambda pipe, x: pipe.decode(x, decoder=GaussSeidelJacobi(99)), "99 is too many, expected at most 5"),
    (lambda pipe, x: pipe.decode(x, decoder=Student(10**6)), "1000000 is too many, expected at most 5"),
    (lambda pipe, x: pipe.decode(None), "latents are None; expected floats"),
    (lambda pipe, x: pipe.decode(x[0]), r"latents have shape \(4, 6, 3\); expected"),
    (lambda pipe, x: pipe.denoise(x, noise_std=-1.0), "noise_std is -1.0; expected a number from 0"),
    (lambda pipe, x: pipe.denoise(x, noise_std="x"), "noise_std is 'x'; expected float"),
    (lambda pipe, x: pipe.denoise(x, noise_std=[0.1, 0.2]), r"noise_std is \[0.1, 0.2\]; expected float"),
    (lambda pipe, x: pipe.denoise(x, multiplier=float("nan")), "multiplier is nan; expected a finite number"),
    (lambda pipe, x: pipe.denoise(x, multiplier=float("inf")), "multiplier is inf; expected a finite number"),
    (lambda pipe, x: pipe.denoise(x, multiplier="1"), "multiplier is '1'; expected float"),
    (lambda pipe, x: pipe.denoise(x, method="ode"), r"method is 'ode'; expected IterativeDenoising \| None"),
    (lambda pipe, x: pipe.log_prob(x[:0]), r"images have shape \(0, 4, 6, 3\); expected"),
    (lambda pipe, x: pipe.log_prob("cat.png"), "images are 'cat.png'; expected floats"),
    (lambda pipe, x: pipe.log_prob([[1.0], [1.0, 2.0]]), "images are .*; expected floats"),
    (lambda pipe, x: pipe.log_prob(x, "cat"), r"labels are <U3 \(\); expected whole numbers"),
    (lambda pipe, x: pipe.log_prob(x, [[1], [1, 2], 3]), "labels are .*; expected whole numbers"),
    (lambda pipe, x: pipe.log_prob(x, noise_std="x"), "noise_std is 'x', but this model is of one noise level"),
    (lambda pipe, x: pipe.latents(0, 4), r"key is 0; expected one key, jax.random.key\(seed\)"),
    (lambda pipe, x: pipe.latents(jax.random.split(jax.random.key(0)), 4), "key is .*; expected one key"),
    (lambda pipe, x: pipe.bits_per_dim(0, np.zeros(x.shape, np.uint8)), "key is 0; expected one key"),
    *(
        (lambda pipe, x, number=number: pipe.sample(jax.random.key(0), number), f"num_images is {number!r}; expected")
        for number in (-1, 0, True, 2.5, "4", None)
    ),
    (lambda pipe, x: pipe.sample(jax.random.key(0), 1, denoise="yes"), r"denoise is 'yes'; expected bool \| Iterative"),
    (lambda pipe, x: pipe.sample(jax.random.key(0), 1, guidance=Guidance(float("nan"))), "guidance.weight is nan"),
    (lambda pipe, x: Guidance(weight="1"), r"guidance.weight is '1'; expected float \| Array"),
    (lambda pipe, x: Guidance(weight=True), "guidance.weight is True; expected float"),
    (lambda pipe, x: Guidance(blocks="some"), "guidance.blocks is 'some'; expected 'all' or"),
    (lambda pipe, x: Guidance(blocks=1.5), "guidance.blocks is 1.5; expected int"),
    (lambda pipe, x: IterativeDenoising(1.5), "IterativeDenoising.num_steps is 1.5; expected int"),
    (lambda pipe, x: IterativeDenoising(2, clip="no"), "IterativeDenoising.clip is 'no'; expected bool"),
    (lambda pipe, x: IterativeDenoising(2, order=3), "IterativeDenoising.order is 3; expected one of 1, 2"),
    (lambda pipe, x: Jacobi(tolerance="0"), "Jacobi.tolerance is '0'; expected float"),
    (lambda pipe, x: GaussSeidelJacobi("4"), "GaussSeidelJacobi.num_segments is '4'; expected int"),
    (lambda pipe, x: Student(True), "Student.polish is True; expected int"),
    (lambda pipe, x: TarFlowPipeline("tiny", pipe.variables), "config is 'tiny'; expected TarFlowConfig"),
    (lambda pipe, x: TarFlowPipeline(TINY, pipe.variables, 0.1), r"noise is 0.1; expected Noise \| None"),
    (lambda pipe, x: TarFlowPipeline(TINY, pipe.variables, memory_bound="2G"), "memory_bound is '2G'; expected int"),
    (lambda pipe, x: TarFlowPipeline(TINY, None), "variables is None; expected Mapping"),
    (lambda pipe, x: TarFlowPipeline(TINY, {}), "variables have no params/block_0/position_embedding; expected"),
    (lambda pipe, x: TarFlowPipeline(VP, pipe.variables), r"variables have .* \(12, 16\); expected shape \(4, 16\)"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_what_cannot_be_is_refused_in_one_line(pipe, call, message):
    with pytest.raises(ValueError, match=message) as refused:
        call(pipe, images_of(TINY))
    assert type(refused.value) is UserError
    assert "\n" not in str(refused.value)


def warnings_of(caplog):
    return [record.message.partition(";")[0] for record in caplog.records]


@pytest.mark.parametrize("method", ["log_prob", "encode"])
def test_images_of_another_range_are_told_of_once(pipe, caplog, method):
    arguments.warn_once.cache_clear()
    for _ in range(2):
        getattr(pipe, method)(8 * np.abs(images_of(TINY)), LABELS)
    assert warnings_of(caplog) == ["images reach far outside [-1, 1]"]


def test_samples_that_are_denoised_are_not_told_to_be_pixels(pipe, caplog):
    arguments.warn_once.cache_clear()
    pipe.denoise(8 * np.abs(images_of(TINY)), LABELS, 0.1)
    assert warnings_of(caplog) == []


def test_results_that_are_not_finite_are_told_of(pipe, caplog):
    images = np.array(images_of(TINY))
    images[1, 0, 0] = np.nan
    pipe.log_prob(images, LABELS)
    assert warnings_of(caplog) == ["log_prob: 1 of 3 results are not finite"]
    caplog.clear()
    pipe.decode(images_of(TINY), LABELS, Guidance(1e4))
    assert warnings_of(caplog) == ["decode: 2 of 3 results are not finite"]  # the second image has no label
    caplog.clear()
    broken = TarFlowPipeline(TINY, jax.tree.map(lambda x: x * jnp.nan, pipe.variables), pipe.noise)
    broken.sample(jax.random.key(0), 3, LABELS)
    broken.bits_per_dim(jax.random.key(0), np.zeros(images.shape, np.uint8))
    functions = ("decode", "denoise", "image_bits_per_dim")
    assert warnings_of(caplog) == [f"{function}: 3 of 3 results are not finite" for function in functions]
