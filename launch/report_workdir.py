"""Reads a run directory for its report. All files are untrusted: validated before use, else left out with a note."""

import base64
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from tarflow_jax.data.images import decode_image
from tarflow_jax.errors import UserError, one_line
from tarflow_jax.files import is_remote
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


class Picture(NamedTuple):
    """A picture to embed, as a data: URI that holds nothing but its pixels."""

    uri: str
    width: int
    height: int


class Run:
    """Contents of a run directory. Strings and values are as the files have them: escape them.

    Attributes:
      previews: samples drawn during training, by step. pictures: the other figures, by name.
      evaluations: protocol, results and environment that launch.evaluate wrote, by file name.
      starts: see `training.workdir.write_start`. notes: what was left out, and why.

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
                yield _json_object(line)
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

    def _picture(self, name: str) -> Picture | None:
        return self._read(f"figures/{name}.png", MAX_PICTURE_BYTES, self._embedded)

    def _embedded(self, content: bytes) -> Picture:
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
        return Picture(f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}", *image.size)

    def _previews(self) -> dict[int, Picture]:
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
        evaluations = {}
        for name in names[:MAX_EVALUATIONS]:
            if content := self._json(f"evaluation/{name}"):
                parts = {part: content.get(part) for part in ("protocol", "results", "environment")}
                evaluations[name] = {part: found if isinstance(found, dict) else {} for part, found in parts.items()}
        return evaluations


def _json_object(content: bytes) -> dict[str, Any]:
    found = json.loads(content)
    if not isinstance(found, dict):
        raise UserError("not a JSON object")
    return found
