"""What a report tells of a workdir, read from its files. Each of them is hostile until it is checked."""

import base64
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

Series = dict[str, list[tuple[int, float]]]  # (step, value) by a metric's name; "block_norms/0" of a list's first

SHEETS = ("samples_guided", "samples_denoised", "samples_raw", "trajectory")  # that launch.train draws at its end
MAX_METRICS_BYTES, MAX_JSON_BYTES, MAX_PICTURE_BYTES = 256 * 2**20, 2**20, 64 * 2**20
MAX_EMBEDDED_BYTES = 16 * 2**20  # of all pictures, so that the page can be sent by mail
MAX_PREVIEWS, MAX_EVALUATIONS, MAX_CLASSES, MAX_LIST, MAX_SIDE = 24, 50, 1000, 64, 1600
JPEG_ABOVE_BYTES = 512 * 2**10
_LARGEST = 1e30  # of a value that can be drawn


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture to be embedded: its name, and a data: URI made of pixels alone."""

    name: str
    uri: str
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class Run:
    """What there is to tell; text and values are as the files have them, to be escaped.

    Attributes:
      previews: by step. pictures: by the name of their file. evaluations: what launch.evaluate wrote, by file.
      starts: see `training.workdir.write_start`. notes: what was left out, and why.
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
    """Reads a workdir; what is damaged or too large is left out and noted.

    Raises FileNotFoundError and ValueError where it is no workdir: see `Recipe.from_workdir`.
    """
    recipe = Recipe.from_workdir(workdir)
    files = _Files(epath.Path(workdir))
    classes = (files.json_object(DATA) or {}).get("label_names")
    return Run(
        name=files.root.name,
        recipe=recipe,
        num_parameters=sum(math.prod(shape) for shape in variables_shapes(recipe.model).values()),
        classes=[str(name) for name in classes[:MAX_CLASSES]] if isinstance(classes, list) else [],
        results=files.json_object(RESULTS) or {},
        series=files.series("metrics.jsonl"),
        pictures={name: found for name in SHEETS if (found := files.picture(f"figures/{name}.png"))},
        previews=files.previews(),
        evaluations=files.evaluations(),
        starts=list(files.json_lines(STARTS, MAX_JSON_BYTES)),
        notes=files.notes,
    )


class _Files:
    """The files of a workdir, by their paths in it."""

    def __init__(self, folder: epath.Path) -> None:
        self.root = folder if is_remote(folder) else epath.Path(Path(folder).resolve())
        self.notes: list[str] = []
        self._room = MAX_EMBEDDED_BYTES

    def read(self, name: str, limit: int) -> bytes | None:
        """A file's content, None where there is none.

        Raises ValueError where it is too large, no plain file, or a link to somewhere else: what lies there is not of
        this run, and may be nobody else's business.
        """
        path = self.root / name
        if not path.exists():
            return None
        if not is_remote(path):  # epath does not follow links, and takes a pipe, which would be waited for, for a file
            if not Path(path).resolve().is_relative_to(self.root):
                raise UserError("a link out of the workdir")
            if not Path(path).is_file():
                raise UserError("not a regular file")
        if (size := path.stat().length) > limit:
            raise UserError(f"{size} bytes, more than the {limit} allowed")
        return path.read_bytes()

    def leave_out(self, name: str, why: str | Exception) -> None:
        self.notes.append(f"{name}: {one_line(why) if isinstance(why, Exception) else why}")

    def json_object(self, name: str) -> dict[str, Any] | None:
        """None where there is none, or, with a note, where it is damaged."""
        try:
            content = self.read(name, MAX_JSON_BYTES)
            found = None if content is None else json.loads(content)
            if found is not None and not isinstance(found, dict):
                raise UserError("not a JSON object")
        except (ValueError, RecursionError, OSError) as error:
            self.leave_out(name, error)
            return None
        return found

    def json_lines(self, name: str, limit: int) -> Iterator[dict[str, Any]]:
        """The JSON objects of a file that has one a line; how many lines are none is noted."""
        try:
            content = self.read(name, limit) or b""
        except (UserError, OSError) as error:
            self.leave_out(name, error)
            return
        damaged = 0
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
            self.leave_out(name, f"{damaged} lines that are no JSON objects")

    def series(self, name: str) -> Series:
        """The numbers of metrics.jsonl that can be drawn."""
        series: Series = {}
        for line in self.json_lines(name, MAX_METRICS_BYTES):
            step = line.pop("step", None)
            if type(step) is not int or not 0 <= step < 2**53:
                continue
            for metric, value in line.items():
                listed = enumerate(value[:MAX_LIST]) if isinstance(value, list) else ()
                values = {f"{metric}/{i}": number for i, number in listed} or {metric: value}
                for key, number in values.items():
                    if type(number) in (int, float) and abs(number) < _LARGEST:  # NaN is not
                        series.setdefault(key, []).append((step, float(number)))
        return series

    def picture(self, name: str) -> Picture | None:
        """A picture decoded and encoded anew, so that nothing but its pixels gets into the page."""
        try:
            content = self.read(name, MAX_PICTURE_BYTES)
            if content is None:
                return None
            image = decode_image(content)
            image.thumbnail((MAX_SIDE, MAX_SIDE))
            kind, encoded = "png", _encode(image, "PNG", optimize=True)
            if len(encoded) > JPEG_ABOVE_BYTES:
                kind, encoded = "jpeg", _encode(image, "JPEG", quality=90)
            if len(encoded) > self._room:
                raise UserError("the page has its fill of pictures")
        except (UserError, OSError) as error:
            self.leave_out(name, error)
            return None
        self._room -= len(encoded)
        uri = f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"
        return Picture(name.rpartition("/")[2].removesuffix(".png"), uri, *image.size)

    def previews(self) -> list[Picture]:
        """Those of training, by step; of too many, as many as the page takes, evenly chosen, with first and last."""
        names = {}
        for path in (self.root / "figures").glob("step_*.png"):
            if found := re.fullmatch(r"step_([0-9]{1,15})\.png", path.name):
                names[int(found[1])] = f"figures/{path.name}"
        steps = sorted(names)
        if len(steps) > MAX_PREVIEWS:
            self.leave_out("figures", f"{len(steps) - MAX_PREVIEWS} of {len(steps)} previews")
            steps = [steps[round(i * (len(steps) - 1) / (MAX_PREVIEWS - 1))] for i in range(MAX_PREVIEWS)]
        found = [(step, self.picture(names[step])) for step in steps]
        return [dataclasses.replace(picture, name=f"step {step:,}") for step, picture in found if picture]

    def evaluations(self) -> dict[str, dict[str, Any]]:
        """What launch.evaluate wrote, by the name of its file."""
        names = sorted(path.name for path in (self.root / "evaluation").glob("*.json"))
        if len(names) > MAX_EVALUATIONS:
            self.leave_out("evaluation", f"{len(names) - MAX_EVALUATIONS} of {len(names)} files")
        found = {name: self.json_object(f"evaluation/{name}") for name in names[:MAX_EVALUATIONS]}
        return {name: content for name, content in found.items() if content}


def _encode(image: Any, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
