"""The cluster files: linters, and runs with stand-ins for gcloud and srun."""

import itertools
import math
import os
import shlex
import signal
import subprocess
import sysconfig
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = Path(sysconfig.get_path("scripts"))
TPU = ("--name=pod", "--zone=us-west4-a", "--type=v5litepod-256")
TRAIN = ("launch.train", "--config=configs/digits.py", "--workdir=gs://bucket/a b's")


@pytest.mark.parametrize(
    "command",
    [
        (SCRIPTS / "shellcheck", LAUNCH / "tpu_pod.sh", LAUNCH / "slurm.sbatch"),
        (SCRIPTS / "hadolint", LAUNCH / "Dockerfile"),
    ],
    ids=["shellcheck", "hadolint"],
)
def test_linters_find_nothing(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts a script of the given name and lines first on the PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "bin").mkdir()

    def make(name, *lines):
        path = tmp_path / "bin" / name
        path.write_text("\n".join(["#!/usr/bin/env bash", *lines]) + "\n")
        path.chmod(0o755)

    return make


def tpu_pod(*arguments):
    return subprocess.run([LAUNCH / "tpu_pod.sh", *arguments], capture_output=True, text=True, check=False)


def dry_run(subcommand, *arguments):
    done = tpu_pod(subcommand, "--dry_run", *TPU, *arguments)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_tpu_pod_creates_and_deletes_what_was_asked_for():
    gcloud = ["gcloud", "compute", "tpus", "queued-resources"]
    machine = ["pod", "--accelerator-type=v5litepod-256", "--runtime-version=v2-alpha-tpuv5-lite"]
    assert dry_run("create") == [[*gcloud, "create", *machine, "--node-id=pod", "--zone=us-west4-a"]]
    slices = ["--node-count=2", "--node-prefix=pod", "--spot", "--zone=us-west4-a", "--project=p"]
    assert dry_run("create", "--slices=2", "--spot", "--project=p") == [[*gcloud, "create", *machine, *slices]]
    assert dry_run("delete") == [[*gcloud, "delete", "pod", "--force", "--quiet", "--zone=us-west4-a"]]


@pytest.mark.parametrize("subcommand", ["copy", "install", "run", "stop"])
def test_tpu_pod_reaches_every_worker_of_every_slice(subcommand):
    lines = dry_run(subcommand, "--slices=3", *(TRAIN if subcommand == "run" else ()))
    reached = [line[5].rstrip(":") if line[4] == "ssh" else line[6] for line in lines if line[0] == "gcloud"]
    assert {name.rstrip(":") for name in reached} == {"pod-0", "pod-1", "pod-2"}
    assert all("--worker=all" in line for line in lines if line[0] == "gcloud")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no subcommand"),
        (("create",), "no slice"),
        (("create", "--name=a", "--zone=b"), "no accelerator"),
        (("create", "--name=a", "--zone=b", "--type=v9-8"), "no runtime is known for v9-8"),
        (("start", "--name=a", "--zone=b"), "unknown subcommand start"),
        (("run", *TPU), "no command"),
        (("create", "--zones=b"), "unknown option --zones=b"),
        (("stop", *TPU, "--slices=0"), "--slices is 0; expected a positive number"),
    ],
)
def test_tpu_pod_refuses_in_one_line(arguments, message):
    done = tpu_pod(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def homes(stand_in, tmp_path):
    """The homes of two workers; a gcloud that records what it is told, and copies there and runs there."""
    stand_in(
        "gcloud",
        f'printf "%s\\n" "$*" >> {tmp_path}/told',
        '[[ "$3 $4" == tpu-vm* ]] || exit 0',
        f'if [[ $4 == scp ]]; then cp "$5" {tmp_path}/"${{6%:}}"; exit; fi',
        f'export HOME={tmp_path}/"$5"; cd; exec bash -c "${{7#--command=}}"',
    )
    # The workers' Python reports its folder and arguments, waits for SIGTERM and reports that.
    stand_in(
        "worker_python",
        "trap 'kill $!; echo saved > ~/said; exit 75' TERM",
        'printf "%s\\n" "$PWD" "$@" > ~/said',
        "sleep 60 & wait",
    )
    stand_in("python3", "mkdir -p ~/.local/bin", 'cp "$(command -v uv)" ~/.local/bin')  # python3 -m pip install uv
    stand_in(
        "uv",
        'printf "%s\\n" "$*" >> ~/uv',
        "mkdir -p ~/tarflow_venv/bin",
        'cp "$(command -v worker_python)" ~/tarflow_venv/bin/python',
    )
    stand_in("tail", 'cat "${@: -1}"')
    homes = [tmp_path / name for name in ("pod-0", "pod-1")]
    for home in homes:
        home.mkdir()
        os.mkfifo(home / "said")
    return homes


def said(home):
    return subprocess.check_output(["timeout", "60", "cat", str(home / "said")], text=True).splitlines()


@pytest.mark.slow
def test_tpu_pod_from_create_to_delete(homes, tmp_path, monkeypatch):
    def starts(subcommand, *arguments):
        command = [LAUNCH / "tpu_pod.sh", subcommand, *TPU, "--slices=2", *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def ends(process):
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for subcommand in ("create", "copy", "install"):
        assert ends(starts(subcommand)) == (0, "", "")
    committed = subprocess.check_output(["git", "ls-tree", "-r", "--name-only", "HEAD"], cwd=ROOT, text=True)
    for home in homes:
        assert all((home / "tarflow_jax" / name).exists() for name in committed.splitlines())
        assert (home / "uv").read_text().splitlines() == [
            "venv --clear --python 3.11 tarflow_venv",
            "pip install --python tarflow_venv --requirement tarflow_jax/requirements.txt jax[tpu]",
        ]
    runner = starts("run", *TRAIN)
    for home in homes:
        assert said(home) == [str(home / "tarflow_jax"), "-m", *TRAIN, "--distributed"]
    assert ends(runner) == (0, "", "")
    assert ends(starts("run", *TRAIN)) == (1, "", "error: a run goes on; stop it first\n" * 2)
    (homes[0] / "tarflow.log").write_text("step 1\n")
    assert ends(starts("logs")) == (0, "step 1\n", "")
    # A slice whose run has crashed does not keep `stop` from the others.
    os.kill(int((homes[0] / "tarflow.pid").read_text()), signal.SIGKILL)
    (homes[0] / "tarflow.pid").write_text("4194304")  # larger than any; that of the killed one lasts until it is reaped
    stopper = starts("stop")
    assert said(homes[1]) == ["saved"]
    code, _, err = ends(stopper)
    assert (code, "No such process" in err) == (1, True)
    assert ends(starts("delete")) == (0, "", "")
    told = [line.split()[2:6] for line in (tmp_path / "told").read_text().splitlines()]
    assert told[0] == ["queued-resources", "create", "pod", "--accelerator-type=v5litepod-256"]
    assert told[-1] == ["queued-resources", "delete", "pod", "--force"]
    assert [line[1] for line in told[1:-1]] == ["scp"] * 2 + ["ssh"] * 11


@pytest.mark.parametrize(
    ("tasks", "code", "preempted", "requeued"),
    [
        (1, 0, "None", ""),
        (16, 0, "None", ""),
        (16, 75, "None", "requeue 7\n"),
        (16, 75, "2026-11-28T21:33:34", ""),  # Slurm does, and a second request would run it again when it has ended
        (1, 1, "None", ""),
    ],
)
def test_slurm_runs_the_command_and_queues_it_again_when_it_was_stopped(
    stand_in, tmp_path, tasks, code, preempted, requeued
):
    stand_in("srun", f'printf "%s\\n" "$@" > {tmp_path}/srun', f"exit {code}")
    show = f'if [[ "$*" == "show job 7" ]]; then echo "   PreemptTime={preempted}"; exit; fi'
    stand_in("scontrol", show, f'echo "$@" >> {tmp_path}/scontrol')
    (tmp_path / "scontrol").touch()
    environment = os.environ | {"SLURM_NTASKS": str(tasks), "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", LAUNCH / "slurm.sbatch", *TRAIN], env=environment, check=False)
    assert done.returncode == code
    ran = (tmp_path / "srun").read_text().splitlines()
    several = ["--distributed"] if tasks > 1 else []
    assert ran == ["--kill-on-bad-exit=0", "python", "-m", *TRAIN, *several]
    assert (tmp_path / "scontrol").read_text() == requeued


@pytest.mark.parametrize(("tasks_per_node", "devices"), [(1, "0,1,2,3"), (4, "")])
def test_slurm_gives_a_node_s_only_process_all_of_its_gpus(stand_in, tmp_path, tasks_per_node, devices):
    stand_in("srun", f'echo "${{JAX_LOCAL_DEVICE_IDS-}}" > {tmp_path}/devices')
    environment = os.environ | {
        "SLURM_NTASKS": str(2 * tasks_per_node),
        "SLURM_NTASKS_PER_NODE": str(tasks_per_node),
        "SLURM_GPUS_ON_NODE": "4",
    }
    subprocess.run(["bash", LAUNCH / "slurm.sbatch", *TRAIN], env=environment, check=True)
    assert (tmp_path / "devices").read_text().strip() == devices


def test_slurm_s_srun_gives_a_task_the_cores_that_sbatch_was_asked_for(stand_in, tmp_path):
    stand_in("srun", f'echo "${{SRUN_CPUS_PER_TASK-}}" >> {tmp_path}/cores')
    for variables in ({}, {"SLURM_CPUS_PER_TASK": "16"}):
        subprocess.run(["bash", LAUNCH / "slurm.sbatch", *TRAIN], env=os.environ | variables, check=True)
    assert (tmp_path / "cores").read_text() == "\n16\n"


def test_slurm_s_options_ask_for_time_to_save_and_for_the_queue():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    options = [line.split()[1] for line in lines if line.startswith("#SBATCH")]
    assert {"--requeue", "--signal=TERM@120", "--open-mode=append"} <= set(options)
    # Slurm reads options up to the first command.
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(not line.startswith("#SBATCH") for line in lines[first_command:])


def test_the_jobset_has_a_pod_for_each_host_of_its_topology():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text(encoding="utf-8"))
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, topology.split("x")))
    assert job["completions"] == job["parallelism"]
    assert job["completions"] * container["resources"]["limits"]["google.com/tpu"] == chips
    # Exit code 75 fails the job for the reason PodFailurePolicy, which restarts the set without limit.
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule == {
        "name": "preempted",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    codes = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert codes == [{"containerName": container["name"], "operator": "In", "values": [75]}]
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    module, *flags = container["args"]
    assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
    assert "--distributed" in flags
    (recipe,) = [flag.partition("=")[2] for flag in flags if flag.startswith("--config=")]
    assert (ROOT / recipe).is_file()


def test_the_image_holds_what_the_commands_import():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = list(itertools.chain(*(line.split()[1:-1] for line in lines if line.startswith("COPY"))))
    assert {"requirements.txt", "configs", "launch", "tarflow_jax"} == set(copied)
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == set(copied)
