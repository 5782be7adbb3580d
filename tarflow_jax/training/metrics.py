"""Writes a run's metrics as JSON lines and TensorBoard events."""

import contextlib
import json
import math
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from tarflow_jax.files import is_remote, naming, write_text

METRICS = "metrics.jsonl"


class MetricsWriter:
    """Writes metrics.jsonl, one JSON object per line, and tensorboard/ in the workdir.

    Object stores cannot append, so there only `flush` and `close` write the files, each as a whole.
    """

    def __init__(self, workdir: epath.PathLike, start_step: int) -> None:
        """Opens the files and drops lines after `start_step`, because the run repeats these steps."""
        self._path = epath.Path(workdir) / METRICS
        lines = self._path.read_bytes().decode(errors="replace").splitlines() if self._path.exists() else []
        write_text(self._path, "".join(f"{line}\n" for line in lines if _step_of(line) <= start_step))
        self._unwritten, self._files = "", contextlib.ExitStack()
        self._remote = is_remote(self._path)
        self._folder = epath.Path(self._path.parent / "tensorboard")  # of the events
        if self._remote:
            self._folder = epath.Path(self._files.enter_context(tempfile.TemporaryDirectory()))
        else:
            self._file = self._files.enter_context(Path(self._path).open("a"))  # noqa: SIM115
        self._events = _open_events(self._folder, start_step)
        self._files.callback(self._events.close)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes scalars, and vectors (one value per block, for example) as lists."""
        values = {name: np.asarray(value).astype(float).tolist() for name, value in metrics.items()}
        self._unwritten += json.dumps({"step": step, **values}) + "\n"
        from tensorboardX.summary import scalar

        with naming(self._path):
            for name, value in values.items():
                scalars = {f"{name}/{i}": x for i, x in enumerate(value)} if isinstance(value, list) else {name: value}
                for tag, number in scalars.items():
                    self._events.write(_event(step, summary=scalar(tag, number)))
            self._events.flush()
        if not self._remote:
            self.flush()

    def flush(self) -> None:
        """Writes the lines that are only in memory. Call with every checkpoint."""
        with naming(self._path):
            if self._remote:
                self._path.write_text(self._path.read_text() + self._unwritten)
                for events in self._folder.iterdir():
                    copy = self._path.parent / "tensorboard" / events.name
                    copy.parent.mkdir(exist_ok=True)
                    copy.write_bytes(events.read_bytes())
            else:
                self._file.write(self._unwritten)
                self._file.flush()
        self._unwritten = ""

    def close(self) -> None:
        """Writes all lines and closes the files, even if writing fails."""
        with self._files:
            self.flush()


# tensorboardX is imported where it is needed: if PyTorch is installed, it takes a second to import that, too.
def _open_events(folder: epath.Path, start_step: int) -> Any:
    """Opens a new file of TensorBoard events, which replace earlier ones after `start_step`."""
    from tensorboardX.proto.event_pb2 import SessionLog
    from tensorboardX.record_writer import RecordWriter

    folder.mkdir(exist_ok=True)
    # Not a SummaryWriter: a full disk kills its thread, and its methods then block forever.
    events = RecordWriter(f"{folder}/events.out.tfevents.{time.time():.6f}.{socket.gethostname()}")
    events.write(_event(start_step + 1, file_version="brain.Event:2"))
    events.write(_event(start_step + 1, session_log=SessionLog(status=SessionLog.START)))
    return events


def _event(step: int, **content: Any) -> bytes:
    from tensorboardX.proto.event_pb2 import Event

    return Event(wall_time=time.time(), step=step, **content).SerializeToString()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a crash cut the line short
