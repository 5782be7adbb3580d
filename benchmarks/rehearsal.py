"""Rehearses many hosts on one machine: every command over several processes, changes of topology, faults.

    python -m benchmarks.rehearsal matrix               # each command on each mesh, against one process
    python -m benchmarks.rehearsal topology             # other processes and another mesh at each start
    python -m benchmarks.rehearsal faults --tries=30    # each fault at random moments of a training

LocalBatch that --rows has are skipped. Some faults need root, for a network and a disk of their own. Clock faults need
LD_PRELOAD=libfaketime.so.1 DONT_FAKE_MONOTONIC=1 FAKETIME_CACHE_DURATION=1 in the environment.
"""

import argparse
import contextlib
import ctypes
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.forked import Layout, Run, clock_file, fork
from tarflow_jax.training.workdir import read_workdir

MESHES = {
    "data": (4, 1, 1),
    "fsdp": (1, 4, 1),
    "tensor": (1, 1, 4),
    "data x fsdp": (2, 2, 1),
    "fsdp x tensor": (1, 2, 2),
}
LAYOUTS = ONE, TWO, FOUR = (1, 4), (2, 2), (4, 1)
STEPS, EVERY = 24, 6
FIELDS = {
    "model.width": 32, "model.head_dim": 8, "train.num_steps": STEPS, "train.checkpoint_every": EVERY,
    "train.sample_every": 12, "train.evaluate_every": 12, "train.log_every": 1,
}  # fmt: skip
STUDENT_FIELDS = {"train.num_steps": 8, "train.checkpoint_every": 4, "train.log_every": 1}
DISTURBED_FIELDS = {"train.sample_every": 0, "train.evaluate_every": 0}
PACE_S = 0.1  # that a step takes longer, so that most faults come while it trains
CLOCK_S = 15  # that it goes on after its clock has jumped, before it is killed
START_S = 15  # in which a fault comes before the first step
LIMIT_S = 150  # by then all must have ended


def config(fields: dict[str, Any], mesh: str) -> list[str]:
    """Flags of a recipe's fields and mesh."""
    sizes = {f"mesh.{axis}": size for axis, size in zip(("data", "fsdp", "tensor"), MESHES[mesh], strict=True)}
    return [f"--config.{name}={value}" for name, value in (fields | sizes).items()]


def train_command(workdir: Path, mesh: str, **more: Any) -> list[str]:
    """The training that is rehearsed."""
    return ["launch.train", "--config=configs/digits.py:smoke", f"--workdir={workdir}", *config(FIELDS | more, mesh)]


def commands(workdir: Path, mesh: str) -> dict[str, list[str]]:
    """What is run in a cell of the matrix, in this order."""
    student = "--config=configs/student/digits.py:smoke"
    on_mesh = {
        "train": train_command(workdir, mesh),
        "distill": ["launch.distill", f"--workdir={workdir}", student, *config(STUDENT_FIELDS, mesh)],
    }
    if mesh != "fsdp x tensor":  # the others share all devices by `data`, whatever mesh the model was trained on
        return on_mesh
    sample = ["launch.sample", f"--workdir={workdir}", "--num_images=10", "--guidance=1"]
    metrics = ["--metrics=bits_per_dim,classification,fid", "--allow_noisy", "--num_samples=1000"]
    return on_mesh | {
        "sample": [*sample, f"--out={workdir}/sample"],
        "sample, student": [*sample, f"--out={workdir}/student_sample", "--decoder=student"],
        "evaluate": ["launch.evaluate", f"--workdir={workdir}", *metrics],
    }


def numbers(tree: Any) -> list[float]:
    """The numbers in JSON, in its order."""
    if isinstance(tree, dict | list):
        return list(itertools.chain(*map(numbers, tree.values() if isinstance(tree, dict) else tree)))
    return [tree] if isinstance(tree, int | float) else []


def losses(workdir: Path) -> list[float]:
    """Losses of a training's steps, and its last test loss; a run that is stopped leaves out other evaluations."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line] + numbers(
        json.loads((workdir / "results.json").read_text())
    )


def figures(command: str, workdir: Path) -> list[float]:
    """What a command measured."""
    if command == "evaluate":
        (path,) = (workdir / "evaluation").glob("*.json")
        return numbers(json.loads(path.read_text())["results"])
    folder = {"train": workdir, "distill": workdir / "student"}.get(command)
    return losses(folder) if folder else []


def images(folder: Path) -> list[np.ndarray]:
    """The floats that `Run` kept."""
    return [np.load(path) for path in sorted(folder.glob("*.npy"))]


def parameters(workdir: Path) -> list[np.ndarray]:
    """The parameters of a run's last checkpoint, read by another process."""
    file, log = workdir / "parameters.npz", workdir / "read"

    def read() -> None:
        np.savez(file, *map(np.asarray, jax.tree.leaves(read_workdir(workdir).variables)))

    if os.waitpid(fork(log, read), 0)[1]:
        raise RuntimeError(Path(f"{log}.err").read_text())
    with np.load(file) as arrays:
        return list(arrays.values())


def difference(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """The largest difference, relative to the largest number of its array or to 1."""
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(ours, theirs, strict=True)]
    return max((float(np.abs(a - b).max() / max(np.abs(b).max(), 1)) for a, b in pairs), default=0.0)


class LocalBatch(list[dict[str, Any]]):
    """LocalBatch in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        super().__init__(map(json.loads, path.read_text().splitlines()) if path.exists() else [])

    def have(self, **key: Any) -> bool:
        return any(key.items() <= row.items() for row in self)

    def add(self, row: dict[str, Any]) -> None:
        print(row, flush=True)
        self.append(row)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def matrix(rows: LocalBatch, folder: Path, meshes: list[str], only: list[str] | None, most: int) -> None:
    """Runs commands on each mesh in one process, two and four, `most` at most, and compares."""
    for mesh, layout in itertools.product(meshes, LAYOUTS):
        one, cell = (folder / f"{mesh} {count}x{devices}".replace(" ", "_") for count, devices in (ONE, layout))
        for command, arguments in commands(cell / "run", mesh).items():
            key = {"part": "matrix", "command": command, "mesh": mesh, "processes": "{} x {}".format(*layout)}
            if rows.have(**key) or layout[0] > most or (only and command not in only):
                continue
            keep = cell / command
            for made in (keep, {"train": cell / "run", "distill": cell / "run" / "student"}.get(command, keep)):
                shutil.rmtree(made, ignore_errors=True)
            seconds = Run(cell / "log" / command, layout, *arguments, keep=keep).finish()
            row: dict[str, Any] = {**key, "seconds": round(seconds, 1)}
            if layout != ONE:
                row["losses"] = difference(figures(command, cell / "run"), figures(command, one / "run"))
                if command != "evaluate":  # in which each process draws a share
                    row["images"] = difference(images(keep), images(one / command))
                if command == "train":
                    row["parameters"] = difference(parameters(cell / "run"), parameters(one / "run"))
            rows.add(row)


def undisturbed(folder: Path, layout: Layout, mesh: str, **fields: Any) -> Path:
    """Returns the workdir of a training that nothing disturbs."""
    workdir = folder / "whole"
    if not (workdir / "results.json").exists():
        shutil.rmtree(workdir, ignore_errors=True)
        Run(folder / "log" / "whole", layout, *train_command(workdir, mesh, **fields)).finish()
    return workdir


def steps(workdir: Path) -> int:
    """How many steps metrics.jsonl has."""
    path = workdir / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def saved_step(workdir: Path) -> int:
    """The newest checkpoint's step, 0 without one."""
    return max((int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit()), default=0)


def topology(rows: LocalBatch, folder: Path) -> None:
    """Continues a run of one process on two, four and one, on another mesh each time."""
    whole = undisturbed(folder, ONE, "data")
    for first in range(len(MESHES)):
        meshes = [list(MESHES)[(first + i) % len(MESHES)] for i in range(4)]
        if rows.have(part="topology", meshes=meshes):
            continue
        random, workdir, stops = np.random.default_rng(first), folder / "run", []
        shutil.rmtree(workdir, ignore_errors=True)
        for stage, (layout, mesh) in enumerate(zip((*LAYOUTS, ONE), meshes, strict=True)):
            command, last = train_command(workdir, mesh), stage == 3
            run = Run(folder / "log" / str(stage), layout, *command, pace=0.0 if last else 2 * PACE_S)
            if last:
                run.finish()
                break
            while steps(workdir) < STEPS // 4 * (stage + 1) - 2 and not run.wait(0.02):
                pass
            os.kill(run.ids[random.integers(layout[0])], signal.SIGTERM)
            if not run.wait(LIMIT_S) or {code for code, _ in run.ends.values()} != {os.EX_TEMPFAIL}:
                run.kill()
                raise RuntimeError(f"{run.log}: {run.ends}")
            stops.append(saved_step(workdir))
        row = {"part": "topology", "meshes": meshes, "stopped after": stops}
        row["losses"] = difference(losses(workdir), losses(whole))
        rows.add(row | {"parameters": difference(parameters(workdir), parameters(whole))})


Fault = Callable[[Run, int, Path], contextlib.AbstractContextManager[None]]


def fault(do: Callable[[Run, int, Path], Any], undo: Callable[[Run, int, Path], Any] | None = None) -> Fault:
    """A fault that lasts while a context is open, of a run, its process number `victim`, and its workdir."""

    @contextlib.contextmanager
    def context(run: Run, victim: int, workdir: Path) -> Iterator[None]:
        do(run, victim, workdir)
        yield
        if undo:
            undo(run, victim, workdir)

    return context


def shell(command: str) -> Callable[..., None]:
    """A function that ignores its arguments and runs a command."""
    return lambda *_: subprocess.run(command, shell=True, check=True, capture_output=True) and None


def send(number: int) -> Callable[[Run, int, Path], None]:
    """A function that sends a signal to the victim."""
    return lambda run, victim, _: os.kill(run.ids[victim], number)


def send_all(run: Run, victim: int, workdir: Path) -> None:
    """Sends SIGTERM to all that still run."""
    for i, child in enumerate(run.ids):
        if i not in run.ends:
            os.kill(child, signal.SIGTERM)


def clock(text: str) -> Callable[[Run, int, Path], Any]:
    """A function that moves the victim's clock."""
    return lambda run, victim, _: clock_file(run.port, victim).write_text(text)


def fill(run: Run, victim: int, workdir: Path) -> None:
    """Fills the workdir's disk."""
    with contextlib.suppress(OSError):  # the run writes, too
        (workdir / "ballast").write_bytes(bytes(shutil.disk_usage(workdir).free))


FAULTS: dict[str, Fault] = {
    "kill -9 of one": fault(send(signal.SIGKILL)),
    "SIGTERM to one": fault(send(signal.SIGTERM)),
    "SIGTERM to all": fault(send_all),
    "one hangs": fault(send(signal.SIGSTOP), send(signal.SIGCONT)),
    "connections closed": fault(shell("for i in $(seq 20); do ss -K state established; done")),  # one at a time
    "network cut": fault(shell("ip link set lo down"), shell("ip link set lo up")),
    "disk full": fault(fill, lambda run, victim, workdir: (workdir / "ballast").unlink()),
    # No file of the first process may grow beyond 64 KiB.
    "first process's disk full": fault(
        lambda run, *_: resource.prlimit(run.ids[0], resource.RLIMIT_FSIZE, (64 << 10, resource.RLIM_INFINITY))
    ),
    "clock an hour ahead": fault(clock("+3600"), clock("+0")),
    "clock an hour behind": fault(clock("-3600"), clock("+0")),
}


def disturb(kind: str, workdir: Path, log: Path, command: list[str], random: np.random.Generator) -> dict[str, Any]:
    """Starts a training, disturbs it at a random moment, and waits until all have ended; returns a row."""
    run, before, everyone = Run(log, TWO, *command, pace=PACE_S), steps(workdir), set(range(TWO[0]))
    number = random.integers(-EVERY, 2 * EVERY)  # of steps; a third come while it starts
    while number > 0 and steps(workdir) < before + number and not run.wait(0.02):
        pass
    run.wait(random.uniform(0, 0.3 if number > 0 else START_S))
    early, taken, saved = set(run.ends), steps(workdir), saved_step(workdir)
    victim, begin = int(random.integers(TWO[0])), time.monotonic()
    others = everyone - ({victim} if kind in ("kill -9 of one", "one hangs") else set())
    if not early:
        with FAULTS[kind](run, victim, workdir):
            if kind.startswith("clock") and not run.wait(CLOCK_S):
                run.kill()  # it went on
            bounded = run.wait(LIMIT_S, others)
    bounded = run.wait(LIMIT_S) and (early or bounded)
    run.kill()
    errors = [(log / f"{i}.err").read_text(errors="replace") for i in everyone]
    return {
        "kind": kind, "victim": victim, "step": taken, "saved": saved, "early": bool(early), "bounded": bool(bounded),
        "last step": steps(workdir),
        "seconds": round(max(run.ends[i][1] for i in others) - begin, 1),
        "codes": [run.ends[i][0] for i in everyone], "said": [run.said(i) for i in everyone],
        "tracebacks": sum("Traceback" in text for text in errors),
        "continued from": max(map(int, re.findall(r"continuing from step (\d+)", errors[0])), default=0),
    }  # fmt: skip


def faults(rows: LocalBatch, folder: Path, kinds: list[str], tries: int) -> None:
    """Disturbs a run by each kind of fault, in random order, lets it finish, and compares; as often as `tries`."""
    if {"connections closed", "network cut"} & set(kinds):
        new_network = 0x40000000  # CLONE_NEWNET
        if ctypes.CDLL(None).unshare(new_network):
            raise PermissionError("these faults need root, for a network of their own")
        shell("ip link set lo up")()
    disk = folder / "disk"
    disk.mkdir(parents=True, exist_ok=True)
    fields = DISTURBED_FIELDS | {"train.num_steps": 20 + 8 * len(kinds)}
    whole = undisturbed(folder / f"of {len(kinds)} kinds", TWO, "fsdp", **fields)
    with contextlib.ExitStack() as mounted:
        if "disk full" in kinds:
            shell(f"mount -t tmpfs -o size=32m tmpfs {disk}")()
            mounted.callback(shell(f"umount --lazy {disk}"))
        for number in range(tries):
            if rows.have(part="faults", number=number, kind="none", kinds=kinds):
                continue
            random, workdir, saved = np.random.default_rng(number), disk / str(number), 0
            shutil.rmtree(workdir, ignore_errors=True)
            workdir.mkdir()
            command = train_command(workdir, "fsdp", **fields)
            for kind in map(str, random.permutation(kinds)):
                row = disturb(kind, workdir, folder / "log" / f"{number} {kind}", command, random)
                row["lost"] = row["step"] < saved or 0 < row["continued from"] < saved
                rows.add({"part": "faults", "number": number, **row})
                saved = saved_step(workdir)
            run = Run(folder / "log" / f"{number} none", TWO, *command)
            row = {
                "part": "faults",
                "number": number,
                "kind": "none",
                "kinds": kinds,
                "seconds": round(run.finish(), 1),
            }
            row["losses"] = difference(losses(workdir), losses(whole))
            rows.add(row | {"parameters": difference(parameters(workdir), parameters(whole))})
            shutil.rmtree(workdir)


def main() -> None:
    """Rehearses one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["matrix", "topology", "faults"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "rehearsal", help="for workdirs")
    parser.add_argument("--rows", type=Path, default=Path("docs/results/rehearsal.jsonl"), help="where rows are added")
    parser.add_argument("--meshes", nargs="+", choices=MESHES, default=[*MESHES], metavar="MESH")
    parser.add_argument("--commands", nargs="+", help="of the matrix; by default all")
    parser.add_argument("--processes", type=int, default=4, help="the most, of the matrix")
    parser.add_argument("--kinds", nargs="+", choices=FAULTS, default=[*FAULTS], metavar="KIND", help=", ".join(FAULTS))
    parser.add_argument("--tries", type=int, default=30, help="of each kind of fault")
    args = parser.parse_args()
    os.environ["TARFLOW_DATA_DIR"] = str(args.folder / "data")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(args.folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    rows, folder = LocalBatch(args.rows), args.folder.resolve() / args.part
    if args.part == "matrix":
        matrix(rows, folder, args.meshes, args.commands, args.processes)
    elif args.part == "topology":
        topology(rows, folder)
    else:
        faults(rows, folder, args.kinds, args.tries)


if __name__ == "__main__":
    main()
