"""Runs launch/slurm.sbatch under a one-node Slurm that it starts and stops: as root, without GPU or systemd.

    apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
    python -m benchmarks.slurm [NUM_STEPS [JOB ...]]       # JOB: "one process", "two processes", …; all by default

Jobs are one process; two processes; one that fails; one stopped at its time limit; and two preempted by a job of a
higher partition. The last three must be requeued and end with the parameters of the first.
"""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tarflow_jax import TarFlowPipeline
from tarflow_jax.fingerprint import fingerprint

JOBS = {  # options of sbatch
    "one process": (),
    "two processes": ("--ntasks-per-node=2",),
    "fails": (),
    "time limit": ("--time=4", "--signal=TERM@60"),
    "preempted": (),  # with 20 s of grace
    "preempted at once": (),
}


def configuration(folder: Path, host: str) -> str:
    """Returns slurm.conf: two partitions, the higher of which preempts, and a node that says it has two GPUs."""
    cpus = os.cpu_count()
    return f"""
ClusterName=bench
SlurmctldHost={host}
SlurmctldPort=16817
SlurmdPort=16818
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
NodeName={host} CPUs={cpus} Gres=gpu:2 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES PriorityTier=1
PartitionName=high Nodes={host} PriorityTier=2 PreemptMode=OFF
"""


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """Runs munged, slurmctld and slurmd with all their files in `folder`."""
    host = socket.gethostname()
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(configuration(folder, host))
    (folder / "gres.conf").write_text(
        f"NodeName={host} Name=gpu File=/dev/null\nNodeName={host} Name=gpu File=/dev/zero\n"
    )
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    options = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munged = ["munged", "--foreground", "--force", *(f"--{key}={folder}/munge.{name}" for key, name in options.items())]
    daemons = []
    try:
        for command in (munged, ["slurmctld", "-D"], ["slurmd", "-D"]):
            log = (folder / f"{command[0]}.out").open("wb")
            daemons.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
            time.sleep(2)
        yield
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()


def slurm(*command: str) -> str:
    """Returns what a command of Slurm prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def submit(name: str, folder: Path, num_steps: str) -> str:
    """Submits a training and returns the job's number."""
    config = "configs/none.py" if name == "fails" else "configs/digits.py:smoke"
    fields = (f"--config.train.num_steps={num_steps}", "--config.train.sample_every=0")
    train = ("launch.train", f"--config={config}", f"--workdir={folder / name}", "--config.train.log_every=1", *fields)
    options = ("--parsable", f"--output={folder / name}.log", f"--job-name={name}")
    return slurm("sbatch", *options, *JOBS[name], "launch/slurm.sbatch", *train)


def field(job: str, name: str) -> str:
    """Returns a field of a job, as scontrol shows it."""
    words = slurm("scontrol", "show", "job", job).split()
    return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))


def main(argv: list[str]) -> None:
    """Starts the cluster, runs the jobs, prints how they ended and the lines of their logs that say why."""
    num_steps = argv[1] if argv[1:] else "20000"
    with tempfile.TemporaryDirectory() as temporary, cluster(Path(temporary)):
        folder = Path(temporary)
        print(slurm("sinfo", "--version"))
        for name in argv[2:] or JOBS:
            job = submit(name, folder, num_steps)
            if name.startswith("preempted"):
                slurm("scontrol", "update", "PartitionName=low", f"GraceTime={20 if name == 'preempted' else 0}")
                while not (folder / name / "metrics.jsonl").exists():
                    time.sleep(0.1)
                slurm("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")
            while field(job, "JobState") not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"):
                time.sleep(0.5)
            words = (f"{key} {field(job, key)}" for key in ("JobState", "ExitCode", "Restarts"))
            print(f"{name}: {', '.join(words)}", flush=True)
            if field(job, "JobState") == "COMPLETED":
                found = fingerprint(TarFlowPipeline.from_pretrained(folder / name).variables)
                print(f"  parameters {found}")
            log = (folder / f"{name}.log").read_text().replace("\r", "\n").splitlines()
            said = ("error", "stopped", "slurm", "srun", "test loss")
            print(
                "\n".join(f"  {line}" for line in log if line.startswith(said) or "continuing from" in line), flush=True
            )


if __name__ == "__main__":
    main(sys.argv)
