"""Pictures of images: grids, and the path from noise to image."""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from tarflow_jax.files import replacing

_MIN_SIDE = 56  # smaller images are enlarged, in whole steps, to be seen
_FONT_SIZE, _MIN_FONT_SIZE, _TITLE_GAP, _CAPTION_GAP = 16, 9, 8, 4  # pixels
_MAX_COLUMNS = 20  # of classes
# From cheap to dear; viridis at five places, which reads the same in grey and to the colour-blind.
COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_OPACITY = 0.75  # of colours over an image


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[-1, 1] floats -> 8-bit values, clipped; the inverse of v / 127.5 - 1."""
    return np.clip(np.rint((np.asarray(images, np.float64) + 1) * 127.5), 0, 255).astype(np.uint8)


def enlarge(images: np.ndarray, side: int) -> np.ndarray:
    """Images [B, H, W, K] with every pixel a square of as many as bring the shorter side up to `side`, at least one."""
    scale = max(1, side // min(images.shape[1:3]))
    return images.repeat(scale, 1).repeat(scale, 2)


def overlay(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values of patches as `COLOURS`, from the lowest to the highest, over an image in grey.

    Args:
      image: uint8 [H, W, K].
      values: float [H / P, W / P].

    Returns:
      uint8 [H, W, 3].
    """
    shares = (values - values.min()) / max(np.ptp(values), 1e-9) * (len(COLOURS) - 1)
    channels = [np.interp(shares, range(len(COLOURS)), channel) for channel in zip(*COLOURS, strict=True)]
    patch = image.shape[0] // values.shape[0]
    colours = np.stack(channels, axis=-1).repeat(patch, 0).repeat(patch, 1)
    grey = image.mean(axis=2, keepdims=True)
    return np.rint(_OPACITY * colours + (1 - _OPACITY) * grey).astype(np.uint8)


def grid(
    images: np.ndarray, columns: int | None = None, titles: Sequence[str] = (), captions: Sequence[str] = ()
) -> np.ndarray:
    """Lays uint8 images [B, H, W, K] out row by row: uint8 [rows H', columns W', K], 2 white pixels between.

    Titles, one a row, stand to the left; captions, one a column, below, if all of them fit the columns' width.
    """
    images = np.asarray(images)
    images = enlarge(images, _MIN_SIDE)
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    cell = np.full((rows * columns, height + 2, width + 2, channels), 255, np.uint8)
    cell[:count, :height, :width] = images
    row_height, column_width = cell.shape[1:3]
    sheet = cell.reshape(rows, columns, *cell.shape[1:]).swapaxes(1, 2)
    sheet = sheet.reshape(rows * row_height, columns * column_width, channels)[:-2, :-2]
    if font := _font_for(captions, column_width - 2):
        baseline = _CAPTION_GAP + font.size
        places = [(i * column_width + column_width // 2 - 1, baseline) for i in range(len(captions))]
        size = (sheet.shape[1], math.ceil(baseline + 0.3 * font.size))
        sheet = np.concatenate([sheet, _text(size, channels, captions, places, font, "ms")])
    if titles:
        font = ImageFont.load_default(_FONT_SIZE)
        size = (math.ceil(max(map(font.getlength, titles))) + 2 * _TITLE_GAP, sheet.shape[0])
        places = [(size[0] - _TITLE_GAP, i * row_height + row_height // 2) for i in range(len(titles))]
        sheet = np.concatenate([_text(size, channels, titles, places, font, "rm"), sheet], 1)
    return sheet


def class_names(labels: np.ndarray, names: Sequence[str]) -> list[str]:
    """The name of each label, int [B], "none" of -1; [] where one has no name."""
    if not names or max(labels) >= len(names):
        return []
    return [names[label] if label >= 0 else "none" for label in labels]


def class_rows(images: np.ndarray, labels: np.ndarray | None, names: Sequence[str]) -> np.ndarray:
    """A `grid` with a row for each class and its name beside it, if each has several images, as many as the others.

    Else `class_columns`.

    Args:
      labels: int [B], or None.
      names: one a class; () where they are not known.
    """
    if labels is None or not names:
        return grid(images)
    classes, counts = np.unique(labels, return_counts=True)
    titles = class_names(classes, names)
    if len(classes) < 2 or counts.min() < 2 or counts.min() < counts.max() or not titles:
        return class_columns(images, labels, names)
    return grid(images[np.argsort(labels, kind="stable")], counts[0], titles)


def class_columns(images: np.ndarray, labels: np.ndarray | None, names: Sequence[str]) -> np.ndarray:
    """A `grid` with a column for each class and its name below it, if few classes come in turn; else a plain one.

    Arguments as of `class_rows`. The images keep their order.
    """
    if labels is None:
        return grid(images)
    period = len(np.unique(labels))
    if not 1 < period <= _MAX_COLUMNS or (labels != np.resize(labels[:period], len(labels))).any():
        return grid(images)
    return grid(images, period, captions=class_names(labels[:period], names))


def _font_for(texts: Sequence[str], width: int) -> Any:
    """The largest font in which none of them is wider than `width` pixels; None for no texts, or no such font."""
    for size in range(_FONT_SIZE, _MIN_FONT_SIZE - 1, -1) if texts else ():
        font = ImageFont.load_default(size)
        if max(map(font.getlength, texts)) <= width:
            return font
    return None


def _text(
    size: tuple[int, int],
    channels: int,
    texts: Sequence[str],
    places: Sequence[tuple[int, int]],
    font: Any,
    anchor: str,
) -> np.ndarray:
    """White, uint8 [H, W, K] of size (W, H), with black texts at their (x, y)."""
    image = Image.new("L", size, 255)
    for text, place in zip(texts, places, strict=True):
        ImageDraw.Draw(image).text(place, text, 0, font, anchor=anchor)
    return np.asarray(image)[..., None].repeat(channels, 2)


def save_png(path: epath.PathLike, sheet: np.ndarray) -> None:
    """Writes a uint8 sheet [H, W, 1 or 3], whole or not at all."""
    _save(path, _encode([sheet], "PNG"))


def save_gif(path: epath.PathLike, frames: list[np.ndarray], milliseconds: int = 400) -> None:
    """Writes `encode_gif`, whole or not at all."""
    _save(path, encode_gif(frames, milliseconds))


def encode_gif(frames: list[np.ndarray], milliseconds: int = 400) -> bytes:
    """An endless animation of uint8 frames [H, W, 1 or 3], as a file's content."""
    return _encode(frames, "GIF", duration=milliseconds, loop=0)


def to_pil(image: np.ndarray) -> Image.Image:
    """From uint8 [H, W, 1 or 3]."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _encode(frames: list[np.ndarray], kind: str, **options: int) -> bytes:
    first, *rest = map(to_pil, frames)
    animation = {"save_all": True, "append_images": rest, **options} if rest else {}
    content = io.BytesIO()
    first.save(content, kind, **animation)
    return content.getvalue()


def _save(path: epath.PathLike, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)
