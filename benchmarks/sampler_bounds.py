"""Computes roofline upper bounds of the sequential sampler's images/s, by batch size, for chips that may be absent.

python -m benchmarks.sampler_bounds --topology=v5e:4x4 --rows=docs/results/sampler_bounds.jsonl
python -m benchmarks.sampler_bounds --topology=h100:8 --rows=docs/results/sampler_bounds.jsonl
python -m benchmarks.sampler_bounds --rows=docs/results/sampler_bounds.jsonl --plot=docs/results/sampler_bounds.png

A row is for the program that launch.plan --sampler compiles. Beside its bound is that of an ideal program, which for
every token reads each weight, and the keys and values of all earlier tokens, once. Existing rows are kept.
"""

import argparse
import importlib
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure

from benchmarks.common import json_lines
from benchmarks.hlo_traffic import RATES, compiled_text, roofline
from tarflow_jax.planning import Topology, open_topology, prepare
from tarflow_jax.runtime.parameters import params_shapes
from tarflow_jax.training import Recipe

RECIPES = ("imagenet64_cond", "imagenet64_uncond", "imagenet64_likelihood", "imagenet128_cond", "afhq256_cond")
BATCHES = (16, 64, 256, 1024, 4096)


def main() -> None:
    """Compiles missing rows, or plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--topology", help="such as v5e:4x4 or h100:8")
    parser.add_argument("--plot", type=Path, help="plot the rows to this file")
    args = parser.parse_args()
    rows = json_lines(args.rows)
    if args.plot:
        draw(rows, args.plot)
        return
    prepare(args.topology)
    topology = open_topology(args.topology)
    known = {(row["recipe"], row["topology"], row["images"]) for row in rows}
    for recipe in RECIPES:
        for images in BATCHES:
            if (recipe, args.topology, images) not in known:
                row = json.dumps(measure(recipe, topology, images))
                print(row, flush=True)
                with args.rows.open("a") as file:
                    file.write(row + "\n")


def measure(name: str, topology: Topology, images: int) -> dict[str, Any]:
    """Returns a row: seconds per batch at least, what sets them, and those of the ideal program."""
    config = importlib.import_module(f"configs.{name}").get_config()
    config.train.batch_size = images
    recipe = Recipe(config)
    begin = time.process_time()
    try:
        bound = roofline(*compiled_text(recipe, topology, sampler=True), topology)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        bound = {}
    memory_rate, _ = next(rates for kind, rates in RATES.items() if topology.devices[0].device_kind.startswith(kind))
    return {
        "recipe": name,
        "topology": topology.name,
        "images": images,
        "fits": bool(bound),
        "seconds": max(bound.values(), default=None),
        "by": max(bound, key=bound.__getitem__, default="does not fit"),
        "ideal_seconds": ideal_bytes(recipe, images / len(topology.devices)) / memory_rate,
        "compile_seconds": round(time.process_time() - begin, 1),
    }


def ideal_bytes(recipe: Recipe, images: float) -> float:
    """Returns the bytes that a device reads for `images` if it reads nothing twice for a token."""
    model = recipe.model
    size = model.compute_dtype.itemsize
    passes = 2 if recipe.config.sample.guidance.weight else 1
    tokens = model.num_tokens
    kernels = [shape for path, shape in params_shapes(model).items() if path.endswith("/kernel") and "/layers/" in path]
    weights = sum(map(math.prod, kernels))
    keys_and_values = images * passes * sum(model.depths) * 2 * model.width * tokens * (tokens - 1) / 2
    return size * (weights * (tokens - 1) + keys_and_values)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plots images/s at most by batch size, one panel per topology; the ideal program is dashed."""
    topologies = list(dict.fromkeys(row["topology"] for row in rows))
    figure = Figure(figsize=(5.5 * len(topologies), 4.4), layout="constrained")
    for axes, topology in zip(figure.subplots(1, len(topologies), squeeze=False)[0], topologies, strict=True):
        for number, name in enumerate(RECIPES):
            fitting = [r for r in rows if (r["recipe"], r["topology"], r["fits"]) == (name, topology, True)]
            if len(fitting) < 2:
                continue
            fitting.sort(key=lambda row: row["images"])
            images = [row["images"] for row in fitting]
            axes.plot(images, [r["images"] / r["seconds"] for r in fitting], "o-", color=f"C{number}", label=name, ms=4)
            axes.plot(images, [r["images"] / r["ideal_seconds"] for r in fitting], "--", color=f"C{number}", lw=1)
        axes.set(xscale="log", yscale="log", xlabel="images a batch", ylabel="images/s at most", title=topology)
        axes.set_xticks(BATCHES, list(map(str, BATCHES)))
        axes.grid(alpha=0.3)
    max(figure.axes, key=lambda axes: len(axes.lines)).legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
