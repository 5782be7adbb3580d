"""Results of a sweep: a row per setting, a table, a plot."""

import csv
import importlib.util
import io
import json
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from numbers import Number
from pathlib import Path
from typing import Any, NamedTuple

from launch.cli import GUIDANCE_FLAGS
from launch.tables import format_table
from tarflow_jax.errors import MissingPackageError, UserError
from tarflow_jax.files import replacing, write_text

# Columns of launch.evaluate, and flags in which a run's evaluations may differ: settings, not metrics.
_EVALUATION_SETTINGS = ("guidance", "denoised")
_EVALUATION_FLAGS = ("decoder", *GUIDANCE_FLAGS, "denoise_multiplier")
_SEED = "train.seed"


class Row(NamedTuple):
    """Settings and metrics by name."""

    settings: dict[str, Any]
    metrics: dict[str, float]


def read_rows(settings: Mapping[str, Any], results: Path, evaluations: Sequence[Path] = ()) -> list[Row]:
    """Reads a run's rows: one per sampling setting of launch.evaluate, or a single one.

    Args:
      settings: the run's swept fields.
      results: its results.json.
      evaluations: JSON files of launch.evaluate. Flags in which they differ become settings.
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
    table = format_table([_line(group) for group in over_seeds(rows)])
    write_text(folder / "sweep.md", table + "\n")
    return table


def over_seeds(rows: Sequence[Row]) -> list[list[Row]]:
    """Groups rows that differ only in the seed; where only the seed varies, each row is its own group."""
    if _varying(rows) == [_SEED]:
        return [[row] for row in rows]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row.settings | {_SEED: None}), []).append(row)
    return list(groups.values())


def _varying(rows: Sequence[Row]) -> list[str]:
    """Returns the settings that vary, the seed last; all settings if none varies."""
    names = list(rows[0].settings)
    varying = [name for name in names if len({str(row.settings.get(name)) for row in rows}) > 1] or names
    return sorted(varying, key=lambda name: name == _SEED)


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
    """Returns the one metric whose name contains `wanted`, by default the last metric; else raises ValueError."""
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
    first, *others = [name for name in _varying(rows) if name != _SEED] or [_SEED]
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
