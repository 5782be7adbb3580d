"""Prepares a data set once, so that training only has to read it, and shows what is in it.

    python -m launch.prepare_data --data=tfds:cifar10
    python -m launch.prepare_data --data=folder:PATH --image_size=64 --preprocessing=tarflow
    python -m launch.prepare_data --data=emoji64:emoji-datasource-google-16.0.0.tgz
    python -m launch.prepare_data --data=packed:FOLDER --autoencoder=FOLDER --text_encoder=words

Downloads a TFDS set, or packs an image folder into array_record shards (in parallel; run it again to resume after an
interruption). Prints the number of images and classes of each split and the name to train by, and writes a preview of
the training images. With --autoencoder, it then packs their latents and, with --text_encoder, their captions.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from launch import cli
from tarflow_jax import data
from tarflow_jax.autoencoder import Autoencoder
from tarflow_jax.errors import UserError
from tarflow_jax.figures import grid, save_png, to_uint8
from tarflow_jax.files import sole_user
from tarflow_jax.fingerprint import fingerprint
from tarflow_jax.noise import to_float
from tarflow_jax.text import T5Encoder, WordVectors

DATA = flags.DEFINE_string("data", None, "Data set to prepare; docs/howto/data.md lists the names.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Prepared sets; default: $TARFLOW_DATA_DIR or ~/.cache/tarflow_jax.")
IMAGE_SIZE = flags.DEFINE_list("image_size", None, "Size to pack images at: one number, or height,width.")
PREPROCESSING = flags.DEFINE_string("preprocessing", "none", "Crop and resize images: none, tarflow or adm.")
SKIP_BAD = flags.DEFINE_bool("skip_bad", False, "Leave out files that cannot be used instead of rejecting the set.")
AUTOENCODER = flags.DEFINE_string("autoencoder", None, "Folder of an autoencoder, to pack latents of the images.")
TEXT_ENCODER = flags.DEFINE_string("text_encoder", None, "Encoder of the captions: words (wordllama) or t5:NAME.")
TEXT_LENGTH = flags.DEFINE_integer("text_length", None, "Words or tokens per caption; default: 12, for T5 128.")
COPIES = flags.DEFINE_integer("copies", 0, "Shifted and scaled copies to pack of a training image.", lower_bound=0)
OUT = flags.DEFINE_string("out", None, "Folder of the latents; default: in the data folder.")
PREVIEW = flags.DEFINE_string("preview", None, "PNG file for a grid of training images; default: in the set's folder.")


def file_stem(name: str) -> str:
    """Turns a name, such as the data set "folder:/data/cats", into letters, digits, dots and underscores."""
    return re.sub(r"[^\w.]+", "_", name).strip("_")


def main(argv: Sequence[str]) -> None:
    """Prepares the set, prints its size and writes the preview."""
    data_dir = data.data_folder(DATA_DIR.value)
    sizes = IMAGE_SIZE.value or ()
    if len(sizes) > 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise UserError(f"--image_size is {','.join(sizes)!r}; expected a positive number, or height,width")
    options = {"preprocessing": PREPROCESSING.value, "data_dir": data_dir, "skip_bad": SKIP_BAD.value}
    options["image_size"] = (int(sizes[0]), int(sizes[-1])) if sizes else None
    with sole_user(data_dir):
        name = data.prepare_source(DATA.value, **options)
    kind, _, argument = name.partition(":")
    folder = Path(argument).expanduser() if kind == "packed" else data_dir / kind / file_stem(argument)
    preview = Path(PREVIEW.value or folder / "preview.png")
    sources = {}
    for split in ("train", "test"):
        source = sources[split] = data.open_source(name, split, **options)
        shape = "x".join(map(str, source.image_shape))
        classes = f"{source.num_classes} classes" if source.num_classes else "no labels"
        print(f"{split:5} {len(source):9,} images {shape}, {classes}, preprocessing {source.preprocessing}")
        if split == "train":
            batch = next(data.train_batches(source, batch_size=64, seed=0))
            save_png(preview, grid(to_uint8(to_float(batch.image))))
    if AUTOENCODER.value:
        out = Path(OUT.value or data_dir / "latents" / file_stem(Path(argument).name)).expanduser()
        with sole_user(out):
            encode(sources, out)
        name = f"latents:{out}"
    print(f"train with --config.data.source={name}; a preview is in {preview}")


def encode(sources: dict[str, data.ImageSource], out: Path) -> None:
    """Packs latents and captions, with the autoencoder and the text encoder beside them."""
    autoencoder, text = Autoencoder.from_pretrained(AUTOENCODER.value), None
    if kind := TEXT_ENCODER.value:
        captions = [text for source in sources.values() for wordings in source.captions for text in wordings]
        if kind == "words":
            text = WordVectors.from_wordllama(captions, TEXT_LENGTH.value or 12)
        elif kind.startswith("t5:"):
            text = T5Encoder(kind.removeprefix("t5:"), TEXT_LENGTH.value or 128)
        else:
            raise UserError(f"--text_encoder is {kind!r}; expected words or t5:NAME")
    encoders = " ".join([fingerprint(autoencoder.params), text.fingerprint if text else ""])
    data.pack_latents(out, sources, autoencoder.posterior, text, encoders, COPIES.value)
    autoencoder.save_pretrained(out / "autoencoder")
    if text:
        text.save(out / "text")


if __name__ == "__main__":
    cli.run(main, "data")
