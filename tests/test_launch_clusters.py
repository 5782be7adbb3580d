"""The cluster files: linters, and runs with stand-ins for gcloud and srun."""

import itertools
import math
import os
import shlex
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


def test_tpu_pod_runs_and_stops_the_command_on_a_worker(stand_in, tmp_path, monkeypatch):
    home = tmp_path / "home"
    python = home / "tarflow_venv" / "bin" / "python"
    for folder in (python.parent, home / "tarflow_jax"):
        folder.mkdir(parents=True)
    os.mkfifo(tmp_path / "said")
    # The worker is a shell in `home`; its Python is a script that reports its arguments and waits for a signal.
    stand_in("gcloud", 'command="${@: -2:1}"', f'export HOME={home}; cd; exec bash -c "${{command#--command=}}"')
    monkeypatch.setenv("SAID", str(tmp_path / "said"))
    python.write_text(
        "#!/usr/bin/env bash\ntrap 'kill $!; echo saved > $SAID; exit 75' TERM\n"
        'printf "%s\\n" "$PWD" "$@" > $SAID\nsleep 60 & wait\n'
    )
    python.chmod(0o755)
    script = LAUNCH / "tpu_pod.sh"
    runner = subprocess.Popen([script, "run", *TPU, *TRAIN], stderr=subprocess.PIPE)
    listen = ["timeout", "60", "cat", str(tmp_path / "said")]
    said = subprocess.check_output(listen, text=True).splitlines()
    assert said == [str(home / "tarflow_jax"), "-m", *TRAIN, "--distributed"]
    assert runner.communicate()[1] == b""
    assert runner.returncode == 0
    again = tpu_pod("run", *TPU, *TRAIN)
    assert (again.returncode, again.stderr) == (1, "error: a run goes on; stop it first\n")
    stopper = subprocess.Popen([script, "stop", *TPU])
    assert subprocess.check_output(listen, text=True) == "saved\n"
    assert stopper.wait() == 0


@pytest.mark.parametrize(("tasks", "code", "requeued"), [(1, 0, ""), (16, 0, ""), (16, 75, "requeue 7\n"), (1, 1, "")])
def test_slurm_runs_the_command_and_queues_it_again_when_it_was_stopped(stand_in, tmp_path, tasks, code, requeued):
    stand_in("srun", f'printf "%s\\n" "$@" > {tmp_path}/srun', f"exit {code}")
    stand_in("scontrol", f'echo "$@" > {tmp_path}/scontrol')
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
