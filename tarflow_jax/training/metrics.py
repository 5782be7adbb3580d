"""Metrics of a run, as JSON lines and TensorBoard events, and its steps per second."""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from tensorboardX import SummaryWriter

from tarflow_jax.files import is_remote, write_text


class MetricsWriter:
    """Writes metrics.jsonl, one JSON object per line, and tensorboard/ in the workdir.

    Object stores cannot append, so there `flush` writes the whole of metrics.jsonl.
    """

    def __init__(self, workdir: epath.PathLike, start_step: int) -> None:
        """Opens the files and drops lines after `start_step`, because the run takes these steps again."""
        self._path = epath.Path(workdir) / "metrics.jsonl"
        lines = self._path.read_bytes().decode(errors="replace").splitlines() if self._path.exists() else []
        self._text = "".join(f"{line}\n" for line in lines if _step_of(line) <= start_step)
        write_text(self._path, self._text)
        self._file = None if is_remote(self._path) else Path(self._path).open("a", buffering=1)  # noqa: SIM115
        self._tensorboard = SummaryWriter(os.fspath(epath.Path(workdir) / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes scalars, and vectors (one value per block, for example) as lists."""
        values = {name: np.asarray(value).astype(float).tolist() for name, value in metrics.items()}
        line = json.dumps({"step": step, **values}) + "\n"
        if self._file:
            self._file.write(line)
        else:
            self._text += line
        for name, value in values.items():
            scalars = {f"{name}/{i}": x for i, x in enumerate(value)} if isinstance(value, list) else {name: value}
            for tag, scalar in scalars.items():
                self._tensorboard.add_scalar(tag, scalar, step)

    def flush(self) -> None:
        """Writes metrics.jsonl to an object store. Call with every checkpoint."""
        if not self._file:
            write_text(self._path, self._text)

    def close(self) -> None:
        self.flush()
        if self._file:
            self._file.close()
        self._tensorboard.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a crash cut the line short


class StepClock:
    """Measures steps per second. Excludes the first step, which compiles, and any step that follows a pause."""

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
        """Returns steps per second since the last call; the previous rate if none were counted, at first 0."""
        if self._steps:
            self._rate = self._steps / self._seconds
        self._seconds, self._steps = 0.0, 0
        return self._rate
