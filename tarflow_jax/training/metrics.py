"""Writes a run's metrics as JSON lines and TensorBoard events, and measures its steps per second.

Functions import tensorboardX as they need it: where PyTorch is installed, it takes a second to import that, too.
"""

import contextlib
import json
import math
import os
import socket
import time
import types
from pathlib import Path
from typing import IO, Any

import numpy as np
from etils import epath

from tarflow_jax.files import is_remote, naming, replacing, write_text

METRICS = "metrics.jsonl"


class MetricsWriter:
    """Writes metrics.jsonl, one JSON object per line, and tensorboard/ in the workdir.

    Object stores cannot append, so there only `flush` and `close` write the files, each as a whole.
    """

    def __init__(self, workdir: epath.PathLike, start_step: int) -> None:
        """Opens the files and drops lines after `start_step`, because the run repeats these steps."""
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.record_writer import RecordWriter, register_writer_factory

        register_writer_factory("gs", types.SimpleNamespace(open=_ObjectWriter))
        self._path = epath.Path(workdir) / METRICS
        self._remote = is_remote(self._path)
        kept = "".join(f"{line}\n" for line in _lines(workdir) if _step_of(line) <= start_step)
        write_text(self._path, kept)
        self._lines: IO[bytes] | _ObjectWriter
        if self._remote:
            self._lines = _ObjectWriter(os.fspath(self._path), kept.encode())
        else:
            self._lines = Path(self._path).open("ab")  # noqa: SIM115
        folder = epath.Path(workdir) / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        # Not a SummaryWriter: a full disk kills its thread, and its methods then block forever.
        self._events = RecordWriter(os.fspath(folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"))
        self._add_event(start_step + 1, file_version="brain.Event:2")
        # TensorBoard drops earlier events from this step on.
        self._add_event(start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes scalars, and vectors (one value per block, for example) as lists."""
        from tensorboardX.summary import scalar

        values = {name: np.asarray(value).astype(float).tolist() for name, value in metrics.items()}
        line = json.dumps({"step": step, **values}) + "\n"
        with naming(self._path):
            self._lines.write(line.encode())
            for name, value in values.items():
                scalars = {f"{name}/{i}": x for i, x in enumerate(value)} if isinstance(value, list) else {name: value}
                for tag, number in scalars.items():
                    self._add_event(step, summary=scalar(tag, number))
            if not self._remote:
                self.flush()

    def flush(self) -> None:
        """Uploads both if they are on an object store. Call with every checkpoint."""
        self._lines.flush()
        self._events.flush()

    def close(self) -> None:
        with naming(self._path), contextlib.closing(self._events):
            self._lines.close()

    def _add_event(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._events.write(Event(wall_time=time.time(), step=step, **content).SerializeToString())


class _ObjectWriter:
    """Buffers an object and uploads it whole. tensorboardX's own writer raises if an upload's response is lost."""

    def __init__(self, path: str, content: bytes = b"") -> None:
        self._path, self._content = path, bytearray(content)

    def write(self, data: bytes) -> None:
        self._content += data

    def flush(self) -> None:
        with replacing(self._path) as file:
            file.write(self._content)

    close = flush


def last_step(workdir: epath.PathLike) -> float:
    """Returns the last step in metrics.jsonl; 0 if there is none."""
    return max((step for line in _lines(workdir) if (step := _step_of(line)) < math.inf), default=0)


def _lines(workdir: epath.PathLike) -> list[str]:
    path = epath.Path(workdir) / METRICS
    return path.read_bytes().decode(errors="replace").splitlines() if path.exists() else []


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a crash cut the line short


class StepClock:
    """Measures steps per second, excluding the first step, which compiles, and any step that follows a pause."""

    def __init__(self) -> None:
        self._last: float | None = None  # when the last step ended, unless other work followed it
        self._seconds, self._steps, self._rate = 0.0, 0, 0.0

    def step_done(self) -> None:
        """Call when a step's results are on the host."""
        now = time.perf_counter()
        if self._last is not None:
            self._seconds, self._steps = self._seconds + now - self._last, self._steps + 1
        self._last = now

    def pause(self) -> None:
        """Call after work between steps, such as an evaluation."""
        self._last = None

    def rate(self) -> float:
        """Returns steps per second since the last call; without new steps, the previous rate (initially 0)."""
        if self._steps:
            self._rate = self._steps / self._seconds
        self._seconds, self._steps = 0.0, 0
        return self._rate
