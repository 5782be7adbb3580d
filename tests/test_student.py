"""The student: what it is told, what it learns from, whose it is, and how it is polished to the inverse."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import runs
from tarflow_jax import Guidance, Noise, TarFlow, TarFlowPipeline
from tarflow_jax.fingerprint import fingerprint
from tarflow_jax.flow import Conditioning
from tarflow_jax.interop import load_student
from tarflow_jax.interop.model_folder import checksum as fields_fingerprint
from tarflow_jax.interop.tensors import flatten
from tarflow_jax.runtime.parameters import row_of, student_shapes
from tarflow_jax.sampling import Jacobi, Sequential, guided_trajectory
from tarflow_jax.sampling import Student as ByStudent
from tarflow_jax.student import Perception, Student, StudentConfig, TrainedStudent, distillation_loss
from tarflow_jax.student.loss import perceptual_distance
from tiny_models import LABELS, TINY, TRIANGULAR, VP, images_of, random_variables

GAUSSIAN = Noise("gaussian", 0.1)


def student_of(flow, max_guidance=2.0, seed=0):
    """A student with random weights."""
    config = StudentConfig(flow, layers_per_block=(1,), max_guidance=max_guidance if flow.num_classes else 0.0)
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in student_shapes(config).items()}
    tree = {"params": {}}
    for name, array in arrays.items():
        *path, last = name.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), path, tree)[last] = array
    return config, jax.tree.map(jnp.asarray, tree)


def pipeline(flow=TINY, variables=None):
    variables = random_variables(flow) if variables is None else variables
    student = TrainedStudent(*student_of(flow), fingerprint(variables))
    return TarFlowPipeline(flow, variables, GAUSSIAN, student=student)


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


apply = jax.jit(lambda config, *args: Student(config).apply(*args), static_argnums=0)


@pytest.mark.parametrize("flow", [TRIANGULAR, VP], ids=["classes", "none"])
def test_the_table_has_the_names_and_shapes_that_the_network_makes(flow):
    config, variables = student_of(flow)
    made = flatten(jax.eval_shape(lambda: Student(config).init(jax.random.key(0), jnp.zeros((1, *flow.image_shape)))))
    assert {name: leaf.shape for name, leaf in made.items()} == student_shapes(config)
    for name in made:
        row_of(name)
    images, trajectory = jax.eval_shape(Student(config).apply, variables, images_of(flow, 2))
    assert images.shape == (2, *flow.image_shape)
    assert trajectory.shape == (2, flow.num_blocks, *flow.image_shape)


@pytest.mark.slow
def test_it_sees_every_token_the_label_and_the_weight():
    config, variables = student_of(TINY)
    latents, labels, zeros = images_of(TINY), jnp.asarray(LABELS), jnp.zeros(3)
    _, trajectory = apply(config, variables, latents, labels, zeros)
    jacobian = jax.jit(jax.jacobian(lambda z: Student(config).apply(variables, z, labels[:1], zeros[:1])[0]))
    assert (jnp.abs(jacobian(latents[:1])) > 0).all()  # of every pixel in every latent
    other = apply(config, variables, latents, jnp.array([1, -1, 2]), zeros)
    guided = apply(config, variables, latents, labels, jnp.array([1.0, 0.0, 2.0]))
    for k in range(TINY.num_blocks):
        for changed, rows in ((other[1], [0]), (guided[1], [0, 2])):
            moved = jnp.abs(changed[:, k] - trajectory[:, k]).max((1, 2, 3)) > 1e-4
            np.testing.assert_array_equal(np.flatnonzero(moved), rows)
    # One operation after the other: programs round otherwise, and scales make more of it.
    made = functools.partial(Student(config).apply, variables, latents)
    chex.assert_trees_all_close(made(labels, None), made(labels, zeros), atol=1e-6)
    chex.assert_trees_all_close(made(None, None), made(jnp.full(3, -1), None), atol=1e-6)


def test_the_trajectory_is_what_the_blocks_read():
    variables, images, labels = random_variables(TRIANGULAR), images_of(TRIANGULAR), jnp.asarray(LABELS)
    latents, trajectory = jax.jit(functools.partial(guided_trajectory, TarFlow(TRIANGULAR)))(
        variables, images, Conditioning(labels)
    )
    flow = TarFlowPipeline(TRIANGULAR, variables, GAUSSIAN)
    np.testing.assert_allclose(flow.encode(images, LABELS)[0], latents, atol=1e-5)
    decoded = flow.decode_trace(latents, LABELS).trajectory  # F + 1, from the latents
    np.testing.assert_allclose(trajectory, decoded[:, :0:-1], atol=1e-4)


@pytest.mark.parametrize("perceptual", [0.5, pytest.param(0.0, marks=pytest.mark.slow)])
def test_loss_is_what_it_says(perceptual):
    config, variables = student_of(TINY)
    config = dataclasses.replace(config, perceptual=perceptual)
    perception = Perception(TINY.num_classes).init(jax.random.key(2), images_of(TINY))["params"]
    weights, labels = np.float32([0.0, 0.0, 1.5]), jnp.asarray(LABELS)
    clean, latents, trajectory = images_of(TINY), images_of(TINY, seed=8), images_of(TINY, 9, seed=9)
    trajectory = trajectory.reshape(3, 3, *TINY.image_shape)
    loss, metrics = jax.jit(functools.partial(distillation_loss, Student(config)))(
        variables, clean, latents, trajectory, labels, weights, perception if perceptual else None
    )
    expected, errors, made = 0.0, [], apply(config, variables, latents, labels, weights)
    for target, found in zip((clean, trajectory), made, strict=True):
        target, found = (np.asarray(x).reshape(3, -1, *TINY.image_shape) for x in (target, found))
        error = np.square(found - target).mean((2, 3, 4))
        error = error / np.square(target).mean((2, 3, 4)) if errors else error
        expected += (error / (error + 0.01)).mean(0).sum()
        errors.append(error.mean(0))
    if perceptual:
        distance = perceptual_distance(TINY.num_classes, perception, made[0], clean)
        expected += perceptual * float((distance / (distance + 0.01)).mean())
        assert float(metrics["perceptual"]) == pytest.approx(float(distance.mean()), rel=1e-4)
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert float(metrics["image_error"]) == pytest.approx(errors[0][0], rel=1e-4)
    np.testing.assert_allclose(metrics["block_errors"], errors[1], rtol=1e-4)


@pytest.mark.slow
def test_the_perceptual_distance_is_of_directions_of_features():
    params = Perception(4).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1)).astype(np.uint8)
    floats = jnp.asarray(images, jnp.float32) / 127.5 - 1
    np.testing.assert_allclose(perceptual_distance(4, params, jnp.asarray(images), floats), 0, atol=1e-6)
    found = perceptual_distance(4, params, floats, jnp.roll(floats, 1, axis=0))
    expected, others = [], np.roll(np.asarray(floats), 1, axis=0)
    scales = zip(*(Perception(4).apply({"params": params}, x).scales for x in (floats, others)), strict=True)
    for a, b in scales:
        cosines = (a * b).sum(3) / np.sqrt((np.square(a).sum(3) + 1e-4) * (np.square(b).sum(3) + 1e-4))
        lengths = sum(np.square(x).sum(3) / (np.square(x).sum(3) + 1e-4) for x in (a, b))
        expected.append((lengths - 2 * cosines).mean((1, 2)))
    np.testing.assert_allclose(found, np.mean(expected, axis=0), rtol=1e-4)
    assert [scale.shape for scale in Perception(4).apply({"params": params}, images).scales] == [
        (3, 8, 8, 24),
        (3, 4, 4, 48),
        (3, 2, 2, 96),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("flow", [TRIANGULAR, pytest.param(VP, marks=pytest.mark.slow)], ids=["triangular", "vp"])
def test_polished_it_nears_the_inverse_and_reaches_it(flow):
    pipe, exact = pipeline(flow), images_of(flow)
    labels = LABELS if flow.num_classes else None
    latents, _ = pipe.encode(exact, labels)
    errors = [
        float(jnp.abs(pipe.decode(latents, labels, decoder=ByStudent(count)) - exact).max())
        for count in (1, 3, flow.num_tokens - 1)
    ]
    assert errors[0] > errors[1] > 1e-4 > 2e-5 > errors[2]


def test_the_parallel_inverse_that_begins_at_it_is_exact(pipe):
    exact = images_of(TINY)
    latents, _ = pipe.encode(exact, LABELS)
    from_student = Jacobi(0.0, init="student")
    decoders = [from_student, Sequential(), from_student]
    found = pipe.decode_trace(latents, LABELS, decoder=decoders)
    np.testing.assert_allclose(found.images, exact, atol=2e-5)
    assert int(found.updates.max()) <= TINY.num_tokens - 1


@pytest.mark.slow
def test_a_perfect_guess_takes_one_update(pipe):
    images = images_of(TINY)
    latents, trajectory = jax.jit(functools.partial(guided_trajectory, TarFlow(TINY)))(
        pipe.variables, images, Conditioning(LABELS)
    )

    class Knowing(TarFlowPipeline):
        def _by_student(self, *_):
            return images, trajectory

    knowing = Knowing(TINY, pipe.variables, GAUSSIAN, student=pipe.student)
    found = knowing.decode_trace(latents, LABELS, decoder=Jacobi(init="student"))
    np.testing.assert_allclose(found.images, images, atol=1e-4)
    assert int(found.updates.max()) == 1
    assert int(knowing.decode_trace(latents, LABELS, decoder=Jacobi()).updates.max()) > 2


def test_sampling_by_it_is_one_pass_and_clean(pipe):
    key = jax.random.key(2)
    images, log_det, trajectory, *_ = pipe.decode_trace(pipe.latents(key, 3), LABELS, decoder=ByStudent())
    assert log_det is None
    expected = apply(pipe.student.config, pipe.student.variables, pipe.latents(key, 3), jnp.asarray(LABELS), None)
    np.testing.assert_allclose(images, expected[0], atol=1e-5)
    np.testing.assert_allclose(trajectory[:, :0:-1], expected[1], atol=1e-5)
    np.testing.assert_allclose(pipe.sample(key, 3, LABELS, decoder=ByStudent()), images, atol=1e-6)
    polished = pipe.sample(key, 3, LABELS, decoder=ByStudent(5))
    np.testing.assert_allclose(polished, pipe.sample(key, 3, LABELS), atol=1e-4)  # denoised, both
    guided = pipe.sample(key, 3, LABELS, Guidance(2.0), decoder=ByStudent())
    assert float(jnp.abs(guided - images).max()) > 1e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda pipe, z: pipe.decode(z, guidance=Guidance(2.5), decoder=ByStudent()),
            "this student learned 0 to 2",
        ),
        (
            lambda pipe, z: pipe.decode(z, guidance=Guidance(-1.0), decoder=ByStudent()),
            "this student learned 0 to 2",
        ),
        (
            lambda pipe, z: pipe.decode(z, guidance=Guidance(1.0, schedule="constant"), decoder=ByStudent()),
            "a student takes a weight alone",
        ),
        (lambda pipe, z: ByStudent(-1), "polish is -1; expected a number from 0"),
        (lambda pipe, z: pipe.decode(z, decoder="student"), "decoder is 'student'; expected a decoder"),
        (
            lambda pipe, z: pipe.sample(jax.random.key(0), 1, decoder=ByStudent(), denoise=False),
            "clean images by itself",
        ),
        (lambda pipe, z: TarFlowPipeline(TINY, pipe.variables).decode(z, decoder=ByStudent()), "has no student"),
        (lambda pipe, z: StudentConfig(TINY, layers_per_block=(1, 2)), "lists 2 blocks; expected 4, one for each"),
        (lambda pipe, z: StudentConfig(TINY, perceptual=-1.0), "perceptual is -1.0; expected"),
        (lambda pipe, z: StudentConfig(VP, perceptual=1.0), "perceptual is 1.0, but the flow has no classes"),
        (lambda pipe, z: StudentConfig(VP, max_guidance=1.0), "max_guidance is 1.0, but the flow has no classes"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(pipe, call, message):
    with pytest.raises(ValueError, match=message) as refused:
        call(pipe, images_of(TINY))
    assert "\n" not in str(refused.value)


def test_a_saved_model_carries_it_and_one_of_other_weights_is_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    again = TarFlowPipeline.from_pretrained(tmp_path / "model")
    assert again.student.config == pipe.student.config
    key = jax.random.key(0)
    drawn = pipe.sample(key, 2, [0, 1], decoder=ByStudent())
    np.testing.assert_array_equal(again.sample(key, 2, [0, 1], decoder=ByStudent()), drawn)
    other = TarFlowPipeline(TINY, random_variables(TINY, seed=3), GAUSSIAN, student=pipe.student)
    with pytest.raises(ValueError, match=r"was trained for the flow .*, not for this one, .*; run launch.distill"):
        other.sample(key, 2, decoder=ByStudent())
    again.save_pretrained(tmp_path / "model")  # which it reads its student from
    assert load_student(tmp_path / "model").flow == pipe.student.flow
    other.save_pretrained(tmp_path / "model")  # what was there is another flow's
    assert load_student(tmp_path / "model") is None
    assert not (tmp_path / "model" / "student").exists()
    with pytest.raises(ValueError, match="was trained for the flow"):
        TarFlowPipeline(runs.SMALL, random_variables(runs.SMALL), student=pipe.student).sample(
            key, 1, decoder=ByStudent()
        )


def test_a_hostile_folder_is_refused_in_one_line(pipe, tmp_path, damage):
    pipe.save_pretrained(tmp_path)
    path, weights = tmp_path / "student" / "config.json", tmp_path / "student" / "model.safetensors"
    whole, expected = path.read_text(), load_student(tmp_path)
    for file in (path, weights):
        for _ in damage(file, 30):
            try:
                found = load_student(tmp_path)
            except (ValueError, FileNotFoundError) as error:
                assert "\n" not in str(error)  # noqa: PT017
            else:
                chex.assert_trees_all_equal(found, expected)

    def rewritten(change):
        fields = json.loads(whole)
        del fields["sha256"]
        change(fields)
        path.write_text(json.dumps({**fields, "sha256": fields_fingerprint(fields)}))

    changes = {
        "lacks fields": lambda fields: fields.pop("flow"),
        "lacks fields of": lambda fields: fields.update(weights={"bytes": 1}),
        "is not a student's of layout version 1": lambda fields: fields.update(format_version=2),
        "unknown model field 'hidden'": lambda fields: fields["student"]["flow"].update(hidden=3),
        "tensor .* has shape": lambda fields: fields["student"].update(width=64),
        "student.max_guidance is .*; expected float": lambda fields: fields["student"].update(max_guidance=["2"]),
        "lacks tensor": lambda fields: fields["student"]["flow"].update(num_blocks=5, layers_per_block=1),
    }
    for message, change in changes.items():
        rewritten(change)
        with pytest.raises(ValueError, match=message) as refused:
            load_student(tmp_path)
        assert "\n" not in str(refused.value)
