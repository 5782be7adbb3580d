"""Measures time and peak memory of reading and writing a model of the AFHQ recipe's shape, 463 M parameters.

    python -m benchmarks.interop

Weights are random. Each row runs in its own process; peak resident memory includes Python, JAX and PyTorch. Needs
PyTorch and 7 GB of disk in the temporary folder.
"""

import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from tarflow_jax.flow import TarFlowConfig
from tarflow_jax.interop import SavedModel, load_model, load_torch, save_model, save_torch
from tarflow_jax.interop.tensors import unflatten
from tarflow_jax.runtime.parameters import variables_shapes

AFHQ = TarFlowConfig((256, 256), 3, patch_size=8, width=768, num_blocks=8, layers_per_block=8, num_classes=3)


def make_torch_file(folder: Path) -> Path:
    """Writes random weights in the reference's layout."""
    rng = np.random.default_rng(0)
    flat = {
        name: rng.standard_normal(shape, np.float32) * np.float32(0.02)
        for name, shape in variables_shapes(AFHQ).items()
    }
    save_torch(folder / "afhq.pth", AFHQ, unflatten(flat))
    return folder / "afhq.pth"


def read_torch(folder: Path) -> Path:
    """Reads the PyTorch file."""
    config, variables = load_torch(folder / "afhq.pth", AFHQ.image_size, AFHQ.image_channels, AFHQ.patch_size)
    assert config == AFHQ
    jax.block_until_ready(variables)
    return folder / "afhq.pth"


def convert(folder: Path, dtype: str = "float32") -> Path:
    """Converts the PyTorch file to a model folder."""
    config, variables = load_torch(folder / "afhq.pth", AFHQ.image_size, AFHQ.image_channels, AFHQ.patch_size)
    save_model(folder / dtype, SavedModel(config, variables), dtype=dtype)
    return folder / "afhq.pth"


def convert_bfloat16(folder: Path) -> Path:
    """Converts the PyTorch file to a bfloat16 model folder."""
    return convert(folder, "bfloat16")


def read_model(folder: Path, dtype: str = "float32") -> Path:
    """Reads the model folder."""
    jax.block_until_ready(load_model(folder / dtype).variables)
    return folder / dtype / "model.safetensors"


def read_model_bfloat16(folder: Path) -> Path:
    """Reads the bfloat16 model folder, as float32 variables."""
    return read_model(folder, "bfloat16")


def _measure(task: Callable[[Path], Path], folder: Path, results: "multiprocessing.Queue[str]") -> None:
    start = time.perf_counter()
    size = task(folder).stat().st_size / 1e6
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    name = task.__name__.replace("_", " ")
    results.put(f"{name:<22}{size:>10.0f}{seconds:>10.1f}{peak:>10.0f}{peak / size:>10.2f}")


def main() -> None:
    """Prints the table."""
    parameters = sum(int(np.prod(shape)) for shape in variables_shapes(AFHQ).values())
    print(f"{parameters / 1e6:.0f} M parameters")
    print(f"{'task':<22}{'file MB':>10}{'seconds':>10}{'peak MB':>10}{'peak/file':>10}", flush=True)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        for task in (make_torch_file, read_torch, convert, read_model, convert_bfloat16, read_model_bfloat16):
            process = context.Process(target=_measure, args=(task, Path(folder), results))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"error: {task.__name__} ended with code {process.exitcode}")
            print(results.get(), flush=True)


if __name__ == "__main__":
    main()
