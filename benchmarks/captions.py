"""Pictures by a text-to-image flow: 100 captions of the test split, 20 new ones, and the autoencoder's upper bound.

    python -m benchmarks.captions --workdir=runs/emoji64_text [--out=docs] [--guidance=2] [--vendor=google]

Writes OUT/captions.png, OUT/captions_new.png, OUT/captions_reconstructed.png (what a perfect flow would draw for the
first), and OUT/captions.txt, captions of one vendor's training images in random order for
`launch.evaluate --metrics=fid --data=emoji64 --prompts=OUT/captions.txt`.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import numpy as np

from tarflow_jax import Guidance, TextToImage
from tarflow_jax.figures import captioned_grid, save_png, to_uint8
from tarflow_jax.training import Recipe

NUM_PROMPTS = 10_000
NEW = (
    "a green heart with a face", "a blue apple", "a red cat", "a purple banana", "a black sun", "a yellow rocket",
    "a heart on fire", "a dog with a hat", "a pink tree", "a white pizza", "a green moon with a face", "a blue rose",
    "a face with a red nose", "a square clock", "a brown star", "a flag with a heart", "an orange fish",
    "a cat with sunglasses", "two red hearts", "a blue car with eyes",
)  # fmt: skip


def main() -> None:
    """Draws and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="of the flow")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for the pictures")
    parser.add_argument("--guidance", type=float, default=None, help="weight, in place of the recipe's")
    parser.add_argument("--vendor", default="google", help="whose captions to write")
    args = parser.parse_args()
    pipe, recipe = TextToImage.from_pretrained(args.workdir, best=True), Recipe.from_workdir(args.workdir)
    guidance = pipe.guidance or Guidance()
    if args.guidance is not None:
        guidance = dataclasses.replace(guidance, weight=args.guidance)
    test = recipe.source("test")
    chosen = np.random.default_rng(0).choice(len(test), 100, replace=False)
    captions = [test.captions[i][0] for i in chosen]
    for name, texts in (("captions", captions), ("captions_new", list(NEW))):
        images = pipe(texts, guidance=guidance, key=jax.random.key(0))
        save_png(args.out / f"{name}.png", captioned_grid(to_uint8(images), texts, 10))
    best = to_uint8(pipe.reconstruct(test, chosen))
    save_png(args.out / "captions_reconstructed.png", captioned_grid(best, captions, 10))
    train = [text for texts in recipe.source("train").captions for text in texts if text.endswith(f", {args.vendor}")]
    shuffled = np.random.default_rng(0).permutation(train)[:NUM_PROMPTS]
    (args.out / "captions.txt").write_text("\n".join(shuffled) + "\n")


if __name__ == "__main__":
    main()
