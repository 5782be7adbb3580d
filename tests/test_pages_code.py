"""The code of README and docs runs as it stands, except for what SHORTER replaces."""

import re
import subprocess

import numpy as np
import pytest

from commands import ROOT, environment, run

ARRAYS = """
import functools, jax, numpy, tarflow_jax
x = numpy.random.default_rng(0).normal(size=(300, 2))
parameters, observations, observed = x, x + 0.1, numpy.zeros((1, 2))
simulate = lambda x: x
log_density = lambda x: -0.5 * (x**2).sum(-1)
tarflow_jax.fit = functools.partial(tarflow_jax.fit, num_steps=4, width=8, head_dim=8, num_blocks=2)
tarflow_jax.fit_density = functools.partial(tarflow_jax.fit_density, num_steps=4, width=8, head_dim=8, num_blocks=2)
"""
PHOTOS = """
import pathlib
from PIL import Image
for split in ("train", "test"):
    pathlib.Path("photos", split, "one").mkdir(parents=True)
    for number in range(40):
        Image.new("RGB", (64, 64)).save(f"photos/{split}/one/{number}.png")
"""
# What each page's Python needs before its first block.
BEFORE = {
    "README.md": "",
    "concepts.md": "",
    "howto/sample.md": "",
    "howto/python.md": "",
    "howto/arrays.md": ARRAYS,
    "howto/data.md": PHOTOS,
}
SHORTER = {
    "howto/arrays.md": {
        "10_000": "100",
        "num_warmup=500, num_samples=2000": "num_warmup=2, num_samples=2",
        "--config=configs/array.py": "--config=configs/array.py:smoke",
    },
    "howto/evaluate.md": {"--num_samples=10000": "--num_samples=128"},
    "launching.md": {"--workdir=runs/mesh": "--workdir=runs/mesh --config.train.num_steps=2"},
}


def blocks(page, language):
    """The blocks of code of a page, shortened."""
    path = ROOT / page if page == "README.md" else ROOT / "docs" / page
    text = path.read_text()
    for old, new in SHORTER.get(page, {}).items():
        assert old in text, f"{page} does not say {old} any more"
        text = text.replace(old, new)
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("page", BEFORE)
def test_python(page, tmp_path):
    found = blocks(page, "python")
    assert found
    code, _, errors = run("-c", "\n".join([BEFORE[page], *found]), cwd=tmp_path)
    assert code == 0, errors


# Pages, and the commands of theirs that need nothing but this repository.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "needle"),
    [
        ("README.md", "launch.sample --model=digits"),
        ("howto/arrays.md", "configs/array.py"),
        ("howto/sample.md", "--model=digits"),
        ("howto/evaluate.md", "--model=digits"),
        ("launching.md", "JAX_NUM_CPU_DEVICES=8"),
    ],
)
def test_shell(page, needle, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=rng.normal(size=(400, 2)), condition=rng.normal(size=(400, 3)))
    np.savez(tmp_path / "observed.npz", condition=rng.normal(size=(1, 3)))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (block,) = [block for block in blocks(page, "bash") if needle in block]
    lines = [line for line in block.replace("\\\n", " ").splitlines() if "launch." in line]
    lines = [line for line in lines if "runs/fashion_mnist" not in line]
    command = ["bash", "-euc", "\n".join(lines)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
