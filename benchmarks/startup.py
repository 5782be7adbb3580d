"""Where the seconds of `python -m launch.sample --model=digits` go: the first time, and with compiled programs kept.

    python -m benchmarks.startup [--model=digits] [--repeats=5]

Adds a row for each start to docs/results/startup.jsonl. Run it on an idle machine.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tarflow_jax.runtime import environment

ROWS = Path("docs/results/startup.jsonl")
# Runs in a process of its own: argv is the time at which it was started, the file for the row, and the command's flags.
PROGRAM = """
import sys, time
begin, path = float(sys.argv.pop(1)), sys.argv.pop(1)
seconds, last = {}, begin
def lap(name):
    global last
    now = time.time()
    seconds[name], last = now - last, now
lap("start Python")
import jax
lap("import jax")
from launch import cli, sample
lap("import the rest")
compiling = {}
def listen(event, duration, **_):
    compiling[event] = compiling.get(event, 0.0) + duration
jax.monitoring.register_event_duration_secs_listener(listen)
open_pipeline = cli.open_pipeline
def timed_open(*args, **kwargs):
    lap("flags and devices")
    pipe = open_pipeline(*args, **kwargs)
    lap("open the model")
    return pipe
cli.open_pipeline = timed_open
import atexit, json
def report():
    lap("trace, compile, draw and write")
    seconds["of these, trace and lower"] = sum(spent for event, spent in compiling.items() if "jaxpr" in event)
    seconds["of these, compile or read"] = compiling.get("/jax/core/compile/backend_compile_duration", 0.0)
    open(path, "w").write(json.dumps(seconds))
atexit.register(report)
cli.run(sample.main)
"""


def start(model: str, folder: Path) -> dict[str, float]:
    """Seconds of one start, by part; compiled programs are kept in the folder."""
    report, flags = folder / "report.json", [f"--model={model}", f"--out={folder}", "--guidance=1.5"]
    flags += [f"--compilation_cache={folder / 'compiled'}"]
    begin = time.time()
    command = [sys.executable, "-c", PROGRAM, str(begin), str(report), *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    whole = time.time() - begin
    return {**json.loads(report.read_text()), "whole": whole}


def main() -> None:
    """Starts the command with and without programs of an earlier start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", help="what to draw from")
    parser.add_argument("--repeats", type=int, default=5, help="starts of each kind")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number in range(args.repeats):
            shutil.rmtree(folder / "compiled", ignore_errors=True)
            for kind in ("first", "again"):
                found = {name: round(seconds, 2) for name, seconds in start(args.model, folder).items()}
                machine = {"processor": environment()["processor"], "date": time.strftime("%Y-%m-%d")}
                row = {"model": args.model, "start": kind, "number": number, **found, **machine}
                print(row, flush=True)
                with ROWS.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
