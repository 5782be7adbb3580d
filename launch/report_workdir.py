"""Reads a run directory for its report. All files are untrusted: validated before use, else left out with a note."""

import base64
import contextlib
import dataclasses
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from tarflow_jax.data.images import decode_image
from tarflow_jax.errors import UserError, one_line
from tarflow_jax.files import is_remote
from tarflow_jax.runtime.parameters import variables_shapes
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


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture to embed, as a data: URI that holds nothing but its pixels."""

    name: str
    uri: str
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class Run:
    """Contents of a run directory. Strings and values are as the files have them: escape them.

    Attributes:
      previews: samples drawn during training, by step. pictures: the other figures, by name.
      evaluations: results of launch.evaluate, by file name. starts: see `training.workdir.write_start`.
      notes: what was left out, and why.
    """

    name: str
    recipe: Recipe
    num_parameters: int
    classes: list[str]
    results: dict[str, Any]
    series: Series
    previews: list[Picture]
    pictures: dict[str, Picture]
    evaluations: dict[str, dict[str, Any]]
    starts: list[dict[str, Any]]
    notes: list[str]


def read_run(workdir: epath.PathLike) -> Run:
    """Reads a run directory.

    Raises:
      FileNotFoundError, ValueError: it is no run directory, see `Recipe.from_workdir`.
    """
    recipe, files = Recipe.from_workdir(workdir), _Reader(epath.Path(workdir))
    classes = files.json_object(DATA).get("label_names")
    return Run(
        name=files.root.name,
        recipe=recipe,
        num_parameters=sum(math.prod(shape) for shape in variables_shapes(recipe.model).values()),
        classes=[str(name) for name in classes[:MAX_CLASSES]] if isinstance(classes, list) else [],
        results=files.json_object(RESULTS),
        series=files.series("metrics.jsonl"),
        pictures={name: found for name in SHEETS if (found := files.picture(f"figures/{name}.png"))},
        previews=files.previews(),
        evaluations=files.evaluations(),
        starts=list(files.json_lines(STARTS, MAX_JSON_BYTES)),
        notes=files.notes,
    )


class _Reader:
    """Reads files by their paths relative to a run directory, and collects notes on those it leaves out."""

    def __init__(self, folder: epath.Path) -> None:
        self.root = folder if is_remote(folder) else epath.Path(Path(folder).resolve())
        self.notes: list[str] = []
        self._room = MAX_EMBEDDED_BYTES

    @contextlib.contextmanager
    def _noting_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            pass  # no run has all files
        except (ValueError, RecursionError, OSError) as error:
            self.notes.append(f"{name}: {one_line(error)}")

    def _read(self, name: str, limit: int) -> bytes:
        """Returns a file's content.

        Raises ValueError for more than `limit` bytes, for anything but a regular file, and for a link that leaves the
        run directory: the page may be published, and what lies outside may be private.
        """
        path = self.root / name
        if not path.exists():
            raise FileNotFoundError(path)
        if not is_remote(path):  # epath counts links and pipes as files; reading a pipe would block
            if not Path(path).resolve().is_relative_to(self.root):
                raise UserError("a link out of the workdir")
            if not Path(path).is_file():
                raise UserError("not a regular file")
        if (size := path.stat().length) > limit:
            raise UserError(f"{size} bytes, more than the {limit} allowed")
        return path.read_bytes()

    def json_object(self, name: str) -> dict[str, Any]:
        """Returns a file's JSON object, {} if there is none."""
        with self._noting_errors(name):
            found = json.loads(self._read(name, MAX_JSON_BYTES))
            if not isinstance(found, dict):
                raise UserError("not a JSON object")
            return found
        return {}

    def json_lines(self, name: str, limit: int) -> Iterator[dict[str, Any]]:
        """Yields the JSON objects of a file that holds one per line."""
        content, damaged = b"", 0
        with self._noting_errors(name):
            content = self._read(name, limit)
        for line in content.splitlines():
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                found = None
            if isinstance(found, dict):
                yield found
            else:
                damaged += 1
        if damaged:
            self.notes.append(f"{name}: {damaged} lines are not JSON objects")

    def series(self, name: str) -> Series:
        """Returns the numbers of metrics.jsonl that can be drawn."""
        series: Series = {}
        for line in self.json_lines(name, MAX_METRICS_BYTES):
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

    def picture(self, name: str) -> Picture | None:
        """Decodes and re-encodes a picture, so that only its pixels reach the page."""
        with self._noting_errors(name):
            image = decode_image(self._read(name, MAX_PICTURE_BYTES))
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
            uri = f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"
            return Picture(Path(name).stem, uri, *image.size)
        return None

    def previews(self) -> list[Picture]:
        """Returns samples drawn during training; of too many, evenly spaced ones, first and last included."""
        paths = (self.root / "figures").glob("step_*.png")
        steps = {int(m[1]): m[0] for path in paths if (m := re.fullmatch(r"step_([0-9]{1,15})\.png", path.name))}
        chosen = sorted(steps)
        if len(steps) > MAX_PREVIEWS:
            self.notes.append(f"figures: {len(steps) - MAX_PREVIEWS} of {len(steps)} previews")
            chosen = [chosen[round(i * (len(steps) - 1) / (MAX_PREVIEWS - 1))] for i in range(MAX_PREVIEWS)]
        found = [(step, self.picture(f"figures/{steps[step]}")) for step in chosen]
        return [dataclasses.replace(picture, name=f"step {step:,}") for step, picture in found if picture]

    def evaluations(self) -> dict[str, dict[str, Any]]:
        """Returns the results of launch.evaluate by file name."""
        names = sorted(path.name for path in (self.root / "evaluation").glob("*.json"))
        if len(names) > MAX_EVALUATIONS:
            self.notes.append(f"evaluation: {len(names) - MAX_EVALUATIONS} of {len(names)} files")
        found = {name: self.json_object(f"evaluation/{name}") for name in names[:MAX_EVALUATIONS]}
        return {name: content for name, content in found.items() if content}
