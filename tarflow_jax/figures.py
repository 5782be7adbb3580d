"""Image grids with class names, GIFs, and values drawn over an image."""

import io
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from tarflow_jax.files import replacing

# All in pixels.
_MIN_SIDE = 56  # smaller images are enlarged
_SPACE = 2  # between images
_FONT_SIZE, _MIN_FONT_SIZE, _TITLE_GAP, _CAPTION_GAP = 16, 9, 8, 4

_CAPTION_LINES = 3
_MAX_COLUMNS = 20  # of classes
# Five colours of viridis, from the lowest to the highest value; readable in grey and by the colour-blind.
COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_OPACITY = 0.75  # of colours over an image


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Converts floats in [-1, 1] to 8-bit values, clipping others; the inverse of v / 127.5 - 1."""
    return np.clip(np.rint((np.asarray(images, np.float64) + 1) * 127.5), 0, 255).astype(np.uint8)


def to_pil(image: np.ndarray) -> Image.Image:
    """Converts uint8 [H, W, 1 or 3] to a Pillow image."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def enlarge(images: np.ndarray, side: int) -> np.ndarray:
    """Repeats the pixels of images [B, H, W, K] by the largest factor that keeps the shorter side within `side`."""
    scale = max(1, side // min(images.shape[1:3]))
    return images.repeat(scale, 1).repeat(scale, 2)


def overlay(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Colours the patches of an image by their values, from the lowest to the highest by `COLOURS`.

    Args:
      image: uint8 [H, W, K].
      values: float [H / P, W / P].

    Returns:
      uint8 [H, W, 3], the colours over the image in grey.
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
    """Lays uint8 images [B, H, W, 1 or 3] out row by row on a white sheet, uint8 [H', W', 1 or 3].

    Writes a title to the left of each row, and a caption below each column if all captions fit the width of one.
    """
    tiles = enlarge(np.asarray(images), _MIN_SIDE)
    count, height, width, channels = tiles.shape
    columns = columns or math.ceil(math.sqrt(count))
    row_height, column_width = height + _SPACE, width + _SPACE
    title_font, caption_font = ImageFont.load_default(_FONT_SIZE), _largest_font(captions, width)
    left = math.ceil(max(map(title_font.getlength, titles))) + 2 * _TITLE_GAP if titles else 0
    bottom = math.ceil(count / columns) * row_height - _SPACE
    below = math.ceil(_CAPTION_GAP + 1.3 * caption_font.size) if caption_font else 0

    size = (left + columns * column_width - _SPACE, bottom + below)
    sheet = Image.new("L" if channels == 1 else "RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        sheet.paste(to_pil(tile), (left + column * column_width, row * row_height))
    for row, title in enumerate(titles):
        place = (left - _TITLE_GAP, row * row_height + row_height // 2)
        draw.text(place, title, "black", title_font, anchor="rm", align="right")
    for column, caption in enumerate(captions if caption_font else ()):
        place = (left + column * column_width + width // 2, bottom + _CAPTION_GAP + caption_font.size)
        draw.text(place, caption, "black", caption_font, anchor="ms")
    return np.array(sheet).reshape(*sheet.size[::-1], channels)


def captioned_grid(images: np.ndarray, captions: Sequence[str], columns: int) -> np.ndarray:
    """Lays uint8 images [B, H, W, K] out on a sheet, each above its own caption, which is wrapped and cut to fit."""
    tiles = enlarge(np.asarray(images), 2 * _MIN_SIDE)
    count, height, width, _ = tiles.shape
    font = ImageFont.load_default(_MIN_FONT_SIZE + 1)
    per_line, line_height = max(int(width / font.getlength("n")), 1), math.ceil(1.3 * (_MIN_FONT_SIZE + 1))
    column_width, row_height = width + 2 * _SPACE, height + _CAPTION_LINES * line_height + 2 * _SPACE
    sheet = Image.new("RGB", (columns * column_width, math.ceil(count / columns) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        left, top = index % columns * column_width, index // columns * row_height
        sheet.paste(to_pil(tile), (left, top))
        lines = textwrap.wrap(caption, per_line, max_lines=_CAPTION_LINES, placeholder=" …")
        draw.text((left, top + height), "\n".join(lines), "black", font)
    return np.array(sheet)


def _largest_font(texts: Sequence[str], width: int) -> Any:
    """Returns the largest font in which no text is wider than `width`; None if there is none, or no text."""
    for size in range(_FONT_SIZE, _MIN_FONT_SIZE - 1, -1) if texts else ():
        font = ImageFont.load_default(size)
        if max(map(font.getlength, texts)) <= width:
            return font
    return None


def class_names(labels: np.ndarray, names: Sequence[str]) -> list[str]:
    """Returns the name of each label, int [B], "none" for -1; [] if a label has no name."""
    if not names or max(labels) >= len(names):
        return []
    return [names[label] if label >= 0 else "none" for label in labels]


def class_rows(images: np.ndarray, labels: np.ndarray | None, names: Sequence[str]) -> np.ndarray:
    """Returns a `grid` with a named row per class, if there are several, each with the same number (> 1) of images.

    Otherwise returns `class_columns`. Takes images uint8 [B, H, W, 1 or 3], labels int [B], and a name per class.
    """
    if labels is None or not names:
        return grid(images)
    classes, counts = np.unique(labels, return_counts=True)
    titles = class_names(classes, names)
    if titles and len(classes) > 1 and counts.min() == counts.max() > 1:
        return grid(images[np.argsort(labels, kind="stable")], counts[0], titles)
    return class_columns(images, labels, names)


def class_columns(images: np.ndarray, labels: np.ndarray | None, names: Sequence[str]) -> np.ndarray:
    """Returns a `grid` with named columns, each of one class, if the labels cycle through at most 20 classes.

    Otherwise returns a plain grid. Takes the arguments of `class_rows` and keeps the order of the images.
    """
    if labels is None:
        return grid(images)
    period = len(np.unique(labels))
    if not 1 < period <= _MAX_COLUMNS or (labels != np.resize(labels[:period], len(labels))).any():
        return grid(images)
    columns = period * max(math.isqrt(len(images)) // period, 1)  # few classes take several columns each
    return grid(images, columns, captions=class_names(np.resize(labels[:period], columns), names))


def save_png(path: epath.PathLike, sheet: np.ndarray) -> None:
    """Writes a uint8 sheet [H, W, 1 or 3] atomically."""
    with replacing(path) as file:
        to_pil(sheet).save(file, "PNG")


def save_gif(path: epath.PathLike, frames: list[np.ndarray]) -> None:
    """Writes uint8 frames [H, W, 1 or 3] atomically."""
    with replacing(path) as file:
        file.write(encode_gif(frames))


def encode_gif(frames: list[np.ndarray], milliseconds: int = 400) -> bytes:
    """Encodes uint8 frames [H, W, 1 or 3] as a GIF that repeats forever; `milliseconds` is the time per frame."""
    first, *rest = map(to_pil, frames)
    content = io.BytesIO()
    first.save(content, "GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0)
    return content.getvalue()
