"""What the demo computes, without its page."""

import dataclasses
import io
import socket

import chex
import numpy as np
import pytest
from PIL import Image

import commands
from launch.demo_model import IN_TURN, MAX_UPLOAD_PIXELS, calibration, class_names, draw, facts, read_upload
from runs import SMALL
from tarflow_jax import Noise, TarFlowPipeline, sampling
from tarflow_jax.figures import COLOURS, enlarge, overlay
from tarflow_jax.fingerprint import fingerprint
from tiny_models import random_variables

COUNT = 4


@pytest.fixture(scope="module")
def pipe():
    return TarFlowPipeline(SMALL, random_variables(SMALL), Noise("gaussian", 0.1))


def test_a_draw_has_the_frames_from_latents_to_denoised_images_and_its_classes(pipe):
    drawn = draw(pipe, COUNT, guidance=1.0)
    chex.assert_shape(list(drawn.frames.values()), (COUNT, *SMALL.image_shape))
    assert [frame.dtype for frame in drawn.frames.values()] == [np.uint8] * 4
    assert list(drawn.frames) == ["latents", "1 of 2 blocks inverted", "2 of 2 blocks inverted", "denoised"]
    np.testing.assert_array_equal(drawn.labels, [0, 1, 2, 0])
    noisy = draw(pipe, COUNT, guidance=1.0, denoise=False)
    assert len(noisy.frames) == 3
    np.testing.assert_allclose(noisy.images.astype(int), drawn.frames["2 of 2 blocks inverted"], atol=1)


def test_no_slider_compiles_anything(pipe):
    draw(pipe, COUNT, guidance=1.0)
    before = sampling.decode_trace._cache_size(), sampling.denoise._cache_size()
    other = draw(pipe, COUNT, label=2, guidance=2.5, attention_temperature=0.9, temperature=0.7, seed=5)
    np.testing.assert_array_equal(other.labels, [2] * COUNT)
    assert (sampling.decode_trace._cache_size(), sampling.denoise._cache_size()) == before


def test_images_far_outside_the_range_are_counted(pipe):
    assert draw(pipe, COUNT, guidance=1.0, temperature=1e4).num_bad == COUNT
    assert draw(pipe, COUNT, guidance=1.0, temperature=0.1).num_bad == 0


@pytest.mark.slow
def test_a_model_without_classes_draws_none():
    config = dataclasses.replace(SMALL, num_classes=0)
    pipe = TarFlowPipeline(config, random_variables(config), Noise("uniform"))
    drawn = draw(pipe, 2, label=IN_TURN)
    np.testing.assert_array_equal(drawn.labels, [-1, -1])
    assert len(drawn.frames) == SMALL.num_blocks + 1  # uniform noise is not denoised
    assert class_names(pipe) == []


def test_classes_of_one_name_are_told_apart(pipe):
    named = TarFlowPipeline(SMALL, pipe.variables, label_names=("crane", "crane", "duck"))
    assert class_names(named) == ["crane (0)", "crane (1)", "duck (2)"]
    assert class_names(pipe) == ["0", "1", "2"]


def picture(mode, size, kind="PNG", **options):
    content = io.BytesIO()
    Image.new(mode, size).save(content, kind, **options)
    return content.getvalue()


def test_an_upload_is_decoded_as_data_are_upright_and_over_white(pipe, tmp_path):
    path = tmp_path / "upload"
    path.write_bytes(picture("RGBA", (40, 30)))
    np.testing.assert_array_equal(read_upload(pipe, path), np.full(SMALL.image_shape, 255))
    upright = Image.new("RGB", (60, 40))
    upright.paste((255, 0, 0), (0, 0, 60, 20))
    exif = Image.Exif()
    exif[274] = 8  # the camera lay on its side
    upright.rotate(-90, expand=True).save(path, "JPEG", exif=exif, quality=95)
    upload = read_upload(pipe, path)
    assert upload.shape == SMALL.image_shape
    assert upload[0, :, 0].min() > 200
    assert upload[-1].max() < 50


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an image of PNG"),
        (b"no image", "not an image of PNG"),
        (picture("RGB", (60, 40))[:50], "damaged image"),
        (picture("1", (MAX_UPLOAD_PIXELS // 4000 + 1, 4000)), f"more than the {MAX_UPLOAD_PIXELS} pixels allowed"),
    ],
    ids=["empty", "text", "cut", "large"],
)
def test_an_upload_that_is_no_image_is_refused_in_one_line(pipe, tmp_path, content, message):
    path = tmp_path / "upload.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        read_upload(pipe, path)
    assert "\n" not in str(refused.value)


def test_probabilities_are_calibrated_where_these_weights_were_evaluated(pipe):
    assert calibration(pipe) is None
    weights = fingerprint(pipe.variables)
    card = {
        "evaluations": [
            {"protocol": {"fingerprint": "others"}, "results": {"classification": {"temperature": 2.0, "draws": 1}}},
            {"protocol": {"fingerprint": weights}, "results": {"classification": {"temperature": 1.5, "draws": 4}}},
            {"protocol": {"fingerprint": weights}, "results": {"classification": {"temperature": 3.5, "draws": 1}}},
            {"protocol": {"fingerprint": weights}, "results": {"bits_per_dim": {}}},
        ]
    }
    assert calibration(TarFlowPipeline(SMALL, pipe.variables, card=card)) == 3.5


def test_the_head_tells_what_is_known(pipe):
    known = facts(pipe)
    assert known["images"] == "4 × 6 × 3"
    assert known["training noise"] == "gaussian 0.1"
    assert "test loss" not in known
    assert facts(TarFlowPipeline(SMALL, pipe.variables, card={"metrics": {"test loss": -1.25}}))["test loss"] == "-1.25"


def refused(*arguments, program=("-m", "launch.demo")):
    """The one line that launch.demo prints where there is no model to read."""
    code, out, err = commands.run(*program, "--workdir=/nowhere", *arguments)
    assert (code, out) == (1, "")
    return err.splitlines()[-1]


@pytest.mark.slow
def test_without_gradio_one_line_says_what_to_install():
    program = (
        "import importlib.util, runpy, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name == 'gradio' else find(name, *more)\n"
        "runpy.run_module('launch.demo', run_name='__main__', alter_sys=True)"
    )
    assert "error: the demo needs Gradio; pip install 'gradio" in refused(program=("-c", program))


@pytest.mark.slow
@pytest.mark.parametrize(("host", "reason"), [("127.0.0.1", "in use"), ("no.such.host.invalid", "choose another")])
def test_an_address_that_cannot_be_had_is_refused_before_the_model_is_read(host, reason):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert reason in refused(f"--host={host}", f"--port={taken.getsockname()[1]}")


def test_overlay_colours_patches_from_the_lowest_to_the_highest():
    image = np.zeros((4, 6, 1), np.uint8)
    coloured = overlay(image, np.arange(6.0).reshape(2, 3))
    assert coloured.shape == (4, 6, 3)
    np.testing.assert_allclose(coloured[0, 0], 0.75 * np.array(COLOURS[0]), atol=0.5)
    np.testing.assert_allclose(coloured[3, 5], 0.75 * np.array(COLOURS[-1]), atol=0.5)
    np.testing.assert_array_equal(overlay(image, np.ones((2, 3))), coloured[:1, :1].repeat(4, 0).repeat(6, 1))


def test_enlarging_repeats_pixels_and_never_shrinks():
    images = np.arange(24, dtype=np.uint8).reshape(1, 4, 6, 1)
    np.testing.assert_array_equal(enlarge(images, 9)[0, ::2, ::2], images[0])
    assert enlarge(images, 9).shape == (1, 8, 12, 1)
    assert enlarge(images, 3).shape == images.shape
