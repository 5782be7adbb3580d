"""Checkpoints of a run: asynchronous, atomic, verified when they are read. The one file that knows Orbax."""

import functools
import json
import logging
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from tarflow_jax.errors import UserError
from tarflow_jax.files import checksums, is_remote, sha256, write_text
from tarflow_jax.runtime import leaf_name
from tarflow_jax.training.checkpoint_errors import DamagedError, on_all_processes, plain_read_errors, plain_write_errors

logger = logging.getLogger(__name__)
STATE, CONFIG, LOSS = "default", "config", "test_loss"
T = TypeVar("T")


class Checkpoints:
    """The checkpoints of a workdir, by step.

    A checkpoint appears under its final name only when it is complete. Its files' SHA-256 are then written
    beside it, and one whose files no longer match is passed over for the one before. All processes of a run
    call every method together.
    """

    def __init__(self, folder: epath.PathLike, *, keep: int = 3) -> None:
        """Opens or makes the folder; the `keep` newest checkpoints stay, and the one of the lowest test loss."""
        folder = epath.Path(folder)
        self._folder = folder if is_remote(folder) else folder.resolve()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._seals = self._folder.parent / "checksums"
        policies = ocp.checkpoint_managers
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                best_fn=_loss,
                best_mode="min",
                # All processes must try the same steps, also where a shared disk shows them files at other times.
                single_host_load_and_broadcast=True,
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(keep), policies.BestN(get_metric_fn=_loss, reverse=True, n=1)]
                ),
            ),
        )
        # Not the manager's: in its `restore` the others wait for a process that failed.
        self._states = ocp.PyTreeCheckpointHandler()
        self._sealer = ThreadPoolExecutor(1, thread_name_prefix="seal")
        self._sealing: Future[None] | None = None

    def save(self, step: int, state: Any, config: Mapping[str, Any], test_loss: float | None = None) -> None:
        """Starts writing; returns once `state` is copied, so that it may be donated.

        Args:
          step: of the run.
          state: its arrays.
          config: its config, as JSON has it.
          test_loss: by which the best checkpoint is known; None if it was not measured.

        Raises OSError if this checkpoint, or the one before it, could not be written (disk full, not allowed, …).
        Errors that are not of the disk stay what they are.
        """
        self.wait()
        items = ocp.args.Composite(**{STATE: ocp.args.StandardSave(state), CONFIG: ocp.args.JsonSave(dict(config))})
        with plain_write_errors(self._folder):
            # Forced: Orbax otherwise does nothing, in silence, about a step before its latest.
            self._manager.save(step, args=items, metrics={} if test_loss is None else {LOSS: test_loss}, force=True)
        self._sealing = self._sealer.submit(self._seal_when_complete, step)

    def wait(self) -> None:
        """Returns when the checkpoint being written is complete and sealed; OSError if it cannot be written."""
        sealing, self._sealing = self._sealing, None
        with plain_write_errors(self._folder):
            try:
                if sealing is not None:
                    sealing.result()
            finally:  # Orbax tells each thread of a failure; asked now, it does not tell this one again later.
                self._manager.wait_until_finished()

    def restore(self, abstract_state: Any, *, best: bool = False, partial: bool = False) -> tuple[int, Any] | None:
        """(step, state) of the newest checkpoint that is whole on all processes, or None in a folder without any.

        Args:
          abstract_state: shapes, dtypes and shardings (`jax.ShapeDtypeStruct`) of what to restore; any mesh will do.
            A leaf without sharding becomes a NumPy array.
          best: of those with a test loss, the one of the lowest.
          partial: what the checkpoint holds beside `abstract_state` is not read, instead of being an error.

        Raises:
          ValueError: there are checkpoints, but none is whole, or they hold another model's state.
          MemoryError: the state does not fit.
          OSError: a checkpoint cannot be read, for another reason than damage; or not on another process.
        """

        def read(path: epath.Path) -> Any:
            _check_shapes(path, self._states.metadata(path / STATE), abstract_state, partial=partial)
            layout = ocp.checkpoint_utils.construct_restore_args(abstract_state)
            wanted = ocp.args.PyTreeRestore(abstract_state, restore_args=layout, partial_restore=partial)
            return self._states.restore(path / STATE, args=wanted)

        return self._first_whole(self._steps(best=best), read)

    def set_aside_after(self, step: int) -> None:
        """Moves the checkpoints later than `step`, which was restored, to damaged/: the run will save theirs anew.

        They are kept, because what looked like damage may have been a disk or a network that failed for a moment.
        """
        later = [other for other in self._steps() if other > step]
        if later:
            on_all_processes(functools.partial(self._set_aside, later))
            self._manager.reload()

    def latest_step(self) -> int:
        """Of the newest checkpoint; 0 in a folder without any."""
        return max(self._steps(), default=0)

    def config(self) -> dict[str, Any] | None:
        """The config in the newest whole checkpoint; None in a folder without any. Raises as `restore`."""
        found = self._first_whole(self._steps(), lambda path: ocp.JsonCheckpointHandler().restore(path / CONFIG))
        return None if found is None else found[1]

    def close(self) -> None:
        """Waits for the last checkpoint and lets go of the folder, whatever fails; then raises the first error."""
        errors = []
        for release in (self.wait, self._sealer.shutdown, self._manager.close, self._states.close):
            try:
                release()
            except BaseException as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _steps(self, *, best: bool = False) -> list[int]:
        """The checkpoints' steps, in the order in which to try them."""
        self.wait()
        steps = sorted(map(int, self._manager.all_steps()), reverse=True)  # broadcast, they are NumPy's
        if not best or not steps:
            return steps
        losses = np.array([_loss(self._manager.metrics(step)) for step in steps], np.float32)
        if jax.process_count() > 1:
            losses = multihost_utils.broadcast_one_to_all(losses)
        if np.isinf(losses).all():
            raise UserError(
                f"no checkpoint in {self._folder} has a test loss; set train.evaluate_every, or use the last"
            )
        order = np.argsort(losses, stable=True)
        return [steps[i] for i in order if np.isfinite(losses[i])]

    def _first_whole(self, steps: list[int], read: Callable[[epath.Path], T]) -> tuple[int, T] | None:
        """The first of the checkpoints that every process can read, and what it read."""
        for step in steps:
            try:
                return step, on_all_processes(functools.partial(self._read, step, read))
            except DamagedError as damage:
                if jax.process_index() == 0:
                    logger.warning("skipping checkpoint %s: %s", self._folder / str(step), damage)
        if steps:
            raise UserError(
                f"no checkpoint in {self._folder} is whole; restore one from a backup, or start in another workdir"
            )
        return None

    def _read(self, step: int, read: Callable[[epath.Path], T]) -> T:
        path = self._folder / str(step)
        with plain_read_errors(path):
            if jax.process_index() == 0:
                self._check_seal(step)
            return read(path)

    def _set_aside(self, steps: list[int]) -> None:
        if jax.process_index():
            return
        aside = self._folder.parent / "damaged"
        aside.mkdir(exist_ok=True)
        for step in steps:
            if (aside / str(step)).exists():
                (aside / str(step)).rmtree()
            (self._folder / str(step)).rename(aside / str(step))
            self._seal_of(step).unlink(missing_ok=True)
            logger.warning("checkpoint %d is now in %s", step, aside)

    def _seal_of(self, step: int) -> epath.Path:
        return self._seals / f"{step}.json"

    def _seal_when_complete(self, step: int) -> None:
        self._manager.wait_until_finished()
        if jax.process_index() == 0 and (self._folder / str(step)).exists():
            write_text(self._seal_of(step), json.dumps(checksums(self._folder / str(step))))
            for seal in self._seals.glob("*.json"):
                if not (self._folder / seal.stem).exists():
                    seal.unlink(missing_ok=True)

    def _check_seal(self, step: int) -> None:
        """Raises DamagedError. A checkpoint without a seal was complete, but not yet sealed."""
        seal, folder = self._seal_of(step), self._folder / str(step)
        try:
            expected = json.loads(seal.read_text())
        except FileNotFoundError:
            return
        except ValueError:
            expected = None
        if not isinstance(expected, dict) or not all(isinstance(value, str) for value in expected.values()):
            raise DamagedError(f"{seal} is damaged")
        for name, digest in sorted(expected.items()):  # other files are nobody's business
            if not (folder / name).exists() or sha256(folder / name) != digest:
                raise DamagedError(f"{name} is missing or damaged")


def _check_shapes(path: epath.Path, metadata: Any, abstract_state: Any, *, partial: bool) -> None:
    stored, expected = _shapes(metadata), _shapes(abstract_state)
    for name in sorted(expected if partial else stored.keys() | expected.keys()):
        if stored.get(name) != expected.get(name):
            raise UserError(
                f"checkpoint {path} holds another state than this configuration's: "
                f"{name} is {stored.get(name, 'missing')} there and {expected.get(name, 'missing')} here"
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {leaf_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _loss(metrics: Mapping[str, Any] | None) -> float:
    return (metrics or {}).get(LOSS, math.inf)
