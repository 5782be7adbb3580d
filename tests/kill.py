"""Kills a training run -9 at random moments, and checks that it ends with the parameters of an undisturbed one.

python tests/kill.py FOLDER NUM_KILLS [SEED]

Each attempt is forked from one process that has imported everything, and programs are compiled once.
"""

import collections
import contextlib
import hashlib
import itertools
import os
import signal
import sys
import time
from pathlib import Path

from commands import NOT_OPTIMISED

# Before JAX is imported for the first time.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{NOT_OPTIMISED} --xla_force_host_platform_device_count=2"

import jax
import numpy as np

from configs import digits
from tarflow_jax.training import train

STEPS_A_KILL = 6
CHANGES_OF_A_SAVE = 40  # of files and folders, by Python; those that TensorStore makes are killed at random moments
ASLEEP = "asleep"


def sleep_in_a_write(workdir, number):
    """Has this process sleep for good before it changes a file or folder in checkpoints/ for the `number`-th time."""
    changes = itertools.count(1)

    def audit(event, arguments):
        if event == "open":
            changing = isinstance(arguments[1], str) and set(arguments[1]) & set("wxa+")
        else:
            changing = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if changing and f"{workdir / 'checkpoints'}/" in f"{arguments[0]}/" and next(changes) == number:
            (workdir / ASLEEP).write_text(event)
            time.sleep(3600)

    sys.addaudithook(audit)


def attempt(workdir, num_steps, sleep_at=0):
    """A forked process that trains to the end and writes a digest of every number in the final state."""
    if child := os.fork():
        return child
    code = 1
    try:
        if sleep_at:
            sleep_in_a_write(workdir, sleep_at)
        config = digits.get_config("smoke")
        config.model.num_blocks = 1
        config.train.update({"num_steps": num_steps, "checkpoint_every": 2, "evaluate_every": 0, "log_every": 1})
        state = train(config, workdir)
        digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)))
        (workdir / "digest").write_text(digest.hexdigest())
        code = 0
    finally:
        os._exit(code)


def ended(child):
    """The exit status of a process, None while it runs."""
    found, status = os.waitpid(child, os.WNOHANG)
    return status if found else None


def wait_for(child, condition):
    """Polls until the condition holds; raises if the process ends before."""
    while not condition():
        status = ended(child)
        assert status is None, f"the run ended with status {status} before it was killed"
        time.sleep(0.001)


def unfinished(workdir):
    """Checkpoints under their temporary names, each with the number that tells it from an earlier one's."""
    found = set()
    for path in (workdir / "checkpoints").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if "tmp" in path.name:
                found.add((path.name, path.stat().st_ino))
    return found


def kill(workdir, child, rng, in_save):
    """Kills a run some steps after it began; returns whether it was saving then."""
    file = workdir / "metrics.jsonl"
    before = file.stat().st_mtime_ns if file.exists() else 0
    wait_for(child, lambda: file.exists() and file.stat().st_mtime_ns > before)
    lines = len(file.read_text().splitlines()) + int(rng.integers(1, STEPS_A_KILL - 2))
    wait_for(child, lambda: len(file.read_text().splitlines()) >= lines)
    left = unfinished(workdir)
    if in_save:
        wait_for(child, lambda: unfinished(workdir) - left)
    time.sleep(rng.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return bool(unfinished(workdir) - left)


def kill_asleep(workdir, child):
    """Kills a run once it sleeps, and returns before which change."""
    wait_for(child, lambda: (workdir / ASLEEP).exists() and (workdir / ASLEEP).read_text())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    change = (workdir / ASLEEP).read_text()
    (workdir / ASLEEP).unlink()
    return change


def main(folder, num_kills, seed=0):
    """Runs, kills, compares, prints."""
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    num_steps, rng = STEPS_A_KILL * (num_kills + 1), np.random.default_rng(seed)
    workdirs = folder / "whole", folder / "killed"
    saving, asleep = 0, []
    for kills, workdir in zip((0, num_kills), workdirs, strict=True):
        for i in range(kills):
            if i % 2:
                number = int(rng.integers(1, CHANGES_OF_A_SAVE + 1))
                asleep.append(kill_asleep(workdir, attempt(workdir, num_steps, number)))
            else:
                saving += kill(workdir, attempt(workdir, num_steps), rng, i % 4 == 0)
        _, status = os.waitpid(attempt(workdir, num_steps), 0)
        assert status == 0, f"the run ended with status {status}"
    whole, killed = ((workdir / "digest").read_text() for workdir in workdirs)
    assert saving, "no kill came while it was saving"
    assert killed == whole, "the parameters differ"
    changes = ", ".join(f"{count} {name}" for name, count in sorted(collections.Counter(asleep).items()))
    print(f"asleep before {changes}")
    print(f"{num_kills} kills, {saving + len(asleep)} of them while saving; the same parameters, bit for bit")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
