"""The strict floor: every test runs on eight CPU devices, and promotion or a warning is an error."""

import dataclasses
import functools
import gc
import json
import os
import time
import zlib
from pathlib import Path
from typing import Any

from commands import COMPILED, NOT_OPTIMISED
from object_store import BUCKET, NO_CREDENTIALS, ObjectStore

# Before JAX is imported for the first time: it reads them only once. XLA_FLAGS="--xla_backend_optimization_level=3
# --xla_cpu_use_fusion_emitters=true" has programs compiled as usual.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        NOT_OPTIMISED,
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
    ]
)
# What one test compiled, no other test, process or later run of the tests compiles again.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ |= NO_CREDENTIALS

import jax
import numpy as np
import pytest
from etils import epath

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")

DATA = Path(__file__).parent / "data"


def pytest_configure():
    """Removes compiled programs that were not used for two weeks, or that a killed process wrote in part."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    COMPILED.mkdir(parents=True, exist_ok=True)
    checked = COMPILED / "checked"
    last = checked.stat().st_mtime if checked.exists() else 0
    checked.touch()
    for path in COMPILED.glob("*-cache"):
        try:
            unused = time.time() - path.stat().st_atime > 14 * 86_400
            if unused or (path.stat().st_mtime >= last and not zlib.decompress(path.read_bytes())):
                path.unlink()
        except (zlib.error, FileNotFoundError):  # another run of the tests may be removing it
            path.unlink(missing_ok=True)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Every compiled program is some mappings of memory, of which Linux allows a process 65,530."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def _store():
    with ObjectStore() as store:  # one for all tests: clients remember where a bucket is
        yield store


@pytest.fixture
def store(_store, monkeypatch):
    """An empty `ObjectStore`, which gs:// means in this process and in those that it starts."""
    _store.reset()
    for name, value in _store.environment.items():
        monkeypatch.setenv(name, value)
    yield _store
    _store.reset()


@pytest.fixture
def bucket(store):
    """A folder in the object store."""
    return epath.Path(f"gs://{BUCKET}/run")


@dataclasses.dataclass(frozen=True)
class Golden:
    """A model of the reference and what the reference computed with it (see tests/data/README.md)."""

    path: Path  # of the reference's weights
    config: Any
    variables: dict[str, Any]
    arrays: dict[str, np.ndarray]  # as stored: images [B, K, H, W], tokens in the reference's order

    def images(self, name: str) -> np.ndarray:
        """Images [..., H, W, K] from those stored as [..., K, H, W]."""
        return np.moveaxis(self.arrays[name], -3, -1)

    def latents(self, name: str) -> np.ndarray:
        """Latents [..., H, W, K] from tokens [..., T, D] in the reference's order."""
        tokens, (height, width, channels) = self.arrays[name], self.config.image_shape
        patch = self.config.patch_size
        grid = (height // patch, width // patch)
        tokens = tokens.reshape(*tokens.shape[:-2], *grid, channels, patch, patch)
        tokens = np.moveaxis(tokens, -3, -1)  # [..., rows, columns, P, P, K]
        return np.swapaxes(tokens, -4, -3).reshape(*tokens.shape[:-5], height, width, channels)

    def labels(self, name: str) -> np.ndarray | None:
        """Labels int32, None for an unconditional model."""
        return self.arrays[name].astype(np.int32) if name in self.arrays else None


@functools.cache
def _load_golden(name: str) -> Golden:
    from tarflow_jax.interop import load_torch

    model = json.loads((DATA / f"{name}.json").read_text())["model"]
    path = DATA / f"{name}.pth"
    patch_size = model.get("patch_size") or model["patch_sizes"][0]
    with np.load(DATA / f"{name}.npz") as arrays:
        golden = dict(arrays)
    config, variables = load_torch(path, golden["x"].shape[-2:], model["in_channels"], patch_size)
    return Golden(path, config, variables, golden)


@pytest.fixture(scope="session")
def load_golden():
    """A function: "cond" and so on, see tests/data/README.md -> Golden, the same object every time."""
    return _load_golden


@pytest.fixture
def damage(tmp_path):
    """A function: (file, count) yields it `count` times beside itself, each with another random damage.

    A third is cut short, a third has a byte changed anywhere, and a third one near an end, where headers are.
    """

    def damaged(path: Path, count: int):
        rng = np.random.default_rng(0)
        content = path.read_bytes()
        for i in range(count):
            broken = bytearray(content)
            if i % 3 == 0:
                del broken[rng.integers(len(broken)) :]
            else:
                ends = np.r_[:2048, -2048:0] if len(content) > 4096 else np.arange(len(content))
                place = rng.integers(len(content)) if i % 3 == 1 else rng.choice(ends)
                broken[place] ^= rng.integers(1, 256)
            path.write_bytes(broken)
            yield path
        path.write_bytes(content)

    return damaged
