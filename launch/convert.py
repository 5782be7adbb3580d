"""Converts a PyTorch checkpoint of the reference (apple/ml-tarflow) to a model folder.

    python -m launch.convert --from_torch=FILE --image_size=256 --image_channels=3 --patch_size=8 --out=DIR

Width, blocks, layers, classes and VP/NVP are inferred from the tensors.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from launch import cli
from tarflow_jax.pipeline import TarFlowPipeline

FROM_TORCH = flags.DEFINE_string("from_torch", None, "PyTorch file of the reference's state dict.")
IMAGE_SIZE = flags.DEFINE_integer("image_size", None, "Height and width of the images, in pixels.")
IMAGE_CHANNELS = flags.DEFINE_integer("image_channels", 3, "Channels of the images, 1 or 3.")
PATCH_SIZE = flags.DEFINE_integer("patch_size", None, "Height and width of a patch, in pixels.")
NOISE_STD = flags.DEFINE_float(
    "noise_std", None, "Training noise σ, in [-1, 1] units, if it is known; denoising needs it."
)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Save the parameters in this dtype.")
flags.DEFINE_string("out", None, "Folder to save the model in; created if it is missing.")


def main(argv: Sequence[str]) -> None:
    """Reads, converts and saves."""
    path, out = Path(FROM_TORCH.value).expanduser(), cli.folder("out")
    pipe = TarFlowPipeline.from_torch(path, IMAGE_SIZE.value, IMAGE_CHANNELS.value, PATCH_SIZE.value, NOISE_STD.value)
    pipe.save_pretrained(out, dtype=DTYPE.value)
    print(f"saved {pipe.config} in {out}")


if __name__ == "__main__":
    cli.run(main, "from_torch", "image_size", "patch_size", "out")
