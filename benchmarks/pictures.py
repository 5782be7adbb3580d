"""Draws README's pictures from a class-conditional flow of Fashion-MNIST.

    python -m benchmarks.pictures --model=fashion_mnist [--guidance=1.5] [--out=docs/pictures]

emerging.gif: latents become noisy images, patch by patch and block by block, then clean ones. class_swap.png: test
images, encoded with their class and decoded as each of the others. models.png: samples of all ready-made models of
images, beside their figures (benchmarks/headline.py).
"""

import argparse
from pathlib import Path

import jax
import numpy as np

from benchmarks import headline
from launch.cli import example_labels
from tarflow_jax.data import open_source
from tarflow_jax.figures import encode_gif, enlarge, grid, save_png, to_uint8
from tarflow_jax.files import replacing
from tarflow_jax.flow import block_orders, from_tokens, to_tokens
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.sampling import Guidance
from tarflow_jax.text_to_image import TextToImage

ROWS, SIDE = 2, 84  # of the animation; pixels of an image
MODEL_COLUMNS = 10
FRAMES_A_BLOCK, FRAMES_HELD = 12, 15
CAPTIONS = [
    f"{caption}, google"
    for caption in (
        "red heart", "green apple", "grinning face", "woman with red hair", "flag of Japan", "waving hand",
        "blue book", "cat face", "orange circle", "pizza",
    )
]  # fmt: skip
SOURCES = (0, 2, 19, 13, 6, 23)  # test images


def emerging(pipe: TarFlowPipeline, guidance: Guidance) -> list[np.ndarray]:
    """Frames of sampling, uint8 [H, W, 1 or 3]."""
    labels = example_labels(pipe.config.num_classes, ROWS * pipe.config.num_classes)
    latents = pipe.latents(jax.random.key(0), len(labels))
    drawn = pipe.decode_trace(latents, labels, guidance, noise_std=pipe.sampling_noise_std)
    tokens = [np.asarray(to_tokens(pipe.config, images)) for images in np.moveaxis(drawn.trajectory, 1, 0)]
    orders = np.asarray(block_orders(pipe.config, pipe.variables))[::-1]  # blocks are inverted last to first
    frames = [np.asarray(latents)]
    for before, after, order in zip(tokens[:-1], tokens[1:], orders, strict=True):
        for share in np.linspace(0, 1, FRAMES_A_BLOCK + 1)[1:]:
            done, mixed = order[: round(share * len(order))], before.copy()
            mixed[:, done] = after[:, done]
            frames.append(np.asarray(from_tokens(pipe.config, mixed)))
    frames += [np.asarray(pipe.denoise_samples(drawn.images, labels))] * FRAMES_HELD
    return [grid(enlarge(to_uint8(images), SIDE), pipe.config.num_classes) for images in frames]


def class_swap(pipe: TarFlowPipeline, guidance: Guidance) -> np.ndarray:
    """A row for each test image: itself, and its latents decoded as every class."""
    test, classes = open_source("fashion_mnist", "test"), pipe.config.num_classes
    labels = test.labels[list(SOURCES)]
    level = pipe.sampling_noise_std
    levels = None if level is None else np.full(len(SOURCES), level, np.float32)
    noisy = pipe.noise(jax.random.key(1), test.images[list(SOURCES)], levels)
    latents, _ = pipe.encode(noisy, labels, noise_std=level)
    every = np.tile(np.arange(classes), len(SOURCES))
    drawn = pipe.decode(np.repeat(latents, classes, axis=0), every, guidance, noise_std=level)
    clean = np.asarray(pipe.denoise_samples(drawn, every)).reshape(len(SOURCES), classes, *pipe.config.image_shape)
    originals = test.images[list(SOURCES)][:, None]
    sheet = np.concatenate([originals, to_uint8(clean)], axis=1).reshape(-1, *pipe.config.image_shape)
    return grid(enlarge(sheet, SIDE), classes + 1, captions=["original", *test.label_names])


def ten_samples(name: str, guidance: Guidance) -> jax.Array:
    """A sample of each class or caption."""
    flow = TarFlowPipeline.from_pretrained(name)
    if flow.config.image_bits == 0:
        return TextToImage.from_flow(flow, name)(CAPTIONS, guidance=guidance)
    labels = example_labels(flow.config.num_classes, MODEL_COLUMNS)
    return flow.sample(jax.random.key(0), MODEL_COLUMNS, labels, guidance)


def models() -> np.ndarray:
    """A row for each ready-made model of images."""
    rows, titles = [], []
    for name, claim in headline.MODELS.items():
        drawn = enlarge(to_uint8(ten_samples(name, claim.guidance)), SIDE)
        margin = SIDE - drawn.shape[1]
        around = (margin // 2, margin - margin // 2)
        drawn = np.pad(drawn, ((0, 0), around, around, (0, 0)), constant_values=255)
        rows.append(np.broadcast_to(drawn, (*drawn.shape[:3], 3)))
        what = "distance" if claim.num_samples else "bits/dim"
        titles.append(f"{name}\n{what} {headline.summary(headline.measured(name, seeds=3))}")
    return grid(np.concatenate(rows), MODEL_COLUMNS, titles)


def main() -> None:
    """Draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion_mnist", help="a name, a workdir or a model folder")
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    args = parser.parse_args()
    pipe, guidance = TarFlowPipeline.from_pretrained(args.model), Guidance(args.guidance)
    with replacing(args.out / "emerging.gif") as file:
        file.write(encode_gif(emerging(pipe, guidance), milliseconds=80))
    save_png(args.out / "class_swap.png", class_swap(pipe, guidance))
    save_png(args.out / "models.png", models())


if __name__ == "__main__":
    main()
