"""Runs commands in several processes on this machine, forked from one that has imported everything (Linux).

Forked processes start in a second instead of ten. Until it forks, this process must not initialise a device.
"""

import atexit
import functools
import importlib
import itertools
import os
import re
import runpy
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import sklearn.datasets  # noqa: F401

from tarflow_jax import figures
from tarflow_jax.evaluation import classifier, generation
from tarflow_jax.runtime import processes
from tarflow_jax.training import loop

Layout = tuple[int, int]  # processes, devices of each
HEARTBEAT_S, JOIN_S = 10, 60  # of the commands; by default, 100 s without a sign of life, and 300 s for all to come
XLA = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_force_host_platform_device_count="


def fork(log: Path, action: Callable[[], Any]) -> int:
    """Runs `action` in a forked process, whose output is in LOG.out and LOG.err; returns its id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads: those that imports start are not needed
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        for number, end in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(f"{log}{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        action()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:  # as Python exits
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Run:
    """A command in several processes: `python -m ARGUMENTS`, their output in the folder LOG (0.out, 0.err, 1.out, …).

    Attributes:
      ids: process ids.
      ends: exit code and time of each process that has ended.
      port: of the first process, for the others.
    """

    def __init__(self, log: Path, layout: Layout, *arguments: str, pace: float = 0.0, keep: Path | None = None) -> None:
        """Starts them.

        pace: seconds that each training step takes longer.
        keep: where the first process keeps its images as floats.
        """
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            self.port = server.getsockname()[1]
        log.mkdir(parents=True, exist_ok=True)
        self.log, self.begin = log, time.monotonic()
        self.ends: dict[int, tuple[int, float]] = {}
        self.ids = [
            fork(log / str(i), functools.partial(_run_command, arguments, i, layout, self.port, pace, keep))
            for i in range(layout[0])
        ]

    def wait(self, seconds: float, which: set[int] | None = None) -> bool:
        """Waits until these processes have ended, by default all; returns whether they have."""
        which, until = which or set(range(len(self.ids))), time.monotonic() + seconds
        while True:
            for i in set(range(len(self.ids))) - self.ends.keys():
                child, status = os.waitpid(self.ids[i], os.WNOHANG)
                if child:
                    self.ends[i] = os.waitstatus_to_exitcode(status), time.monotonic()
            if which <= self.ends.keys() or time.monotonic() > until:
                return which <= self.ends.keys()
            time.sleep(0.01)

    def finish(self) -> float:
        """Waits for all and returns seconds. RuntimeError unless all exit with 0 and only the first one prints."""
        try:
            done = self.wait(1200)
        finally:
            self.kill()
        last = "\n".join(map(self.said, range(len(self.ids))))
        if not done or {code for code, _ in self.ends.values()} != {0}:
            raise RuntimeError(f"{self.log}: {self.ends}\n{last}")
        if any(_lines(self.log / f"{i}.out") for i in range(1, len(self.ids))):
            raise RuntimeError(f"{self.log}: another than the first process printed something")
        return max(end for _, end in self.ends.values()) - self.begin

    def kill(self) -> None:
        for i, child in enumerate(self.ids):
            if i not in self.ends:
                os.kill(child, signal.SIGKILL)
        self.wait(60)

    def said(self, index: int) -> str:
        """The last line of a process on stderr."""
        return (_lines(self.log / f"{index}.err") or [""])[-1]


def clock_file(port: int, index: int) -> Path:
    """What libfaketime, if it is preloaded, adds to a process's clock."""
    return Path(tempfile.gettempdir()) / f"clock_{port}_{index}"


def _run_command(
    arguments: Sequence[str], index: int, layout: Layout, port: int, pace: float, keep: Path | None
) -> None:
    sys.argv = ["-m", *arguments[1:]]
    importlib.import_module("launch")  # from here on signals end it, as in a command's first tenth of a second
    count, devices = layout
    os.environ["XLA_FLAGS"] = f"{XLA}{devices}"
    os.environ["FAKETIME_TIMESTAMP_FILE"] = str(clock_file(port, index))
    jax.distributed.initialize = functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=HEARTBEAT_S)
    processes.start_processes.__kwdefaults__["timeout_s"] = JOIN_S
    classifier.MIN_STEPS = 20
    if pace:
        take_step = loop._Run.take_step
        loop._Run.take_step = lambda *args: time.sleep(pace) or take_step(*args)  # type: ignore[method-assign]
    if keep and index == 0:
        figures.to_uint8 = generation.to_uint8 = _kept(keep, figures.to_uint8)
    if count > 1:
        where = [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={index}"]
        sys.argv += ["--distributed", *where]
    _keep_programs_of_all_processes()
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def _keep_programs_of_all_processes() -> None:
    """Has every process write to the compilation cache: JAX lets the first alone, but those of CPUs share none."""
    compiler = importlib.import_module("jax._src.compiler")
    write, state = compiler._cache_write, compiler.distributed.global_state

    def write_anyhow(*args: Any) -> None:
        own, state.process_id = state.process_id, 0
        try:
            write(*args)
        finally:
            state.process_id = own

    compiler._cache_write = write_anyhow


def _kept(folder: Path, function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """A function that saves its argument in turn as 000.npy, 001.npy, …"""
    folder.mkdir(parents=True)
    numbers = itertools.count()

    def saving(images: Any) -> np.ndarray:
        np.save(folder / f"{next(numbers):03d}.npy", np.asarray(images))
        return function(images)

    return saving


def _lines(file: Path) -> list[str]:
    """Lines without progress bars, and without gloo's, whose threads write into each other's."""
    lines = [line.rpartition("\r")[2].strip() for line in file.read_text(errors="replace").split("\n")]
    return [line for line in lines if line and not re.search(r"\[Gloo\]|connected to \d+ peer ranks", line)]
