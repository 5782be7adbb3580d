"""Trains a recipe once per point of its sweep. To continue a sweep, run the same command again.

    python -m launch.sweep --config=configs/sweeps/depth.py --workdir=runs/depth --parallel=2

The recipe file defines `sweep()`, a list of overrides (see configs/sweeping.py), and optionally EVALUATE, the flags of
a launch.evaluate after each training, or a list of those. Writes a folder per run, and sweep.csv, sweep.md and
sweep.png. Stopping, continuing, Slurm: docs/launching.md.
"""

import csv
import dataclasses
import functools
import hashlib
import importlib.util
import io
import json
import logging
import math
import operator
import re
import runpy
import shlex
import statistics
from collections.abc import Mapping, Sequence
from numbers import Number
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from launch import cli, jobs
from tarflow_jax.errors import MissingPackageError, UserError
from tarflow_jax.files import replacing, sole_user, write_text
from tarflow_jax.runtime import Preempted
from tarflow_jax.training import Recipe
from tarflow_jax.training.workdir import RESULTS

CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe file that defines sweep(): FILE or FILE:VARIANT.")
WORKDIR = flags.DEFINE_string("workdir", None, "Local directory of the sweep; created if it does not exist.")
EXECUTOR = flags.DEFINE_enum(
    "executor", "local", ["local", "slurm", "print"], "Run here, submit with sbatch, or print the commands."
)
PARALLEL = flags.DEFINE_integer("parallel", 1, "Number of local runs at a time.", lower_bound=1)
METRIC = flags.DEFINE_string("metric", None, "Metric to plot, by its name or a part of it; default: the last column.")

# Columns of launch.evaluate, and flags in which a run's evaluations may differ: settings, not metrics.
_EVALUATION_SETTINGS = ("guidance", "denoised")
_EVALUATION_FLAGS = ("decoder", *cli.GUIDANCE_FLAGS, "denoise_multiplier")
_SEED = "train.seed"


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
        for run in runs:
            if steps := run.to_do():
                print(" && ".join(shlex.join(step.command) for step in steps))
        return 0
    require_matplotlib()
    with sole_user(workdir):
        for run in runs:
            run.recipe.write_to(run.folder)
        if EXECUTOR.value == "slurm":
            jobs.submit(runs)
        elif jobs.LocalRunner(PARALLEL.value).run(runs):
            left = sum(bool(run.to_do()) for run in runs)
            raise Preempted(f"{left} of {len(runs)} runs are left; run the same command to continue")
        rows = []
        for run in runs:
            if not run.to_do():
                results, *evaluations = [next(run.folder.glob(step.result)) for step in run.steps]
                rows += read_rows(run.settings, results, evaluations)
        if rows:
            print(write_table(rows, workdir))
            write_plot(rows, choose_metric(rows, METRIC.value), workdir / "sweep.png")
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


class Row(NamedTuple):
    """Settings and metrics by name."""

    settings: dict[str, Any]
    metrics: dict[str, float]


def read_rows(settings: Mapping[str, Any], results: Path, evaluations: Sequence[Path] = ()) -> list[Row]:
    """Reads a run's rows: one per sampling setting of launch.evaluate, or a single one.

    `results` is the run's results.json, `evaluations` are files of launch.evaluate. Flags in which these differ become
    settings, beside the run's own.
    """
    metrics, samples = json.loads(results.read_text()), []
    for evaluation in evaluations:
        read = json.loads(evaluation.read_text(encoding="utf-8"))
        flags = {name: read["protocol"][name] for name in _EVALUATION_FLAGS if name in read["protocol"]}
        samples += [flags | row for row in read["results"].pop("samples", [])]
        for figures in read["results"].values():
            metrics |= {name: value for name, value in figures.items() if isinstance(value, Number)}
    differing = [name for name in _EVALUATION_FLAGS if len({str(row.get(name)) for row in samples}) > 1]
    of_rows = (*_EVALUATION_SETTINGS, *differing)
    return [
        Row(
            settings | {name: row[name] for name in of_rows if name in row},
            metrics | {k: v for k, v in row.items() if k not in (*_EVALUATION_SETTINGS, *_EVALUATION_FLAGS)},
        )
        for row in samples or [{}]
    ]


def write_table(rows: Sequence[Row], folder: Path) -> str:
    """Writes all rows to sweep.csv, and means ± standard deviations over seeds to sweep.md; returns the latter."""
    lines = [row.settings | row.metrics for row in rows]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for line in lines for name in line)))
    writer.writeheader()
    writer.writerows(lines)
    write_text(folder / "sweep.csv", text.getvalue())
    table = cli.format_table([_line(group) for group in over_seeds(rows)])
    write_text(folder / "sweep.md", table + "\n")
    return table


def over_seeds(rows: Sequence[Row]) -> list[list[Row]]:
    """Groups rows that differ only in the seed; where only the seed varies, each row is its own group."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row.settings | {_SEED: None}), []).append(row)
    return list(groups.values()) if len(groups) > 1 else [[row] for row in rows]


def _spread(group: Sequence[Row], metric: str) -> tuple[float, float]:
    """Mean and standard deviation over a group; the latter is 0 for a single row."""
    values = [row.metrics.get(metric, math.nan) for row in group]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _line(group: Sequence[Row]) -> dict[str, Any]:
    settings, metrics = group[0]
    if len(group) == 1:
        return settings | metrics
    means = {name: "{:.4g} ± {:.2g}".format(*_spread(group, name)) for name in metrics}
    return {name: value for name, value in settings.items() if name != _SEED} | means


def choose_metric(rows: Sequence[Row], wanted: str | None) -> str:
    """Returns the one metric whose name contains `wanted`, by default the last metric; else raises UserError."""
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    if wanted is None:
        return names[-1]
    found = [wanted] if wanted in names else [name for name in names if wanted.lower() in name.lower()]
    if len(found) != 1:
        raise UserError(f"--metric={wanted} fits {len(found)} metrics; expected a part of one of {names}")
    return found[0]


def require_matplotlib() -> None:
    """Raises ImportError, before hours of training rather than after them."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackageError("the sweep's plot needs matplotlib; pip install 'matplotlib>=3.10,<4'")


def write_plot(rows: Sequence[Row], metric: str, path: Path) -> None:
    """Plots a metric over the first setting that varies, a line for each combination of the others.

    Over seeds it is the mean, with bars of one standard deviation.
    """
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it reports its font cache
    first, lines = plot_lines(rows, metric)
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot(xlabel=first, ylabel=metric)
    for label, points in lines.items():
        x, y, deviation = zip(*points, strict=True)
        axes.errorbar(x, y, deviation if any(deviation) else None, marker="o", capsize=3, label=label)
    places = [x for points in lines.values() for x, *_ in points]
    if all(isinstance(x, Number) for x in places) and min(places) > 0 and max(places) > 30 * min(places):
        axes.set_xscale("log")
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize="small")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=150)


def plot_lines(rows: Sequence[Row], metric: str) -> tuple[str, dict[str, list[tuple[Any, float, float]]]]:
    """Returns the setting on the x-axis, and (x, mean, standard deviation) of each line's points by its label.

    There is one line where the first setting already tells all points apart. Values that are not numbers are plotted as
    text; metrics that are missing or not finite are not plotted.
    """
    groups = over_seeds(rows)
    names = list(rows[0].settings)
    varying = [name for name in names if len({str(row.settings.get(name)) for row in rows}) > 1] or names
    first, *others = [name for name in varying if name != _SEED] or [_SEED]
    if len({str(row.settings[first]) for row, *_ in groups}) == len(groups):
        others = []
    numbers = all(isinstance(row.settings[first], Number) for row in rows)
    lines: dict[str, list[tuple[Any, float, float]]] = {}
    for group in groups:
        settings = group[0].settings
        label = ", ".join(f"{name} {settings.get(name)}" for name in others)
        x = settings[first] if numbers else str(settings[first])
        lines.setdefault(label, []).append((x, *_spread(group, metric)))
    if numbers:
        lines = {label: sorted(points, key=lambda point: point[0]) for label, points in lines.items()}
    return first, lines


if __name__ == "__main__":
    cli.run(main, "config", "workdir")
