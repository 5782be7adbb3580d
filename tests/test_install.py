"""The wheel: what `pip install .` puts into an environment is the whole library."""

import shutil
import zipfile

import pytest

import commands

BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
USE = """
import importlib.metadata, sys
import jax, numpy as np
import tarflow_jax
from tarflow_jax import Guidance, Noise, TarFlow, TarFlowConfig, TarFlowPipeline

assert tarflow_jax.__file__.startswith(sys.argv[1]), tarflow_jax.__file__
assert tarflow_jax.__version__ == importlib.metadata.version("tarflow_jax")
config = TarFlowConfig((4, 4), 1, 2, 8, 2, 1, 3, head_dim=4)
variables = jax.jit(TarFlow(config).init)(jax.random.key(0), np.zeros((1, 4, 4, 1), np.float32))
pipe = TarFlowPipeline(config, variables, Noise("gaussian", 0.1))
images = pipe.sample(jax.random.key(0), 2, labels=[0, 2], guidance=Guidance(weight=1.5))
pipe.save_pretrained("model")
again = TarFlowPipeline.from_pretrained("model").sample(jax.random.key(0), 2, labels=[0, 2], guidance=Guidance(1.5))
np.testing.assert_array_equal(images, again)
print(images.shape)
"""


@pytest.mark.slow
def test_the_wheel_serves_from_any_folder_without_the_clone(tmp_path):
    source, site, elsewhere = (tmp_path / name for name in ("source", "site", "elsewhere"))
    for folder in (source, elsewhere):
        folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.txt"):
        shutil.copy(commands.ROOT / name, source)
    shutil.copytree(commands.ROOT / "tarflow_jax", source / "tarflow_jax", ignore=shutil.ignore_patterns("__pycache__"))
    code, _, err = commands.run("-c", BUILD, tmp_path, cwd=source)
    assert code == 0, err
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 2e6
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        (metadata,) = [archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA")]
    extras = [line.partition(": ")[2] for line in metadata.splitlines() if line.startswith("Provides-Extra: ")]
    assert set(extras) >= {"demo", "torch", "gcs", "plan"}
    assert "Requires-Dist: jax<" in metadata
    assert sorted(path.name for path in site.iterdir() if path.suffix != ".dist-info") == ["tarflow_jax"]
    code, out, err = commands.run("-c", USE, site, cwd=elsewhere, PYTHONPATH=str(site))
    assert (code, out) == (0, "(2, 4, 4, 1)\n"), err
