"""Trains a recipe once per point of its sweep, one run after another; run again, it skips what is finished.

    python -m launch.sweep --config=configs/sweeps/depth.py --workdir=runs/depth

The recipe file defines `sweep()`, a list of overrides (see configs/sweeping.py), and optionally EVALUATE, the flags of
a launch.evaluate after each training, or a list of those. Writes a folder per run, sweep.csv and sweep.md.
--executor=print prints the commands that are left, a line per run, to start them elsewhere.
"""

import csv
import functools
import hashlib
import io
import json
import math
import operator
import re
import runpy
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any, NamedTuple

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from launch import cli, end_at_signals, on_signals
from tarflow_jax.errors import UserError
from tarflow_jax.files import write_text
from tarflow_jax.runtime import Preempted
from tarflow_jax.training import Recipe
from tarflow_jax.training.workdir import RESULTS

CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe file that defines sweep(): FILE or FILE:VARIANT.")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the sweep; created if it does not exist.")
EXECUTOR = flags.DEFINE_enum("executor", "local", ["local", "print"], "Run here, or print the commands.")

# Columns of launch.evaluate, and flags in which a run's evaluations may differ: settings, not metrics.
_EVALUATION_SETTINGS = ("guidance", "denoised")
_EVALUATION_FLAGS = ("decoder", *cli.GUIDANCE_FLAGS, "denoise_multiplier")
_SEED = "train.seed"
_PYTHON = (sys.executable, "-m")


class Run(NamedTuple):
    """A point of the sweep: a training and its evaluations."""

    folder: epath.Path
    commands: dict[str, tuple[str, ...]]  # by a glob pattern, in the folder, of what each writes last
    recipe: Recipe
    settings: dict[str, Any]  # the value of every swept field

    def to_do(self) -> list[tuple[str, ...]]:
        """Returns the commands that have no result yet."""
        return [command for result, command in self.commands.items() if not any(self.folder.glob(result))]


def main(argv: Sequence[str]) -> None:
    """Plans, runs and reports the sweep."""
    flag, workdir = flags.FLAGS["config"], epath.Path(WORKDIR.value)
    source, shared = config_flags.get_config_filename(flag), config_flags.get_override_values(flag)
    runs = plan(CONFIG.value, source, shared, workdir)
    if EXECUTOR.value == "print":
        for run in runs:
            if commands := run.to_do():
                print(" && ".join(map(shlex.join, commands)))
        return
    for run in runs:
        run.recipe.write_to(run.folder)  # refuses a folder with results of another recipe
    finished = [run for run in runs if all(succeeds(command) for command in run.to_do())]
    if rows := [row for run in finished for row in read_rows(run)]:
        print(write_table(rows, workdir))
    if failed := [run.folder.name for run in runs if run.to_do()]:
        raise UserError(f"failed: {', '.join(failed)}; see above, and run the same command to try them again")


def succeeds(command: Sequence[str]) -> bool:
    """Runs a command and returns whether it succeeded; passes a signal on to it, and raises Preempted once it ends."""
    signals: list[int] = []

    def forward(number: int, _: object) -> None:
        signals.append(number)
        process.send_signal(number)

    print(shlex.join(command), flush=True)
    process = subprocess.Popen(command, start_new_session=True)  # in this session, Ctrl-C would reach it twice
    on_signals(forward)
    code = process.wait()
    end_at_signals()
    if signals:
        raise Preempted("asked to stop; run the same command to continue", signals[0])
    return code == 0


def plan(config: ConfigDict, source: str, shared: Mapping[str, Any], workdir: epath.PathLike) -> list[Run]:
    """Returns the runs of a sweep, all checked before the first one starts.

    `config` is the recipe of `source`, FILE or FILE:VARIANT, with the overrides `shared` that hold for all runs. Raises
    UserError for a file without sweep() and for an invalid field or value.
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
        swept = config.copy_and_resolve_references()
        try:
            swept.update_from_flattened_dict(point)
            recipe = Recipe(swept)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the sweep's {name}: {' '.join(str(error.args[0]).split())}") from error
        folder, overrides = epath.Path(workdir) / name, {**shared, **point}
        changes = [f"--config.{field}={value}" for field, value in overrides.items()]
        commands = {RESULTS: (*_PYTHON, "launch.train", f"--config={source}", f"--workdir={folder}", *changes)}
        for evaluation in evaluations:
            out = f"evaluation/{_hash(repr(evaluation))}"  # other flags, another folder
            command = (*_PYTHON, "launch.evaluate", f"--workdir={folder}", f"--out={folder / out}", *evaluation)
            commands[f"{out}/*.json"] = command
        settings = {field: functools.reduce(operator.getitem, field.split("."), recipe.config) for field in fields}
        runs[name] = Run(folder, commands, recipe, settings)
    return list(runs.values())


def run_name(overrides: Mapping[str, Any]) -> str:
    """Names a run's folder, as in `noise.std=0.1,train.seed=2`; unsafe or too long a name gets a hash."""
    values = {name: f"{value:.16g}" if isinstance(value, float) else value for name, value in overrides.items()}
    plain = ",".join(f"{name}={value}" for name, value in values.items())
    safe = re.sub(r"[^A-Za-z0-9._=,+-]", "_", plain)[:160]  # file systems allow 255 bytes
    return safe if safe == plain else f"{safe}-{_hash(plain)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


class Row(NamedTuple):
    """Settings and metrics by name."""

    settings: dict[str, Any]
    metrics: dict[str, float]


def read_rows(run: Run) -> list[Row]:
    """Reads a finished run's rows, one per sampling setting; flags in which its evaluations differ are settings too."""
    files = [next(iter(run.folder.glob(result))) for result in run.commands]
    metrics, *evaluations = [json.loads(file.read_text()) for file in files]
    samples: list[dict[str, Any]] = []
    for evaluation in evaluations:
        used = {name: value for name, value in evaluation["protocol"].items() if name in _EVALUATION_FLAGS}
        samples += [used | row for row in evaluation["results"].pop("samples", [])]
        for figures in evaluation["results"].values():
            metrics |= {name: value for name, value in figures.items() if isinstance(value, Number)}
    differing = [name for name in _EVALUATION_FLAGS if len({str(row.get(name)) for row in samples}) > 1]
    rows = []
    for row in samples or [{}]:
        settings = {name: row[name] for name in (*_EVALUATION_SETTINGS, *differing) if name in row}
        of_row = {k: v for k, v in row.items() if k not in (*_EVALUATION_SETTINGS, *_EVALUATION_FLAGS)}
        rows.append(Row(run.settings | settings, metrics | of_row))
    return rows


def write_table(rows: Sequence[Row], folder: epath.PathLike) -> str:
    """Writes all rows to sweep.csv, and means ± standard deviations over seeds to sweep.md; returns the latter."""
    lines = [row.settings | row.metrics for row in rows]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for line in lines for name in line)))
    writer.writeheader()
    writer.writerows(lines)
    write_text(epath.Path(folder) / "sweep.csv", text.getvalue())
    seeds: dict[str, list[Row]] = {}  # rows that differ only in the seed, by their other settings
    for row in rows:
        seeds.setdefault(str(row.settings | {_SEED: None}), []).append(row)
    table = cli.format_table([_over_seeds(group) for group in seeds.values()])
    write_text(epath.Path(folder) / "sweep.md", table + "\n")
    return table


def _over_seeds(group: Sequence[Row]) -> dict[str, Any]:
    settings, metrics = group[0]
    if len(group) == 1:
        return settings | metrics
    values = {name: [row.metrics.get(name, math.nan) for row in group] for name in metrics}
    means = {name: f"{statistics.fmean(each):.4g} ± {statistics.stdev(each):.2g}" for name, each in values.items()}
    return {name: value for name, value in settings.items() if name != _SEED} | means


if __name__ == "__main__":
    cli.run(main, "config", "workdir")
