"""The student: what it is told, what it learns from, whose it is, and how it is polished to the inverse."""

import dataclasses
import functools
import importlib
import json
import math
import os
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from tiny_models import LABELS, TINY, TRIANGULAR, VP, images_of, random_variables

from configs import digits
from configs.student import digits as student_digits
from launch.distill import of_flow
from tarflow_jax import Guidance, Noise, TarFlowPipeline
from tarflow_jax.fingerprint import fingerprint
from tarflow_jax.interop import load_student, save_student
from tarflow_jax.interop.layout import flatten
from tarflow_jax.interop.model_folder import fingerprint as fields_fingerprint
from tarflow_jax.runtime import Preempted, Rows, make_mesh
from tarflow_jax.runtime.parameters import rows_of, student_shapes
from tarflow_jax.sampling import GaussSeidelJacobi, Jacobi, Sequential
from tarflow_jax.student import METHODS, Student, StudentConfig, TrainedStudent, distillation_loss
from tarflow_jax.student.loss import flow_trajectory
from tarflow_jax.training import Recipe, TrainConfig, train
from tarflow_jax.training.optimizer import Optimizer
from tarflow_jax.training.state import initial_state, new_state
from tarflow_jax.training.step import compiled_step, train_step

GAUSSIAN = Noise("gaussian", 0.1)


def student_of(flow, method="hidden_alignment", max_guidance=2.0, seed=0):
    """A student with random weights."""
    config = StudentConfig.of_flow(flow, 0, (1,), method=method, max_guidance=max_guidance if flow.num_classes else 0.0)
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in student_shapes(config).items()}
    tree = {"params": {}}
    for name, array in arrays.items():
        *path, last = name.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), path, tree)[last] = array
    return config, jax.tree.map(jnp.asarray, tree)


def pipeline(flow=TINY, method="hidden_alignment", variables=None):
    variables = random_variables(flow) if variables is None else variables
    student = TrainedStudent(*student_of(flow, method), fingerprint(variables))
    return TarFlowPipeline(flow, variables, GAUSSIAN, student=student)


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


apply = jax.jit(lambda config, *args: Student(config).apply(*args), static_argnums=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("flow", [TRIANGULAR, VP], ids=["classes", "none"])
def test_the_table_has_the_names_and_shapes_that_the_network_makes(flow, method):
    config, variables = student_of(flow, method)
    made = flatten(jax.eval_shape(lambda: Student(config).init(jax.random.key(0), jnp.zeros((1, *flow.image_shape)))))
    assert {name: leaf.shape for name, leaf in made.items()} == student_shapes(config)
    assert {len(rows_of(name)) for name in made} == {1}
    images, trajectory = jax.eval_shape(Student(config).apply, variables, images_of(flow, 2))
    assert images.shape == (2, *flow.image_shape)
    expected = None if method == "naive" else (2, flow.num_blocks, *flow.image_shape)
    assert (trajectory and trajectory.shape) == expected


def test_it_sees_every_token_the_label_and_the_weight():
    config, variables = student_of(TINY)
    latents, labels, zeros = images_of(TINY), jnp.asarray(LABELS), jnp.zeros(3)
    images, trajectory = apply(config, variables, latents, labels, zeros)
    jacobian = jax.jit(jax.jacobian(lambda z: Student(config).apply(variables, z, labels[:1], zeros[:1])[0]))
    assert (jnp.abs(jacobian(latents[:1])) > 0).all()  # of every pixel in every latent
    other = apply(config, variables, latents, jnp.array([1, -1, 2]), zeros)
    guided = apply(config, variables, latents, labels, jnp.array([1.0, 0.0, 2.0]))
    for k in range(TINY.num_blocks):
        for changed, rows in ((other[1], [0]), (guided[1], [0, 2])):
            moved = jnp.abs(changed[:, k] - trajectory[:, k]).max((1, 2, 3)) > 1e-4
            np.testing.assert_array_equal(np.flatnonzero(moved), rows)
    chex.assert_trees_all_close(apply(config, variables, latents, labels, None), (images, trajectory), atol=1e-6)
    unlabelled = apply(config, variables, latents, jnp.full(3, -1), None)
    chex.assert_trees_all_close(apply(config, variables, latents, None, None), unlabelled, atol=1e-6)


def test_the_trajectory_is_what_the_blocks_read():
    variables, images, labels = random_variables(TRIANGULAR), images_of(TRIANGULAR), jnp.asarray(LABELS)
    latents, trajectory = jax.jit(functools.partial(flow_trajectory, TRIANGULAR))(variables, images, labels, None)
    flow = TarFlowPipeline(TRIANGULAR, variables, GAUSSIAN)
    np.testing.assert_allclose(flow.encode(images, LABELS)[0], latents, atol=1e-5)
    _, decoded = flow.decode(latents, LABELS, return_trajectory=True)  # F + 1, from the latents
    np.testing.assert_allclose(trajectory, np.moveaxis(decoded[1:][::-1], 0, 1), atol=1e-4)


def loss_of(flow_variables, variables, config, weights):
    clean, noisy = images_of(TINY), images_of(TINY, seed=8)
    return distillation_loss(
        config, TINY, flow_variables, variables, clean, noisy, jnp.asarray(LABELS), None, jnp.asarray(weights)
    )


def test_gradients_stop_at_the_flow_and_at_the_guided_targets():
    config, variables = student_of(TINY)
    weights = jnp.array([0.0, 0.0, 1.5])
    flow_variables = random_variables(TINY)
    gradient = jax.jit(jax.grad(lambda *args: loss_of(*args, config, weights)[0], argnums=(0, 1)))
    of_flow_, of_student = gradient(flow_variables, variables)
    assert all(not leaf.any() for leaf in jax.tree.leaves(of_flow_))
    assert all(leaf.any() for leaf in jax.tree.leaves(of_student))


def test_loss_is_what_it_says():
    config, variables = student_of(TINY)
    weights = np.float32([0.0, 0.0, 1.5])
    flow_variables = random_variables(TINY)
    loss, metrics = jax.jit(lambda w: loss_of(flow_variables, variables, config, w))(weights)
    noisy, labels = images_of(TINY, seed=8), jnp.asarray(LABELS)
    latents, trajectory = jax.jit(functools.partial(flow_trajectory, TINY))(flow_variables, noisy, labels, None)
    targets = [np.asarray(images_of(TINY))[:, None], np.asarray(trajectory)]
    with_label, without, found = (
        [np.asarray(x).reshape(3, -1, *TINY.image_shape) for x in apply(config, variables, latents, *told)]
        for told in ((labels, None), (None, None), (labels, jnp.asarray(weights)))
    )
    expected, errors = 0.0, []
    for i, target in enumerate(targets):
        target = target + weights[:, None, None, None, None] * (with_label[i] - without[i])
        error = np.square(found[i] - target).mean((2, 3, 4)) / (np.square(target).mean((2, 3, 4)) if i else 1)
        expected += (error / (error + 0.01)).mean(0).sum()
        errors.append(error.mean(0))
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert float(metrics["image_error"]) == pytest.approx(errors[0][0], rel=1e-4)
    np.testing.assert_allclose(metrics["block_errors"], errors[1], rtol=1e-4)


@pytest.mark.parametrize("flow", [TRIANGULAR, pytest.param(VP, marks=pytest.mark.slow)], ids=["triangular", "vp"])
def test_polished_it_is_the_inverse(flow):
    pipe = pipeline(flow)
    exact, labels = images_of(flow), LABELS if flow.num_classes else None
    latents, _ = pipe.encode(exact, labels)
    decode = functools.partial(pipe.decode, latents, labels)
    images, (iterations, _) = decode(decoder=Jacobi(0.0, init="student"), return_statistics=True)
    np.testing.assert_allclose(images, exact, atol=2e-5)
    assert int(iterations.max()) <= flow.num_tokens - 1
    enough = decode(decoder="student", polish=flow.num_tokens - 1)
    np.testing.assert_allclose(enough, exact, atol=2e-5)
    errors = [float(jnp.abs(decode(decoder="student", polish=count) - exact).max()) for count in (1, 3)]
    assert errors[0] > errors[1] > 1e-4
    mixed = [Jacobi(0.0, init="student"), *[Sequential()] * (flow.num_blocks - 1)]
    np.testing.assert_allclose(decode(decoder=mixed), exact, atol=2e-5)


def test_a_perfect_guess_takes_one_update(pipe):
    images = images_of(TINY)
    latents, trajectory = jax.jit(functools.partial(flow_trajectory, TINY))(pipe.variables, images, LABELS, None)

    class Knowing(TarFlowPipeline):
        def _guess(self, *_):
            return trajectory

    knowing = Knowing(TINY, pipe.variables, GAUSSIAN)
    found, (iterations, _) = knowing.decode(latents, LABELS, decoder=Jacobi(init="student"), return_statistics=True)
    np.testing.assert_allclose(found, images, atol=1e-4)
    assert int(iterations.max()) == 1
    _, (from_latents, _) = knowing.decode(latents, LABELS, decoder=Jacobi(), return_statistics=True)
    assert int(from_latents.max()) > 2


def test_sampling_by_it_is_one_pass_and_clean(pipe):
    key = jax.random.key(2)
    images, trajectory = pipe.decode(pipe.latents(key, 3), LABELS, decoder="student", return_trajectory=True)
    expected = apply(pipe.student.config, pipe.student.variables, pipe.latents(key, 3), jnp.asarray(LABELS), None)
    np.testing.assert_allclose(images, expected[0], atol=1e-5)
    np.testing.assert_allclose(trajectory[1:][::-1], np.moveaxis(expected[1], 1, 0), atol=1e-5)
    np.testing.assert_allclose(pipe.sample(key, 3, LABELS, decoder="student"), images, atol=1e-6)
    polished = pipe.sample(key, 3, LABELS, decoder="student", polish=7)
    np.testing.assert_allclose(polished, pipe.sample(key, 3, LABELS), atol=1e-4)  # denoised, both
    guided = pipe.sample(key, 3, LABELS, Guidance(2.0), decoder="student")
    assert float(jnp.abs(guided - images).max()) > 1e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe, z: pipe.decode(z, guidance=Guidance(2.5), decoder="student"), "this student learned 0 to 2"),
        (lambda pipe, z: pipe.decode(z, guidance=Guidance(-1.0), decoder="student"), "this student learned 0 to 2"),
        (
            lambda pipe, z: pipe.decode(z, guidance=Guidance(1.0, schedule="constant"), decoder="student"),
            "a student takes a weight alone",
        ),
        (lambda pipe, z: pipe.decode(z, polish=1), 'polish is 1, which is for decoder="student"'),
        (lambda pipe, z: pipe.decode(z, decoder="student", polish=-1), "polish is -1; expected a whole number"),
        (lambda pipe, z: pipe.decode(z, decoder="student", return_statistics=True), "takes no updates"),
        (lambda pipe, z: pipe.sample(jax.random.key(0), 1, decoder="student", denoise=False), "clean images by itself"),
        (lambda pipe, z: pipe.decode(z, decoder=GaussSeidelJacobi(2, init="student")), "init is 'student'; expected"),
        (lambda pipe, z: TarFlowPipeline(TINY, pipe.variables).decode(z, decoder="student"), "has no student"),
        (lambda pipe, z: pipeline(method="naive").decode(z, decoder=Jacobi(init="student")), "is 'naive': it has no"),
        (lambda pipe, z: StudentConfig.of_flow(TINY, 0, (1, 2)), "lists 2 blocks; expected 4, one for each"),
        (lambda pipe, z: StudentConfig.of_flow(TINY, 0, (1,), method="best"), "method is 'best'; expected"),
        (lambda pipe, z: StudentConfig.of_flow(VP, 0, (1,), max_guidance=1.0), "has no classes to guide by"),
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
    drawn = pipe.sample(key, 2, [0, 1], decoder="student")
    np.testing.assert_array_equal(again.sample(key, 2, [0, 1], decoder="student"), drawn)
    other = TarFlowPipeline(TINY, random_variables(TINY, seed=3), GAUSSIAN, student=pipe.student)
    with pytest.raises(ValueError, match=r"was trained for the flow .*, not for this one, .*; run launch.distill"):
        other.sample(key, 2, decoder="student")
    other.save_pretrained(tmp_path / "model")  # what was there is another flow's
    assert load_student(tmp_path / "model") is None
    with pytest.raises(ValueError, match="of a flow of 3 blocks; this one has 2"):
        TarFlowPipeline(runs.SMALL, random_variables(runs.SMALL), student=pipe.student).sample(
            key, 1, decoder="student"
        )


def test_a_hostile_folder_is_refused_in_one_line(pipe, tmp_path, damage):
    save_student(tmp_path, pipe.student)
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
        "a student of 1000000000 blocks": lambda fields: fields["student"]["shape"].update(num_blocks=10**9),
        "unknown model field 'hidden'": lambda fields: fields["student"]["shape"].update(hidden=3),
        "tensor .* has shape": lambda fields: fields["student"]["shape"].update(width=64),
        "expected a shape, a method": lambda fields: fields["student"].update(method=["naive"]),
        "lacks tensor": lambda fields: fields["student"].update(method="hidden_distillation"),
    }
    for message, change in changes.items():
        rewritten(change)
        with pytest.raises(ValueError, match=message) as refused:
            load_student(tmp_path)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["digits:smoke", pytest.param("fashion_mnist", marks=pytest.mark.slow)])
def test_recipes_make_a_full_train_step_and_small_students(name):
    module, _, variant = name.partition(":")
    flow, recipe = (importlib.import_module(f"configs.{folder}{module}") for folder in ("", "student."))
    recipe = Recipe(of_flow(recipe.get_config(variant), flow.get_config()))
    count, config = recipe.config.train.batch_size, recipe.train_config
    state = jax.eval_shape(functools.partial(initial_state, config), jax.random.key(0))
    frozen = jax.eval_shape(
        functools.partial(initial_state, dataclasses.replace(config, student=None)), jax.random.key(0)
    )
    images = jax.ShapeDtypeStruct((count, *recipe.model.image_shape), jnp.uint8)
    labels = jax.ShapeDtypeStruct((count,), jnp.int32)
    step = functools.partial(train_step, config)
    new, metrics = jax.eval_shape(step, state, images, labels, jax.random.key(0), frozen.variables)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["block_errors"].shape == (recipe.model.num_blocks,)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(s.variables)) for s in (state, frozen)]
    assert sizes[0] <= 1.2 * sizes[1]


def test_a_student_s_recipe_alone_is_no_flow_s():
    with pytest.raises(ValueError, match=r"no model: it is a student's, for launch\.distill"):
        Recipe(student_digits.get_config())
    with pytest.raises(ValueError, match="is no student's recipe"):
        of_flow(digits.get_config(), digits.get_config())


def run_steps(mesh, accumulation=1, count=3):
    """Losses of a tiny student's first steps."""
    flow = dataclasses.replace(TINY, num_blocks=1, layers_per_block=1)
    student = StudentConfig.of_flow(flow, 0, (1,), max_guidance=1.0)
    optimizer = Optimizer(count, 1e-3, 1e-3, 0, 0.9, 0.999, 1e-4, 0.0, 0.0)
    config = TrainConfig(flow, GAUSSIAN, optimizer, 0.2, accumulation, student)
    state, step = new_state(config, mesh, jax.random.key(0)), compiled_step(config, mesh)
    rows, losses = Rows(mesh, runs.BATCH_SIZE), []
    frozen = random_variables(flow)
    for i in range(count):
        batch = (rows.put(values[rows.local]) for values in runs.random_images(flow, runs.BATCH_SIZE, i))
        state, metrics = step(state, *batch, jax.random.key(1), frozen)
        losses.append(float(metrics["loss"]))
    assert step.function._cache_size() <= 2  # the state's first placement, and a step's
    assert set(metrics) == {"loss", "image_error", "block_errors", "grad_norm"}
    return losses


@functools.cache
def on_one_device():
    return run_steps(make_mesh(devices=jax.devices()[:1]))


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "accumulation"), [((8, 1, 1), 1), ((2, 2, 2), 1), ((8, 1, 1), 2)])
def test_losses_do_not_depend_on_the_mesh(sizes, accumulation):
    mesh = make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    np.testing.assert_allclose(run_steps(mesh, accumulation), on_one_device(), rtol=1e-5)


@pytest.mark.slow
def test_stopped_and_resumed_it_ends_bit_for_bit_the_same(tmp_path, monkeypatch, compiled_once):
    monkeypatch.setattr(Recipe, "mesh", lambda self, devices=None: make_mesh(devices=jax.devices()[:1]))
    flow = digits.get_config("smoke")
    flow.model.num_blocks = 1
    config = of_flow(student_digits.get_config("smoke"), flow)
    config.student.flow = "0" * 16
    config.train.update({"num_steps": 4, "checkpoint_every": 2, "evaluate_every": 2, "log_every": 1, "sample_every": 3})
    frozen = random_variables(Recipe(flow).model)
    whole = train(config, tmp_path / "whole", frozen_flow=frozen)

    def stop(step, variables):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted, match="stop at step 3"):
        train(config, tmp_path / "stopped", stop, frozen)
    resumed = train(config, tmp_path / "stopped", frozen_flow=frozen)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, resumed), jax.tree.map(np.asarray, whole))
    lines = [json.loads(line) for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert {"image_error", "block_errors", "loss"} <= lines[0].keys()
    assert sum("test_loss" in line for line in lines) == 2
    config.student.flow = "1" * 16  # another flow's
    with pytest.raises(ValueError, match=r"holds another configuration: student\.flow"):
        train(config, tmp_path / "stopped", frozen_flow=frozen)
