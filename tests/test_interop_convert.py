"""The command `python -m launch.convert`."""

import subprocess
import sys

import numpy as np
import pytest

import commands
from tarflow_jax import TarFlowPipeline
from tarflow_jax.interop import load_model
from tarflow_jax.interop.tensors import flatten
from tarflow_jax.noise import Noise

pytestmark = pytest.mark.slow


def convert(*arguments):
    command = [sys.executable, "-m", "launch.convert", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_converts(load_golden, tmp_path):
    golden = load_golden("vp")
    arguments = ["--image_size=8", "--image_channels=3", "--patch_size=2", "--noise_std=0.1"]
    done = convert(f"--from_torch={golden.path}", f"--out={tmp_path}", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    saved = load_model(tmp_path)
    assert (saved.config, saved.noise) == (golden.config, Noise("gaussian", 0.1))
    for name, array in flatten(golden.variables).items():
        np.testing.assert_array_equal(flatten(saved.variables)[name], array)


def test_a_flow_of_many_noise_levels_is_drawn_by_default_once_its_levels_are_known(load_golden, tmp_path):
    golden = load_golden("noise_cond")
    shape = [f"--image_size={golden.config.image_size[0]}", f"--image_channels={golden.config.image_channels}"]
    shape += [f"--patch_size={golden.config.patch_size}", "--noise_std=0.3", "--noise_std_min=0.01"]
    done = convert(f"--from_torch={golden.path}", f"--out={tmp_path / 'model'}", *shape)
    assert (done.returncode, done.stderr) == (0, "")
    assert load_model(tmp_path / "model").noise == Noise("levels", std_min=0.01, std_max=0.3)
    code, _, err = commands.run(
        "-m", "launch.sample", f"--model={tmp_path / 'model'}", "--num_images=4", f"--out={tmp_path}"
    )
    assert code == 0, err
    with pytest.raises(ValueError, match="noise_std_min is given, but this model is of one noise level"):
        TarFlowPipeline.from_torch(load_golden("vp").path, 8, 3, 2, 0.1, noise_std_min=0.01)


def test_errors_are_one_line(load_golden, tmp_path):
    path = load_golden("vp").path
    done = convert(f"--from_torch={path}", f"--out={tmp_path / 'out'}", "--image_size=8", "--patch_size=1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "16 tokens, but 64 patches of 1 fill an image of 8x8" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    code, _, err = commands.run("-m", "launch.convert", f"--from_torch={path}", "--out=", "--image_size=8")
    assert (code, err) == (1, "error: --out is empty; expected a folder\n")
    (tmp_path / "README.md").write_text("mine")
    done = convert(f"--from_torch={path}", f"--out={tmp_path}", "--image_size=8", "--patch_size=2")
    message = f"error: {tmp_path} holds README.md, which is not a saved model's; choose another folder\n"
    assert (done.returncode, done.stderr) == (1, message)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
