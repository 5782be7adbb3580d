"""What the minutes of a training buy: launch.evaluate of each checkpoint that a run kept, a row each.

    python -m launch.train … --workdir=DIR --config.train.checkpoint_every=2000 --config.train.keep_checkpoints=100
    python -m benchmarks.checkpoints --workdir=DIR --rows=FILE.jsonl -- --metrics=bits_per_dim

What follows `--` are flags of launch.evaluate. Minutes are those of training, from each start of the run to the
checkpoint from which the next one went on. Before the last checkpoint the learning rate has not come down: a run that
ends there does better. Steps that have a row are skipped.
"""

import argparse
import json
import shutil
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.common import evaluate, json_lines


def measure(workdir: Path, step: int, flags: list[str]) -> dict[str, Any]:
    """What launch.evaluate writes of a run whose last checkpoint is of this step."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / workdir.name
        shutil.copytree(workdir, run, ignore=lambda _, names: {x for x in names if x.isdigit() and x != str(step)})
        return evaluate(f"--workdir={run}", *flags)


def minutes(workdir: Path, step: int) -> float:
    """How long the run trained until its checkpoint of this step, interruptions left out."""
    starts = [json.loads(line) for line in (workdir / "starts.jsonl").read_text().splitlines()]
    ends = [start["step"] for start in starts[1:]] + [step]
    seconds = 0.0
    for start, end in zip(starts, ends, strict=True):
        if start["step"] < min(end, step):
            saved = (workdir / "checkpoints" / str(min(end, step))).stat().st_mtime
            seconds += saved - datetime.fromisoformat(start["time"]).timestamp()
    return seconds / 60


def main() -> None:
    """Measures the checkpoints that have no row yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="a training run's folder")
    parser.add_argument("--rows", type=Path, required=True, help="file to append to")
    parser.add_argument("flags", nargs="+", help="flags of launch.evaluate, after --")
    args = parser.parse_args()
    rows = json_lines(args.rows)
    done = {row["step"] for row in rows}
    for step in sorted(int(path.name) for path in (args.workdir / "checkpoints").glob("[0-9]*")):
        if step in done:
            continue
        found = measure(args.workdir, step, args.flags)
        about = {name: found["environment"][name] for name in ("processor", "cores", "commit")}
        row = {"step": step, "minutes": round(minutes(args.workdir, step)), **found["results"], **about}
        print(row, flush=True)
        with args.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
