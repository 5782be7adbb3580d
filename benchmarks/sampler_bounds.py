"""How many images/s a recipe's sequential sampler can make at most, against the batch, on chips that are not here.

python -m benchmarks.sampler_bounds --topology=v5e:4x4 --rows=docs/results/sampler_bounds.jsonl
python -m benchmarks.sampler_bounds --topology=h100:8 --rows=docs/results/sampler_bounds.jsonl
python -m benchmarks.sampler_bounds --rows=docs/results/sampler_bounds.jsonl --plot=docs/results/sampler_bounds.png

A row is a program that launch.plan --sampler would compile. Beside its bound stands the ideal one, of a program that
for every token reads each weight once, and of every token before its keys and values once. Rows that are there are
kept.
"""

import argparse
import importlib
import json
import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tarflow_jax.planning import Topology, compile_program, open_topology, prepare, sample_program
from tarflow_jax.runtime.parameters import params_shapes
from tarflow_jax.training import Recipe

RECIPES = ("imagenet64_cond", "imagenet64_uncond", "imagenet64_likelihood", "imagenet128_cond", "afhq256_cond")
BATCHES = (16, 64, 256, 1024, 4096)


def main() -> None:
    """Compiles what is missing, or draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--topology", help="such as v5e:4x4 or h100:8")
    parser.add_argument("--plot", type=Path, help="draw the rows there are")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()] if args.rows.exists() else []
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
    """A row: seconds a batch, by what, and ideally."""
    config = importlib.import_module(f"configs.{name}").get_config()
    config.train.batch_size = images
    recipe = Recipe(config)
    mesh = recipe.mesh(topology.devices)
    plan = compile_program(sample_program(recipe, mesh), recipe, topology, mesh)
    by = max(plan.limits, key=plan.limits.__getitem__) if plan.fits else "does not fit"
    return {
        "recipe": name,
        "topology": topology.name,
        "images": images,
        "fits": plan.fits,
        "seconds": plan.bound if plan.fits else None,
        "by": by,
        "ideal_seconds": ideal_bytes(recipe, images / plan.num_devices) / topology.chip.memory_rate,
        "compile_seconds": round(plan.compile_seconds, 1),
    }


def ideal_bytes(recipe: Recipe, images: float) -> float:
    """Bytes that the sampler of so many images a device reads if it reads nothing twice for a token."""
    model = recipe.model
    size = model.compute_dtype.itemsize
    passes = 2 if recipe.config.sample.guidance.weight else 1
    tokens = model.num_tokens
    kernels = [shape for path, shape in params_shapes(model).items() if path.endswith("/kernel") and "/layers/" in path]
    weights = sum(map(math.prod, kernels))
    keys_and_values = images * passes * sum(model.depths) * 2 * model.width * tokens * (tokens - 1) / 2
    return size * (weights * (tokens - 1) + keys_and_values)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Images/s at most against the batch, a panel a topology; dashed: the ideal."""
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
