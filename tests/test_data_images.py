"""Decoding and preprocessing: equal to Pillow's and torchvision's, and no garbage from hostile files."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tarflow_jax.data.images import decode_image, preprocess, read_file


def encode(image: Image.Image, kind: str = "png", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise_image(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Smooth shapes with noise on top."""
    coarse = Image.fromarray(rng.integers(0, 256, (6, 5, 3), np.uint8)).resize((width, height))
    return Image.fromarray(np.clip(np.asarray(coarse) + rng.normal(0, 9, (height, width, 1)), 0, 255).astype("u1"))


@pytest.fixture(scope="module")
def odd_images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = rng.integers(9, 300, (200, 2))
    sizes[:4] = [[64, 64], [64, 300], [300, 64], [128, 191]]
    return [noise_image(rng, int(width), int(height)) for width, height in sizes]


def test_tarflow_is_torchvisions_resize_and_centre_crop(odd_images):
    from torchvision import transforms

    for size in (64, 33):
        theirs = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size)])
        for image in odd_images:
            ours = preprocess(image, "tarflow", (size, size))
            assert ours.dtype == np.uint8
            assert np.abs(ours.astype(int) - np.asarray(theirs(image)).astype(int)).max() <= 1, image.size


def test_adm_without_halving_is_torchvisions_bicubic(odd_images):
    from torchvision import transforms

    compared = 0
    for image in odd_images:
        size = 64
        if not size <= min(image.size) < 2 * size:
            continue
        # The longer side as ADM rounds it; torchvision would round it down.
        scaled = [round(side * size / min(image.size)) for side in image.size]
        theirs = transforms.functional.resize(image, scaled[::-1], transforms.InterpolationMode.BICUBIC)
        top, left = (scaled[1] - size) // 2, (scaled[0] - size) // 2
        theirs = transforms.functional.crop(theirs, top, left, size, size)
        difference = preprocess(image, "adm", (size, size)).astype(int) - np.asarray(theirs).astype(int)
        assert np.abs(difference).max() <= 1, image.size
        compared += 1
    assert compared > 20


def test_adm_halves_by_box_filter_first():
    image = noise_image(np.random.default_rng(1), 64, 48)
    pixels = np.asarray(image).astype(float)
    halved = pixels.reshape(24, 2, 32, 2, 3).mean((1, 3))
    ours = preprocess(image, "adm", (24, 24)).astype(float)
    assert np.abs(ours - halved[:, 4:28]).max() <= 1  # Pillow rounds after each of its two passes


@pytest.mark.parametrize("preprocessing", ["tarflow", "adm"])
@pytest.mark.parametrize("size", [(16, 40), (40, 16), (24, 24)])
def test_rectangular_sizes_are_covered(odd_images, preprocessing, size):
    for image in odd_images[:40]:
        assert preprocess(image, preprocessing, size).shape == (*size, 3)


def test_none_takes_only_the_size_asked_for():
    image = noise_image(np.random.default_rng(2), 20, 10)
    np.testing.assert_array_equal(preprocess(image, "none", (10, 20)), np.asarray(image))
    with pytest.raises(ValueError, match=r"10x20 .*expected 20x10"):
        preprocess(image, "none", (20, 10))


def test_modes_become_rgb():
    base = noise_image(np.random.default_rng(3), 16, 12)
    grey = base.convert("L")
    pixels, grey_pixels = np.asarray(base), np.repeat(np.asarray(grey)[..., None], 3, 2)
    np.testing.assert_array_equal(decode_image(encode(base)), pixels)
    np.testing.assert_array_equal(decode_image(encode(grey)), grey_pixels)
    np.testing.assert_array_equal(decode_image(encode(grey), channels=1), np.asarray(grey))
    palette = base.quantize(8)
    np.testing.assert_array_equal(decode_image(encode(palette)), np.asarray(palette.convert("RGB")))
    np.testing.assert_array_equal(decode_image(encode(base, "tiff", compression="tiff_lzw")), pixels)
    np.testing.assert_array_equal(decode_image(encode(base, "webp", lossless=True)), pixels)
    cmyk = encode(base.convert("CMYK"), "jpeg", quality=100)
    with Image.open(io.BytesIO(cmyk)) as opened:
        np.testing.assert_array_equal(decode_image(cmyk), opened.convert("RGB"))


def test_transparency_lies_over_white():
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4] = [10, 20, 30, 255]
    pixels[0, 0] = [0, 0, 0, 128]
    decoded = np.asarray(decode_image(encode(Image.fromarray(pixels))))
    assert decoded[4, 2].tolist() == [10, 20, 30]
    assert decoded[4, 6].tolist() == [255, 255, 255]
    assert decoded[0, 0].tolist() == [127, 127, 127]
    palette = Image.fromarray(np.zeros((8, 8), np.uint8), "L").convert("P")
    assert np.asarray(decode_image(encode(palette, transparency=0))).min() == 255


def test_gif_gives_its_first_frame_and_exif_turns():
    frames = [Image.new("RGB", (9, 8), colour) for colour in ("red", "blue")]
    animated = encode(frames[0], "gif", save_all=True, append_images=frames[1:])
    assert np.asarray(decode_image(animated))[0, 0].tolist() == [255, 0, 0]
    image = noise_image(np.random.default_rng(4), 16, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, clockwise
    turned = decode_image(encode(image, exif=exif))
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(np.asarray(image), -1))


def bomb() -> bytes:
    """A PNG of a few bytes that promises 20,000 x 20,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999))


DEEP = np.random.default_rng(8).integers(0, 65536, (9, 12, 4)).astype(np.uint16)


def deep_png(array, more=b""):
    """A PNG of uint16 [H, W, 1, 2, 3 or 4], with more chunks behind its header."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, channels = array.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    parts = chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def deep_tiff(array, order="<", deflate=False, planar=False, bits=16, kind=1, orientation=1):
    """A TIFF of [H, W, K] in one strip; a plane a strip if planar."""
    height, width, channels = array.shape
    planes = [array] if not planar else list(np.moveaxis(array, 2, 0))
    strips = [plane.astype(array.dtype.newbyteorder(order)).tobytes() for plane in planes]
    strips = [zlib.compress(strip) if deflate else strip for strip in strips]
    body, offsets = b"", []
    for strip in strips:
        offsets.append(8 + len(body))
        body += strip + b"\0" * (len(strip) % 2)
    tags = {
        256: ("I", [width]), 257: ("I", [height]), 258: ("H", [bits] * channels), 259: ("H", [8 if deflate else 1]),
        262: ("H", [1 if channels == 1 else 2]), 273: ("I", offsets), 274: ("H", [orientation]), 277: ("H", [channels]),
        278: ("I", [height]), 279: ("I", [len(strip) for strip in strips]), 284: ("H", [2 if planar else 1]),
        339: ("H", [kind] * channels),
    }  # fmt: skip
    entries, later, start = b"", b"", 8 + len(body) + 2 + 12 * len(tags) + 4
    for tag, (code, values) in tags.items():
        packed = struct.pack(f"{order}{len(values)}{code}", *values)
        if len(packed) > 4:
            later, packed = later + packed, struct.pack(f"{order}I", start + len(later))
        entries += struct.pack(f"{order}HHI", tag, {"H": 3, "I": 4}[code], len(values)) + packed.ljust(4, b"\0")
    header = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(body))
    return header + body + struct.pack(f"{order}H", len(tags)) + entries + b"\0" * 4 + later


def test_16_bits_are_kept_all():
    array = DEEP[..., :1]
    files = [deep_png(array)] + [deep_tiff(array, order, deflate) for order in "<>" for deflate in (False, True)]
    for content in files:
        decoded = decode_image(content, None, bits=None)
        assert decoded.dtype == np.uint16
        np.testing.assert_array_equal(decoded, array)
        np.testing.assert_array_equal(decode_image(content, bits=16), np.broadcast_to(array, (9, 12, 3)))
        np.testing.assert_array_equal(preprocess(decoded, "none", (9, 12)), array)
        with pytest.raises(ValueError, match="16 bits a number; expected 8"):
            decode_image(content)
    turned = decode_image(deep_tiff(array, orientation=6), None, bits=16)
    np.testing.assert_array_equal(turned, np.rot90(array, -1))
    with pytest.raises(ValueError, match="8 bits a number; expected 16"):
        decode_image(encode(Image.new("RGB", (9, 9))), bits=16)


def test_16_bits_are_resized_as_8_bits_are(odd_images):
    for name, bound in (("tarflow", 1.1), ("adm", 3)):  # Pillow rounds 8 bits after each of two passes, or of eight
        for image in odd_images[:20]:
            deep = preprocess(np.asarray(image).astype(np.uint16) * 257, name, (33, 40))
            assert (deep.dtype, deep.shape) == (np.uint16, (33, 40, 3))
            assert np.abs(deep / 257 - preprocess(image, name, (33, 40))).max() <= bound
    halved = preprocess(DEEP[:8, :, :3], "adm", (4, 6))
    np.testing.assert_allclose(halved, DEEP[:8, :, :3].reshape(4, 2, 6, 2, 3).mean((1, 3)), atol=0.51)


def test_no_bits_are_lost_in_silence():
    floats = DEEP[..., :1].astype(np.float32)
    pages = encode(Image.new("L", (9, 9)), "tiff", save_all=True, append_images=[Image.new("L", (9, 9))])
    for content, message in (
        (deep_png(DEEP[..., :2]), "16 bits in mode .*A; expected unsigned grey"),
        (deep_png(DEEP), "16 bits in mode RGBA; expected unsigned grey"),
        (deep_png(DEEP[..., :3]), "16 bits in mode RGB; expected unsigned grey"),
        (deep_tiff(DEEP[..., :3], planar=True), "16 bits in mode RGB; expected unsigned grey"),
        (deep_tiff(floats, bits=32, kind=3), "32 bits a number; expected 8 or 16"),
        (deep_tiff(DEEP[..., :1].astype(np.int32), bits=32, kind=2), "32 bits a number; expected 8 or 16"),
        (deep_tiff(DEEP[..., :1].astype(np.int16), kind=2), "16 bits in mode I; expected unsigned grey"),
        (pages, "a TIFF of several pages"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_image(content, None, bits=None)


BAD = {
    "empty": (b"", "not an image"),
    "text": (b"this is no image at all", "not an image"),
    "bomb": (bomb(), "damaged image .*exceeds limit of 178956970 pixels"),
    "tiny": (encode(Image.new("RGB", (1, 1))), "1x1, smaller than 8x8"),
    "thread": (encode(Image.new("RGB", (8, 400))), "8x400, more than 32 times"),
    "truncated png": (encode(noise_image(np.random.default_rng(5), 64, 64))[:5000], "damaged image"),
    "truncated jpeg": (encode(noise_image(np.random.default_rng(5), 64, 64), "jpeg")[:900], "damaged image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_content_is_refused(name):
    content, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        decode_image(content)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "tiff"])
def test_damaged_content_raises_value_error_or_decodes_whole(tmp_path, damage, kind):
    path = tmp_path / "image"
    path.write_bytes(encode(noise_image(np.random.default_rng(6), 20, 16), kind))
    messages = []
    for broken in damage(path, 60):
        try:
            assert decode_image(broken.read_bytes()).mode == "RGB"
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) >= 15
    assert all(messages)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    messages = {
        "folder": "not a regular file",
        "link": "No such file",
        "pipe": "not a regular file",
        "missing": "No such file",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            read_file(tmp_path / name)
