"""The commands, as a user runs them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
FIGURES = ("samples_raw", "samples_denoised", "samples_guided", "trajectory")


def command(*arguments):
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONWARNINGS": "default"}
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def run(*arguments):
    return finish(command(*arguments))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of the smoke recipe, stopped by SIGTERM after its first checkpoint and continued by the same command."""
    workdir = tmp_path_factory.mktemp("run") / "digits"
    arguments = ("launch.train", "--config=configs/digits.py:smoke", f"--workdir={workdir}")
    process = command(*arguments, "--config.train.log_every=1")
    deadline = time.monotonic() + 200
    while not (workdir / "checksums" / "10.json").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code in (0, 75), err  # 0: it was done before the signal came
    code, out, err = run(*arguments)
    assert code == 0, err
    assert "test loss" in out
    return workdir


def test_train_leaves_metrics_and_figures_that_differ(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))
    assert steps[-1] == 20
    assert all(np.isfinite(line["loss"]) for line in lines)
    pictures = {(workdir / "figures" / f"{name}.png").read_bytes() for name in FIGURES}
    assert len(pictures) == len(FIGURES)


def test_sample_writes_grid_images_and_animation(workdir, tmp_path):
    code, _, err = run(
        "launch.sample",
        f"--workdir={workdir}",
        f"--out={tmp_path}",
        "--num_images=6",
        "--guidance=1",
        "--denoise",
    )
    assert code == 0, err
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as samples:
        assert samples["arr_0"].shape == (6, 8, 8, 3)  # the format has three channels
        assert samples["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(samples["arr_1"], np.arange(6))
    with Image.open(tmp_path / "trajectory.gif") as animation:
        assert animation.n_frames == 4  # latents, two blocks, denoised
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.size == (3 * 34 - 2, 2 * 34 - 2)


def test_tune_decoder_prints_its_choices_and_auto_uses_them(workdir, tmp_path):
    code, out, err = run("launch.tune_decoder", f"--workdir={workdir}", "--num_images=2")
    assert code == 0, err
    assert "2 images" in out
    assert "sequential" in out
    schedule = json.loads((workdir / "decoder.json").read_text())
    assert [len(row) for row in schedule["decoders"].values()] == [2]  # a decoder for each block
    assert schedule["guidance"] is None
    code, _, err = run(
        "launch.sample",
        f"--workdir={workdir}",
        f"--out={tmp_path}",
        "--num_images=2",
        "--decoder=auto",
    )
    assert code == 0, err
    assert (tmp_path / "samples.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.model.widht=3"], "unknown config field 'widht'. Did you mean \"width\""),
        (["--config.model.patch_size=3"], "image_size 8x8 is not divisible by patch_size 3"),
        (["--config.data.source=digit"], "digits"),
        (["--config.noise.std=0.3"], "holds another configuration: noise.std"),
    ],
    ids=["field", "patch", "data", "workdir"],
)
def test_bad_input_is_one_line_and_exit_code_1(workdir, arguments, message):
    before = (workdir / "config.json").read_bytes()
    code, out, err = run("launch.train", "--config=configs/digits.py:smoke", f"--workdir={workdir}", *arguments)
    last = err.strip().splitlines()[-1]
    assert (code, out) == (1, "")
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in err
    assert (workdir / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_processes=2"], "mean nothing without --distributed"),
        (["--distributed", "--num_processes=2"], "go together"),
        (["--distributed"], "the cluster does not say which processes take part"),
    ],
    ids=["alone", "partial", "no cluster"],
)
def test_processes_that_cannot_be_joined(tmp_path, arguments, message):
    code, out, err = run("launch.sample", f"--workdir={tmp_path}", *arguments)
    assert (code, out) == (1, "")
    assert message in err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "flags", "shows_traceback"),
    [
        ("UserError('width is 3; expected 4')", [], False),
        ("FileNotFoundError('no such file')", [], False),
        ("UserError('width is 3; expected 4')", ["--traceback"], True),
        ("ValueError('operands could not be broadcast')", [], True),
        ("TypeError('missing argument')", [], True),
    ],
)
def test_only_errors_of_the_users_making_lose_their_traceback(error, flags, shows_traceback):
    program = (
        "from launch import common\n"
        "from tarflow_jax.errors import UserError\n"
        f"def main(argv): raise {error}\n"
        "common.run(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *flags], cwd=ROOT, env=os.environ, text=True, capture_output=True
    )
    assert done.returncode == 1
    assert ("Traceback" in done.stderr) == shows_traceback
    if not shows_traceback:
        assert done.stderr == f"error: {error.split(chr(39))[1]}\n"
