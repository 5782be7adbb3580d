"""Draws images from a trained model: a PNG grid, the images as .npz, the way from noise as an animated GIF.

Of a flow of sequences: x and log_q, its log p, as .npz.

python -m launch.sample --model=digits --num_images=64 --guidance=1.5
python -m launch.sample --workdir=runs/digits --num_images=64 --guidance=1.5 --denoise
python -m launch.sample --workdir=runs/emoji64_text --prompt="a red heart" --num_images=4
python -m launch.sample --workdir=runs/fashion_mnist --label=sneaker --num_images=16 --out=sneakers
"""

import dataclasses
import os
import sys
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags
from etils import epath

from launch import cli, end_at_signals
from tarflow_jax.arguments import PIXEL_WARN_LIMIT
from tarflow_jax.errors import UserError
from tarflow_jax.evaluation.generation import quantise, write_samples
from tarflow_jax.figures import captioned_grid, class_columns, grid, save_gif, save_png, to_uint8
from tarflow_jax.files import read_npz, write_npz
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.runtime import make_mesh
from tarflow_jax.sampling import DEFAULT_DENOISING, Decoder, Guidance
from tarflow_jax.text_to_image import TextToImage

OUT = flags.DEFINE_string("out", None, "Folder for the results; default: WORKDIR/samples or ./samples.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 64, "Number of images.", lower_bound=1)
LABELS = flags.DEFINE_list("labels", None, "Classes to draw in turn, by number or name; -1 is no class. Default: all.")
LABEL = flags.DEFINE_string("label", None, "The only class to draw, by number or name.")
CONDITION = flags.DEFINE_string("condition", None, "File (npz) of `condition` or `mask` of sequences, used in turn.")
PROMPT = flags.DEFINE_multi_string("prompt", None, "Caption to draw --num_images images of; may be repeated.")
SEED = cli.define_seed("Seed of the latents.")
GUIDANCE = cli.define_number("guidance", None, "Guidance weight w; default: 0 (none), or the model's with --prompt.")
cli.define_guidance_flags()
DENOISE = flags.DEFINE_bool("denoise", None, "Denoise; default: for Gaussian noise that no decoder removes.")
MULTIPLIER = cli.define_number("denoise_multiplier", 1.0, "Factor of the score in denoising.")
STEPS = flags.DEFINE_integer("denoise_steps", None, "Denoising steps, for noise-conditional models.", lower_bound=1)
cli.define_decoder_flags()
cli.define_model_flags()
cli.define_process_flags()
flags.mark_flags_as_mutual_exclusive(["label", "labels"])


def chosen_labels(num_classes: int, names: Sequence[str]) -> np.ndarray | None:
    """Labels int32 [--num_images] by --label or --labels, else all classes in turn; None without classes."""
    if LABEL.value is not None:
        return np.full(NUM_IMAGES.value, cli.class_number(LABEL.value, names, "label"))
    if LABELS.value:
        return np.resize([cli.class_number(label, names) for label in LABELS.value], NUM_IMAGES.value)
    return cli.example_labels(num_classes, NUM_IMAGES.value)


def denoised(pipe: TarFlowPipeline, images: jax.Array, labels: np.ndarray | None) -> list[np.ndarray]:
    """Drawn images [B, H, W, K] after each step of denoising."""
    method = dataclasses.replace(DEFAULT_DENOISING, num_steps=STEPS.value) if STEPS.value else None
    if not pipe.config.noise_conditional:
        return [np.asarray(pipe.denoise_samples(images, labels, MULTIPLIER.value, method))]
    _, path = pipe.denoise_samples(images, labels, MULTIPLIER.value, method, return_trajectory=True)
    return list(np.asarray(path[1:]))


def draw_sequences(
    pipe: TarFlowPipeline, labels: np.ndarray | None, guidance: Guidance, decoder: Decoder, path: epath.Path
) -> None:
    """Draws sequences, and writes them with log q and what they are given."""
    key, count, file = jax.random.key(SEED.value), NUM_IMAGES.value, os.path.expanduser(CONDITION.value or "")
    given = read_npz(file, ("condition", "mask")) if file else {}
    if pipe.config.condition_dim and "condition" not in given:
        raise UserError("this flow has a condition; name a file with the array `condition`, --condition=FILE")
    for name, values in given.items():
        if not values.shape or not len(values):
            raise UserError(f"{file}: {name} has shape {list(values.shape)}; expected rows")
        given[name] = values[np.arange(count) % len(values)]
    x, log_q = pipe.sample(key, count, labels, guidance, DENOISE.value, decoder=decoder, return_log_prob=True, **given)
    if labels is not None:
        given["labels"] = labels
    if jax.process_index() == 0:
        write_npz(path, x=np.asarray(x), log_q=np.asarray(log_q), **given)
        print(path)


def draw_captions(pipe: TextToImage, decoder: Decoder, out: epath.Path) -> None:
    """Draws images of captions, or of the classes, by a flow over latents."""
    guidance = pipe.guidance if GUIDANCE.value is None else cli.guidance(GUIDANCE.value)
    labels, names = chosen_labels(pipe.flow.config.num_classes, pipe.flow.label_names), pipe.flow.label_names
    if PROMPT.value and labels is not None:
        labels = np.repeat(labels[: len(PROMPT.value)], NUM_IMAGES.value) if LABELS.value or LABEL.value else None
    key = jax.random.key(SEED.value)
    images = pipe(PROMPT.value, NUM_IMAGES.value, guidance, key, labels=labels, decoder=decoder, denoise=DENOISE.value)
    if jax.process_index():
        return
    pixels, _ = quantise(np.asarray(images))
    if PROMPT.value:
        captions = np.repeat(PROMPT.value, NUM_IMAGES.value).tolist()
        sheet = captioned_grid(pixels, captions, min(NUM_IMAGES.value, 10) if len(PROMPT.value) > 1 else 8)
    else:
        sheet = class_columns(pixels, labels, names)
    save_png(out / "samples.png", sheet)
    write_samples(out / "samples.npz", pixels, labels)
    print(f"{out / 'samples.png'}\n{out / 'samples.npz'}")


def main(argv: Sequence[str]) -> int:
    """Draws and writes; returns 1 if every image is bad."""
    guidance, decoder = cli.guidance(GUIDANCE.value or 0.0), cli.decoder()
    distributed = cli.join_processes()
    end_at_signals()  # JAX may have taken SIGTERM
    name, place = cli.model_name()
    pipe = cli.open_pipeline(name, make_mesh() if distributed else None, sequences=True)
    labels = chosen_labels(pipe.config.num_classes, pipe.label_names)
    out = epath.Path(cli.folder("out") if OUT.value else epath.Path(place) / "samples")
    if CONDITION.value and not pipe.config.is_sequence:
        raise UserError("--condition is for a flow of sequences; this one is of images")
    if PROMPT.value or pipe.config.image_bits == 0:
        if pipe.config.has_prefix and not PROMPT.value:
            raise UserError('this flow draws from captions; give it one, --prompt="…"')
        draw_captions(TextToImage.from_flow(pipe, name), decoder, out)
        return 0
    if pipe.config.is_sequence:
        draw_sequences(pipe, labels, guidance, decoder, out / "samples.npz")
        return 0
    latents = pipe.latents(jax.random.key(SEED.value), NUM_IMAGES.value)
    trace = pipe.decode_trace(latents, labels, guidance, decoder, pipe.sampling_noise_std)
    frames = list(np.moveaxis(np.asarray(trace.trajectory), 1, 0))
    if cli.draws_clean_images():
        frames.append(np.asarray(trace.images))
    elif DENOISE.value or (DENOISE.value is None and pipe.noise_std is not None):
        frames += denoised(pipe, trace.images, labels)
    if jax.process_index():
        return 0
    pixels, bad = quantise(frames[-1])
    bad |= (np.abs(np.nan_to_num(frames[-1])) > PIXEL_WARN_LIMIT).any((1, 2, 3))
    save_png(out / "samples.png", class_columns(pixels, labels, pipe.label_names))
    save_gif(out / "trajectory.gif", [grid(to_uint8(frame)) for frame in frames])
    write_samples(out / "samples.npz", pixels, labels)
    print(*(out / name for name in ("samples.png", "samples.npz", "trajectory.gif")), sep="\n")
    if pipe.config.image_bits > 8:
        print("these files have 8 bits; TarFlowPipeline.sample returns floats", file=sys.stderr)
    if bad.any():
        cure = "use less guidance, or train longer" if guidance.weight else "the flow needs more training"
        outside = "images have pixels that are not finite or far outside [-1, 1]"
        print(f"{bad.sum()} of {len(bad)} {outside}; {cure}", file=sys.stderr)
    return cli.EXIT_ERROR if bad.all() else 0


if __name__ == "__main__":
    cli.run(main)
