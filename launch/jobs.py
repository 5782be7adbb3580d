"""Runs jobs, each with its own folder: as child processes here, or as Slurm jobs.

A step is done once its result exists, and is not run again. A child process holds a lock on its folder through an
inherited file descriptor, so the lock lasts as long as the child, even if its parent is killed.
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
from typing import NamedTuple

from launch import end_at_signals, on_signals

LOG = "log.txt"
SLURM_SCRIPT = Path(__file__).with_name("slurm.sbatch")


class Step(NamedTuple):
    """A module with its flags, and a glob pattern in the job's folder for what it writes last."""

    arguments: tuple[str, ...]
    result: str

    @property
    def command(self) -> tuple[str, ...]:
        return (sys.executable, "-m", *self.arguments)


@dataclasses.dataclass(frozen=True)
class Job:
    """Steps to run one after the other, with their output in log.txt."""

    folder: Path
    steps: tuple[Step, ...]

    def to_do(self) -> list[Step]:
        """Returns the steps that have no result yet."""
        return [step for step in self.steps if not any(self.folder.glob(step.result))]


class LocalRunner:
    """Runs jobs as child processes, `parallel` at a time.

    SIGTERM, SIGINT or SIGHUP stops them: every child gets SIGTERM, saves and exits. A second signal kills them. Each
    child has its own session, so that Ctrl-C reaches it only through this process.
    """

    def __init__(self, parallel: int) -> None:
        self._parallel = parallel
        self._stopping = False  # a signal has arrived
        self._guard = threading.RLock()  # reentrant: a second signal may interrupt the first one's handler
        self._live: set[int] = set()  # process ids

    def run(self, jobs: Sequence[Job]) -> bool:
        """Runs all jobs, whether or not others fail, and returns whether a signal stopped them.

        Call it from the main thread.
        """
        on_signals(self._stop)
        try:
            with ThreadPoolExecutor(self._parallel) as pool:
                list(pool.map(self._run_job, jobs))
        finally:
            end_at_signals()
        return self._stopping

    def _stop(self, number: int, frame: FrameType | None) -> None:
        again, self._stopping = self._stopping, True  # first, since a second signal may come while these are sent
        with self._guard:
            for process in self._live:
                _send(process, signal.SIGKILL if again else signal.SIGTERM)

    def _run_job(self, job: Job) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        with (job.folder / "run.lock").open("a+") as lock, (job.folder / LOG).open("ab") as log:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                left = int(lock.read() or 0)  # 0: the sweep was killed before it wrote the number
                _say(job, f"still runs, left by a sweep that was killed; waiting for process {left or 'unknown'}")
                with self._stoppable(left):
                    fcntl.flock(lock, fcntl.LOCK_EX)
            for step in job.to_do():
                if self._stopping:
                    return
                lock.truncate(0)
                process = subprocess.Popen(
                    step.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=[lock.fileno()],
                )
                with self._stoppable(process.pid):
                    lock.write(str(process.pid))
                    lock.flush()
                    _say(job, f"{step.arguments[0]} runs, process {process.pid}")
                    code = process.wait()
                if code != 0:
                    _say(job, f"{'stopped' if self._stopping else 'failed'} with exit code {code}")
                    return
            _say(job, "is done")

    @contextlib.contextmanager
    def _stoppable(self, process: int) -> Iterator[None]:
        """Has signals forwarded to a process, including one that arrived while it started."""
        with self._guard:
            self._live.add(process)
            if self._stopping:
                _send(process, signal.SIGTERM)
        yield
        with self._guard:
            self._live.discard(process)


def submit(jobs: Sequence[Job]) -> None:
    """Submits jobs that are neither done, queued nor running: a Slurm job per step, each after the one before.

    Raises OSError if Slurm's commands are missing or fail.
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
            before = answer.strip().partition(";")[0]  # ";CLUSTER" may follow
            _say(job, f"{step.arguments[0]} is Slurm job {before}")


def _slurm(command: str, *arguments: str) -> str:
    if shutil.which(command) is None:
        raise OSError(f"{command} not found; --executor=slurm needs a machine with Slurm's commands")
    done = subprocess.run([command, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{command} failed with exit code {done.returncode}: {' '.join(done.stderr.split())}")
    return done.stdout


def _say(job: Job, what: str) -> None:
    with contextlib.suppress(OSError):  # a closed terminal must not leave a child unwatched
        print(f"{job.folder.name}: {what}\n", end="", flush=True)  # one write, so that threads do not mix lines


def _send(process: int, number: int) -> None:
    if process:  # 0 would be this process's group
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
