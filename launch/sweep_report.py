"""What a sweep has found: a row for each setting, a table, a plot."""

import csv
import importlib.util
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from numbers import Number
from pathlib import Path
from typing import Any, NamedTuple

from tarflow_jax.errors import MissingPackageError, UserError
from tarflow_jax.evaluation.report import format_table
from tarflow_jax.files import replacing, write_text

# What launch.evaluate varies by itself: settings of a row, not metrics.
_EVALUATION_SETTINGS = ("guidance", "denoised")


class Row(NamedTuple):
    """A setting and its figures; both by name."""

    settings: dict[str, Any]
    metrics: dict[str, float]


def read_rows(settings: Mapping[str, Any], results: Path, evaluation: Path | None = None) -> list[Row]:
    """The rows of a run: one, or one for each of launch.evaluate's settings of sampling.

    `settings` and `results` (results.json) are the run's own; `evaluation` is launch.evaluate's JSON file, if any.
    """
    metrics = json.loads(results.read_text())
    found = json.loads(evaluation.read_text(encoding="utf-8"))["results"] if evaluation else {}
    samples = found.pop("samples", [{}])
    for figures in found.values():
        metrics |= {name: value for name, value in figures.items() if isinstance(value, Number)}
    return [
        Row(
            settings | {name: row[name] for name in _EVALUATION_SETTINGS if name in row},
            metrics | {name: value for name, value in row.items() if name not in _EVALUATION_SETTINGS},
        )
        for row in samples
    ]


def write_table(rows: Sequence[Row], folder: Path) -> str:
    """Writes sweep.csv and sweep.md, whole or not at all; returns the latter's text."""
    lines = [row.settings | row.metrics for row in rows]
    rows_of_text = io.StringIO(newline="")
    writer = csv.DictWriter(rows_of_text, list(dict.fromkeys(name for line in lines for name in line)))
    writer.writeheader()
    writer.writerows(lines)
    write_text(folder / "sweep.csv", rows_of_text.getvalue())
    table = format_table(lines)
    write_text(folder / "sweep.md", table + "\n")
    return table


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
    """Draws the metric over the first setting that varies, a line for each combination of the others."""
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells of its cache of fonts
    first, lines = plot_lines(rows, metric)
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot(xlabel=first, ylabel=metric)
    for label, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    places = [x for points in lines.values() for x, _ in points]
    if all(isinstance(x, Number) for x in places) and min(places) > 0 and max(places) > 30 * min(places):
        axes.set_xscale("log")
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize="small")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=150)


def plot_lines(rows: Sequence[Row], metric: str) -> tuple[str, dict[str, list[tuple[Any, float]]]]:
    """The setting on the abscissa, and each line's label and (x, y) points in order of x.

    Where the first setting alone tells the rows apart there is one line: blocks and layers of a fixed product. A
    value that is no number is shown as its text; a metric that is missing or not finite, not at all.
    """
    names = list(rows[0].settings)
    first, *others = [name for name in names if len({str(row.settings[name]) for row in rows}) > 1] or names
    if len({str(row.settings[first]) for row in rows}) == len(rows):
        others = []
    numbers = all(isinstance(row.settings[first], Number) for row in rows)
    lines: dict[str, list[tuple[Any, float]]] = {}
    for row in rows:
        label = ", ".join(f"{name} {row.settings[name]}" for name in others)
        x, y = row.settings[first], row.metrics.get(metric, math.nan)
        lines.setdefault(label, []).append((x if numbers else str(x), y))
    if numbers:
        lines = {label: sorted(points, key=lambda point: point[0]) for label, points in lines.items()}
    return first, lines
