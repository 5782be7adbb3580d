"""Reads, decodes and preprocesses image files.

Files are untrusted: an unusable one raises a UserError that says why.
"""

import io
import stat
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from tarflow_jax.errors import UserError

PREPROCESSINGS = ("none", "tarflow", "adm")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF")
BACKGROUND = 255  # transparent pixels become white
MIN_SIDE = 8
MAX_PIXELS = 80_000_000  # below Pillow's own limit, which only warns
MAX_ASPECT = 32
MAX_FILE_BYTES = 256 * 2**20


def read_file(path: Path) -> bytes:
    """Reads an image file; raises UserError unless it is a regular, readable file of moderate size."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError("not a regular file")  # reading a pipe would block
        if status.st_size > MAX_FILE_BYTES:
            raise UserError(f"{status.st_size} bytes, more than the {MAX_FILE_BYTES} allowed")
        return path.read_bytes()
    except OSError as error:
        raise UserError(str(error.strerror)) from None


def decode_image(
    content: bytes, channels: int | None = 3, max_pixels: int = MAX_PIXELS, bits: int | None = 8
) -> Image.Image | np.ndarray:
    """Decodes a PNG, JPEG, WebP, TIFF or GIF (first frame) with 8 or 16 `bits` per channel; None accepts both.

    Returns an 8-bit Pillow image, RGB or, for one channel, L. Files of 16 bits have to be grey, because Pillow lacks
    16-bit colour, and become uint16 [H, W, channels or 1].

    Applies the EXIF orientation and composites transparency over white. Raises UserError unless the image is intact,
    has the given bits, 8x8 to `max_pixels` pixels, and an aspect ratio of at most 32.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            size = f"{image.width}x{image.height}"
            if image.width * image.height > max_pixels:
                raise UserError(f"{size}, more than the {max_pixels} pixels allowed")
            if min(image.size) < MIN_SIDE:
                raise UserError(f"{size}, smaller than {MIN_SIDE}x{MIN_SIDE}")
            if max(image.size) > MAX_ASPECT * min(image.size):  # resized to cover a square, it would not fit in memory
                raise UserError(f"{size}, more than {MAX_ASPECT} times as long as wide")
            if image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
                raise UserError("a TIFF of several pages; expected one image a file")
            depth = max(32 if image.mode in ("I", "F") else 8, *getattr(image, "tag_v2", {}).get(258, (8,)))
            if image.tile and ";16" in str(image.tile[0].args):  # the raw mode that Pillow decodes from
                depth = 16
            if bits not in (None, depth) or depth not in (8, 16):
                raise UserError(f"{depth} bits a number; expected {bits or '8 or 16'}")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            if depth == 16:
                if not image.mode.startswith("I;16"):
                    raise UserError(f"16 bits in mode {image.mode}; expected unsigned grey, or arrays in npz")
                return np.asarray(image).astype(np.uint16)[..., None].repeat(channels or 1, 2)
            opaque: Image.Image = image
            if image.has_transparency_data:
                background = Image.new("RGBA", image.size, (BACKGROUND,) * 4)
                opaque = Image.alpha_composite(background, image.convert("RGBA"))
            return opaque.convert("L" if channels == 1 else "RGB")
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        raise UserError(f"not an image of {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise UserError(f"damaged image ({error})") from None


def preprocess(image: Image.Image | np.ndarray, preprocessing: str, image_size: tuple[int, int]) -> np.ndarray:
    """Resizes and crops an image from `decode_image` to `image_size` (H, W). Returns uint8 or uint16 [H, W, K].

    "tarflow" resizes bilinearly to the smallest size that covers (H, W), then crops the centre, as the reference and
    torchvision's Resize + CenterCrop do. "adm" halves the image with a box filter while it is at least twice too large,
    then resizes bicubically and crops the centre. "none" raises UserError for an image of another size.
    """
    if isinstance(image, np.ndarray):  # Pillow can resize float32, which represents 16 bits exactly
        floats = [Image.fromarray(channel.astype(np.float32)) for channel in np.moveaxis(image, 2, 0)]
        resized = np.concatenate([preprocess(channel, preprocessing, image_size) for channel in floats], axis=2)
        return np.rint(resized).clip(0, 65535).astype(np.uint16)
    height, width = image_size
    if preprocessing == "tarflow":
        image = _resize_tarflow(image, height, width)
        top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    elif preprocessing == "adm":
        image = _resize_adm(image, height, width)
        top, left = (image.height - height) // 2, (image.width - width) // 2
    else:
        top = left = 0
        if image.size != (width, height):
            raise UserError(
                f"{image.height}x{image.width} (height x width), expected {height}x{width}; "
                "choose preprocessing tarflow or adm to resize"
            )
    array = np.asarray(image.crop((left, top, left + width, top + height)))
    return array[..., None] if array.ndim == 2 else array


def _resize_tarflow(image: Image.Image, height: int, width: int) -> Image.Image:
    # torchvision rounds the longer side down; multiplying before dividing keeps the exact cases exact.
    if height * image.width >= width * image.height:
        size = (int(height * image.width / image.height), height)
    else:
        size = (width, int(width * image.height / image.width))
    return image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)


def _resize_adm(image: Image.Image, height: int, width: int) -> Image.Image:
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
