"""The commands as a user runs them."""

import json
import re
import signal
import time

import jax
import numpy as np
import pytest
from PIL import Image

import commands
from launch import cli
from tarflow_jax import Guidance, TarFlowPipeline
from tarflow_jax.figures import grid, to_uint8

FIGURES = ("samples_raw", "samples_denoised", "samples_guided", "trajectory")


def run(*arguments):
    return commands.run("-m", *arguments)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of the smoke recipe, stopped by SIGTERM after its first checkpoint, then continued by the same command."""
    workdir = tmp_path_factory.mktemp("run") / "digits"
    arguments = ("launch.train", "--config=configs/digits.py:smoke", f"--workdir={workdir}")
    process = commands.start("-m", *arguments, "--config.train.log_every=1", PYTHONWARNINGS="default")
    deadline = time.monotonic() + 200
    while not (workdir / "checkpoints" / "10").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=240)
    assert process.returncode in (0, 75), err  # 0: it had finished before the signal
    assert process.returncode == 0 or "its state is saved, run the same command to continue" in err
    code, out, err = run(*arguments)
    assert code == 0, err
    assert "test loss" in out
    return workdir


@pytest.mark.slow
def test_every_command_refuses_a_flag_it_does_not_know_in_one_line_and_names_the_nearest():
    given = dict.fromkeys(commands.COMMANDS, "--tracebak") | {"sample": "--guidence=1", "train": "--surplus=1"}
    # For speed: forked from a process that has most modules loaded, and ended without the interpreter's finalization.
    program = (
        "import os, runpy, sys, warnings\n"
        "import launch.cli, launch.demo_model, tarflow_jax.evaluation.classification\n"
        "warnings.filterwarnings('ignore', '.*fork')\n"
        f"for name, flag in {given}.items():\n"
        "    if os.fork() == 0:\n"
        "        sys.argv = [name, flag]\n"
        "        try:\n"
        "            runpy.run_module(f'launch.{name}', run_name='__main__')\n"
        "        except SystemExit as end:\n"
        "            os._exit(end.code)\n"
        "    print(name, os.waitstatus_to_exitcode(os.wait()[1]))\n"
    )
    code, out, err = commands.run("-c", program)
    assert code == 0
    told = dict.fromkeys(commands.COMMANDS, "error: Unknown command line flag 'tracebak'. Did you mean: traceback ?")
    guidance_flags = ", ".join(sorted(["guidance", *cli.GUIDANCE_FLAGS])).removeprefix("attention_temperature, ")
    told["sample"] = f"error: Unknown command line flag 'guidence'. Did you mean: {guidance_flags} ?"
    told["train"] = "error: Unknown command line flag 'surplus'"
    assert err.splitlines() == list(told.values())
    assert out.splitlines() == [f"{name} 1" for name in commands.COMMANDS]


@pytest.mark.slow
def test_train_leaves_the_losses_of_an_undisturbed_run_and_figures_that_differ(workdir, tmp_path):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))
    assert steps[-1] == 20
    fields = ("--config.train.log_every=1", "--config.train.sample_every=0")
    code, _, err = run("launch.train", "--config=configs/digits.py:smoke", f"--workdir={tmp_path}", *fields)
    assert code == 0, err
    expected = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = {line["step"]: line["loss"] for line in expected}
    # Each loss is a difference of two float32 numbers near 1, and some are near 0.
    rounding = 4 * np.finfo(np.float32).eps
    losses = [line["loss"] for line in lines]
    np.testing.assert_allclose(losses, [expected[step] for step in steps], rtol=1e-5, atol=rounding)
    pictures = {(workdir / "figures" / f"{name}.png").read_bytes() for name in FIGURES}
    assert len(pictures) == len(FIGURES)


@pytest.mark.slow
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
        images = samples["arr_0"][..., :1]
    pipe = TarFlowPipeline.from_pretrained(workdir)
    expected = to_uint8(pipe.sample(jax.random.key(0), 6, np.arange(6), Guidance(1.0)))
    np.testing.assert_allclose(images.astype(int), expected, atol=1)
    with Image.open(tmp_path / "trajectory.gif") as animation:
        assert animation.n_frames == 4  # latents, two blocks, denoised
    with Image.open(tmp_path / "samples.png") as picture:
        sheet = grid(images, 6)[..., 0]
        np.testing.assert_array_equal(np.asarray(picture)[: len(sheet)], sheet)
        assert picture.height > len(sheet)  # the classes' names


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_processes=2"], "mean nothing without --distributed"),
        (["--distributed", "--num_processes=2"], "give coordinator_address, num_processes and process_id"),
        (["--distributed"], "the cluster does not say which processes take part"),
    ],
    ids=["alone", "partial", "no cluster"],
)
def test_processes_that_cannot_be_joined(tmp_path, arguments, message):
    code, out, err = run("launch.sample", f"--workdir={tmp_path}", *arguments)
    assert (code, out) == (1, "")
    assert message in err.strip().splitlines()[-1]


@pytest.mark.slow
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
def test_only_errors_of_the_user_lose_their_traceback(error, flags, shows_traceback):
    program = (
        "from launch import cli\n"
        "from tarflow_jax.errors import UserError\n"
        f"def main(argv): raise {error}\n"
        "cli.run(main)\n"
    )
    code, _, err = commands.run("-c", program, *flags)
    assert code == 1
    assert ("Traceback" in err) == shows_traceback
    if not shows_traceback:
        assert err == f"error: {error.split(chr(39))[1]}\n"


def run_joined(main):
    """Runs a command, `main`, as the second of two processes that seem to have met."""
    program = (
        "import os, jax\n"
        "from launch import cli\n"
        "cli.define_process_flags()\n"
        "jax.distributed.initialize = lambda *_, **options: print(options['shutdown_timeout_seconds'])\n"
        f"cli.run(lambda argv: cli.join_processes() and {main})\n"
    )
    return commands.run(
        "-c", program, "--distributed", "--coordinator_address=host:1", "--num_processes=2", "--process_id=1"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 75), ("SIGINT", 130), ("SIGHUP", 129)])
def test_training_that_a_signal_stopped_ends_in_one_line_and_its_code(number, code):
    program = (
        "import signal\nfrom launch import cli\nfrom tarflow_jax.runtime import Preempted, PreemptionGuard\n"
        "def main(argv):\n"
        "    with PreemptionGuard() as guard:\n"
        f"        signal.raise_signal(signal.{number})\n"
        "        raise Preempted('at step 3', guard.signal)\n"
        "cli.run(main)\n"
    )
    assert commands.run("-c", program) == (code, "", "stopped: at step 3\n")


@pytest.mark.slow
def test_processes_that_are_done_wait_for_the_first_for_days():
    code, out, _ = run_joined("0")
    assert code == 0
    assert int(out) > 24 * 3600


@pytest.mark.slow
def test_a_process_that_jax_aborts_ends_in_a_line():
    code, _, err = run_joined("os.abort()")
    assert code == 1
    assert re.fullmatch("error: lost the other processes; .+\n", err)


@pytest.mark.slow
def test_a_process_that_meets_no_other_says_so():
    program = (
        "from launch import cli\n"
        "from tarflow_jax.runtime import start_processes\n"
        "cli.define_process_flags()\n"
        "start_processes.__kwdefaults__['timeout_s'] = 1\n"
        "cli.run(lambda argv: cli.join_processes() and 0)\n"
    )
    flags = ("--distributed", "--coordinator_address=localhost:1", "--num_processes=2", "--process_id=1")
    code, _, err = commands.run("-c", program, *flags)
    assert code == 1
    assert re.fullmatch("error: not all of 2 processes met at localhost:1 within 1 s .+\n", err)


def test_table_is_aligned_and_fills_gaps():
    table = cli.format_table([{"guidance": 0.0, "FID": 12.345678}, {"guidance": 1.5, "recall": 0.5}])
    assert table.splitlines() == [
        "|   guidance |    FID |   recall |",
        "|------------|--------|----------|",
        "|        0   | 12.346 |          |",
        "|        1.5 |        |      0.5 |",
    ]
