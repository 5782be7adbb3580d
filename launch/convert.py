"""Turns a PyTorch checkpoint of the reference (apple/ml-tarflow) into a model folder.

    python -m launch.convert --from_torch=FILE --image_size=256 --image_channels=3 --patch_size=8 --out=DIR

Width, blocks, layers, classes and VP/NVP are read off the tensors.
"""

from collections.abc import Sequence

from absl import flags

from launch import common
from tarflow_jax.pipeline import TarFlowPipeline

FROM_TORCH = flags.DEFINE_string("from_torch", None, "Read this PyTorch file, the reference's state dict.")
IMAGE_SIZE = flags.DEFINE_integer("image_size", None, "Take the images to be squares of this many pixels a side.")
IMAGE_CHANNELS = flags.DEFINE_integer("image_channels", 3, "Take the images to have this many channels, 1 or 3.")
PATCH_SIZE = flags.DEFINE_integer("patch_size", None, "Take patches to be squares of this many pixels a side.")
NOISE_STD = flags.DEFINE_float(
    "noise_std", None, "Note the training noise's σ, in [-1, 1] units, where it is known; denoising needs it."
)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Save the parameters in this dtype.")
OUT = flags.DEFINE_string("out", None, "Save the model in this folder; it is made if it is missing.")
flags.mark_flags_as_required(["from_torch", "image_size", "patch_size", "out"])


def main(argv: Sequence[str]) -> None:
    """Reads, converts and saves."""
    pipe = TarFlowPipeline.from_torch(
        FROM_TORCH.value, IMAGE_SIZE.value, IMAGE_CHANNELS.value, PATCH_SIZE.value, NOISE_STD.value
    )
    pipe.save_pretrained(OUT.value, dtype=DTYPE.value)
    print(f"saved {pipe.config} in {OUT.value}")


if __name__ == "__main__":
    common.run(main)
