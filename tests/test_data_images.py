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
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    np.testing.assert_array_equal(decode_image(encode(sixteen)), grey_pixels)
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


BAD = {
    "text": (b"this is no image at all", "not an image"),
    "bomb": (bomb(), "pixels allowed"),
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
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif"])
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
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "closed").write_bytes(b"x")
    (tmp_path / "closed").chmod(0)
    messages = {
        "empty": "empty file",
        "folder": "not a regular file",
        "link": "broken link",
        "pipe": "not a regular file",
        "closed": "no permission to read",
        "missing": "No such file",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            read_file(tmp_path / name)
