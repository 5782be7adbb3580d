"""Metrics of a run: one JSON object a line, and TensorBoard events."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from tensorboardX import SummaryWriter

from tarflow_jax.files import is_remote, write_text


class MetricsWriter:
    """Writes workdir/metrics.jsonl and workdir/tensorboard, from `start_step` on.

    In an object store, which cannot append, metrics.jsonl is written whole by `flush`.
    """

    def __init__(self, workdir: epath.PathLike, start_step: int) -> None:
        """Continues the files; lines of steps after `start_step` are dropped, for they will be written again."""
        self._path = epath.Path(workdir) / "metrics.jsonl"
        lines = self._path.read_bytes().decode(errors="replace").splitlines() if self._path.exists() else []
        self._text = "".join(f"{line}\n" for line in lines if _step_of(line) <= start_step)
        write_text(self._path, self._text)
        self._file = None if is_remote(self._path) else Path(self._path).open("a", buffering=1)  # noqa: SIM115
        self._tensorboard = SummaryWriter(os.fspath(epath.Path(workdir) / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes scalars, and vectors such as the blocks' norms as lists."""
        values = {name: np.asarray(value).astype(float).tolist() for name, value in metrics.items()}
        line = json.dumps({"step": step, **values}) + "\n"
        if self._file:
            self._file.write(line)
        else:
            self._text += line
        for name, value in values.items():
            for i, number in enumerate(value if isinstance(value, list) else [value]):
                tag = f"{name}/{i}" if isinstance(value, list) else name
                self._tensorboard.add_scalar(tag, number, step)

    def flush(self) -> None:
        """Brings an object store's metrics.jsonl up to date; to be called with every checkpoint."""
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
        return float("inf")  # a line cut short by a crash
