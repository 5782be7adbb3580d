"""Builds the page of a report: figures, tables and curves here, markup in report.html.j2."""

import base64
import datetime
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from launch.report_workdir import Run, Series
from tarflow_jax.likelihood import LOG_2PI
from tarflow_jax.runtime import release
from tarflow_jax.runtime.parameters import variables_shapes

MAX_STARTS, MAX_ROWS, MAX_COLUMNS, MAX_DEPTH = 10, 200, 20, 4
MAX_CELL = 300  # characters
MAX_POINTS = 400  # of a curve; neighbours are averaged to stay below it
_COLOURS = 8  # of report.css
_X_PIXELS, _Y_PIXELS = (58, 430), (214, 10)  # ends of the axes in report.html.j2


def page(run: Run) -> str:
    """Renders the page. It loads nothing: its policy forbids that, and any script but its own."""
    style, script = (Path(__file__).with_name(f"report.{kind}").read_text() for kind in ("css", "js"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"text": text_of, "facts": _facts, "table": _table}
    text = environment.get_template("report.html.j2").render(
        run=run,
        recipe=json.loads(run.recipe.to_json()),
        num_parameters=sum(math.prod(shape) for shape in variables_shapes(run.recipe.model).values()),
        steps=max((points[-1][0] for points in run.series.values()), default=0),
        seconds=_seconds(run),
        test_loss=next((value for name, value in run.results.items() if name.startswith("test loss")), None),
        constant=LOG_2PI / 2,
        chart=chart,
        starts=run.starts[:1] + run.starts[1:][1 - MAX_STARTS :],
        release=release(),
        now=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        policy=f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}",
        style=Markup(style),
        script=Markup(script),
    )
    return text.encode(errors="replace").decode()  # JSON may hold lone surrogates, which UTF-8 cannot encode


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _seconds(run: Run) -> float:
    """Time in training steps by their logged speeds, without compilation, previews, evaluations and checkpoints."""
    seconds, before = 0.0, 0
    for step, rate in run.series.get("images_per_second", ()):
        if rate > 0:
            seconds, before = seconds + max(step - before, 0) * run.recipe.config.train.batch_size / rate, step
    return seconds


def text_of(value: Any) -> str:
    """Formats a value for reading: numbers to five digits, long texts cut, nested lists and mappings as "…"."""
    if isinstance(value, list | tuple):
        text = ", ".join("…" if isinstance(item, list | Mapping) else text_of(item) for item in value[:MAX_CELL])
    elif isinstance(value, float):
        text = f"{value:.5g}"
    elif value is None or isinstance(value, bool):
        text = {True: "yes", False: "no", None: "unknown"}[value]
    elif isinstance(value, int) and 9999 < abs(value) < 10**18:
        text = f"{value:,}"
    else:
        text = "…" if isinstance(value, Mapping) else str(value)
    return text if len(text) <= MAX_CELL else f"{text[:MAX_CELL]}…"


def _facts(mapping: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of nested mappings, the names joined by dots."""
    return [(text_of(name), text_of(value)) for name, value in list(_flat(mapping).items())[:MAX_ROWS]]


def _flat(mapping: Mapping[str, Any], depth: int = MAX_DEPTH) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in mapping.items():
        if isinstance(value, Mapping) and depth:
            found |= {f"{name}.{inner}": leaf for inner, leaf in _flat(value, depth - 1).items()}
        else:
            found[name] = value
    return found


def _table(found: Any) -> list[list[str]]:
    """Cells of a table, its heading first: a row per mapping, columns in order of first appearance, no lists."""
    items = found[:MAX_ROWS] if isinstance(found, list) else [found]
    mappings = [item if isinstance(item, Mapping) else {} for item in items]
    rows = [{name: value for name, value in row.items() if not isinstance(value, list)} for row in mappings]
    columns = list(dict.fromkeys(name for row in rows for name in row))[:MAX_COLUMNS]
    return [[text_of(name) for name in columns], *([text_of(row.get(name, "")) for name in columns] for row in rows)]


def chart(series: Series, labels: Mapping[str, str]) -> dict[str, Any] | None:
    """Lays out the metrics that `labels` names as curves, in the pixels of report.html.j2; None if there are none.

    A curve has a label with its last value, CSS classes, and points; a tick has a text and a pixel.
    """
    curves, arrays, averaged = [], [], 1
    for name, points in series.items():
        metric, _, index = name.partition("/")
        if metric in labels:
            style = f"c{len(curves) % _COLOURS}" + (" dashed" if len(curves) >= _COLOURS else "")
            curves.append({"label": f"{labels[metric]}{index} {points[-1][1]:.4g}", "style": style})
            share = math.ceil(len(points) / MAX_POINTS)
            arrays.append(np.array([np.mean(points[i : i + share], 0) for i in range(0, len(points), share)]))
            averaged = max(averaged, share)
    if not curves:
        return None
    steps, values = np.concatenate(arrays).T
    x_range, y_range = (0.0, max(steps.max(), 1.0)), _value_range(values)
    for curve, array in zip(curves, arrays, strict=True):
        pixels = np.interp(array[:, 0], x_range, _X_PIXELS), np.interp(array[:, 1], y_range, _Y_PIXELS)
        curve["points"] = np.stack(pixels, 1).round(1).tolist()
    return {
        "curves": curves,
        "averaged": averaged,
        "hidden": int(((values < y_range[0]) | (values > y_range[1])).sum()),
        "x_ticks": [(_step_text(tick), np.interp(tick, x_range, _X_PIXELS).round(1)) for tick in _ticks(*x_range)],
        "y_ticks": [(f"{tick:.4g}", np.interp(tick, y_range, _Y_PIXELS).round(1)) for tick in _ticks(*y_range)],
    }


def _value_range(values: np.ndarray) -> tuple[float, float]:
    """Lowest and highest value with a margin, without outliers: first losses, a spike."""
    low, high = np.quantile(values, [0.05, 0.95])
    reach = 3 * (high - low)
    low, high = max(values.min(), low - reach), min(values.max(), high + reach)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return float(low - margin), float(high + margin)


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers within a range."""
    unit = 10.0 ** math.floor(math.log10(high - low))
    step = max(unit * factor for factor in (0.2, 0.5, 1, 2) if unit * factor * 3 <= high - low)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _step_text(step: float) -> str:
    return f"{step / 1000:g}k" if step >= 1000 else f"{step:g}"
