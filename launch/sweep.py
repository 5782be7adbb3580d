"""Trains a recipe once per point of its sweep. To continue a sweep, run the same command again.

    python -m launch.sweep --config=configs/sweeps/depth.py --workdir=runs/depth --parallel=2

The recipe file defines `sweep()`, a list of overrides (see configs/sweeping.py), and optionally EVALUATE, the flags of
a launch.evaluate after each training, or a list of those. Writes a folder per run, and sweep.csv, sweep.md and
sweep.png. Stopping, continuing, Slurm: docs/launching.md.
"""

import dataclasses
import functools
import hashlib
import operator
import re
import runpy
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from launch import cli, jobs, sweep_report
from tarflow_jax.errors import UserError
from tarflow_jax.files import sole_user
from tarflow_jax.runtime import Preempted
from tarflow_jax.training import Recipe
from tarflow_jax.training.workdir import RESULTS

CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe file that defines sweep(): FILE or FILE:VARIANT.")
WORKDIR = flags.DEFINE_string("workdir", None, "Local directory of the sweep; created if it does not exist.")
EXECUTOR = flags.DEFINE_enum(
    "executor", "local", ["local", "slurm", "print"], "Run here, submit with sbatch, or print the commands."
)
PARALLEL = flags.DEFINE_integer("parallel", 1, "Number of local runs at a time.", lower_bound=1)
METRIC = flags.DEFINE_string("metric", None, "Metric to plot: a part of its name; default: the last column.")
flags.mark_flags_as_required(["config", "workdir"])


@dataclasses.dataclass(frozen=True)
class Run(jobs.Job):
    """A point of the sweep: a training with its evaluations, the recipe, and the value of every swept field."""

    recipe: Recipe
    settings: dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """Plans, runs and reports the sweep."""
    if "://" in WORKDIR.value:
        raise UserError(f"--workdir is {WORKDIR.value}; a sweep needs a local directory, for its locks")
    flag, workdir = flags.FLAGS["config"], Path(WORKDIR.value)
    source, shared = config_flags.get_config_filename(flag), config_flags.get_override_values(flag)
    runs = plan(CONFIG.value, source, shared, workdir)
    if EXECUTOR.value == "print":
        for steps in filter(None, (run.to_do() for run in runs)):
            print(" && ".join(shlex.join(step.command) for step in steps))
        return 0
    sweep_report.require_matplotlib()
    with sole_user(workdir):
        for run in runs:
            run.recipe.write_to(run.folder)
        if EXECUTOR.value == "slurm":
            jobs.submit(runs)
        else:
            runner = jobs.LocalRunner(PARALLEL.value)
            runner.run(runs)
            if runner.stopping:
                left = sum(bool(run.to_do()) for run in runs)
                raise Preempted(f"{left} of {len(runs)} runs are left; run the same command to continue")
        rows = []
        for run in runs:
            if not run.to_do():
                results, *evaluations = [next(run.folder.glob(step.result)) for step in run.steps]
                rows += sweep_report.read_rows(run.settings, results, evaluations)
        if rows:
            print(sweep_report.write_table(rows, workdir))
            sweep_report.write_plot(rows, sweep_report.choose_metric(rows, METRIC.value), workdir / "sweep.png")
            print(workdir / "sweep.png")
    failed = [run for run in runs if run.to_do()] if EXECUTOR.value == "local" else []
    for run in failed:
        print(f"failed: see {run.folder / jobs.LOG}")
    return cli.EXIT_ERROR if failed else 0


def plan(config: ConfigDict, source: str, shared: Mapping[str, Any], workdir: Path) -> list[Run]:
    """Returns the runs of a sweep, all checked before the first one starts.

    `config` is the recipe of `source`, FILE or FILE:VARIANT, with the overrides `shared` that hold for all runs. Raises
    UserError for a file without sweep(), an invalid field or value, and two runs with the same overrides.
    """
    module = runpy.run_path(source.partition(":")[0])
    points = list(module["sweep"]()) if "sweep" in module else []
    if not all(points) or not points:
        raise UserError(f"{source} has no sweep() that returns overrides; see configs/sweeping.py")
    fields = list(dict.fromkeys(name for point in points for name in point))
    if both := [name for name in fields if name in shared]:
        raise UserError(f"--config.{both[0]} was given, but the sweep sets it")
    evaluations = module.get("EVALUATE", ())
    if evaluations and isinstance(evaluations[0], str):
        evaluations = [evaluations]
    runs: dict[str, Run] = {}
    for point in points:
        name = run_name(point)
        if name in runs:
            raise UserError(f"{source} has the run {name} twice")
        swept = config.copy_and_resolve_references()
        try:
            swept.update_from_flattened_dict(point)
            recipe = Recipe(swept)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the sweep's {name}: {' '.join(str(error.args[0]).split())}") from error
        folder, overrides = workdir / name, {**shared, **point}
        given = [f"--config.{field}={value}" for field, value in overrides.items()]
        steps = [jobs.Step(("launch.train", f"--config={source}", f"--workdir={folder}", *given), RESULTS)]
        for evaluation in evaluations:
            out = f"evaluation/{_hash(repr(evaluation))}"  # other flags, another folder
            command = ("launch.evaluate", f"--workdir={folder}", f"--out={folder / out}", *evaluation)
            steps.append(jobs.Step(command, f"{out}/*.json"))
        settings = {field: functools.reduce(operator.getitem, field.split("."), recipe.config) for field in fields}
        runs[name] = Run(folder, tuple(steps), recipe, settings)
    return list(runs.values())


def run_name(overrides: Mapping[str, Any]) -> str:
    """Names a run's folder, as in `noise.std=0.1,train.seed=2`; unsafe or too long a name gets a hash."""
    values = {name: f"{value:.16g}" if isinstance(value, float) else value for name, value in overrides.items()}
    plain = ",".join(f"{name}={value}" for name, value in values.items())
    safe = re.sub(r"[^A-Za-z0-9._=,+-]", "_", plain)[:160]  # file systems allow 255 bytes
    return safe if safe == plain else f"{safe}-{_hash(plain)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


if __name__ == "__main__":
    cli.run(main)
