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


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_copies_compute_the_same(pipe, duplicate):
    images = images_of(TINY)
    np.testing.assert_array_equal(duplicate(pipe).log_prob(images, LABELS), pipe.log_prob(images, LABELS))


def test_it_says_what_it_is(pipe):
    number = sum(leaf.size for leaf in jax.tree.leaves(pipe.variables))
    expected = f"4x6x3, 2-16-(1, 2, 1), 3 classes, noise gaussian 0.1, {number:,} parameters on {jax.devices()[0]}"
    assert repr(pipe) == f"TarFlowPipeline({expected})"


@pytest.mark.slow
def test_labels_keys_and_guidance_may_be_traced(pipe):
    def draw(key, labels, weight, temperature):
        return pipe.sample(key, 3, labels, Guidance(weight, attention_temperature=temperature))

    points = [(jax.random.key(i), jnp.roll(LABELS, i), 0.5 + i, 0.7 + 0.2 * i) for i in range(2)]
    expected = jnp.stack([draw(*point) for point in points])
    stacked = jax.tree.map(lambda *leaves: jnp.stack([*map(jnp.asarray, leaves)]), *points)
    np.testing.assert_allclose(jax.jit(jax.vmap(draw))(*stacked), expected, atol=1e-5)
    with pytest.raises(ValueError, match="labels are float32"):
        jax.jit(pipe.log_prob)(images_of(TINY), jnp.zeros(3))


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


@pytest.mark.slow
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
