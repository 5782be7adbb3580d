"""Pictures of images: grids, and the path from noise to image."""

import math

import numpy as np
from etils import epath
from PIL import Image

from tarflow_jax.files import replacing

_MIN_SIDE = 32  # smaller images are enlarged, in whole steps, to be seen


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[-1, 1] floats -> 8-bit values, clipped; the inverse of v / 127.5 - 1."""
    return np.clip(np.rint((np.asarray(images, np.float64) + 1) * 127.5), 0, 255).astype(np.uint8)


def grid(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Lays uint8 images [B, H, W, K] out row by row: uint8 [rows H', columns W', K], 2 white pixels between."""
    images = np.asarray(images)
    count, height, width, channels = images.shape
    scale = max(1, _MIN_SIDE // min(height, width))
    images = images.repeat(scale, 1).repeat(scale, 2)
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    cell = np.full((rows * columns, height * scale + 2, width * scale + 2, channels), 255, np.uint8)
    cell[:count, : height * scale, : width * scale] = images
    sheet = cell.reshape(rows, columns, *cell.shape[1:]).swapaxes(1, 2)
    return sheet.reshape(rows * cell.shape[1], columns * cell.shape[2], channels)[:-2, :-2]


def save_png(path: epath.PathLike, sheet: np.ndarray) -> None:
    """Writes a uint8 sheet [H, W, 1 or 3], whole or not at all."""
    _save(path, [sheet], "PNG")


def save_gif(path: epath.PathLike, frames: list[np.ndarray], milliseconds: int = 400) -> None:
    """Writes uint8 frames [H, W, 1 or 3] as an endless animation."""
    _save(path, frames, "GIF", duration=milliseconds, loop=0)


def _save(path: epath.PathLike, frames: list[np.ndarray], kind: str, **options: int) -> None:
    first, *rest = [Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame) for frame in frames]
    animation = {"save_all": True, "append_images": rest, **options} if rest else {}
    with replacing(path) as file:
        first.save(file, kind, **animation)
