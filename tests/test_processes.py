"""Two real processes that talk through gloo, as SLURM and GKE start them."""

import json
import re
import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest

import commands
import runs
from configs import digits
from tarflow_jax import TarFlowPipeline
from tarflow_jax.evaluation.generation import read_samples
from tarflow_jax.figures import to_uint8
from tarflow_jax.files import sole_user
from tarflow_jax.runtime import make_mesh
from tarflow_jax.training import Recipe, train
from tarflow_jax.training.workdir import read_workdir

pytestmark = pytest.mark.slow

FLAGS = {"num_steps": 8, "checkpoint_every": 4, "evaluate_every": 0, "sample_every": 0, "log_every": 1}


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(count, arguments, devices, variables):
    """Processes of `devices` CPU devices each; `variables(index)` are added to their environment."""
    own = {
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "XLA_FLAGS": f"{commands.NOT_OPTIMISED} --xla_force_host_platform_device_count={devices}",
    }
    return [commands.start(*arguments(index), **own, **variables(index)) for index in range(count)]


def finish(processes):
    """Exit codes, and the lines that each printed, without gloo's own; stderr tells of a failure."""
    try:
        results = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert set(codes) <= {0, 75}, "\n".join(err[-2000:] for _, err in results)
    # Gloo's threads write into each other's lines.
    gloo = re.compile(r"\[Gloo\]|connected to \d+ peer ranks")
    return codes, [[line for line in out.splitlines() if line and not gloo.search(line)] for out, _ in results]


def slurm():
    """What srun sets for each of two tasks on this host, for JAX to find them by."""
    port = str(free_port())
    return lambda index: {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
        "JAX_COORDINATOR_PORT": port,
    }


def train_command(workdir, *arguments):
    return [
        "-m", "launch.train", "--distributed", "--config=configs/digits.py:smoke", f"--workdir={workdir}",
        "--config.model.num_blocks=1", *(f"--config.train.{name}={value}" for name, value in FLAGS.items()), *arguments,
    ]  # fmt: skip


def train_here(workdir, devices, monkeypatch):
    """The same run on some devices of this process."""
    config = digits.get_config("smoke")
    config.model.num_blocks = 1
    config.train.update(FLAGS)
    monkeypatch.setattr(Recipe, "mesh", lambda self: make_mesh(devices=jax.devices()[:devices]))
    return train(config, workdir)


def evaluate_command(workdir, out):
    chosen = ("--metrics=bits_per_dim,classification,fid", "--allow_noisy", "--num_samples=600")
    return ["-m", "launch.evaluate", f"--workdir={workdir}", f"--out={out}", *chosen]


def measured(out):
    """What launch.evaluate found, as one list of numbers."""
    (path,) = out.glob("*.json")
    results = json.loads(path.read_text())["results"]
    return [
        *results["bits_per_dim"].values(),
        results["classification"]["accuracy"],
        *results["samples"][0].values(),
    ]


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def assert_ends_as(state, expected):
    """Every parameter within 1e-5 of the largest one of its array."""
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        theirs = np.asarray(theirs)
        np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=1e-5 * max(np.abs(theirs).max(), 1))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(workdir, final variables) of an uninterrupted run on eight devices of this process; steps 4 and 8 are saved."""
    workdir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        state = train_here(workdir, 8, patch)
    return workdir, jax.tree.map(np.asarray, state.variables)


def cut_back(whole, workdir, step=4):
    """A copy of a run as it was at `step`."""
    shutil.copytree(whole, workdir)
    for path in (workdir / "checkpoints").iterdir():
        if path.name != str(step):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return workdir


def test_figures_are_those_of_one_device(tmp_path):
    codes, _ = finish(start(2, lambda index: ["tests/runs.py", tmp_path / "found.json"], 4, slurm()))
    assert codes == [0, 0]
    expected = runs.figures(make_mesh(devices=jax.devices()[:1]))
    runs.assert_same(json.loads((tmp_path / "found.json").read_text()), expected)


def test_the_command_continues_on_two_processes_what_one_began(whole, tmp_path):
    workdir = cut_back(whole[0], tmp_path / "run")
    codes, (out, silent) = finish(start(2, lambda index: train_command(workdir), 2, slurm()))
    assert codes == [0, 0]
    assert any(line.startswith("test loss") for line in out)
    assert silent == []
    assert len(list((workdir / "figures").glob("*.png"))) == 4
    run = read_workdir(workdir)
    assert run.card["training"]["steps"] == 8
    assert_ends_as(run.variables, whole[1])
    expected = losses(whole[0])
    assert losses(workdir).keys() == expected.keys()
    np.testing.assert_allclose(list(losses(workdir).values()), list(expected.values()), rtol=1e-5)


def test_previews_are_drawn_while_parameters_are_sharded_across_processes(whole, tmp_path):
    flags = (
        "--config.mesh.data=1",
        "--config.mesh.fsdp=8",
        "--config.train.num_steps=4",
        "--config.train.sample_every=4",
    )
    codes, _ = finish(start(2, lambda index: train_command(tmp_path, *flags), 4, slurm()))
    assert codes == [0, 0]
    assert (tmp_path / "figures" / "step_0000004.png").exists()
    expected = losses(whole[0])
    np.testing.assert_allclose(list(losses(tmp_path).values()), [expected[step] for step in (1, 2, 3, 4)], rtol=1e-5)


def test_sigterm_to_one_process_stops_both_and_one_process_continues(whole, tmp_path, monkeypatch):
    workdir, address = tmp_path / "run", f"--coordinator_address=127.0.0.1:{free_port()}"
    processes = start(
        2,
        lambda index: train_command(workdir, address, "--num_processes=2", f"--process_id={index}"),
        2,
        lambda index: {},
    )
    while not (workdir / "config.json").exists():  # by then JAX listens for the signal
        assert processes[0].poll() is None, processes[0].communicate()[1]
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    codes, _ = finish(processes)
    assert codes == [75, 75]
    (step,) = (int(path.name) for path in (workdir / "checkpoints").iterdir() if path.is_dir())
    assert step < 8
    state = train_here(workdir, 8, monkeypatch)
    assert_ends_as(state.variables, whole[1])


def test_when_one_process_dies_the_other_says_so_and_ends(tmp_path):
    workdir = tmp_path / "run"
    # No checkpoint: one under way would wait for the dead until JAX gives them up, after 100 s.
    command = train_command(workdir, "--config.train.num_steps=100000", "--config.train.checkpoint_every=100000")
    processes = start(2, lambda index: command, 1, slurm())
    try:
        while not (workdir / "metrics.jsonl").exists() or len(losses(workdir)) < 3:
            assert processes[0].poll() is None, processes[0].communicate()[1]
            time.sleep(0.01)
        processes[1].kill()
        (_, said), _ = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode == 1, said
    assert re.fullmatch(r"error: process 0 of 2: .+; if another stopped before, .+", said.splitlines()[-1])


def test_when_one_process_fails_the_other_ends_too(tmp_path):
    with sole_user(tmp_path):  # which the first alone tries to become
        processes = start(2, lambda index: train_command(tmp_path), 1, slurm())
        try:
            said = [process.communicate(timeout=200)[1].splitlines() for process in processes]
        finally:
            for process in processes:
                process.kill()
    assert [process.returncode for process in processes] == [1, 1]
    assert re.fullmatch(rf"error: process \d+ on .+ works in {tmp_path}; .+", said[0][-1])
    assert said[1][-1].startswith("error: ")


def test_a_process_that_cannot_save_says_so_while_the_others_wait_for_it(tmp_path):
    processes = start(2, lambda index: ["tests/save_apart.py", tmp_path], 1, slurm())
    try:
        said, _ = processes[1].communicate(timeout=120)
    finally:
        for process in processes:
            process.kill()
        processes[0].communicate()
    assert f"could not write a checkpoint in {tmp_path}/checkpoints: " in said
    assert (tmp_path / "checkpoints" / "1").is_dir()


def test_processes_restore_the_same_step_or_none(tmp_path):
    codes, lines = finish(start(2, lambda index: ["tests/restore_apart.py", tmp_path], 1, slurm()))
    assert codes == [0, 0]
    found = [{line.split()[0]: line for line in out} for out in lines]
    assert found[0].keys() - found[1].keys() == {"checkpoint"}  # the first moved it
    mine, other = "DATA_LOSS: a checksum does not match", "process {} failed; its log says why"
    for process, reasons in enumerate(((mine, other.format(1)), (other.format(0), mine))):
        reasons += ("kernel is damaged",)
        assert [line for line in lines[process] if line.startswith("skipping")] == [
            f"skipping checkpoint {tmp_path}/checkpoints/3: {reason}" for reason in reasons
        ]
    for process in (0, 1):
        here, there = found[process], found[1 - process]
        assert here[f"damaged{process}"] == there[f"damaged{process}"] == f"damaged{process} 2 16"
        reason = f"not enough memory to restore {tmp_path}/checkpoints/3: no bytes left;"
        assert here[f"memory{process}"].startswith(f"memory{process} UserError False {reason}")
        failed = f"OSError True process {process} failed; its log says why"
        assert there[f"memory{process}"] == f"memory{process} {failed}"
        assert f"could not read {tmp_path}/checkpoints/3: [Errno 13] Permission" in here[f"denied{process}"]
        assert there[f"denied{process}"] == f"denied{process} {failed}"
    assert found[0]["best"] == found[1]["best"] == "best 1"
    assert found[0]["changed"] == found[1]["changed"] == "changed 2 16"
    assert found[0]["aside"] == found[1]["aside"] == "aside 2 16"
    assert (tmp_path / "damaged" / "3").is_dir()


def test_two_processes_measure_what_one_does(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("TARFLOW_DATA_DIR", str(tmp_path / "data"))
    command = evaluate_command(whole[0], tmp_path / "two")
    codes, (_, silent) = finish(start(2, lambda index: [*command, "--distributed"], 2, slurm()))
    assert (codes, silent) == ([0, 0], [])
    finish(start(1, lambda index: evaluate_command(whole[0], tmp_path / "one"), 1, lambda index: {}))
    np.testing.assert_allclose(measured(tmp_path / "two"), measured(tmp_path / "one"), rtol=1e-5)


def test_two_processes_draw_what_one_does(whole, tmp_path):
    command = [
        "-m",
        "launch.sample",
        "--distributed",
        f"--workdir={whole[0]}",
        f"--out={tmp_path}",
        "--num_images=10",
    ]
    codes, (_, silent) = finish(start(2, lambda index: command, 2, slurm()))
    assert (codes, silent) == ([0, 0], [])
    pipe = TarFlowPipeline.from_pretrained(whole[0])
    expected = to_uint8(np.asarray(pipe.sample(jax.random.key(0), 10, np.arange(10))))
    found = read_samples(tmp_path / "samples.npz")
    np.testing.assert_allclose(found[..., : expected.shape[-1]], expected, atol=1)


def test_a_run_of_eight_devices_continues_on_four(whole, tmp_path, monkeypatch):
    state = train_here(cut_back(whole[0], tmp_path / "run"), 4, monkeypatch)
    assert_ends_as(state.variables, whole[1])
