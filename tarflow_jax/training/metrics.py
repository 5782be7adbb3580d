"""Metrics of a run: one JSON object a line, and TensorBoard events."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter


class MetricsWriter:
    """Writes workdir/metrics.jsonl and workdir/tensorboard, from `start_step` on."""

    def __init__(self, workdir: Path, start_step: int) -> None:
        """Continues the files; lines of steps after `start_step` are dropped, for they will be written again."""
        path = workdir / "metrics.jsonl"
        kept = []
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= start_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        temporary.replace(path)
        self._file = path.open("a", buffering=1)
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes scalars, and vectors such as the blocks' norms as lists."""
        values = {name: np.asarray(value).astype(float).tolist() for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            for i, number in enumerate(value if isinstance(value, list) else [value]):
                tag = f"{name}/{i}" if isinstance(value, list) else name
                self._tensorboard.add_scalar(tag, number, step)

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut short by a crash
