"""Commands as jobs, each in a folder of its own: run as child processes here, or handed to Slurm.

A step is done when its file is there, and is never run again. While a child process lives it holds a lock on its
folder, through a file descriptor that it inherits: also when its parent was killed and watches it no more.
"""

import contextlib
import dataclasses
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import IO

from tarflow_jax.errors import UserError

LOG = "log.txt"
SLURM_SCRIPT = Path(__file__).with_name("slurm.sbatch")
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclasses.dataclass(frozen=True)
class Step:
    """A module with its flags, and what it leaves at its very end: a pattern of files in the job's folder."""

    arguments: tuple[str, ...]
    result: str

    @property
    def command(self) -> tuple[str, ...]:
        return (sys.executable, "-m", *self.arguments)


@dataclasses.dataclass(frozen=True)
class Job:
    """Steps to be run one after the other; their output goes to log.txt in the folder."""

    folder: Path
    steps: tuple[Step, ...]

    def to_do(self) -> list[Step]:
        """The steps whose result is not there yet."""
        return [step for step in self.steps if not any(self.folder.glob(step.result))]


@contextlib.contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Keeps a second sweep out of a folder; raises ValueError while another process is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "sweep.lock").open("a+") as lock:
        if not _try_lock(lock):
            raise UserError(f"process {_read(lock)} sweeps {folder} already; wait for it, or stop it")
        _write(lock, os.getpid())
        yield


class LocalRunner:
    """Runs jobs as child processes, `parallel` at a time.

    SIGTERM, SIGINT and SIGHUP stop them all: the children get SIGTERM, save and exit; a second signal kills them.
    They are in sessions of their own, so that ctrl-C reaches them through here alone.
    """

    def __init__(self, parallel: int) -> None:
        self.stopping = False  # whether such a signal came
        self._parallel = parallel
        self._guard = threading.RLock()  # a second signal may come while the first one's handler holds it
        self._live: set[int] = set()  # process ids

    def run(self, jobs: Sequence[Job]) -> list[int | None]:
        """Each job's exit code (negative: a signal's number; None: not started), once no process is left.

        Call it from the main thread. One job's failure does not stop the others.
        """
        previous = {
            number: signal.signal(number, self._stop)
            for number in _STOP_SIGNALS
            if signal.getsignal(number) != signal.SIG_IGN  # as nohup leaves it
        }
        try:
            with ThreadPoolExecutor(self._parallel) as pool:
                return list(pool.map(self._run_job, jobs))
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        with self._guard:
            for process in self._live:
                _send(process, signal.SIGKILL if self.stopping else signal.SIGTERM)
            self.stopping = True

    def _run_job(self, job: Job) -> int | None:
        job.folder.mkdir(parents=True, exist_ok=True)
        with (job.folder / "run.lock").open("a+") as lock, (job.folder / LOG).open("ab") as log:
            self._take(lock, job)
            code: int | None = 0
            for step in job.to_do():
                code = self._run_step(job, step, lock, log)
                if code != 0:
                    break
            if code is not None:
                _say(job, "is done" if code == 0 else "has stopped" if self.stopping else f"failed: {code}")
            return code

    def _run_step(self, job: Job, step: Step, lock: IO[str], log: IO[bytes]) -> int | None:
        _write(lock, "")
        with self._guard:  # so that no process starts behind the back of _stop
            if self.stopping:
                return None
            process = subprocess.Popen(
                step.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock.fileno()],
            )
            self._live.add(process.pid)
        _write(lock, process.pid)
        _say(job, f"{step.arguments[0]} runs, process {process.pid}")
        code = process.wait()
        with self._guard:
            self._live.discard(process.pid)
        return code

    def _take(self, lock: IO[str], job: Job) -> None:
        """Locks a job's folder; waits for the process that a killed sweep left in it."""
        if _try_lock(lock):
            return
        left = _read(lock)
        _say(job, f"still runs, left by a sweep that was killed; waiting for process {left}")
        with self._guard:
            if left:
                self._live.add(int(left))
                if self.stopping:
                    _send(int(left), signal.SIGTERM)
        fcntl.flock(lock, fcntl.LOCK_EX)
        with self._guard:
            self._live.discard(int(left or 0))


def submit(jobs: Sequence[Job]) -> None:
    """Hands what is neither done, queued nor running to Slurm: a Slurm job a step, after the one before it.

    Raises OSError if Slurm's commands are missing, or refuse.
    """
    queued = set(_slurm("squeue", "--me", "--noheader", "--format=%j").splitlines())
    for job in jobs:
        name, before = str(job.folder.resolve()), None
        if name in queued:
            _say(job, "is queued or running")
            continue
        job.folder.mkdir(parents=True, exist_ok=True)
        for step in job.to_do():
            options = ["--parsable", f"--job-name={name}", f"--output={job.folder / LOG}"]
            if before:
                options += [f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes"]
            answer = _slurm("sbatch", *options, str(SLURM_SCRIPT), *step.arguments)
            before = answer.strip().partition(";")[0]  # a cluster's name may follow
            _say(job, f"{step.arguments[0]} is Slurm job {before}")


def _slurm(command: str, *arguments: str) -> str:
    if shutil.which(command) is None:
        raise OSError(f"{command} not found; --executor=slurm needs a machine that has Slurm's commands")
    done = subprocess.run([command, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{command} failed with exit code {done.returncode}: {' '.join(done.stderr.split())}")
    return done.stdout


def _say(job: Job, what: str) -> None:
    with contextlib.suppress(OSError):  # a closed terminal is no reason to leave a child unwatched
        print(f"{job.folder.name}: {what}\n", end="", flush=True)  # one write, for threads share it


def _send(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip()


def _write(file: IO[str], content: object) -> None:
    file.truncate(0)
    file.write(str(content))
    file.flush()
