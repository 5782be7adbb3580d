"""Mistakes and accidents of users: each is one line, before anything is lost."""

import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import sys

import chex
import numpy as np
import pytest
from PIL import Image

import commands
from configs import digits
from tarflow_jax import Noise, TarFlowPipeline, data, files
from tarflow_jax.data.folder import list_folder
from tarflow_jax.interop import load_torch
from tarflow_jax.runtime import kernels
from tarflow_jax.runtime.kernels import attend_on_device
from tarflow_jax.training import Recipe, train
from tarflow_jax.training.metrics import MetricsWriter
from test_resume import limited_files
from tiny_models import LABELS, TINY, images_of, random_variables

SMOKE = ("-m", "launch.train", "--config=configs/digits.py:smoke")


def refused(*arguments):
    """Returns the error line of a command that must fail."""
    code, out, err = commands.run(*arguments)
    assert (code, out) == (1, ""), err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err
    return line


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved model with random weights."""
    folder = tmp_path_factory.mktemp("model") / "model"
    TarFlowPipeline(TINY, random_variables(TINY), Noise("gaussian", 0.1)).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.num_classes=0", "sample.guidance.weight=1.0"], "guidance by class needs a class-conditional model"),
        (["model.num_classes=12"], "digits has 10 classes, the model 12; set model.num_classes to 10"),
        (["data.source=npz:{folder}/only_train.npz"], "only_train.npz not found; expected an npz file"),
        (["sample.denoise_multiplier=nan"], "sample.denoise_multiplier is nan; expected a finite number"),
        (["train.seed=-1"], "train.seed is -1; expected a number from 0"),
        (["data.num_workers=-2"], "data.num_workers is -2; expected a number from 0"),
    ],
)
def test_training_refuses_at_its_start_and_leaves_the_workdir_usable(tmp_path, overrides, message):
    flags = [f"--config.{override.format(folder=tmp_path)}" for override in overrides]
    assert message in refused(*SMOKE, f"--workdir={tmp_path / 'run'}", *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics=fid", "--num_samples=100"], "--num_samples is 100; fid needs at least 128"),
        (["--metrics=kid", "--num_samples=999"], "--num_samples is 999; kid needs at least 1000"),
        (["--metrics=kid", "--num_samples=1000"], "the reference split has 38 images; kid needs at least 1000"),
        (["--metrics=fid", "--reference={folder}/none.npz"], "none.npz not found; expected an npz file"),
        (
            ["--metrics=fid", "--guidance_rule=best", "--model={folder}/none"],
            "guidance.rule is 'best'; expected one of",
        ),
        (["--metrics=fid", "--guidance="], "--guidance has ''; expected numbers"),
        (["--metrics=outliers", "--outliers=npz:{folder}/none.npz"], "none.npz not found; expected an npz file"),
        (["--metrics=classification"], "x.npz has no labels; classification needs them"),
        (["--metrics=outliers", "--data=npz:{folder}/few.npz"], "few.npz has 1 image; expected several"),
        (["--metrics=fid", "--out={folder}/x.npz"], "File exists"),
        (["--metrics=bits_per_dim"], "bits/dim is defined for models trained with uniform noise"),
        (["--metrics="], "--metrics is empty; expected some of bits_per_dim"),
        (["--metrics=fid", "--denoise_multiplier=inf"], "flag --denoise_multiplier=inf: expected a finite number"),
        (["--metrics=fid", f"--seed={2**64}"], f"flag --seed={2**64}"),
    ],
)
def test_evaluation_refuses_before_it_draws(tmp_path, model, arguments, message):
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 6, 3), np.uint8)
    np.savez(tmp_path / "x.npz", images=images)
    np.savez(tmp_path / "few.npz", images=images[:10])
    flags = [f"--model={model}", f"--data=npz:{tmp_path / 'x.npz'}", f"--out={tmp_path / 'out'}", *arguments]
    assert message in refused("-m", "launch.evaluate", *(flag.format(folder=tmp_path) for flag in flags))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_broken_images_are_counted_and_only_broken_ones_are_an_error(tmp_path, model):
    command = ("-m", "launch.sample", f"--workdir={model}", "--num_images=6", "--nodenoise", f"--out={tmp_path}")
    code, _, err = commands.run(*command, "--guidance=100")
    assert code == 1
    assert "6 of 6 images have pixels that are not finite or far outside [-1, 1]" in err
    assert (tmp_path / "samples.png").exists()
    assert "--workdir is empty; expected a folder" in refused("-m", "launch.sample", "--workdir=")


def test_a_set_without_labels_trains_no_classes(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "plain.npz", images=images)
    config = digits.get_config()
    config.data.source = f"npz:{tmp_path / 'plain.npz'}"
    with pytest.raises(ValueError, match=r"has 0 classes, the model 10; set model\.num_classes to 0"):
        Recipe(config).source("train")
    config.model.num_classes = 0
    assert Recipe(config).source("train").num_classes == 0


def test_two_do_not_train_in_one_workdir(tmp_path):
    config = digits.get_config("smoke")
    config.train.num_steps = 1
    with (
        files.sole_user(tmp_path),
        pytest.raises(ValueError, match=rf"process {os.getpid()} on \S+ works in .*; wait for it, or stop it"),
    ):
        train(config, tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.slow
def test_a_killed_process_leaves_its_folder_free(tmp_path):
    program = (
        "from tarflow_jax import files\n"
        f"with files.sole_user({str(tmp_path)!r}):\n"
        "    print('in', flush=True)\n"
        "    input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=commands.ROOT, env=commands.environment(), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "in\n"
    with pytest.raises(ValueError, match=f"process {process.pid} on"), files.sole_user(tmp_path):
        pass
    process.kill()
    process.communicate()
    with files.sole_user(tmp_path):
        pass


@pytest.mark.slow
def test_a_signal_while_a_command_starts_ends_it_in_one_line(tmp_path):
    process = commands.start("-X", "importtime", *SMOKE, f"--workdir={tmp_path}")
    # Python writes a line once it has imported a module.
    while (line := process.stderr.readline()) and line.rpartition("|")[2].strip() != "jax":
        assert line.startswith("import time:"), line + process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert [line for line in err.splitlines() if not line.startswith("import time:")] == [
        "stopped: asked to stop; run the same command again"
    ]


def png(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)


@pytest.mark.parametrize(
    ("folders", "classes", "count"),
    [
        (["train/a", "valid/a"], ("a",), 1),
        (["TRAIN/a", "TRAIN/b", "Test/a"], ("a", "b"), 2),
        (["training/a", "testing/a", "val/a"], ("a",), 1),
        (["a", "b"], ("a", "b"), None),
    ],
)
def test_folders_of_splits_are_known_by_their_usual_names(tmp_path, folders, classes, count):
    for name in folders:
        png(tmp_path / name / "x.png")
    for i in range(40):  # without folders of splits, some of these are in the training split
        png(tmp_path / folders[0] / f"{i}.png")
        png(tmp_path / folders[-1] / f"{i}.png")
    items, label_names = list_folder(tmp_path, "train")
    assert label_names == classes
    if count:
        assert len(items) == 40 + count


@pytest.mark.parametrize(
    "folders", [["train/a"], ["test/a", "other/a"], ["train/a", "Train/a", "test/a"], ["train/a", "test/a", "cats"]]
)
def test_folders_that_may_be_splits_or_classes_are_refused(tmp_path, folders):
    for name in folders:
        png(tmp_path / name / "x.png")
    with pytest.raises(ValueError, match=r"may be splits or classes; expected train and test \(or val\), each with"):
        list_folder(tmp_path, "train")


def test_a_line_of_metrics_that_was_cut_short_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2.0}\n\xff\xfe\n{"step": 2')
    MetricsWriter(tmp_path, 5).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'


def test_a_full_disk_leaves_no_part_of_a_shard(tmp_path):
    for i in range(20):
        png(tmp_path / "images" / "a" / f"{i}.png")
    with (
        limited_files(tmp_path),
        pytest.raises(OSError, match=r"could not write .*/train-00000.array_record: .*File too large.*; free some"),
    ):
        data.prepare_source(f"folder:{tmp_path / 'images'}", image_size=(8, 8), data_dir=tmp_path / "data")
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


@pytest.mark.slow
def test_two_do_not_prepare_into_one_folder(tmp_path):
    with files.sole_user(tmp_path):
        code, _, err = commands.run("-m", "launch.prepare_data", "--data=digits", f"--data_dir={tmp_path}")
    assert code == 1
    assert re.fullmatch(rf"error: process {os.getpid()} on \S+ works in .*; wait for it, or stop it\n", err)


def test_pytorch_files_of_ddp_are_read_and_others_never_with_advice_to_run_them(tmp_path, load_golden):
    golden, torch = load_golden("cond"), pytest.importorskip("torch")
    shape = (golden.config.image_size, golden.config.image_channels, golden.config.patch_size)
    state = torch.load(golden.path, weights_only=True)
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "ddp.pth")
    _, variables = load_torch(tmp_path / "ddp.pth", *shape)
    chex.assert_trees_all_equal(variables, golden.variables)
    torch.save({"optimizer": pathlib.PurePosixPath("x")}, tmp_path / "objects.pth")
    with pytest.raises(ValueError, match="holds more than tensors, and other objects are never loaded") as refused:
        load_torch(tmp_path / "objects.pth", *shape)
    assert "weights_only" not in str(refused.value)


def test_a_kernel_of_another_device_is_refused():
    query = np.zeros((1, 1, 2, 8), np.float32)
    with pytest.raises(ValueError, match=r"model\.attention is 'cudnn', which needs a device of kind NVIDIA"):
        attend_on_device(query, query, query, causal=True, kernel="cudnn")


def test_cudnn_s_attention_which_has_no_float32_is_evaluated_in_it(monkeypatch):
    monkeypatch.setattr(kernels, "device_kind", lambda: "NVIDIA H100 80GB HBM3")
    query = np.zeros((1, 1, 2, 8), np.float32)
    with pytest.raises(ValueError, match=r"'cudnn', which needs model\.dtype=bfloat16; this model is in float32"):
        attend_on_device(query, query, query, causal=True, kernel="cudnn")
    half = dataclasses.replace(TINY, dtype="bfloat16", attention="cudnn")
    pipes = [TarFlowPipeline(config, random_variables(TINY), Noise("gaussian", 0.1)) for config in (half, TINY)]
    of_half, expected = (pipe.log_prob(images_of(TINY), LABELS) for pipe in pipes)
    np.testing.assert_array_equal(of_half, expected)


def test_a_saved_model_is_no_run(tmp_path, model):
    with pytest.raises(ValueError, match="is a saved model; expected the workdir of a training run, or --model"):
        Recipe.from_workdir(model)


@pytest.fixture
def read_only(tmp_path):
    """An empty folder that an ordinary user may not write to."""
    folder = tmp_path / "read_only"
    folder.mkdir(mode=0o555)
    yield folder
    folder.chmod(0o755)


SAVE = "import sys; from tarflow_jax import TarFlowPipeline as T; T.from_pretrained(sys.argv[1]).save_pretrained({!r})"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "-m launch.convert --from_torch={torch} --image_size=8 --patch_size=2 --out={folder}",
        "-m launch.sample --workdir={model} --num_images=2 --out={folder}/samples",
        "-m launch.prepare_data --data=digits --data_dir={folder}/data",
        "-m launch.prepare_data --data=digits --data_dir={folder}/../data --preview={folder}/preview.png",
        "-c {save} {model}",
    ],
)
def test_a_folder_that_may_not_be_written_is_named_in_one_line(read_only, model, load_golden, command):
    names = {"torch": load_golden("vp").path, "folder": read_only, "model": model}
    words = [SAVE.format(str(read_only)) if word == "{save}" else word.format(**names) for word in command.split()]
    # Root may write everywhere, but not without these.
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*drop, sys.executable, *words], env=commands.environment(PYTHONPATH=str(commands.ROOT)), cwd=commands.ROOT,
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if "Permission denied" in line]
    assert done.returncode == 1, done.stderr
    assert len(lines) == 1
    assert str(read_only) in lines[0]
    assert lines[0].startswith("PermissionError: " if words[0] == "-c" else "error: ")
    assert words[0] == "-c" or "Traceback" not in done.stderr
    assert not list(read_only.iterdir())
