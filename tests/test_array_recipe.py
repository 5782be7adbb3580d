"""Flows of arrays by command: files, splits, training, and the commands that open the workdir."""

import contextlib
import json
import shutil

import chex
import jax
import numpy as np
import pytest

import commands
import tarflow_jax
from configs import array, digits
from tarflow_jax import Guidance, TarFlowPipeline
from tarflow_jax.data import SequenceSource, open_arrays
from tarflow_jax.errors import UserError
from tarflow_jax.runtime import make_mesh
from tarflow_jax.training import Recipe, train
from test_processes import assert_ends_as, finish, slurm, start

STEPS = {
    "num_steps": 4,
    "batch_size": 16,
    "checkpoint_every": 2,
    "evaluate_every": 4,
    "log_every": 1,
    "drop_label": 0.2,
}
SMALL = {"width": 8, "head_dim": 8, "num_blocks": 2}
SHAPE = {"sequence_shape": (4, 2), "condition_dim": 3, "condition_kind": "tokens", "num_classes": 2}


def sequences(count=80, seed=0):
    """Sequences of 2 to 4 tokens in large units, with conditions by token and labels; padding is NaN."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 5, count)
    lengths[0] = 4
    x = np.where(np.arange(4)[None, :, None] < lengths[:, None, None], 50 + 10 * rng.normal(size=(count, 4, 2)), np.nan)
    labels = np.arange(count) % 2
    return {"x": x, "condition": rng.normal(size=(count, 4, 3)), "mask": lengths, "labels": labels}


def as_test_set(arrays):
    return {f"{name}_test": values for name, values in arrays.items()}


def written(path, **arrays):
    """The name of a file of these arrays."""
    np.savez(path, **arrays)
    return f"array:{path}"


def small_config(name, **fields):
    config = array.get_config()
    config.data.source = name
    config.model.update(SMALL)
    config.train.update(STEPS | fields)
    config.optimizer.warmup_steps = 1
    return config


def train_here(config, workdir, monkeypatch, devices=1):
    monkeypatch.setattr(Recipe, "mesh", lambda self: make_mesh(devices=jax.devices()[:devices]))
    return train(config, workdir)


def begin(config, workdir):
    """What launch.train does first."""
    Recipe(config).source("test")
    train(config, workdir)


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    """A file with a test split of its own."""
    folder = tmp_path_factory.mktemp("arrays")
    return written(folder / "sequences.npz", **sequences(), **as_test_set(sequences(20, seed=1)))


@pytest.fixture(scope="module")
def whole(name, tmp_path_factory):
    """(workdir, final state) of an uninterrupted run on one device; steps 2 and 4 are saved."""
    workdir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        state = train_here(small_config(name), workdir, patch)
    return workdir, jax.tree.map(np.asarray, state)


# Files


def test_the_shape_follows_from_the_file_and_stays_with_the_run(tmp_path):
    name = written(tmp_path / "a.npz", **sequences())
    given = small_config(name)
    recipe = Recipe(given)
    assert {field: getattr(recipe.model, field) for field in SHAPE} == SHAPE
    assert given.model.sequence_shape == (0, 0)
    assert recipe.noise is None
    recipe.write_to(tmp_path / "run")
    (tmp_path / "a.npz").unlink()
    assert Recipe.from_workdir(tmp_path / "run").model == recipe.model
    table = written(tmp_path / "b.npz", x=sequences()["condition"][:, 0])
    assert Recipe(small_config(table)).model.sequence_shape == (3, 0)


def test_what_the_recipe_sets_must_fit_the_file(tmp_path):
    name = written(tmp_path / "a.npz", **sequences())
    config = small_config(name)
    config.model.num_classes = 5
    assert Recipe(config).source("train").shape["num_classes"] == 2
    assert Recipe(config).model.num_classes == 5
    for field, value in {"num_classes": 1, "condition_dim": 2, "sequence_shape": (3, 2)}.items():
        config = small_config(name)
        config.model.update({field: value})
        with pytest.raises(ValueError, match=rf"model\.{field} is .*, the data's is .*; leave model"):
            Recipe(config).source("train")


@pytest.mark.parametrize(
    ("field", "value"),
    [("noise.std", 0.1), ("data.flip", True), ("data.preprocessing", "adm"), ("model.noise_conditional", True)],
)
def test_options_of_images_are_refused(tmp_path, field, value):
    config = small_config(written(tmp_path / "a.npz", **sequences()))
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=rf"{field} is {value!r}; expected .* for sequences"):
        Recipe(config)


def test_images_and_arrays_are_not_taken_for_each_other(tmp_path):
    of_images = digits.get_config("smoke")
    of_images.data.source = written(tmp_path / "a.npz", **sequences())
    with pytest.raises(ValueError, match=r"a\.npz holds arrays; expected a data set of images"):
        Recipe(of_images).source("train")
    config = small_config("digits")
    config.model.sequence_shape = (4, 2)
    with pytest.raises(ValueError, match=r"data\.source is 'digits'; expected array:FILE"):
        Recipe(config).source("train")


def rows_of(source):
    return {row.tobytes() for row in source.arrays.x}


def test_the_split_by_hash_is_disjoint_stable_and_a_tenth(tmp_path):
    x = np.random.default_rng(0).normal(size=(2000, 3))
    name = written(tmp_path / "a.npz", x=np.concatenate([x, x[:50]]))  # some rows twice
    train, test = (open_arrays(name, split) for split in ("train", "test"))
    assert len(train) + len(test) == 2050
    assert 150 < len(test) < 250
    assert not rows_of(train) & rows_of(test)
    other = written(tmp_path / "b.npz", x=np.random.default_rng(1).permutation(x[:1500]).astype(np.float32))
    assert rows_of(open_arrays(other, "test")) < rows_of(test)
    assert rows_of(open_arrays(other, "train")) < rows_of(train)


def test_padding_does_not_move_a_row(tmp_path):
    arrays = sequences()
    clean = written(tmp_path / "a.npz", **arrays)
    other = written(tmp_path / "b.npz", **arrays | {"x": np.nan_to_num(arrays["x"], nan=7.0)})
    sources = [open_arrays(name, "test") for name in (clean, other)]
    assert sources[0].fingerprint == sources[1].fingerprint
    assert sources[0].fingerprint != open_arrays(clean, "train").fingerprint


def test_a_test_split_of_its_own(name):
    given = sequences(20, seed=1)
    test = open_arrays(name, "test")
    np.testing.assert_array_equal(test.arrays.x, np.nan_to_num(given["x"].astype(np.float32)))
    np.testing.assert_array_equal(test.labels, given["labels"])
    assert len(open_arrays(name, "train")) == 80


def with_value(name, value, place):
    values = sequences()[name].copy()
    values[place] = value
    return {name: values}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (with_value("x", np.inf, (7, 1, 1)), "x is inf in row 7, column 1; expected finite numbers"),
        (with_value("x", 1e300, (7, 1, 1)), r"x is 1e\+300 in row 7, column 1; expected .* of float32's range"),
        (with_value("condition", np.nan, (3, 0, 2)), "condition is nan in row 3, column 2"),
        (with_value("labels", -1, 5), "labels have -1 in row 5; expected integers from 0"),
        (with_value("labels", 10**9, 5), "labels have 1000000000 in row 5; expected integers from 0 to 1048575"),
        (with_value("mask", 5, 9), "row 9 of mask has 5 tokens; expected 1 to 4"),
        ({"mask": np.tile([True, False, True, True], (80, 1))}, "mask has a hole in row 0"),
        ({"x": np.zeros((80, 4, 2), int)}, "x is int64"),
        ({"x": np.float64(3)}, r"x is float64 \[\]; expected floats"),
        ({"condition": np.array(["a"] * 80)}, r"condition is <U1 \[80\]; expected \[80, C\] or \[80, 4, C\]"),
        ({"condition": np.zeros((80, 0))}, r"condition is float64 \[80, 0\]"),
        ({"labels": np.zeros(80)}, r"labels are float64 \[80\]; expected integers"),
        ({"x": np.array([{}] * 80)}, "array x holds Python objects, which are never loaded"),
        (
            {"x_test": sequences()["x"]},
            "expected x, perhaps .* and for another test split all of them with _test",
        ),
        (as_test_set(with_value("x", np.inf, (2, 0, 0))), "expected x, perhaps"),
        (
            as_test_set(sequences() | with_value("x", np.inf, (2, 0, 0))),
            "its test arrays: x is inf in row 2, column 0",
        ),
        (as_test_set(sequences() | {"condition": np.zeros((80, 4, 1))}), "its test arrays: model.condition_dim is 3"),
        ({"x": np.where(np.arange(2) > 0, 1.5, sequences()["x"])}, r"x is constant in column 1 \(1.5\); leave it out"),
    ],
)
def test_bad_files_are_refused_in_one_line_before_the_workdir_is_written(tmp_path, changed, message):
    config = small_config(written(tmp_path / "a.npz", **sequences() | changed))
    with pytest.raises(ValueError, match=message) as error:
        begin(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert "a.npz" in str(error.value) or "constant" in message
    assert not (tmp_path / "run" / "config.json").exists()


def test_files_of_other_arrays_and_damaged_ones_are_refused(tmp_path, damage):
    with pytest.raises(ValueError, match=r"a\.npz has none of its arrays; expected x"):
        open_arrays(written(tmp_path / "a.npz", y=np.zeros(3)), "train")
    with pytest.raises(ValueError, match="none of its 2 rows falls into the test split"):
        open_arrays(written(tmp_path / "b.npz", x=np.eye(2)), "test")
    with pytest.raises(ValueError, match=r"unknown split 'val' of .*; expected one of train, test"):
        open_arrays(f"array:{tmp_path}/b.npz", "val")
    with pytest.raises(FileNotFoundError, match="expected an npz file"):
        open_arrays(f"array:{tmp_path}/none.npz", "train")
    written(tmp_path / "c.npz", **sequences())
    for broken in damage(tmp_path / "c.npz", 30):
        with contextlib.suppress(UserError):  # some damage changes a number
            open_arrays(f"array:{broken}", "train")


def test_files_in_an_object_store(bucket, tmp_path):
    written(tmp_path / "a.npz", **sequences())
    (bucket / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes())
    found, expected = (open_arrays(f"array:{folder}/a.npz", "train") for folder in (bucket, tmp_path))
    assert found.fingerprint == expected.fingerprint


# Training


@pytest.mark.slow
def test_it_learns_and_ends_with_a_test_loss_in_nats(whole, name):
    workdir, state = whole
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    test = open_arrays(name, "test")
    (x, condition, lengths), labels = test.arrays, test.labels
    pipe = TarFlowPipeline.from_pretrained(workdir, best=True)
    assert (pipe.config.sequence_shape, pipe.noise) == ((4, 2), None)
    expected = -np.asarray(pipe.log_prob(x, labels, condition=condition, mask=lengths)).mean()
    assert next(line["test_loss"] for line in lines if "test_loss" in line) == pytest.approx(expected, rel=1e-5)
    chex.assert_trees_all_equal(jax.device_get(pipe.variables["params"]), state.variables["params"])


@pytest.mark.slow
def test_units_are_those_of_the_training_split_and_of_fit(whole, name):
    workdir, state = whole
    pipe, given = TarFlowPipeline.from_pretrained(workdir), sequences()
    values = given["x"].reshape(-1, 2)
    for found, expected in (("mean", np.nanmean(values, 0)), ("std", np.nanstd(values, 0))):
        np.testing.assert_allclose(pipe.variables["constants"][found], np.tile(expected, (4, 1)), rtol=1e-5)
    fitted = tarflow_jax.fit(**given, num_steps=1, batch_size=16, **SMALL)
    chex.assert_trees_all_equal(jax.device_get(fitted.variables["constants"]), state.variables["constants"])
    assert SequenceSource(**given).fingerprint == open_arrays(name, "train").fingerprint


@pytest.mark.slow
def test_a_run_that_stopped_ends_as_one_that_did_not(whole, name, tmp_path, monkeypatch):
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    state = train_here(small_config(name), tmp_path / "run", monkeypatch)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, state), whole[1])


@pytest.mark.slow
def test_a_run_continues_on_its_own_data_alone(whole, name, tmp_path, monkeypatch):
    shutil.copytree(whole[0], tmp_path / "run")
    path = tmp_path / "changed.npz"
    arrays = sequences()
    arrays["x"][0] += 1e-3
    config = small_config(written(path, **arrays, **as_test_set(sequences(20, seed=1))))
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["data"]["source"] == name
    # As if the file had been overwritten.
    monkeypatch.setattr("tarflow_jax.training.recipe.CHANGEABLE_ON_RESUME", ("data.source", "mesh"))
    with pytest.raises(ValueError, match=r"is not what .* was trained on"):
        train_here(config, tmp_path / "run", monkeypatch)


@pytest.mark.slow
def test_two_devices_that_accumulate_train_as_one(whole, name, tmp_path, monkeypatch):
    state = train_here(small_config(name, accumulation=2), tmp_path, monkeypatch, devices=2)
    assert_ends_as(state.variables, whole[1].variables)


def command(workdir, name):
    return [
        "-m", "launch.train", "--config=configs/array.py", f"--config.data.source={name}", f"--workdir={workdir}",
        *(f"--config.model.{field}={value}" for field, value in SMALL.items()), "--config.optimizer.warmup_steps=1",
        *(f"--config.train.{field}={value}" for field, value in STEPS.items()),
    ]  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_as_one(whole, name, tmp_path):
    codes, (out, silent) = finish(start(2, lambda _: [*command(tmp_path, name), "--distributed"], 1, slurm()))
    assert codes == [0, 0]
    assert any(line.startswith("test loss (nats)") for line in out)
    assert silent == []
    assert_ends_as(TarFlowPipeline.from_pretrained(tmp_path).variables, whole[1].variables)


# Commands


@pytest.fixture
def workdir(whole, tmp_path):
    return shutil.copytree(whole[0], tmp_path / "run")


def run(*arguments):
    return commands.run("-m", *arguments)


@pytest.mark.slow
def test_train_again_prints_the_results_and_draws_nothing(workdir, name):
    code, out, err = run(*command(workdir, name)[1:])
    assert code == 0, err
    assert "test loss (nats)" in out
    assert list(json.loads((workdir / "results.json").read_text())) == ["test loss (nats)"]
    assert not (workdir / "figures").exists()


@pytest.mark.slow
def test_samples_have_log_q_and_what_they_were_given(workdir, tmp_path):
    given = sequences(3)
    np.savez(tmp_path / "given.npz", condition=given["condition"], mask=given["mask"])
    flags = ("--num_images=5", "--guidance=1", f"--condition={tmp_path / 'given.npz'}", "--label=1")
    code, out, err = run("launch.sample", f"--workdir={workdir}", *flags)
    assert (code, out) == (0, f"{workdir / 'samples' / 'samples.npz'}\n"), err
    with np.load(workdir / "samples" / "samples.npz") as file:
        found = dict(file)
    turns = np.array([0, 1, 2, 0, 1])
    np.testing.assert_array_equal(found["condition"], given["condition"][turns])
    np.testing.assert_array_equal(found["mask"], given["mask"][turns])
    np.testing.assert_array_equal(found["labels"], np.ones(5))
    pipe = TarFlowPipeline.from_pretrained(workdir)
    x, log_q = pipe.sample(
        jax.random.key(0), 5, found["labels"], Guidance(1.0), condition=found["condition"], mask=found["mask"],
        return_log_prob=True,
    )  # fmt: skip
    np.testing.assert_allclose(found["x"], x, rtol=1e-4)
    np.testing.assert_allclose(found["log_q"], log_q, rtol=1e-4)


@pytest.mark.slow
def test_samples_need_conditions_that_fit(workdir, tmp_path):
    np.savez(tmp_path / "empty.npz", condition=np.zeros((0, 4, 3)))
    for file, message in (
        (None, "this flow has a condition; name a file"),
        ("empty", "condition has shape [0, 4, 3]; expected rows"),
    ):
        flags = () if file is None else (f"--condition={tmp_path / file}.npz",)
        code, _, err = run("launch.sample", f"--workdir={workdir}", *flags)
        assert code == 1
        assert err.splitlines()[-1].startswith("error: ")
        assert message in err.splitlines()[-1]


@pytest.mark.slow
def test_evaluate_measures_the_test_split_in_nats(workdir):
    code, out, err = run("launch.evaluate", f"--workdir={workdir}")
    assert code == 0, err
    (path,) = (workdir / "evaluation").glob("*.json")
    found = json.loads(path.read_text())
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    test_loss = next(line["test_loss"] for line in lines if "test_loss" in line)
    assert found["results"]["log_prob"]["log p, nats"] == pytest.approx(-test_loss, rel=1e-5)
    assert found["results"]["log_prob"]["sequences"] == 20
    assert "log p, nats" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "--metrics=fid"), "fid is for images; log_prob is for sequences"),
        (("demo",), "is a flow of sequences; this command is for images"),
        (("distill", "--config=configs/student/digits.py:smoke"), "a student is for a flow of images"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_commands_for_images_refuse_in_one_line(workdir, arguments, message):
    command, *flags = arguments
    code, _, err = run(f"launch.{command}", f"--workdir={workdir}", *flags)
    assert code == 1
    assert len(err.splitlines()) == 1
    assert message in err


@pytest.mark.slow
def test_the_model_card_is_of_sequences(workdir, tmp_path):
    TarFlowPipeline.from_pretrained(workdir).save_pretrained(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| sequences | 4 x 2, in their own units |" in card
    assert "image-generation" not in card
