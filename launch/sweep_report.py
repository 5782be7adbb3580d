"""What a sweep has found: a row for each setting, a table, a plot."""

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

from launch.common import GUIDANCE_FLAGS
from launch.tables import format_table
from tarflow_jax.errors import MissingPackageError, UserError
from tarflow_jax.files import replacing, write_text

# What launch.evaluate varies by itself, and what several evaluations may differ in: settings of a row, not metrics.
_EVALUATION_SETTINGS = ("guidance", "denoised")
_EVALUATION_FLAGS = ("decoder", *GUIDANCE_FLAGS, "denoise_multiplier")
_SEED = "train.seed"


class Row(NamedTuple):
    """A setting and its figures; both by name."""

    settings: dict[str, Any]
    metrics: dict[str, float]


def read_rows(settings: Mapping[str, Any], results: Path, evaluations: Sequence[Path] = ()) -> list[Row]:
    """The rows of a run: one, or one for each of launch.evaluate's settings of sampling.

    `settings` and `results` (results.json) are the run's own; `evaluations` are launch.evaluate's JSON files. What
    these differ in among themselves is a setting of their rows.
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
    """Writes sweep.csv and sweep.md, whole or not at all; returns the latter's text.

    Where seeds are among what varies, the latter has means over them, with the standard deviation, in their place.
    """
    lines = [row.settings | row.metrics for row in rows]
    rows_of_text = io.StringIO(newline="")
    writer = csv.DictWriter(rows_of_text, list(dict.fromkeys(name for line in lines for name in line)))
    writer.writeheader()
    writer.writerows(lines)
    write_text(folder / "sweep.csv", rows_of_text.getvalue())
    table = format_table(over_seeds(rows) if _SEED not in _varying(rows)[:1] else lines)
    write_text(folder / "sweep.md", table + "\n")
    return table


def over_seeds(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A line for each setting but the seed: means of its metrics, and "mean ± standard deviation" of several runs."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str({k: v for k, v in row.settings.items() if k != _SEED}), []).append(row)
    lines = []
    for group in groups.values():
        line = {name: value for name, value in group[0].settings.items() if name != _SEED or len(group) == 1}
        for name in group[0].metrics:
            mean, deviation = _spread([row.metrics.get(name, math.nan) for row in group])
            line[name] = mean if len(group) == 1 else f"{mean:.4g} ± {deviation:.2g}"
        lines.append(line)
    return lines


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation; that of one value is 0."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _varying(rows: Sequence[Row]) -> list[str]:
    """The settings that vary, the seed last; all of them if none does."""
    names = list(rows[0].settings)
    varying = [name for name in names if len({str(row.settings.get(name)) for row in rows}) > 1] or names
    return sorted(varying, key=lambda name: name == _SEED)


def choose_metric(rows: Sequence[Row], wanted: str | None) -> str:
    """The one metric whose name has `wanted` in it, or the last one; raises ValueError if that is not one."""
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    if wanted is None:
        return names[-1]
    found = [name for name in names if wanted.lower() in name.lower()]
    if wanted in names:
        return wanted
    if len(found) != 1:
        raise UserError(f"--metric={wanted} fits {len(found)} metrics; expected a part of one of {names}")
    return found[0]


def require_matplotlib() -> None:
    """Raises ImportError, before hours of training rather than after them."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackageError("the sweep's plot needs matplotlib; pip install 'matplotlib>=3.10,<4'")


def write_plot(rows: Sequence[Row], metric: str, path: Path) -> None:
    """Draws the metric over the first setting that varies, a line for each combination of the others.

    Over seeds it is the mean, with bars of one standard deviation.
    """
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells of its cache of fonts
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
    """The setting on the abscissa, and each line's label and points in order of x: (x, mean, standard deviation).

    Where the first setting alone tells the rows apart there is one line: blocks and layers of a fixed product. A
    value that is no number is shown as its text; a metric that is missing or not finite, not at all.
    """
    first, *others = [name for name in _varying(rows) if name != _SEED] or [_SEED]
    settings = {str([row.settings.get(name) for name in (first, *others)]) for row in rows}
    if len({str(row.settings[first]) for row in rows}) == len(settings):
        others = []
    numbers = all(isinstance(row.settings[first], Number) for row in rows)
    values: dict[str, dict[Any, list[float]]] = {}
    for row in rows:
        label = ", ".join(f"{name} {row.settings.get(name)}" for name in others)
        x = row.settings[first] if numbers else str(row.settings[first])
        values.setdefault(label, {}).setdefault(x, []).append(row.metrics.get(metric, math.nan))
    lines = {label: [(x, *_spread(found)) for x, found in of.items()] for label, of in values.items()}
    if numbers:
        lines = {label: sorted(points, key=lambda point: point[0]) for label, points in lines.items()}
    return first, lines
