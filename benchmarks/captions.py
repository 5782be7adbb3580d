"""Pictures and figures of configs/emoji64_text.py: what its flow draws from captions, and how good its autoencoder is.

    python -m benchmarks.captions --workdir=runs/emoji64_text [--pixels=runs/emoji64_levels] [--guidance=1,2,3]

Writes OUT/captions.png (100 captions of the test split) and OUT/captions_new.png (20 that nobody drew). Adds a row to
--rows: the autoencoder's PSNR and distance; distances, at each guidance, of 1,000 samples from captions of Google's
training images (emoji_captions.txt) to these images; seconds for 1 and 16 images. --pixels adds those of a
class-conditional flow of emoji64's pixels.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.common import time_in_turns
from benchmarks.sample_metrics import SampleMetrics
from tarflow_jax import Guidance, TarFlowPipeline, TextToImage
from tarflow_jax.figures import captioned_grid, save_png, to_uint8
from tarflow_jax.noise import to_float
from tarflow_jax.sampling import GaussSeidelJacobi
from tarflow_jax.training import Recipe

NUM_SAMPLES, TIMED, REPEATS = 1000, (1, 16), 5
CAPTIONS = Path(__file__).with_name("emoji_captions.txt")  # of NUM_SAMPLES random drawings of Google's
NEW = (
    "a green heart with a face", "a blue apple", "a red cat", "a purple banana", "a black sun", "a yellow rocket",
    "a heart on fire", "a dog with a hat", "a pink tree", "a white pizza", "a green moon with a face", "a blue rose",
    "a face with a red nose", "a square clock", "a brown star", "a flag with a heart", "an orange fish",
    "a cat with sunglasses", "two red hearts", "a blue car with eyes",
)  # fmt: skip


def seconds(draw: Callable[[int], Any]) -> dict[str, float]:
    """Median seconds for 1 and 16 images, compilation left out."""
    figures = time_in_turns({str(count): functools.partial(draw, count) for count in TIMED}, REPEATS)
    return {count: round(row["median_s"], 3) for count, row in figures.items()}


def measure(draw: Callable[..., Any], guidances: Sequence[Guidance], metrics: SampleMetrics) -> dict[str, Any]:
    """Distances at each guidance, and seconds; `draw` maps a number of images and a guidance to images."""
    distances = {f"{guidance.weight:g}": metrics(draw(NUM_SAMPLES, guidance)) for guidance in guidances}
    return {"guidance": distances, "seconds": seconds(functools.partial(draw, guidance=middle(guidances)))}


def middle(guidances: Sequence[Guidance]) -> Guidance:
    """The guidance of pictures and timings."""
    return guidances[len(guidances) // 2]


def reconstruction(pipe: TextToImage, metrics: SampleMetrics) -> dict[str, float]:
    """PSNR of emoji64's test images, and the distance of reconstructed training images."""
    chosen = np.random.default_rng(0).choice(len(metrics.train), NUM_SAMPLES, replace=False)
    train, test = metrics.train.read(chosen)[0], metrics.test.read(np.arange(len(metrics.test)))[0]

    def again(images: np.ndarray) -> np.ndarray:
        return np.asarray(pipe.autoencoder.decode(pipe.autoencoder.encode(to_float(images))))

    error = float(np.square(again(test) - np.asarray(to_float(test))).mean())
    return {
        "psnr": round(10 * np.log10(4 / error), 2),
        "distance": metrics(again(train))["distance"],
        "distance_of_real": metrics(train)["distance"],
    }


def draw_pictures(pipe: TextToImage, recipe: Recipe, guidance: Guidance, out: Path) -> None:
    """The two grids."""
    test = recipe.source("test")
    chosen = np.random.default_rng(0).choice(len(test), 100, replace=False)
    captions = [test.captions[i][0] for i in chosen]
    for name, texts in (("captions", captions), ("captions_new", list(NEW))):
        images = pipe(texts, guidance=guidance, key=jax.random.key(0))
        save_png(out / f"{name}.png", captioned_grid(to_uint8(images), texts, 10))


def main() -> None:
    """Draws, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="of the flow over latents")
    parser.add_argument("--pixels", help="workdir of a flow of pixels, to measure beside it")
    parser.add_argument("--guidance", default="1,2,3", help="weights; pictures are drawn with the one in the middle")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="folder for the pictures")
    parser.add_argument("--rows", type=Path, default=Path("docs/results/emoji64_text.jsonl"), help="file to append to")
    args = parser.parse_args()
    guidances = [Guidance(float(weight), schedule="constant") for weight in args.guidance.split(",")]
    shown = middle(guidances)
    pipe, recipe = TextToImage.from_pretrained(args.workdir, best=True), Recipe.from_workdir(args.workdir)
    draw_pictures(pipe, recipe, shown, args.out)
    captions = CAPTIONS.read_text().splitlines()
    metrics, key = SampleMetrics("emoji64"), jax.random.key(0)

    def draw(count: int, guidance: Guidance, decoder: Any = None) -> jax.Array:
        return pipe(captions[:count], guidance=guidance, key=key, decoder=decoder)

    row: dict[str, Any] = {"seed": recipe.config.train.seed, "metrics": pipe.flow.card["metrics"]}
    row |= {"autoencoder": reconstruction(pipe, metrics), "latents": measure(draw, guidances, metrics)}
    jacobi = functools.partial(draw, guidance=shown, decoder=GaussSeidelJacobi(4))
    row["seconds with Gauss-Seidel-Jacobi"] = seconds(jacobi)
    if args.pixels:
        pixels = TarFlowPipeline.from_pretrained(args.pixels)
        chosen = np.random.default_rng(0).choice(len(metrics.train), NUM_SAMPLES, replace=False)
        labels = metrics.train.read(chosen)[1]

        def draw_pixels(count: int, guidance: Guidance) -> jax.Array:
            return pixels.sample(key, count, labels[:count], guidance)

        row["pixels"] = measure(draw_pixels, guidances, metrics)
    with args.rows.open("a") as file:
        file.write(json.dumps(row | {"date": time.strftime("%Y-%m-%d")}) + "\n")


if __name__ == "__main__":
    main()
