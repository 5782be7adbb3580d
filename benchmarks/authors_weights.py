"""Converts checkpoints that have the shapes of the authors' released ones, with random weights.

    python -m benchmarks.authors_weights [NAME ...]

Saves each as .pth in a temporary folder and converts it with launch.convert in a separate process, whose time and peak
resident memory are added to docs/results/authors_weights.jsonl. Needs PyTorch, 1 GB of memory more than the file, and
three times its size on disk.
"""

import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tarflow_jax.flow import TarFlowConfig
from tarflow_jax.interop import torch_weights
from tarflow_jax.interop.tensors import import_torch
from tarflow_jax.runtime import environment
from tarflow_jax.runtime.parameters import variables_shapes

ROWS = Path("docs/results/authors_weights.jsonl")


class Release(NamedTuple):
    """A checkpoint: its file, model, training noise, and what is left out of its shape to fit this machine."""

    file: str
    config: TarFlowConfig
    noise_std: float
    scaled: str = ""


STARFLOW = TarFlowConfig(
    32,
    4,
    patch_size=1,
    width=3072,
    num_blocks=6,
    layers_per_block=(2, 2, 2, 2, 2, 6),
    head_dim=torch_weights.HEAD_DIM,
    rotary_base_size=32,
    orders="backwards_first",
    condition_kind="prefix",
    condition_dim=2048,
    condition_length=128,
    condition_blocks=1,
    **torch_weights.STARFLOW,
)
RELEASES = {
    "afhq256": Release("afhq_model_8_768_8_8_0.07.pth", TarFlowConfig(256, 3, 8, 768, 8, 8, num_classes=3), 0.07),
    "imagenet64_uncond": Release("imagenet64_model_2_768_8_8_0.05.pth", TarFlowConfig(64, 3, 2, 768, 8, 8), 0.05),
    "imagenet64_cond": Release(
        "imagenet_model_4_1024_8_8_0.05.pth", TarFlowConfig(64, 3, 4, 1024, 8, 8, num_classes=1000), 0.05
    ),
    "imagenet128_cond": Release(
        "imagenet_model_4_1024_8_8_0.15.pth", TarFlowConfig(128, 3, 4, 1024, 8, 8, num_classes=1000), 0.15
    ),
    "starflow": Release("starflow_3B_t2i_256x256.pth", STARFLOW, 0.3, "6 of the 24 layers of the deep block"),
}


def write(path: Path, config: TarFlowConfig) -> None:
    """Writes a state dict of this shape, tensor by tensor, so that memory holds it once."""
    torch = import_torch()
    torch.manual_seed(0)
    trained = config.rotary_base_size**2 or config.num_tokens
    buffers = torch_weights._buffers(config, trained)
    state = {name: torch.from_numpy(buffer) for name, buffer in buffers.items()}
    for _, row, names in torch_weights._tensors(config):
        state |= {name: torch.empty(row.torch_shape(config)).normal_(std=0.02) for name in names}
    torch.save(state, path)


def convert(release: Release, folder: Path) -> dict[str, float]:
    """Runs launch.convert; returns its seconds, those of the processor, and its peak of resident memory in bytes."""
    config = release.config
    command = [
        *(sys.executable, "-m", "launch.convert", f"--from_torch={folder / release.file}", f"--out={folder / 'out'}"),
        *(f"--image_size={config.image_size[0]}", f"--image_channels={config.image_channels}"),
        *(f"--patch_size={config.patch_size}", f"--noise_std={release.noise_std}"),
    ]
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"error: {release.file} was not converted")
    seconds = round(time.perf_counter() - start, 1)
    cpu_seconds = round(usage.ru_utime + usage.ru_stime, 1)  # what others on this machine change little
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": usage.ru_maxrss * 1024}


def main() -> None:
    """Writes a row for each release."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(RELEASES)}; default: all")
    context = multiprocessing.get_context("spawn")
    for name in parser.parse_args().names or RELEASES:
        release = RELEASES[name]
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            writer = context.Process(target=write, args=(folder / release.file, release.config))
            writer.start()  # its memory is gone before the conversion
            writer.join()
            row = {
                "name": name,
                "file": release.file,
                "scaled": release.scaled,
                "parameters": sum(math.prod(shape) for shape in variables_shapes(release.config).values()),
                "file_bytes": (folder / release.file).stat().st_size,
                **convert(release, folder),
                "saved_bytes": (folder / "out" / "model.safetensors").stat().st_size,
                "date": time.strftime("%Y-%m-%d"),
                **environment(),
            }
        print(json.dumps(row), flush=True)
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
