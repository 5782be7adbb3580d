"""What a run survives: signals, bad numbers, full disks, kills. One process; several are in test_processes.py."""

import contextlib
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

import commands
from configs import digits
from damage import cut_short
from tarflow_jax import TarFlowPipeline, files
from tarflow_jax.data import ArraySource, train_batches
from tarflow_jax.runtime import Preempted, make_mesh
from tarflow_jax.training import Checkpoints, Recipe, train
from tarflow_jax.training.loop import NonFiniteError
from tarflow_jax.training.metrics import MetricsWriter
from tarflow_jax.training.workdir import read_workdir

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def small_config(**fields):
    config = digits.get_config("smoke")
    config.model.num_blocks = 1
    config.train.update({"num_steps": 6, "checkpoint_every": 2, "evaluate_every": 0, "log_every": 1} | fields)
    return config


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(Recipe, "mesh", lambda self: make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The final state of an uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recipe, "mesh", lambda self: make_mesh(devices=jax.devices()[:1]))
        return jax.tree.map(np.asarray, train(small_config(), tmp_path_factory.mktemp("whole")))


def steps_in(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def ask_to_stop(*_):
    os.kill(os.getpid(), signal.SIGTERM)


class StopsWhenRead(ArraySource):
    """A split in whose evaluation the signal comes, and which must not be read to its end."""

    reads = 0

    def read(self, indices):
        StopsWhenRead.reads += 1
        ask_to_stop()
        return super().read(indices)


@pytest.mark.slow
def test_sigterm_in_a_preview_or_an_evaluation(whole, tmp_path, monkeypatch):
    def preview(step, variables):
        ask_to_stop()
        pipe = TarFlowPipeline(recipe.model, variables, mesh=recipe.mesh())
        pipe.decode(pipe.latents(jax.random.key(0), 2))
        pytest.fail("drawn to the end")

    recipe = Recipe(small_config(sample_every=3))
    with pytest.raises(Preempted, match="stop at step 3; its state is saved"):
        train(recipe.config, tmp_path, preview)
    assert steps_in(tmp_path) == [2, 3]

    source = Recipe.source
    images = np.zeros((40, 8, 8, 1), np.uint8)
    test = StopsWhenRead("stops", images, np.zeros(40, np.int32), 10)
    monkeypatch.setattr(Recipe, "source", lambda self, split: test if split == "test" else source(self, split))
    with pytest.raises(Preempted, match="stop at step 5; its state is saved"):
        train(small_config(evaluate_every=5), tmp_path)
    assert StopsWhenRead.reads == 1  # of three batches
    assert steps_in(tmp_path) == [3, 4, 5]

    chex.assert_trees_all_equal(jax.tree.map(np.asarray, train(small_config(), tmp_path)), whole)


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 75), ("SIGINT", 130), ("SIGHUP", 129)])
def test_a_signal_ends_a_command_at_once_and_leaves_no_half_file(tmp_path, number, code):
    in_a_file = (
        "with files.replacing(folder + '/grid.png') as file:\n"
        "        file.write(b'half')\n"
        f"        os.kill(os.getpid(), signal.{number})\n"
    )
    in_a_chunk = (
        "def sample(key, number, labels):\n"
        "        if glob.glob(folder + '/*/chunk_00000.npz'):\n"
        f"            os.kill(os.getpid(), signal.{number})\n"
        "        return jax.numpy.zeros((number, 2, 2, 1))\n"
        "    sampler = mock.Mock(side_effect=sample, protocol=dict)\n"
        "    generation.draw_samples(sampler, folder, 12, (), seed=0, chunk_size=4)\n"
    )
    for i, (body, left) in enumerate(((in_a_file, []), (in_a_chunk, ["chunk_00000.npz", "protocol.json"]))):
        folder = tmp_path / str(i)
        folder.mkdir()
        program = (
            "import glob, os, signal, jax\nfrom unittest import mock\n"
            "from launch import cli\nfrom tarflow_jax import files\n"
            f"from tarflow_jax.evaluation import generation\nfolder = {str(folder)!r}\n"
            f"def main(argv):\n    {body}\ncli.run(main)\n"
        )
        found, out, err = commands.run("-c", program)
        assert (found, out) == (code, ""), err
        assert err.splitlines()[-1] == "stopped: asked to stop; run the same command again"
        assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == left


class Poisoned(ArraySource):
    """Images of which one, `bad`, is not a number."""

    bad = 0

    def read(self, indices):
        images, labels = super().read(indices)
        images = images.astype(np.float32)
        images[np.asarray(indices) == self.bad] = np.nan
        return images, labels


@pytest.mark.slow
def test_a_nan_in_a_batch_stops_the_run_and_reaches_no_checkpoint(tmp_path, monkeypatch):
    config = small_config(checkpoint_every=1)
    images = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 1), np.uint8)
    numbered = ArraySource("numbered", images, np.arange(100), 100)
    *_, third = itertools.islice(train_batches(numbered, batch_size=16, seed=config.train.seed), 3)
    source = Poisoned("poisoned", images, np.zeros(100, np.int32), 10)
    source.bad = third.label[0]
    monkeypatch.setattr(Recipe, "source", lambda self, split: source)
    with pytest.raises(NonFiniteError, match="loss is nan at step 3;"):
        train(config, tmp_path)
    assert steps_in(tmp_path) == [1, 2]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(read_workdir(tmp_path).variables))


@contextlib.contextmanager
def full_tmpfs(folder):
    """A file system of which 64 KiB are left."""
    filler = folder / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(folder).free - (64 << 10)))
    yield
    filler.unlink()


@contextlib.contextmanager
def limited_files(folder):
    """No file may grow over 4 KiB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def tmpfs(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("a tmpfs may not be mounted here; limited_files is tested in its place")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


@pytest.mark.parametrize(
    ("disk", "full", "says"),
    [("tmpfs", full_tmpfs, "No space left .* Free some space"), ("tmp_path", limited_files, "File too large")],
)
def test_a_full_disk_is_a_clear_error_and_earlier_checkpoints_stay(request, disk, full, says):
    folder = request.getfixturevalue(disk)
    state = {"kernel": jax.random.normal(jax.random.key(0), (1 << 16,))}  # 256 KiB, which do not compress
    checkpoints = Checkpoints(folder / "checkpoints")

    def save(step):
        checkpoints.save(step, state, {})
        checkpoints.wait()

    save(1)
    with full(folder):
        with pytest.raises(OSError, match=rf"could not write a checkpoint in .*{says}") as e:
            save(2)
        assert "earlier ones are intact" in str(e.value)
        with contextlib.suppress(OSError):
            checkpoints.close()
    checkpoints = Checkpoints(folder / "checkpoints")
    step, found = checkpoints.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state))
    assert step == 1
    chex.assert_trees_all_equal(found, state)
    save(2)
    checkpoints.close()


def test_a_full_disk_is_named_in_metrics_and_small_files(tmp_path):
    writer = MetricsWriter(tmp_path, 0)

    def write_all():
        for step in range(100):
            writer.write(step, {"block_norms": np.ones(50)})

    with limited_files(tmp_path):
        with pytest.raises(OSError, match=rf"File too large: '{tmp_path}/config.json'"):
            files.write_text(tmp_path / "config.json", 5000 * "x")
        with pytest.raises(OSError, match=rf"File too large: '{tmp_path}/metrics.jsonl'"):
            write_all()
        with contextlib.suppress(OSError):
            writer.close()
    assert not (tmp_path / "config.json").exists()


def test_a_full_disk_ends_training_in_one_line(tmp_path):
    program = (
        "import resource, runpy\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))\n"
        "runpy.run_module('launch.train', run_name='__main__')"
    )
    flags = ("--config=configs/digits.py:smoke", f"--workdir={tmp_path}", "--config.train.num_steps=1")
    code, _, err = commands.run("-c", program, *flags, JAX_ENABLE_COMPILATION_CACHE="false")
    assert code == 1, err
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith(f"error: could not write a checkpoint in {tmp_path}/checkpoints: ")
    assert "File too large" in last


def test_a_workdir_deleted_or_moved_while_it_trains_ends_the_run(tmp_path):
    def move(step, variables):
        if step == 3:
            while steps_in(tmp_path / "run") != [2]:
                time.sleep(0.01)
            (tmp_path / "run").rename(tmp_path / "elsewhere")

    with pytest.raises(OSError, match=r"run/checkpoints is gone: the workdir was moved or deleted;"):
        train(small_config(sample_every=1), tmp_path / "run", move)
    assert not (tmp_path / "run").exists()
    assert read_workdir(tmp_path / "elsewhere").card["training"]["steps"] == 2


def test_the_best_checkpoint_stays_beside_the_last_ones(tmp_path):
    state, losses = {"step": jax.numpy.int32(0)}, {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: 2.5, 6: None}
    shapes = jax.eval_shape(lambda: state)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step, loss in losses.items():
        checkpoints.save(step, {"step": jax.numpy.int32(step)}, {"name": "run"}, loss)
        if step == 4:  # as when a run is resumed
            checkpoints.close()
            checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    checkpoints.wait()
    assert steps_in(tmp_path) == [2, 5, 6]
    assert checkpoints.restore(shapes)[0] == 6
    step, found = checkpoints.restore(shapes, best=True)
    assert (step, int(found["step"])) == (2, 2)
    checkpoints.close()
    other = Checkpoints(tmp_path / "other" / "checkpoints")
    other.save(1, state, {})
    other.wait()
    with pytest.raises(ValueError, match=r"has a test loss; set train.evaluate_every"):
        other.restore(shapes, best=True)
    other.close()


def test_a_workdir_is_read_by_its_best_checkpoint(tmp_path):
    config = small_config(num_steps=4, checkpoint_every=1, evaluate_every=1)
    train(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["test_loss"] for line in lines if "test_loss" in line}
    assert losses.keys() == {1, 2, 3, 4}
    (start,) = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert (start["step"], start["jax"], start["devices"]) == (0, jax.__version__, "8 x cpu")
    assert read_workdir(tmp_path, best=True).card["training"]["steps"] == min(losses, key=losses.get)
    assert read_workdir(tmp_path).card["training"]["steps"] == 4
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    assert read_workdir(tmp_path).card["training"]["steps"] == 3


@pytest.mark.slow
def test_a_run_takes_damaged_steps_again_and_saves_them(whole, tmp_path, caplog):
    train(small_config(), tmp_path)
    for step in (4, 6):
        cut_short(tmp_path / "checkpoints" / str(step))
    train(small_config(), tmp_path)
    assert "skipping checkpoint" in caplog.text
    caplog.clear()
    run = read_workdir(tmp_path)
    assert "skipping checkpoint" not in caplog.text
    assert (steps_in(tmp_path), run.card["training"]["steps"]) == ([2, 4, 6], 6)
    assert {path.name for path in (tmp_path / "damaged").iterdir()} == {"4", "6"}
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, run.variables), whole.variables)


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_bit_for_bit_the_same(tmp_path):
    finished = subprocess.run(
        [sys.executable, "tests/kill.py", str(tmp_path), "3"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "while saving; the same parameters, bit for bit" in finished.stdout
