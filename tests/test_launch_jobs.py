"""launch.jobs with a stub instead of a training, so that its processes take milliseconds."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.jobs import Job, Step, submit

ROOT = Path(__file__).parent.parent

# `python -m stub`: counts its starts and writes a result. By its arguments, it first waits until the test writes to a
# pipe, ignores SIGTERM, or fails.
STUB = """
import signal, sys
from pathlib import Path
folder, how = Path(sys.argv[1]), sys.argv[2:]
def stop(number, frame):
    (folder / "saved").touch()
    if "stubborn" not in how:
        sys.exit(75)
signal.signal(signal.SIGTERM, stop)
with (folder / "starts").open("a") as file:
    file.write("started\\n")
if "wait" in how:
    while not (folder / "pipe").read_text():
        pass
if "fail" in how:
    sys.exit(3)
(folder / "result").touch()
"""
DRIVER = """
import signal, sys
from pathlib import Path
from launch.jobs import Job, LocalRunner, Step
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has background processes ignore it
runner = LocalRunner(parallel=2)
jobs = [Job(Path(name), (Step(("stub", name, *how.split()), "result"),))
        for name, _, how in (argument.partition(":") for argument in sys.argv[1:])]
print("stopped by a signal" if runner.run(jobs) else "all have run")
"""


@pytest.fixture
def start(tmp_path):
    """Starts a process that runs jobs, each "NAME:HOW", two at a time, in tmp_path."""
    (tmp_path / "stub.py").write_text(STUB)
    started = []

    def start(*jobs):
        for name in (job.partition(":")[0] for job in jobs):
            (tmp_path / name).mkdir(exist_ok=True)
            if not (tmp_path / name / "pipe").exists():
                os.mkfifo(tmp_path / name / "pipe")
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", DRIVER, *jobs],
                cwd=tmp_path,
                env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def started(folder, times=1):
    """Whether the stub has installed its signal handler, and its process id is in the lock."""
    starts = folder / "starts"
    return starts.exists() and starts.read_text().count("\n") == times and (folder / "run.lock").read_text()


def locked(folder):
    with (folder / "run.lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def counts(folder):
    return [len((folder / name / "starts").read_text().splitlines()) for name in "abcdef"]


def ends(out):
    """The lines that say how each job ended."""
    return [line for line in out.splitlines() if line.endswith("is done") or "exit code" in line]


@pytest.mark.slow
def test_killed_and_its_folder_moved_a_job_waits_for_the_old_process_and_runs_again(start, tmp_path):
    first = start("old:wait")
    until(lambda: started(tmp_path / "old"))
    first.kill()
    first.wait()
    (tmp_path / "old").rename(tmp_path / "new")
    second = start("new:wait")
    assert second.stdout.readline().startswith("new: still runs, left by a sweep that was killed; waiting for process")
    (tmp_path / "new" / "pipe").write_text("go")  # the old process ends, as it cannot write its result
    until(lambda: started(tmp_path / "new", times=2))
    (tmp_path / "new" / "pipe").write_text("go")
    out, _ = second.communicate(timeout=60)
    assert ends(out) == ["new: is done"]
    assert not (tmp_path / "old").exists()


@pytest.mark.slow
def test_killed_in_the_middle_and_started_again_no_run_starts_twice(start, tmp_path):
    jobs = ("a", "b", "c:wait", "d:wait", "e", "f")
    first = start(*jobs)
    until(lambda: all(started(tmp_path / name) for name in "cd"))
    first.kill()
    first.wait()
    second = start(*jobs)
    lines = [second.stdout.readline().partition(",")[0].strip() for _ in range(4)]
    assert sorted(lines) == ["a: is done", "b: is done", "c: still runs", "d: still runs"]
    for name in "cd":
        (tmp_path / name / "pipe").write_text("go")
    out, _ = second.communicate(timeout=60)
    assert out.endswith("all have run\n")
    assert sorted(ends(out)) == ["c: is done", "d: is done", "e: is done", "f: is done"]
    assert counts(tmp_path) == [1] * 6
    out, _ = start(*jobs).communicate(timeout=60)
    assert sorted(ends(out)) == [f"{name}: is done" for name in "abcdef"]  # a third time there is nothing to do
    assert counts(tmp_path) == [1] * 6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_stopped_its_children_save_and_none_is_left(start, tmp_path, number):
    process = start("a", "b:wait", "c:wait", "d")
    until(lambda: all(started(tmp_path / name) for name in "bc"))
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert out.endswith("stopped by a signal\n")
    assert sorted(ends(out)) == ["a: is done", "b: stopped with exit code 75", "c: stopped with exit code 75"]
    assert not (tmp_path / "d" / "starts").exists()
    assert all((tmp_path / name / "saved").exists() and not locked(tmp_path / name) for name in "bc")


@pytest.mark.slow
def test_stopped_while_it_waits_for_what_a_killed_one_left(start, tmp_path):
    first = start("a:wait", "b:wait")
    until(lambda: all(started(tmp_path / name) for name in "ab"))
    first.kill()
    first.wait()
    second = start("a:wait", "b:wait")
    for _ in range(2):
        assert "still runs" in second.stdout.readline()
    assert all(locked(tmp_path / name) for name in "ab")
    second.terminate()
    out, _ = second.communicate(timeout=60)
    assert out == "stopped by a signal\n"
    assert all((tmp_path / name / "saved").exists() and not locked(tmp_path / name) for name in "ab")


@pytest.mark.slow
def test_a_second_signal_kills(start, tmp_path):
    process = start("a:wait stubborn")
    until(lambda: started(tmp_path / "a"))
    process.terminate()
    until((tmp_path / "a" / "saved").exists)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert ends(out) == [f"a: stopped with exit code {-signal.SIGKILL}"]


@pytest.mark.slow
def test_a_failure_is_reported_and_the_others_go_on(start, tmp_path):
    out, _ = start("a:fail", "b", "c").communicate(timeout=60)
    assert sorted(ends(out)) == ["a: failed with exit code 3", "b: is done", "c: is done"]
    assert out.endswith("all have run\n")


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins for Slurm's commands that record their arguments; the file `queue` holds the queued jobs."""
    scripts = {
        "squeue": f"cat {tmp_path}/queue",
        "sbatch": f'printf "%s\\n" "$*" >> {tmp_path}/submitted; wc -l < {tmp_path}/submitted',
    }
    for name, line in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "queue").touch()
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_slurm_gets_what_is_neither_done_nor_queued(slurm):
    steps = (Step(("launch.train", "--x=1"), "result"), Step(("launch.evaluate",), "more/*.json"))
    done, trained, queued, new = (Job(slurm / f"{name},x=1", steps) for name in ("a", "b", "c", "d"))
    for path in (done.folder / "result", done.folder / "more" / "1.json", trained.folder / "result"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (slurm / "queue").write_text(f"other\n{queued.folder}\n")
    submit([done, trained, queued, new])
    script = ROOT / "launch" / "slurm.sbatch"

    def options(job):
        return f"--parsable --job-name={job.folder} --output={job.folder}/log.txt"

    assert (slurm / "submitted").read_text().splitlines() == [
        f"{options(trained)} {script} launch.evaluate",
        f"{options(new)} {script} launch.train --x=1",
        f"{options(new)} --dependency=afterok:2 --kill-on-invalid-dep=yes {script} launch.evaluate",
    ]


def test_slurm_s_refusal_is_one_line(slurm):
    (slurm / "sbatch").write_text("#!/bin/sh\necho no such partition >&2; exit 1\n")
    with pytest.raises(OSError, match="sbatch failed with exit code 1: no such partition"):
        submit([Job(slurm / "a", (Step(("launch.train",), "result"),))])
