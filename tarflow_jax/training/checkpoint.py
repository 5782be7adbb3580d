"""Checkpoints of a run: asynchronous, atomic, verified when they are read. The one file that knows Orbax."""

import hashlib
import json
import logging
import threading
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from tarflow_jax.distributed import leaf_name

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a workdir, by step.

    A checkpoint appears under its final name only when it is complete. Its files' SHA-256 are then written
    beside it, and one whose files no longer match is passed over for the one before.
    """

    def __init__(self, folder: Path, *, keep: int = 3) -> None:
        """Opens or makes the folder; `keep` is how many of the newest checkpoints stay."""
        self._folder = folder.absolute()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._seals = self._folder.parent / "checksums"
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep),
            item_handlers=ocp.StandardCheckpointHandler(),  # without it, metadata cannot be read before restoring
        )
        self._sealing: threading.Thread | None = None

    def save(self, step: int, state: Any) -> None:
        """Starts writing; returns once `state` is copied, so that it may be donated.

        Raises:
          OSError: the checkpoint before this one could not be written (disk full).
        """
        self.wait()
        self._manager.save(step, args=ocp.args.StandardSave(state))
        self._sealing = threading.Thread(target=self._seal_when_complete, args=(step,), daemon=True)
        self._sealing.start()

    def wait(self) -> None:
        """Returns when the checkpoint being written is complete and sealed.

        Raises:
          OSError: it could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise OSError(
                f"could not write a checkpoint in {self._folder}: {_first_line(error)}; free some space or choose "
                "another workdir, then run the same command again"
            ) from error
        if self._sealing is not None:
            self._sealing.join()
            self._sealing = None

    def restore(self, abstract_state: Any) -> tuple[int, Any] | None:
        """(step, state) of the newest checkpoint that is whole, or None in a folder without any.

        Args:
          abstract_state: shapes, dtypes and shardings (`jax.ShapeDtypeStruct`) of what to restore.

        Raises:
          ValueError: there are checkpoints, but none is whole, or they hold another model's state.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            problem = self._problem(step)
            if problem is None:
                try:
                    self._check_shapes(step, abstract_state)
                    return step, self._manager.restore(step, args=ocp.args.StandardRestore(abstract_state))
                except _AnotherStateError:
                    raise
                except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
                    problem = _first_line(error)
            logger.warning("skipping checkpoint %s: %s", self._folder / str(step), problem)
        if steps:
            raise ValueError(
                f"no checkpoint in {self._folder} is whole; restore one from a backup, or start in another workdir"
            )
        return None

    def close(self) -> None:
        """Waits for the last checkpoint and lets go of the folder."""
        self.wait()
        self._manager.close()

    def _check_shapes(self, step: int, abstract_state: Any) -> None:
        stored = _shapes(self._manager.item_metadata(step))
        expected = _shapes(abstract_state)
        for name in sorted(stored.keys() | expected.keys()):
            if stored.get(name) != expected.get(name):
                raise _AnotherStateError(
                    f"checkpoint {self._folder / str(step)} holds another state than this configuration's: "
                    f"{name} is {stored.get(name, 'missing')} there and {expected.get(name, 'missing')} here"
                )

    def _seal_of(self, step: int) -> Path:
        return self._seals / f"{step}.json"

    def _seal_when_complete(self, step: int) -> None:
        try:
            self._manager.wait_until_finished()
        except Exception:  # reported by wait(), in the thread that can stop the run
            return
        if jax.process_index() == 0 and (self._folder / str(step)).exists():
            self._seals.mkdir(exist_ok=True)
            temporary = self._seal_of(step).with_suffix(".tmp")
            temporary.write_text(json.dumps(_checksums(self._folder / str(step))))
            temporary.replace(self._seal_of(step))
            for seal in self._seals.glob("*.json"):
                if not (self._folder / seal.stem).exists():
                    seal.unlink()

    def _problem(self, step: int) -> str | None:
        """Why the checkpoint cannot be trusted, or None. One without a seal was complete, but not yet sealed."""
        try:
            expected = json.loads(self._seal_of(step).read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            return f"{self._seal_of(step)} is damaged"
        found = _checksums(self._folder / str(step))
        wrong = sorted(
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        )
        return f"{wrong[0]} is missing or damaged" if wrong else None


class _AnotherStateError(ValueError):
    pass


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {leaf_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
