"""Converts a PyTorch checkpoint of a reference (apple/ml-tarflow, ml-itarflow or ml-starflow) to a model folder.

    python -m launch.convert --from_torch=FILE --image_size=256 --image_channels=3 --patch_size=8 --out=DIR

Width, blocks, layers, classes, prefix and VP/NVP are inferred from the tensors. STARFlow's images are latents.
"""

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags

from launch import cli
from tarflow_jax.pipeline import TarFlowPipeline

FROM_TORCH = flags.DEFINE_string("from_torch", None, "PyTorch file of the reference's state dict.")
IMAGE_SIZE = flags.DEFINE_multi_integer("image_size", None, "Side of the images, in pixels; twice: height and width.")
IMAGE_CHANNELS = flags.DEFINE_integer("image_channels", 3, "Channels of the images.")
PATCH_SIZE = flags.DEFINE_integer("patch_size", None, "Height and width of a patch, in pixels.")
NOISE_STD = flags.DEFINE_float("noise_std", None, "Training noise σ, in [-1, 1] units; denoising needs it.")
NOISE_STD_MIN = flags.DEFINE_float("noise_std_min", None, "Lowest σ of an iTARFlow, where denoising ends.")
BASE_SIZE = flags.DEFINE_integer("base_size", None, "STARFlow: side in tokens of its positions; default: as trained.")
ORDERS = flags.DEFINE_enum(
    "orders", None, ["alternate", "backwards_first"], "STARFlow: R2L or L2R; default: L2R with a prefix, else R2L."
)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Save the parameters in this dtype.")
flags.DEFINE_string("out", None, "Folder to save the model in; created if it is missing.")


def main(argv: Sequence[str]) -> None:
    """Reads, converts and saves, with one variable at a time in memory."""
    jax.config.update("jax_platforms", "cpu")  # whose arrays may be files
    path, out = Path(FROM_TORCH.value).expanduser(), cli.folder("out")
    near = next((str(parent) for parent in Path(out).absolute().parents if parent.is_dir()), None)
    place = functools.partial(jax.tree.map, functools.partial(in_a_file, near))
    shape = tuple(IMAGE_SIZE.value), IMAGE_CHANNELS.value, PATCH_SIZE.value
    options = {"base_size": BASE_SIZE.value, "orders": ORDERS.value, "noise_std_min": NOISE_STD_MIN.value}
    pipe = TarFlowPipeline.from_torch(path, *shape, NOISE_STD.value, place=place, **options)
    pipe.save_pretrained(out, dtype=DTYPE.value)
    print(f"saved {pipe.config} in {out}")


def in_a_file(folder: str | None, array: np.ndarray) -> np.ndarray:
    """Moves an array into a nameless file on the disk of `folder`, which is gone when the array is."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(np.ascontiguousarray(array))  # through a map, a full disk would kill the process
        file.flush()
        return np.memmap(file, array.dtype, "r", shape=array.shape)


if __name__ == "__main__":
    cli.run(main, "from_torch", "image_size", "patch_size", "out")
