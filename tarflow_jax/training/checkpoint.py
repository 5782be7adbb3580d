"""Writes checkpoints asynchronously and atomically, and verifies them when read. Only this file imports Orbax."""

import contextlib
import json
import logging
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from tarflow_jax.errors import UserError, one_line
from tarflow_jax.files import is_remote, storage_failed
from tarflow_jax.runtime import leaf_name

logger = logging.getLogger(__name__)
STATE, RECORD = "state", "record"
T = TypeVar("T")


class Checkpoints:
    """The checkpoints of a workdir, by step.

    A checkpoint appears under its final name only when it is complete. It holds the state and a record: the config, the
    test loss, and every array's shape and checksum. Reading compares the arrays with the record and falls back to the
    previous checkpoint if they differ. In a run of several processes, all of them call every method together.
    """

    def __init__(self, folder: epath.PathLike, *, keep: int = 3) -> None:
        """Opens or creates the folder; saving keeps the `keep` newest checkpoints and the best one."""
        folder = epath.Path(folder)
        self._folder = folder if is_remote(folder) else folder.resolve()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._keep = keep
        # All processes must try the same steps, even if a shared disk shows them new files at different times.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self,
            single_host_load_and_broadcast=True,
            async_options=ocp.AsyncOptions(barrier_sync_fn=_barrier),
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        steps = self._steps()
        losses = multihost_utils.broadcast_one_to_all(np.array([self._read_loss(step) for step in steps]))
        self._losses = dict(zip(steps, losses.tolist(), strict=True))  # inf where none was measured

    def save(self, step: int, state: Any, config: Mapping[str, Any], test_loss: float | None = None) -> None:
        """Starts writing a checkpoint. Returns once `state`, a pytree, is copied, so the caller may donate it.

        `config` must be JSON-serializable. `test_loss` ranks the checkpoints; it is None if it was not measured. Raises
        OSError if this checkpoint or the previous one could not be written, or the folder is gone.
        """
        if not is_remote(self._folder) and not self._folder.exists():  # Orbax would recreate it
            raise OSError(f"{self._folder} is gone: the workdir was moved or deleted; run again, with its new name")
        self._losses[step] = math.inf if test_loss is None or math.isnan(test_loss) else test_loss
        record: dict[str, Any] = {
            "config": dict(config),
            "test_loss": self._losses[step],
            "arrays": _arrays(state),
            "checksums": jax.tree.map(int, _checksums(state)),
        }
        record["crc32"] = _crc32(record)
        items = ocp.args.Composite(**{STATE: ocp.args.StandardSave(state), RECORD: ocp.args.JsonSave(record)})
        with _write_errors(self._folder):  # waits for the previous checkpoint
            self._manager.save(step, args=items, force=True)  # unforced, Orbax silently skips a step before its latest

    def wait(self) -> None:
        """Blocks until the checkpoint being written is complete. Raises OSError if it could not be written."""
        with _write_errors(self._folder):
            self._manager.wait_until_finished()

    def restore(self, abstract_state: Any, *, best: bool = False, partial: bool = False) -> tuple[int, Any] | None:
        """Reads the newest checkpoint that is intact on all processes; returns None if the folder holds none.

        Args:
          abstract_state: pytree of `jax.ShapeDtypeStruct`, sharded over any mesh. A leaf without a sharding becomes a
            NumPy array.
          best: read the one with the lowest test loss instead.
          partial: skip arrays that `abstract_state` does not have, instead of raising.

        Raises:
          UserError: no checkpoint is intact, the state is another model's, or it does not fit into memory.
          OSError: the disk or network failed, or reading failed on another process.
        """
        steps = self._steps()
        candidates = self._ranked(steps) if best else steps
        if steps and not candidates:
            raise UserError(
                f"no checkpoint in {self._folder} has a test loss; set train.evaluate_every or use the last"
            )
        reasons = []
        for step in candidates:
            path = self._folder / str(step)
            try:
                return step, _read_state(path, abstract_state, partial=partial)
            except _DamagedError as reason:
                logger.warning("skipping checkpoint %s: %s", path, reason)
                reasons.append(reason)
        if reasons:
            raise UserError(
                f"no checkpoint in {self._folder} is intact ({candidates[0]}: {reasons[0]}); restore one from a "
                "backup, or start in another workdir"
            ) from reasons[0]
        return None

    def set_aside_after(self, step: int) -> None:
        """Moves the checkpoints after `step` to damaged/, so that the run can save these steps again.

        They are not deleted, because a disk or network that failed for a moment can look like damage.
        """
        later = [str(other) for other in self._steps() if other > step]
        if later and jax.process_index() == 0:
            aside = self._folder.parent / "damaged"
            aside.mkdir(exist_ok=True)
            for name in later:
                if (aside / name).exists():
                    (aside / name).rmtree()
                (self._folder / name).rename(aside / name)
                logger.warning("checkpoint %s is now in %s", name, aside)
        if later:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")
            self._manager.reload()

    def close(self) -> None:
        """Waits for the last checkpoint and releases everything, even if that checkpoint could not be written."""
        try:
            self.wait()
        finally:
            with _write_errors(self._folder):
                self._manager.close()

    def should_preserve(self, checkpoints: Sequence[Any], **_: Any) -> list[bool]:
        """Tells Orbax which of these checkpoints, oldest first, to keep."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self._keep :], *self._ranked(steps)[:1]}
        return [step in kept for step in steps]

    def _ranked(self, steps: list[int]) -> list[int]:
        """Returns the steps that have a test loss, best first."""
        return sorted((step for step in steps if self._losses[step] < math.inf), key=self._losses.__getitem__)

    def _steps(self) -> list[int]:
        """Returns all steps, newest first."""
        self.wait()
        return sorted(map(int, self._manager.all_steps()), reverse=True)  # the broadcast returns NumPy integers

    def _read_loss(self, step: int) -> float:
        """Returns a checkpoint's test loss; -inf for a damaged record, so that `best` tries it first and reports it."""
        try:
            return _load_record(self._folder / str(step))["test_loss"]
        except Exception:
            return -math.inf


def _barrier(*, key: str, timeout_ms: int) -> None:
    """Waits for the other processes, but not in one whose save failed: Orbax would wait there for 20 minutes."""
    if error := sys.exception():
        raise error
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _read_state(path: epath.Path, abstract_state: Any, *, partial: bool) -> Any:
    """Reads one checkpoint; raises as `Checkpoints.restore`, and _DamagedError if it is not intact."""
    record = _on_all_processes(path, lambda: _load_record(path))
    stored, expected = record["arrays"], _arrays(abstract_state)
    for name in sorted(expected if partial else stored | expected):
        there, here = stored.get(name, "missing"), expected.get(name, "missing")
        if there != here:
            raise UserError(f"{path} holds another state than this config's: {name} is {there} there, {here} here")
    layout = ocp.checkpoint_utils.construct_restore_args(abstract_state)
    args = ocp.args.PyTreeRestore(abstract_state, restore_args=layout, partial_restore=partial)
    # Not the manager's `restore`: if it fails on one process, the others wait for that one.
    state = _on_all_processes(path, lambda: ocp.PyTreeCheckpointHandler().restore(path / STATE, args=args))
    for name, checksum in _checksums(state).items():
        if int(checksum) != record["checksums"][name]:
            raise _DamagedError(f"{name} is damaged")
    return state


def _load_record(path: epath.Path) -> dict[str, Any]:
    record = ocp.JsonCheckpointHandler().restore(path / RECORD)
    if record.pop("crc32", None) != _crc32(record):
        raise _DamagedError("its record is damaged")
    return record


def _crc32(record: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _arrays(tree: Any) -> dict[str, str]:
    """Returns every leaf's dtype and shape, like "float32[8, 16]"."""
    return {leaf_name(p): f"{x.dtype}{list(x.shape)}" for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def _checksum(array: jax.Array) -> jax.Array:
    """Returns a uint32 hash of elements and positions: the same for any sharding, changed by any one element."""
    word = array.view(f"uint{8 * array.dtype.itemsize}").astype(jnp.uint32)
    position = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    word ^= position * jnp.uint32(0x9E3779B1)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # MurmurHash3's, invertible
        word = (word ^ (word >> shift)) * jnp.uint32(factor)
    return word.sum(dtype=jnp.uint32)


@jax.jit  # One program: CPU processes deadlock when several programs with collectives are in flight.
def _checksums(tree: Any) -> dict[str, jax.Array]:
    return {leaf_name(path): _checksum(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


class _DamagedError(Exception):
    """A checkpoint's files are damaged or missing."""


def _on_all_processes(path: epath.Path, read: Callable[[], T]) -> T:
    """Returns `read()` once it has succeeded on every process. All processes must call this together.

    Raises this process's `_read_error`, or if another one's is worse, _DamagedError for damage and OSError otherwise.
    """
    failure: Exception | None = None
    try:
        result = read()
    except Exception as error:
        failure, cause = _read_error(path, error), error
    severity = 0 if failure is None else 1 if isinstance(failure, _DamagedError) else 2
    severities = multihost_utils.process_allgather(np.int32(severity))
    if failure and severity == severities.max():
        raise failure from cause
    if severities.any():
        kind = _DamagedError if severities.max() == 1 else OSError
        raise kind(f"process {severities.argmax()} failed; its log says why")
    return result


def _read_error(path: epath.Path, error: BaseException) -> Exception:
    """Returns a UserError if memory ran out, an OSError if the disk or network failed, else a _DamagedError."""
    while type(error) is Exception and error.__cause__:  # Orbax wraps errors from reading arrays
        error = error.__cause__
    reason = one_line(error)
    device_memory_ran_out = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in reason
    if isinstance(error, MemoryError) or device_memory_ran_out:
        return UserError(f"not enough memory to restore {path}: {reason}; use more devices (mesh.fsdp), or free some")
    if storage_failed(error) and not isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return OSError(
            f"could not read {path}: {reason}; fix that and run the same command again, or move the checkpoint "
            "elsewhere to use the previous one"
        )
    return _DamagedError(reason)


@contextlib.contextmanager
def _write_errors(folder: epath.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not (isinstance(error, ValueError) or storage_failed(error)):  # TensorStore's, when a disk is full
            raise
        reason = " ".join(str(error).partition(" [tensorstore_spec=")[0].split()) or type(error).__name__
        raise OSError(
            f"could not write a checkpoint in {folder}: {reason}; earlier ones are intact. "
            "Free some space or fix the disk, then run the same command again"
        ) from error
