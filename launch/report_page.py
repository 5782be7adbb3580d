"""Reads a run directory and renders it as one HTML page: figures, tables and curves here, markup in report.html.j2.

All files of the directory are untrusted: validated before use, else left out with a note.
"""

import base64
import datetime
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict
from markupsafe import Markup

from tarflow_jax.data.images import decode_image
from tarflow_jax.errors import UserError, one_line
from tarflow_jax.files import is_remote
from tarflow_jax.likelihood import LOG_2PI
from tarflow_jax.runtime import release
from tarflow_jax.runtime.parameters import student_shapes, variables_shapes
from tarflow_jax.training import Recipe
from tarflow_jax.training.recipe import DATA
from tarflow_jax.training.workdir import RESULTS, STARTS

Series = dict[str, list[tuple[int, float]]]  # (step, value) by metric; "block_norms/0" has the first items of a list

SHEETS = ("samples_guided", "samples_denoised", "samples_raw", "trajectory")  # figures that launch.train ends with
MAX_METRICS_BYTES, MAX_JSON_BYTES, MAX_PICTURE_BYTES = 256 * 2**20, 2**20, 64 * 2**20
MAX_EMBEDDED_BYTES = 16 * 2**20  # of all pictures together, so that the page can be sent by mail
MAX_PREVIEWS, MAX_EVALUATIONS, MAX_CLASSES, MAX_LIST, MAX_SIDE = 24, 50, 1000, 64, 1600
PNG_MAX_BYTES = 512 * 2**10  # larger pictures become JPEG
_LARGEST = 1e30  # values beyond it cannot be drawn
MAX_STARTS, MAX_ROWS, MAX_COLUMNS = 10, 200, 20
MAX_CELL = 300  # characters
MAX_POINTS = 400  # of a curve; neighbours are averaged to stay below it
_X_PIXELS, _Y_PIXELS = (58, 430), (214, 10)  # ends of the axes in report.html.j2


class Run:
    """Contents of a run directory. Strings and values are as the files have them: escape them.

    Attributes:
      previews: samples drawn during training, by step; pictures: the other figures, by name; all as data: URIs.
      evaluations: protocol, results and environment that launch.evaluate wrote, by file name.
      starts: see `training.workdir.write_start`; notes: what was left out, and why.

    Raises FileNotFoundError or UserError if it is no run directory, see `Recipe.from_workdir`.
    """

    def __init__(self, workdir: epath.PathLike) -> None:
        self.recipe, folder = Recipe.from_workdir(workdir), epath.Path(workdir)
        self.folder = folder if is_remote(folder) else epath.Path(Path(folder).resolve())
        self.notes: list[str] = []
        self._room = MAX_EMBEDDED_BYTES
        classes = self._json(DATA).get("label_names")
        self.classes = [str(name) for name in classes[:MAX_CLASSES]] if isinstance(classes, list) else []
        self.results = self._json(RESULTS)
        self.series = self._series()
        self.pictures = {name: found for name in SHEETS if (found := self._picture(name))}
        self.previews = self._previews()
        self.evaluations = self._evaluations()
        self.starts = list(self._json_lines(STARTS, MAX_JSON_BYTES))

    def _read(self, name: str, limit: int, parse: Callable[[bytes], Any]) -> Any:
        """Returns what `parse` makes of a file; None for a missing one, and for a refused one, which is noted.

        Refuses more than `limit` bytes, anything but a regular file, and a link that leaves the run directory: the page
        may be published, and what lies outside may be private.
        """
        path = self.folder / name
        try:
            if not path.exists():
                return None
            if not is_remote(path):  # epath counts links and pipes as files; reading a pipe would block
                if not Path(path).resolve().is_relative_to(self.folder):
                    raise UserError("a link out of the workdir")
                if not Path(path).is_file():
                    raise UserError("not a regular file")
            if (size := path.stat().length) > limit:
                raise UserError(f"{size} bytes, more than the {limit} allowed")
            return parse(path.read_bytes())
        except (ValueError, RecursionError, OSError) as error:
            self.notes.append(f"{name}: {one_line(error)}")
            return None

    def _json(self, name: str) -> dict[str, Any]:
        return self._read(name, MAX_JSON_BYTES, _json_object) or {}

    def _json_lines(self, name: str, limit: int) -> Iterator[dict[str, Any]]:
        damaged = 0
        for line in self._read(name, limit, bytes.splitlines) or []:
            try:
                yield flatten_dict(_json_object(line), sep=".")
            except (ValueError, RecursionError):
                damaged += 1
        if damaged:
            self.notes.append(f"{name}: {damaged} lines are not JSON objects")

    def _series(self) -> Series:
        """Returns the numbers of metrics.jsonl that can be drawn."""
        series: Series = {}
        for line in self._json_lines("metrics.jsonl", MAX_METRICS_BYTES):
            step = line.pop("step", None)
            if type(step) is not int or not 0 <= step < 2**53:
                continue
            for metric, value in line.items():
                items = value[:MAX_LIST] if isinstance(value, list) else [value]
                for i, number in enumerate(items):
                    if type(number) in (int, float) and abs(number) < _LARGEST:  # false for NaN
                        key = f"{metric}/{i}" if isinstance(value, list) else metric
                        series.setdefault(key, []).append((step, float(number)))
        return series

    def _picture(self, name: str) -> str | None:
        return self._read(f"figures/{name}.png", MAX_PICTURE_BYTES, self._embedded)

    def _embedded(self, content: bytes) -> str:
        """Decodes and re-encodes a picture, so that only its pixels reach the page."""
        image = decode_image(content)
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 90})):
            file = io.BytesIO()
            image.save(file, kind, **options)
            if file.tell() <= PNG_MAX_BYTES:
                break
        encoded = file.getvalue()
        if len(encoded) > self._room:
            raise UserError("no room left for pictures on the page")
        self._room -= len(encoded)
        return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"

    def _previews(self) -> dict[int, str]:
        """Returns samples drawn during training; of too many, evenly spaced ones, first and last included."""
        paths = (self.folder / "figures").glob("step_*.png")
        names = {int(m[1]): m[0] for path in paths if (m := re.fullmatch(r"step_([0-9]{1,15})", path.stem))}
        steps = sorted(names)
        if len(steps) > MAX_PREVIEWS:
            self.notes.append(f"figures: {len(steps) - MAX_PREVIEWS} of {len(steps)} previews")
            steps = [steps[round(i * (len(steps) - 1) / (MAX_PREVIEWS - 1))] for i in range(MAX_PREVIEWS)]
        return {step: found for step in steps if (found := self._picture(names[step]))}

    def _evaluations(self) -> dict[str, dict[str, dict[str, Any]]]:
        names = sorted(path.name for path in (self.folder / "evaluation").glob("*.json"))
        if len(names) > MAX_EVALUATIONS:
            self.notes.append(f"evaluation: {len(names) - MAX_EVALUATIONS} of {len(names)} files")
            names = names[:MAX_EVALUATIONS]
        read = {name: self._read(f"evaluation/{name}", MAX_JSON_BYTES, _evaluation) for name in names}
        return {name: content for name, content in read.items() if content}


def _evaluation(content: bytes) -> dict[str, dict[str, Any]]:
    found = {name: part for name, part in _json_object(content).items() if isinstance(part, dict)}
    protocol, environment = (flatten_dict(found.get(name, {}), sep=".") for name in ("protocol", "environment"))
    return {"protocol": protocol, "results": found.get("results", {}), "environment": environment}


def _json_object(content: bytes) -> dict[str, Any]:
    found = json.loads(content)
    if not isinstance(found, dict):
        raise UserError("not a JSON object")
    return found


def page(run: Run) -> str:
    """Renders the page. It loads nothing: its policy forbids that, and any script but its own."""
    style, script = (Path(__file__).with_name(f"report.{kind}").read_text() for kind in ("css", "js"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    student = run.recipe.student
    shapes = student_shapes(student) if student else variables_shapes(run.recipe.model)
    environment.filters |= {"text": text_of, "facts": _facts, "table": _table}
    text = environment.get_template("report.html.j2").render(
        run=run,
        recipe={group: flatten_dict(fields, sep=".") for group, fields in run.recipe.config.to_dict().items()},
        num_parameters=sum(map(math.prod, shapes.values())),
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
    return [(text_of(name), text_of(value)) for name, value in list(mapping.items())[:MAX_ROWS]]


def _table(found: Any) -> list[list[str]]:
    """Cells of a table, its heading first: a row per mapping, columns in order of first appearance, no lists."""
    mappings = [item for item in (found if isinstance(found, list) else [found]) if isinstance(item, Mapping)]
    rows = [{k: value for k, value in row.items() if not isinstance(value, list)} for row in mappings[:MAX_ROWS]]
    columns = list(dict.fromkeys(name for row in rows for name in row))[:MAX_COLUMNS]
    return [[text_of(name) for name in columns], *([text_of(row.get(name, "")) for name in columns] for row in rows)]


def chart(series: Series, labels: Mapping[str, str]) -> dict[str, Any] | None:
    """Lays out the metrics that `labels` names as curves, in the pixels of report.html.j2; None if there are none.

    A curve has a label, which ends with its last value, and points; a tick has a text and a pixel.
    """
    curves, arrays, averaged = [], [], 1
    for name, points in series.items():
        metric, _, index = name.partition("/")
        if metric in labels:
            curves.append({"label": f"{labels[metric]}{index} {points[-1][1]:.4g}"})
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
