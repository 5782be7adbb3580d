"""Saving and restoring checkpoints while something fails. Runs of two processes are in test_processes.py."""

import errno
import functools
import traceback
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tarflow_jax import Noise
from tarflow_jax.errors import UserError
from tarflow_jax.runtime import Preempted, make_mesh
from tarflow_jax.training import Checkpoints, Recipe, train
from tarflow_jax.training.checkpoint import _checksum
from tarflow_jax.training.step import TrainConfig, initial_state
from tarflow_jax.training.task import FlowTask
from tarflow_jax.training.workdir import read_workdir
from test_resume import small_config, steps_in
from tiny_models import TINY

DATA_LOSS = 'DATA_LOSS: Error decoding local file "manifest.ocdbt": checksum mismatch'


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(Recipe, "mesh", lambda self: make_mesh(devices=jax.devices()[:1]))


def shapes_of(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def state_of(optimizer):
    """A state with an average and the moments of an optax optimizer."""
    averaged = types.SimpleNamespace(transformation=lambda: optimizer, ema_decay=0.9)
    config = TrainConfig(FlowTask(TINY, Noise("gaussian", 0.1)), averaged)
    return jax.jit(functools.partial(initial_state, config))(jax.random.key(0))


@pytest.fixture
def checkpoints(tmp_path):
    """Steps 1 and 2 of {"kernel": […]}, whose values are the step."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        checkpoints.save(step, {"kernel": jnp.full(8, step, jnp.float32)}, {"name": "run"})
    checkpoints.wait()
    yield checkpoints
    checkpoints.close()


SHAPES = {"kernel": jax.ShapeDtypeStruct((8,), jnp.float32)}


def failing(error):
    """A method that raises."""

    def method(self, *args, **kwargs):
        raise error

    return method


def wrapped(error):
    """As Orbax wraps what TensorStore raises where it reads an array."""
    outer = Exception("Encountered error while reading array index")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (MemoryError(), UserError, "not enough memory to restore"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"),
            UserError,
            "not enough memory to restore .*/checkpoints/2: RESOURCE_EXHAUSTED: Out of memory allocating 9",
        ),
        (wrapped(MemoryError("no")), UserError, "not enough memory"),
        (PermissionError(errno.EACCES, "Permission denied"), OSError, "could not read .*/2: .*Permission"),
        (wrapped(OSError(errno.EIO, "Input/output error")), OSError, "could not read .*/2: .*Input/output"),
        (ConnectionResetError("reset by peer"), OSError, "could not read .*/2: reset by peer"),
    ],
)
def test_an_error_that_is_no_damage_condemns_no_checkpoint(checkpoints, monkeypatch, caplog, error, kind, message):
    with monkeypatch.context() as patch:
        patch.setattr(ocp.PyTreeCheckpointHandler, "restore", failing(error))
        with pytest.raises(kind, match=message):
            checkpoints.restore(SHAPES)
    assert "skipping" not in caplog.text
    assert checkpoints.restore(SHAPES)[0] == 2


@pytest.mark.parametrize(
    "error",
    [ValueError(DATA_LOSS), wrapped(ValueError(DATA_LOSS)), FileNotFoundError("no d/12"), EOFError(), KeyError("c")],
)
def test_damage_that_shows_in_reading_is_passed_over(checkpoints, monkeypatch, caplog, error):
    restore = ocp.PyTreeCheckpointHandler.restore

    def first(self, directory, *args, **kwargs):
        if "/2/" in f"{directory}/":
            raise error
        return restore(self, directory, *args, **kwargs)

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", first)
    assert checkpoints.restore(SHAPES)[0] == 1
    cause = error.__cause__ or error
    assert f"checkpoints/2: {cause}" in caplog.text or "checkpoints/2: EOFError" in caplog.text


def test_if_no_checkpoint_can_be_read_the_first_reason_is_named(checkpoints, monkeypatch):
    error = TypeError("ours")
    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", failing(error))
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact \(2: ours\)") as e:
        checkpoints.restore(SHAPES)
    assert e.value.__cause__.__cause__ is error


def many_arrays(step):
    return {str(i): jnp.full(i + 1, step, jnp.float32) for i in range(20)}


def everything(tmp_path):
    """The steps of the newest and the best checkpoint, as they are read."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    try:
        restored = [checkpoints.restore(jax.eval_shape(many_arrays, 1), best=best) for best in (False, True)]
        for step, state in restored:
            chex.assert_trees_all_equal(state, many_arrays(step))
        return [step for step, _ in restored]
    finally:
        checkpoints.close()


@pytest.mark.slow
def test_no_damage_to_any_file_changes_what_is_read(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        checkpoints.save(step, many_arrays(step), {"step": step}, 1 / step)
    checkpoints.close()
    passed_over = set()
    files = sorted(path for path in (tmp_path / "checkpoints" / "2").rglob("*") if path.is_file())
    for path in files:
        for _ in damage(path, 6):
            newest, best = everything(tmp_path)
            assert newest == best
            assert newest in (1, 2)
            if newest == 1:
                passed_over.add(path.parent.name)
    assert {"record", "state", "d"} <= passed_over
    assert everything(tmp_path) == [2, 2]


@pytest.mark.parametrize("name", ["record/metadata", "state/manifest.ocdbt"])
def test_a_checkpoint_that_lacks_a_file_is_passed_over(checkpoints, tmp_path, caplog, name):
    (tmp_path / "checkpoints" / "2" / name).unlink()
    assert checkpoints.restore(SHAPES)[0] == 1
    assert "skipping checkpoint" in caplog.text


def test_a_checksum_depends_on_every_bit_and_its_place_but_not_on_the_sharding():
    values = np.arange(48, dtype=np.float32).reshape(8, 6)
    for dtype in (np.float32, jnp.bfloat16, np.int32, np.uint8):
        array = values.astype(dtype)
        expected = int(_checksum(array))
        sharded = jax.device_put(array, NamedSharding(make_mesh(devices=jax.devices()), PartitionSpec("data")))
        assert int(_checksum(sharded)) == expected
        seen = {expected}
        for i in range(array.nbytes * 8):  # every bit
            flipped = array.copy()
            flipped.reshape(-1).view(np.uint8)[i // 8] ^= 1 << i % 8
            seen.add(int(_checksum(flipped)))
        assert len(seen) == array.nbytes * 8 + 1
    swapped = values.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert int(_checksum(swapped)) != int(_checksum(values))


NO_SPACE = f"RESOURCE_EXHAUSTED: Error writing {'a/long/path/' * 40}: No space left [os_error_code='28']"


@pytest.mark.parametrize(
    ("method", "error", "says"),
    [
        ("save", OSError(errno.ENOSPC, "No space left on device"), "No space left"),
        ("save", PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        ("save", FileNotFoundError(errno.ENOENT, "No such file", "/gone"), "No such file.*'/gone'"),
        ("wait_until_finished", OSError(errno.EDQUOT, "Disk quota exceeded"), "quota exceeded"),
        ("wait_until_finished", ValueError(NO_SPACE), "No space left"),
        ("wait_until_finished", ValueError("OUT_OF_RANGE: File too large [os_error_code='27']"), "File too large"),
    ],
)
def test_what_hinders_saving_is_named(checkpoints, monkeypatch, method, error, says):
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, method, failing(error))
        with pytest.raises(
            OSError, match=f"could not write a checkpoint in .*: .*{says}.*earlier ones are intact. Free"
        ):
            checkpoints.save(3, {"kernel": jnp.zeros(8)}, {})


@pytest.mark.parametrize("error", [TypeError("ours"), Preempted("stop"), MemoryError()])
def test_an_error_of_ours_in_saving_stays_what_it_is(checkpoints, monkeypatch, error):
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", failing(error))
        with pytest.raises(type(error)) as e:
            checkpoints.save(3, {"kernel": jnp.zeros(8)}, {})
        assert e.value is error


def test_a_save_that_failed_is_reported_once(checkpoints, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "_finalize_checkpoint", failing(OSError(errno.EIO, "Input/output error")))
        checkpoints.save(3, {"kernel": jnp.zeros(8)}, {})
        with pytest.raises(OSError, match="Input/output error"):
            checkpoints.wait()
    checkpoints.save(4, {"kernel": jnp.zeros(8)}, {})
    checkpoints.wait()
    assert checkpoints.restore(SHAPES)[0] == 4


@pytest.mark.parametrize("second", [None, OSError("second")])
def test_all_is_released_though_the_last_save_failed(tmp_path, monkeypatch, second):
    closed = []
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    close = ocp.CheckpointManager.close

    def manager_close(self):
        closed.append("manager")
        close(self)
        if second:
            raise second

    monkeypatch.setattr(ocp.CheckpointManager, "close", manager_close)
    monkeypatch.setattr(Checkpoints, "wait", failing(OSError("first")))
    with pytest.raises(OSError, match="second" if second else "first") as e:
        checkpoints.close()
    assert "first" in "".join(traceback.format_exception(e.value))
    assert closed == ["manager"]


def test_stray_files_condemn_no_checkpoint(checkpoints, tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    for place in (folder, folder / "1", folder / "2", folder / "2" / "state"):
        (place / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder / "2" / "notes.txt").write_text("the good one")
    checkpoints.close()
    again = Checkpoints(folder, keep=1)
    step, found = again.restore(SHAPES)
    assert (step, found["kernel"][0]) == (2, 2)
    again.set_aside_after(1)
    assert again.restore(SHAPES)[0] == 1
    again.save(2, {"kernel": jnp.zeros(8)}, {})
    again.close()
    assert steps_in(tmp_path) == [2]
    assert "skipping" not in caplog.text


@pytest.fixture
def arrays_read(monkeypatch):
    """The names of the arrays that Orbax reads."""
    names, deserialize = [], ocp.type_handlers.ArrayHandler.deserialize

    async def noted(self, infos, *args, **kwargs):
        names.extend(info.name for info in infos)
        return await deserialize(self, infos, *args, **kwargs)

    monkeypatch.setattr(ocp.type_handlers.ArrayHandler, "deserialize", noted)
    return names


@pytest.mark.slow
def test_part_of_a_state_is_restored_whatever_optimizer_it_had(tmp_path, arrays_read):
    saved = state_of(optax.adam(1e-3))
    used = {"variables": saved.variables, "ema_params": saved.ema_params}
    checkpoints, wanted = Checkpoints(tmp_path / "checkpoints"), shapes_of(used)
    checkpoints.save(1, saved, {})
    step, found = checkpoints.restore(wanted, partial=True)
    assert step == 1
    chex.assert_trees_all_equal(found, used)
    assert len(arrays_read) == len(jax.tree.leaves(wanted))
    assert not any(name.startswith(("opt_state", "step")) for name in arrays_read)
    larger = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*x.shape, 2), x.dtype), wanted)
    with pytest.raises(ValueError, match="holds another state than this config's: ema_params"):
        checkpoints.restore(larger, partial=True)
    with pytest.raises(ValueError, match=r"holds another state .* mean is missing there, float32\[8\] here"):
        checkpoints.restore(wanted | {"mean": SHAPES["kernel"]}, partial=True)
    with pytest.raises(ValueError, match=r"holds another state .*: opt_state/\S+ is int32\[\] there, missing here"):
        checkpoints.restore(shapes_of(state_of(optax.sgd(1e-3))))
    checkpoints.close()


@pytest.mark.slow
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_workdir_is_read_without_its_optimizer(tmp_path, arrays_read, ema_decay):
    config = small_config(num_steps=2)
    config.optimizer.ema_decay = ema_decay
    state = jax.tree.map(np.asarray, train(config, tmp_path))
    arrays_read.clear()
    run = read_workdir(tmp_path)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, run.variables), state.variables)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, run.ema_params), state.ema_params)
    read = {name.split(".")[0] for name in arrays_read}
    assert read == ({"variables", "ema_params"} if ema_decay else {"variables"})


def test_a_workdir_s_checkpoints_are_let_go_when_they_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(Recipe(small_config()).to_json())
    closed = []
    monkeypatch.setattr(Checkpoints, "restore", failing(ValueError("damaged")))
    monkeypatch.setattr(Checkpoints, "close", lambda self: closed.append(self))
    with pytest.raises(ValueError, match="damaged"):
        read_workdir(tmp_path)
    assert len(closed) == 1
