"""Trains a recipe once for each point of its sweep; to continue a sweep, run the same command again.

    python -m launch.sweep --config=configs/sweeps/depth.py --workdir=runs/depth --parallel=2

The recipe's file defines `sweep()`, a list of overrides (configs/sweeping.py), and may define EVALUATE, the flags
of a launch.evaluate after each training, or a list of such. Leaves a folder for each run, and sweep.csv, sweep.md and
sweep.png. Stopping, continuing, Slurm: docs/launching.md.
"""

import functools
import hashlib
import operator
import re
import runpy
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from launch import common, jobs, sweep_report
from tarflow_jax.errors import UserError
from tarflow_jax.runtime import Preempted
from tarflow_jax.training import Recipe
from tarflow_jax.training.workdir import RESULTS

CONFIG = config_flags.DEFINE_config_file("config", None, "Train the runs of this recipe's sweep().")
WORKDIR = flags.DEFINE_string("workdir", None, "Keep the sweep in this folder, on a disk; it is made if it is missing.")
EXECUTOR = flags.DEFINE_enum(
    "executor", "local", ["local", "slurm", "print"], "Run here, submit by sbatch, or print the commands."
)
PARALLEL = flags.DEFINE_integer("parallel", 1, "Train this many runs at a time, if they run here.", lower_bound=1)
METRIC = flags.DEFINE_string(
    "metric", None, "Plot this metric, named by a part of its name; the last one if not given."
)
flags.mark_flags_as_required(["config", "workdir"])

_LONGEST_NAME = 160  # of a folder; file systems allow 255 bytes


class Run(NamedTuple):
    """A point of the sweep: its recipe, the value of every swept field, and what is to be run."""

    recipe: Recipe
    settings: dict[str, Any]
    job: jobs.Job


def main(argv: Sequence[str]) -> int:
    """Plans, runs, reports."""
    if "://" in WORKDIR.value:
        raise UserError(f"--workdir is {WORKDIR.value}; a sweep needs a folder on a disk, for its locks")
    flag, workdir = flags.FLAGS["config"], Path(WORKDIR.value)
    source, shared = config_flags.get_config_filename(flag), config_flags.get_override_values(flag)
    runs = plan(CONFIG.value, source, shared, workdir)
    if EXECUTOR.value == "print":
        for steps in filter(None, (run.job.to_do() for run in runs)):
            print(" && ".join(shlex.join(step.command) for step in steps))
        return 0
    sweep_report.require_matplotlib()
    with jobs.sole_user(workdir):
        for run in runs:
            run.recipe.write_to(run.job.folder)
        if EXECUTOR.value == "slurm":
            jobs.submit([run.job for run in runs])
            failed = 0
        else:
            failed = run_here(runs)
        report([run for run in runs if not run.job.to_do()], workdir)
    return common.EXIT_ERROR if failed else 0


def run_here(runs: Sequence[Run]) -> int:
    """Runs what is to be done; returns how many failed, after a line for each. Raises Preempted if stopped."""
    runner = jobs.LocalRunner(PARALLEL.value)
    codes = runner.run([run.job for run in runs])
    failed = [(run.job, code) for run, code in zip(runs, codes, strict=True) if run.job.to_do()]
    if runner.stopping:
        raise Preempted(f"{len(failed)} of {len(runs)} runs are left; run the same command to continue")
    for job, code in failed:
        print(f"failed with exit code {code}: see {job.folder / jobs.LOG}")
    return len(failed)


def report(runs: Sequence[Run], workdir: Path) -> None:
    """Writes and prints the table of the runs that are done, and draws its plot."""
    if not runs:
        return
    rows = []
    for run in runs:
        results, *evaluations = [next(run.job.folder.glob(step.result)) for step in run.job.steps]
        rows += sweep_report.read_rows(run.settings, results, evaluations)
    print(sweep_report.write_table(rows, workdir))
    sweep_report.write_plot(rows, sweep_report.choose_metric(rows, METRIC.value), workdir / "sweep.png")
    print(workdir / "sweep.png")


def plan(config: ConfigDict, source: str, shared: Mapping[str, Any], workdir: Path) -> list[Run]:
    """The sweep of a recipe, each of its points checked before the first one runs.

    Args:
      config: the recipe. source: where it is from, FILE or FILE:VARIANT.
      shared: the overrides that `config` has already, for all runs.
      workdir: of the sweep.

    Raises ValueError: no sweep() in the file, a field that cannot be, or two runs of one name.
    """
    module = runpy.run_path(source.partition(":")[0])
    points = list(module["sweep"]()) if "sweep" in module else []
    if not all(points) or not points:
        raise UserError(f"{source} has no sweep() that gives overrides; see configs/sweeping.py")
    fields = list(dict.fromkeys(name for point in points for name in point))
    if both := [name for name in fields if name in shared]:
        raise UserError(f"--config.{both[0]} was given, but the sweep sets it")
    runs = []
    for point in points:
        recipe = _recipe(config, point)
        settings = {name: functools.reduce(operator.getitem, name.split("."), recipe.config) for name in fields}
        folder = workdir / run_name(point)
        steps = _steps(source, {**shared, **point}, folder, module.get("EVALUATE", ()))
        runs.append(Run(recipe, settings, jobs.Job(folder, steps)))
    names = [run.job.folder.name for run in runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{source} has the run {twice[0]} twice")
    return runs


def run_name(overrides: Mapping[str, Any]) -> str:
    """`noise.std=0.1,train.seed=2`, safe for file names: a hash stands for what had to be replaced or left out."""
    plain = _plain(overrides)
    safe = re.sub(r"[^A-Za-z0-9._=,+-]", "_", plain)[:_LONGEST_NAME]
    return safe if safe == plain else f"{safe}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


def _plain(overrides: Mapping[str, Any]) -> str:
    return ",".join(
        f"{name}={str(value).removesuffix('.0') if isinstance(value, float) else value}"
        for name, value in overrides.items()
    )


def _recipe(config: ConfigDict, overrides: Mapping[str, Any]) -> Recipe:
    config = config.copy_and_resolve_references()
    try:
        config.update_from_flattened_dict(overrides)
        return Recipe(config)
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error.args[0]).split())
        raise UserError(f"the sweep's {_plain(overrides)}: {reason}") from error


def _steps(
    source: str, overrides: Mapping[str, Any], folder: Path, evaluate: Sequence[str] | Sequence[Sequence[str]]
) -> tuple[jobs.Step, ...]:
    fields = [f"--config.{name}={value}" for name, value in overrides.items()]
    train = ("launch.train", f"--config={source}", f"--workdir={folder}", *fields)
    steps = [jobs.Step(train, RESULTS)]
    for given in [evaluate] if evaluate and isinstance(evaluate[0], str) else evaluate:
        out = f"evaluation/{hashlib.sha256(repr(given).encode()).hexdigest()[:8]}"  # other flags, other folder
        measure = ("launch.evaluate", f"--workdir={folder}", f"--out={folder / out}", *given)
        steps.append(jobs.Step(measure, f"{out}/*.json"))
    return tuple(steps)


if __name__ == "__main__":
    common.run(main)
