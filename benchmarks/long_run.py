"""Trains a tiny model for 20,000 steps with a checkpoint every 100, and watches the process and its files from outside.

    python -m benchmarks.long_run [NUM_STEPS [FIELD=VALUE ...]]

Samples memory, open files, threads and the workdir's size every second, and reads metrics.jsonl and the TensorBoard
events while they are written, as a dashboard would. Prints medians for each tenth of the steps, and the growth from the
second tenth, when everything has been compiled, to the last.
"""

import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.proto.event_pb2 import Event

OPTIONS = {
    "model.width": 16,
    "model.head_dim": 8,
    "mesh.data": 1,
    "train.batch_size": 8,
    "train.log_every": 10,
    "train.checkpoint_every": 100,
    "train.evaluate_every": 1000,
    "train.sample_every": 1000,
}


def size(folder: Path) -> int:
    """Returns the bytes of a folder's files, which may vanish meanwhile."""
    return int(subprocess.run(["du", "-sb", folder], capture_output=True, text=True, check=False).stdout.split()[0])


def last_step(metrics: Path) -> int:
    """Reads metrics.jsonl: every line that has an end is JSON, and their steps rise."""
    steps = [json.loads(line)["step"] for line in metrics.read_text().split("\n")[:-1]]
    assert steps == sorted(steps), "metrics.jsonl: steps out of order"
    return steps[-1] if steps else 0


def events(folder: Path) -> int:
    """Counts the whole events of a TensorBoard folder; the last one may be unfinished."""
    count = 0
    for path in folder.glob("events.*"):
        content, position = path.read_bytes(), 0
        while len(content) >= position + 12:
            (length,) = struct.unpack_from("<Q", content, position)
            record = content[position + 12 : position + 12 + length]
            if len(content) < position + 16 + length:
                break
            Event.FromString(record)
            position, count = position + 16 + length, count + 1
    return count


def sample(pid: int, workdir: Path) -> dict[str, Any]:
    """Returns what the process and its files are like now."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    checkpoints = workdir / "checkpoints"
    return {
        "step": last_step(workdir / "metrics.jsonl"),
        "resident MiB": int(status["VmRSS"].split()[0]) / 1024,
        "open files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
        "mappings": Path(f"/proc/{pid}/maps").read_bytes().count(b"\n"),
        "checkpoints": sum(path.name.isdigit() for path in checkpoints.iterdir()),
        "checkpoints MiB": size(checkpoints) / 2**20,
        "events": events(workdir / "tensorboard"),
    }


def watch(process: subprocess.Popen[bytes], workdir: Path) -> list[dict[str, Any]]:
    """Samples each second until the process ends."""
    rows = []
    while process.poll() is None:
        time.sleep(1)
        try:
            rows.append(sample(process.pid, workdir))
        except (FileNotFoundError, KeyError):  # before its first files, or it has just ended
            continue
    return rows


def main(argv: list[str]) -> None:
    """Trains, watches, prints."""
    num_steps = int(argv[1]) if argv[1:] else 20_000
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder, "run")
        command = [sys.executable, "-m", "launch.train", "--config=configs/digits.py:smoke", f"--workdir={workdir}"]
        fields = OPTIONS | dict(field.split("=") for field in argv[2:]) | {"train.num_steps": num_steps}
        begin = time.perf_counter()
        process = subprocess.Popen(
            [*command, *(f"--config.{name}={value}" for name, value in fields.items())], stderr=subprocess.DEVNULL
        )
        rows = watch(process, workdir)
        assert process.returncode == 0, process.returncode
        assert last_step(workdir / "metrics.jsonl") == num_steps
    print(f"{num_steps:,} steps in {(time.perf_counter() - begin) / 60:.1f} minutes, {len(rows)} samples")
    names = list(rows[0])
    tenth = np.array([min(10 * row["step"] // num_steps, 9) for row in rows])
    figures = np.array([list(row.values()) for row in rows])
    tenths = [np.median(figures[tenth == i], axis=0) for i in range(10) if (tenth == i).any()]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for row in [*tenths, figures[tenth > 0].max(axis=0)]:
        print(f"| {' | '.join(f'{value:,.1f}'.removesuffix('.0') for value in row)} |")
    growth = tenths[-1][1:-1] / tenths[1][1:-1] - 1
    print(f"the last row has the maxima; growth from the second tenth to the last: {growth.round(3)}")


if __name__ == "__main__":
    main(sys.argv)
