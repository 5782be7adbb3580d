"""Checkpoints of a run: asynchronous, atomic, verified when they are read. The one file that knows Orbax."""

import contextlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from tarflow_jax.errors import UserError, one_line
from tarflow_jax.files import checksums, is_remote, write_text
from tarflow_jax.runtime import leaf_name

logger = logging.getLogger(__name__)
STATE, CONFIG, LOSS = "default", "config", "test_loss"


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
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(keep), policies.BestN(get_metric_fn=_loss, reverse=True, n=1)]
                ),
            ),
            # Without them, metadata cannot be read before restoring.
            item_handlers={STATE: ocp.StandardCheckpointHandler(), CONFIG: ocp.JsonCheckpointHandler()},
        )
        self._sealer = ThreadPoolExecutor(1, thread_name_prefix="seal")
        self._sealing: Future[None] | None = None

    def save(self, step: int, state: Any, config: Mapping[str, Any], test_loss: float | None = None) -> None:
        """Starts writing; returns once `state` is copied, so that it may be donated.

        Args:
          step: of the run. state: its arrays. config: its config, as JSON has it.
          test_loss: by which the best checkpoint is known; None if it was not measured.

        Raises:
          OSError: this checkpoint, or the one before it, could not be written (disk full).
        """
        self.wait()
        items = ocp.args.Composite(**{STATE: ocp.args.StandardSave(state), CONFIG: ocp.args.JsonSave(dict(config))})
        with self._plain_errors():
            # Forced: Orbax otherwise does nothing, in silence, about a step before its latest.
            self._manager.save(step, args=items, metrics={} if test_loss is None else {LOSS: test_loss}, force=True)
        self._sealing = self._sealer.submit(self._seal_when_complete, step)

    def wait(self) -> None:
        """Returns when the checkpoint being written is complete and sealed.

        Raises:
          OSError: it could not be written.
        """
        with self._plain_errors():
            sealing, self._sealing = self._sealing, None
            if sealing is not None:
                sealing.result()
            self._manager.wait_until_finished()

    def restore(self, abstract_state: Any, *, best: bool = False) -> tuple[int, Any] | None:
        """(step, state) of the newest checkpoint that is whole, or None in a folder without any.

        Args:
          abstract_state: shapes, dtypes and shardings (`jax.ShapeDtypeStruct`) of what to restore; any mesh will do.
          best: of those with a test loss, the one of the lowest.

        Raises:
          ValueError: there are checkpoints, but none is whole, or they hold another model's state.
        """
        steps = self._steps(best=best)
        for step in steps:
            problem = self._problem(step)
            if problem is None:
                try:
                    self._check_shapes(step, abstract_state)
                    restored = self._manager.restore(
                        step, args=ocp.args.Composite(**{STATE: ocp.args.StandardRestore(abstract_state)})
                    )
                    return step, restored[STATE]
                except _AnotherStateError:
                    raise
                except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
                    problem = one_line(error)
            if jax.process_index() == 0:
                logger.warning("skipping checkpoint %s: %s", self._folder / str(step), problem)
        if steps:
            raise UserError(
                f"no checkpoint in {self._folder} is whole; restore one from a backup, or start in another workdir"
            )
        return None

    def set_aside_after(self, step: int) -> None:
        """Moves the checkpoints later than `step`, which was restored, to damaged/: the run will save theirs anew.

        They are kept, because what looked like damage may have been a disk or a network that failed for a moment.
        """
        later = [other for other in self._steps() if other > step]
        if not later:
            return
        if jax.process_index() == 0:
            aside = self._folder.parent / "damaged"
            aside.mkdir(exist_ok=True)
            for other in later:
                if (aside / str(other)).exists():
                    (aside / str(other)).rmtree()
                (self._folder / str(other)).rename(aside / str(other))
                self._seal_of(other).unlink(missing_ok=True)
                logger.warning("checkpoint %d is now in %s", other, aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints set aside")
        self._manager.reload()

    def config(self) -> dict[str, Any] | None:
        """The config in the newest whole checkpoint; None if there is none."""
        for step in self._steps():
            if self._problem(step) is None:
                return self._manager.restore(step, args=ocp.args.Composite(**{CONFIG: ocp.args.JsonRestore()}))[CONFIG]
        return None

    def close(self) -> None:
        """Waits for the last checkpoint and lets go of the folder."""
        self.wait()
        self._sealer.shutdown()
        self._manager.close()

    def _steps(self, *, best: bool = False) -> list[int]:
        """The checkpoints' steps, in the order in which to try them."""
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not best:
            return steps
        losses = {step: _loss(self._manager.metrics(step)) for step in steps}
        if steps and all(map(math.isinf, losses.values())):
            raise UserError(
                f"no checkpoint in {self._folder} has a test loss; set train.evaluate_every, or use the last"
            )
        return sorted(filter(lambda step: math.isfinite(losses[step]), steps), key=losses.__getitem__)

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise OSError(
                f"could not write a checkpoint in {self._folder}: {one_line(error)}; earlier ones are whole. Free "
                "some space, or choose another workdir, then run the same command again"
            ) from error

    def _check_shapes(self, step: int, abstract_state: Any) -> None:
        stored = _shapes(self._manager.item_metadata(step)[STATE])
        expected = _shapes(abstract_state)
        for name in sorted(stored.keys() | expected.keys()):
            if stored.get(name) != expected.get(name):
                raise _AnotherStateError(
                    f"checkpoint {self._folder / str(step)} holds another state than this configuration's: "
                    f"{name} is {stored.get(name, 'missing')} there and {expected.get(name, 'missing')} here"
                )

    def _seal_of(self, step: int) -> epath.Path:
        return self._seals / f"{step}.json"

    def _seal_when_complete(self, step: int) -> None:
        self._manager.wait_until_finished()
        if jax.process_index() == 0 and (self._folder / str(step)).exists():
            write_text(self._seal_of(step), json.dumps(checksums(self._folder / str(step))))
            for seal in self._seals.glob("*.json"):
                if not (self._folder / seal.stem).exists():
                    seal.unlink()

    def _problem(self, step: int) -> str | None:
        """Why the checkpoint cannot be trusted, or None; the same answer on all processes."""
        if jax.process_count() == 1:
            return self._damage(step)
        found = self._damage(step) if jax.process_index() == 0 else None
        damaged = multihost_utils.broadcast_one_to_all(np.int32(found is not None))
        return (found or "the first process says why") if damaged else None

    def _damage(self, step: int) -> str | None:
        """What differs from the seal. A checkpoint without a seal was complete, but not yet sealed."""
        try:
            expected = json.loads(self._seal_of(step).read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            return f"{self._seal_of(step)} is damaged"
        found = checksums(self._folder / str(step))
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        return f"{wrong[0]} is missing or damaged" if wrong else None


class _AnotherStateError(UserError):
    pass


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {leaf_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _loss(metrics: Mapping[str, Any] | None) -> float:
    return (metrics or {}).get(LOSS, math.inf)
