"""Makes a ready-made model, models/NAME, from a finished run, and measures it.

    python -m benchmarks.ready_made emoji64 --workdir=runs/emoji64 --dtype=bfloat16 \
        --command="python -m launch.train --config=configs/emoji64_levels.py --workdir=runs/emoji64"

Its card has the headline figure (benchmarks/headline.py). tests/data/ready_made.npz gets two samples of the model and
their log p, for the tests. Without --workdir, only these are made, of a model that exists.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from benchmarks import headline
from launch.cli import example_labels
from tarflow_jax import TarFlowPipeline, TextToImage
from tarflow_jax.text import WordVectors, words_of
from tarflow_jax.training import Recipe

RECORDED, PICTURE = Path("tests/data/ready_made.npz"), "samples.png"


def save(name: str, workdir: Path, dtype: str, command: str) -> None:
    """Writes the folder, measures it, and writes it again with the figures."""
    flow, folder = TarFlowPipeline.from_pretrained(workdir), Path("models", name)
    model = flow if flow.config.image_bits else TextToImage.from_flow(flow, workdir)
    if isinstance(model, TextToImage) and isinstance(model.text, WordVectors):
        model.text = with_words_of(model.text, Recipe.from_workdir(workdir).source("train").captions)
    start = json.loads((workdir / "starts.jsonl").read_text().splitlines()[-1])
    machine = "{cores} core(s) of an {processor}, JAX {jax}, commit {commit:.7}, {time:.10}".format(**start)
    training = {**flow.card["training"], "command": command, "machine": machine}
    card: dict[str, Any] = {"name": name, "training": training}
    model.save_pretrained(folder, dtype=dtype, card=card)
    if name in headline.MODELS:
        claim, rows = headline.MODELS[name], headline.measured(name, seeds=3)
        figure = (
            f"{claim.figure}, launch.evaluate {' '.join(claim.flags)}, seeds {', '.join(str(r['seed']) for r in rows)}"
        )
        found = {figure: ", ".join(f"{headline.figure_of(row):.4g}" for row in rows)}
        model.save_pretrained(folder, dtype=dtype, card=card | {"metrics": {**flow.card["metrics"], **found}})
    with Image.open(folder / PICTURE) as picture:  # 256 colours are a third of the bytes
        picture.quantize(256).save(folder / PICTURE, optimize=True)


def with_words_of(text: WordVectors, captions: Iterable[Sequence[str]]) -> WordVectors:
    """The vectors of the captions' words alone, for a small file."""
    used = {word for wordings in captions for caption in wordings for word in words_of(caption)}
    kept = [row for row, word in enumerate(text.words) if word in used]
    return WordVectors(tuple(text.words[row] for row in kept), text.table[kept], text.length)


def draw(pipe: TarFlowPipeline) -> dict[str, np.ndarray]:
    """Draws two images or sequences, float32 [2, …], and computes their log p, float32 [2]."""
    config, labels = pipe.config, example_labels(pipe.config.num_classes, 2)
    condition = np.zeros((2, *config.condition_shape), np.float32) if config.condition_dim else None
    samples = pipe.sample(jax.random.key(0), 2, labels, denoise=False, condition=condition)
    log_prob = pipe.log_prob(samples, labels, pipe.sampling_noise_std, condition)
    return {"samples": np.asarray(samples), "log_prob": np.asarray(log_prob)}


def record(name: str) -> None:
    """Adds what a model draws, and its log p, to those that the tests compare."""
    drawn = draw(TarFlowPipeline.from_pretrained(name))
    with np.load(RECORDED) as file:
        others = {key: value for key, value in file.items() if not key.startswith(f"{name}/")}
    np.savez_compressed(RECORDED, **others, **{f"{name}/{key}": value for key, value in drawn.items()})


def main() -> None:
    """Makes one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the model")
    parser.add_argument("--workdir", type=Path, help="of the run")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    parser.add_argument("--command", default="", help="that trained it, for the card")
    args = parser.parse_args()
    if args.workdir:
        save(args.name, args.workdir, args.dtype, args.command)
    record(args.name)


if __name__ == "__main__":
    main()
