"""Publishes a trained model on the Hugging Face hub, once a new process has reproduced it.

    python -m launch.publish --workdir=runs/digits --name=owner/digits
    python -m launch.publish --model=digits --name=owner/digits --private

Writes the model folder and opens it in a new process, in an empty directory. What it draws there and its log p must be
those of the model here, to 1e-4; so must the likelihood that launch.evaluate has measured of a run, if that takes at
most two minutes. Otherwise nothing is uploaded.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from launch import cli
from launch.reproduction import COUNT, check_opened, measure_again
from tarflow_jax import interop
from tarflow_jax.fingerprint import fingerprint
from tarflow_jax.text_to_image import TextToImage

NAME = flags.DEFINE_string("name", None, "Name on the hub, owner/name.")
PRIVATE = flags.DEFINE_bool("private", False, "Create a private repository.")
REPLACE = flags.DEFINE_bool("replace", False, "Replace a model that already has this name.")
cli.define_model_flags()


def main(argv: Sequence[str]) -> None:
    """Writes, checks, uploads."""
    jax.config.update("jax_platforms", "cpu")  # launch.evaluate, in a process of its own, may take the accelerator
    name, _ = cli.model_name()
    interop.check_hub(NAME.value, replace=REPLACE.value)
    pipe = cli.open_pipeline(name, None, sequences=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        if pipe.card:  # of a run; that of a saved model is kept
            of_latents = pipe.config.image_bits == 0  # which are published with their autoencoder
            whole = TextToImage.around(pipe, name) if of_latents else pipe
            whole.save_pretrained(folder, card={"name": NAME.value})
        else:
            interop.copy_model(interop.local_folder(name), folder)
        check_opened(pipe, folder)
        print(f"{COUNT} samples and their log_prob: the same in a new process")
        weights = fingerprint(pipe.variables)
        for evaluation in pipe.card.get("evaluations", ()):
            if evaluation["protocol"].get("fingerprint") == weights:
                measure_again(folder, evaluation)
        print(interop.push_model(folder, NAME.value, private=PRIVATE.value))


if __name__ == "__main__":
    cli.run(main, "name")
