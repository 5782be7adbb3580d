"""What saving and restoring do when something is in the way; runs of two processes are in test_processes.py."""

import errno
import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from test_resume import small_config, steps_in
from tiny_models import TINY

from tarflow_jax import Noise
from tarflow_jax.runtime import Preempted, make_mesh
from tarflow_jax.training import Checkpoints, Recipe, train
from tarflow_jax.training.state import TrainConfig, initial_state
from tarflow_jax.training.task import FlowTask
from tarflow_jax.training.workdir import read_workdir

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
        (MemoryError(), MemoryError, "not enough memory to restore"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"),
            MemoryError,
            "not enough memory to restore .*/checkpoints/2: RESOURCE_EXHAUSTED: Out of memory allocating 9",
        ),
        (wrapped(MemoryError("no")), MemoryError, "not enough memory"),
        (PermissionError(errno.EACCES, "Permission denied"), OSError, "could not read .*/2: .*Permission"),
        (ConnectionResetError("reset by peer"), OSError, "could not read .*/2: reset by peer"),
        (wrapped(ValueError("UNAVAILABLE: no route to host")), OSError, "could not read .*no route"),
        (ValueError("PERMISSION_DENIED: [os_error_code='13']"), OSError, "could not read .*DENIED"),
        (ValueError("sharding does not divide"), ValueError, "^sharding does not divide$"),
        (TypeError("ours"), TypeError, "^ours$"),
        (Preempted("asked to stop"), Preempted, "asked to stop"),
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
    "error", [ValueError(DATA_LOSS), wrapped(ValueError(DATA_LOSS)), FileNotFoundError("no d/12"), EOFError()]
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


def test_a_checkpoint_without_a_seal_is_read_with_care(checkpoints, tmp_path):
    (tmp_path / "checksums" / "2.json").unlink()
    assert checkpoints.restore(SHAPES)[0] == 2
    path = tmp_path / "checkpoints" / "2" / "default" / "_METADATA"
    path.write_text(path.read_text()[:100])
    assert checkpoints.restore(SHAPES)[0] == 1


NO_SPACE = f"RESOURCE_EXHAUSTED: Error writing {'a/long/path/' * 40}: No space left [os_error_code='28']"


@pytest.mark.parametrize(
    ("error", "says", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left", True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "quota exceeded", True),
        (ValueError(NO_SPACE), "No space left", True),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied", False),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system", False),
        (FileNotFoundError(errno.ENOENT, "No such file", "/gone"), "No such file.*'/gone'", False),
        (
            ValueError("PERMISSION_DENIED: [os_error_code='13']"),
            r"Permission denied \(PERMISSION_DENIED",
            False,
        ),
        (ValueError("OUT_OF_RANGE: File too large [os_error_code='27']"), "File too large", False),
    ],
)
def test_what_hinders_saving_is_named(checkpoints, monkeypatch, error, says, full):
    monkeypatch.setattr(ocp.CheckpointManager, "save", failing(error))
    with pytest.raises(OSError, match=f"could not write a checkpoint in .*: .*{says}.*earlier ones are whole") as e:
        checkpoints.save(3, {"kernel": jnp.zeros(8)}, {})
    assert ("Free some space" in str(e.value)) is full


@pytest.mark.parametrize("error", [TypeError("ours"), ValueError("ours"), Preempted("stop"), MemoryError()])
def test_an_error_of_ours_in_saving_stays_what_it_is(checkpoints, monkeypatch, error):
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", failing(error))
        with pytest.raises(type(error)) as e:
            checkpoints.save(3, {"kernel": jnp.zeros(8)}, {})
        assert e.value is error
    with pytest.raises(ValueError, match="Unsupported type"):
        checkpoints.save(3, {"kernel": object()}, {})


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
        closed.append(self)
        close(self)
        if second:
            raise second

    monkeypatch.setattr(ocp.CheckpointManager, "close", manager_close)
    monkeypatch.setattr(Checkpoints, "wait", failing(OSError("first")))
    with pytest.raises(OSError, match="first"):
        checkpoints.close()
    assert len(closed) == 1
    with pytest.raises(RuntimeError, match="after shutdown"):
        checkpoints._sealer.submit(print)


def test_stray_files_condemn_no_checkpoint(checkpoints, tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    for place in (folder, folder / "1", folder / "2", folder / "2" / "default"):
        (place / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder / "2" / "notes.txt").write_text("the good one")
    (tmp_path / "checksums" / ".DS_Store").write_bytes(b"\0")
    checkpoints.close()
    again = Checkpoints(folder, keep=1)
    step, found = again.restore(SHAPES)
    assert (step, found["kernel"][0]) == (2, 2)
    assert again.config() == {"name": "run"}
    again.set_aside_after(1)
    assert again.restore(SHAPES)[0] == 1
    again.save(2, {"kernel": jnp.zeros(8)}, {})
    again.close()
    assert steps_in(tmp_path) == [2]
    assert "skipping" not in caplog.text


def test_a_file_that_the_finder_made_before_the_seal_may_change(tmp_path, monkeypatch, caplog):
    checkpoints, seal = Checkpoints(tmp_path / "checkpoints"), Checkpoints._seal_when_complete
    stray = tmp_path / "checkpoints" / "1" / "default" / ".DS_Store"

    def looked_at(self, step):
        self._manager.wait_until_finished()
        stray.write_bytes(b"one")
        seal(self, step)

    monkeypatch.setattr(Checkpoints, "_seal_when_complete", looked_at)
    checkpoints.save(1, {"kernel": jnp.zeros(8)}, {})
    checkpoints.wait()
    stray.write_bytes(b"two")
    assert checkpoints.restore(SHAPES)[0] == 1
    assert "skipping" not in caplog.text
    checkpoints.close()


@pytest.mark.parametrize("content", ["[]", "null", "7", '{"a": 1}', '{"a"', "\xff"])
def test_a_damaged_seal_is_named(checkpoints, tmp_path, caplog, content):
    seal = tmp_path / "checksums" / "2.json"
    seal.write_bytes(content.encode("latin1"))
    assert checkpoints.restore(SHAPES)[0] == 1
    assert f"{seal} is damaged" in caplog.text
    assert checkpoints.config() == {"name": "run"}


@pytest.fixture
def arrays_read(monkeypatch):
    """The names of the arrays that Orbax reads."""
    names, deserialize = [], ocp.type_handlers.ArrayHandler.deserialize

    async def noted(self, infos, *args, **kwargs):
        names.extend(info.name for info in infos)
        return await deserialize(self, infos, *args, **kwargs)

    monkeypatch.setattr(ocp.type_handlers.ArrayHandler, "deserialize", noted)
    return names


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
    with pytest.raises(ValueError, match="holds another state than this configuration's: ema_params"):
        checkpoints.restore(larger, partial=True)
    with pytest.raises(ValueError, match=r"holds another state .* mean is missing there"):
        checkpoints.restore(wanted | {"mean": SHAPES["kernel"]}, partial=True)
    with pytest.raises(ValueError, match=r"holds another state .*: opt_state/\S+ is .* there and missing here"):
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
