"""The pictures of docs/results.md, from the tables in docs/results: python -m benchmarks.results_plots [NAME …].

Points are means over seeds, bars one standard deviation.
"""

import argparse
import csv
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from configs.sweeps import widths as widths_recipe
from tarflow_jax.planning.flops import program_flops
from tarflow_jax.training import Recipe
from tarflow_jax.training.step import abstract_state, compiled_step

FOLDER = Path("docs/results")
DISTANCE = "Fréchet distance (classifier features)"
Row = dict[str, Any]


def table(name: str) -> list[Row]:
    """The rows of a table, numbers as numbers."""

    def value(text: str) -> Any:
        try:
            return float(text)
        except ValueError:
            return text

    with (FOLDER / f"{name}.csv").open(newline="") as file:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def where(rows: list[Row], **fields: Any) -> list[Row]:
    """The rows that have these values; in names of fields `__` stands for a dot."""
    return [row for row in rows if all(row[key.replace("__", ".")] == value for key, value in fields.items())]


def over_seeds(rows: list[Row], x: str, y: str) -> tuple[list[Any], list[float], list[float]]:
    """Every x in order of appearance, with mean and standard deviation of y."""
    groups: dict[Any, list[float]] = {}
    for row in rows:
        groups.setdefault(row[x], []).append(row[y])
    spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in groups.values()]
    return list(groups), [statistics.fmean(values) for values in groups.values()], spread


def line(axes: Axes, rows: list[Row], x: str, y: str, label: str = "", **options: Any) -> None:
    """Means and standard deviations, joined where x is a number."""
    places, means, spread = over_seeds(rows, x, y)
    joined = "-" if all(isinstance(place, float) for place in places) else ""
    order = np.argsort(places) if joined else np.arange(len(places))
    ordered = [np.array(values, dtype=object)[order] for values in (places, means, spread)]
    options = {"marker": "o", "capsize": 3, "linestyle": joined, "ms": 4} | options
    axes.errorbar(ordered[0], ordered[1].astype(float), ordered[2].astype(float), label=label or None, **options)


def floor(axes: Axes) -> None:
    """The distance of real test images, which no samples need be below."""
    _, (of_tests, _), _ = over_seeds(table("bounds"), "images", "distance")
    axes.axhline(of_tests, color="black", ls=":", lw=1, label="real test images")
    axes.set(ylabel="Fréchet distance", ylim=(0, None))


def noise(axes: Axes) -> None:
    """Distance over σ, raw and denoised."""
    rows = table("noise")
    raw, clean = where(rows, denoised="False"), where(rows, denoised="True", denoise_multiplier=1.0)
    line(axes, raw, "noise.std", DISTANCE, "raw")
    line(axes, clean, "noise.std", DISTANCE, "denoised")
    uniform = where(table("dequantisation"), guidance=1.0)
    line(axes, [row | {"noise.std": 1 / 128 / 12**0.5} for row in uniform], "noise.std", DISTANCE, "uniform")
    floor(axes)
    axes.set_xlabel("σ of the training noise")


def multiplier(axes: Axes) -> None:
    """Distance over the multiplier of the score, raw samples at 0."""
    rows = table("noise")
    for std in sorted({row["noise.std"] for row in rows}):
        of_std = [
            row | {"multiplier": row["denoise_multiplier"] if row["denoised"] == "True" else 0.0}
            for row in where(rows, noise__std=std)
        ]
        line(axes, of_std, "multiplier", DISTANCE, f"σ {std:g}")
    floor(axes)
    axes.set_xlabel("multiplier of the score")


def guidance(axes: Axes) -> None:
    """Distance over the weight, by schedule and target."""
    rows = table("guidance")
    unguided = where(rows, guidance=0.0)
    for schedule, target in (("linear", "both"), ("constant", "both"), ("linear", "log_scale"), ("linear", "shift")):
        chosen = where(rows, guidance_schedule=schedule, guidance_target=target)
        chosen = [row for row in chosen if row["guidance"]] + unguided
        line(axes, chosen, "guidance", DISTANCE, f"{schedule}, {target}")
    floor(axes)
    axes.set_xlabel("guidance weight")


def unconditional(axes: Axes) -> None:
    """The same without classes, by temperature."""
    rows = table("unconditional")
    for temperature in sorted({row["attention_temperature"] for row in rows}):
        chosen = [row for row in where(rows, attention_temperature=temperature) if row["guidance"]]
        line(axes, chosen + where(rows, guidance=0.0), "guidance", DISTANCE, f"attention temperature {temperature:g}")
    floor(axes)
    axes.set_xlabel("guidance weight")


def volume(axes: Axes) -> None:
    """Both kinds of affine map."""
    for value, label in (("False", "changes volumes (NVP)"), ("True", "preserves them (VP)")):
        line(axes, where(table("volume"), model__volume_preserving=value), "guidance", DISTANCE, label)
    floor(axes)
    axes.set_xlabel("guidance weight")


def depth(axes: Axes) -> None:
    """Eight layers in blocks."""
    rows = table("depth")
    for blocks in sorted({row["model.num_blocks"] for row in rows}):
        line(axes, where(rows, model__num_blocks=blocks), "guidance", DISTANCE, f"{blocks:g} x {8 / blocks:g}")
    line(axes, table("deep_last"), "guidance", DISTANCE, "1 + 1 + 1 + 5")
    axes.set(yscale="log", xlabel="guidance weight", ylabel="Fréchet distance")


def directions(axes: Axes) -> None:
    """Blocks that alternate, and that do not."""
    alternate = [row | {"directions": "alternate"} for row in where(table("dequantisation"), guidance=0.0)]
    line(axes, alternate + table("directions"), "directions", "bits/dim")
    axes.set_ylabel("bits/dim")
    axes.margins(x=0.4)


def coupling(axes: Axes) -> None:
    """A coupling flow beside ours."""
    ours = [row | {"flow": "TarFlow"} for row in where(table("patches"), model__patch_size=4.0)]
    line(axes, ours + [row | {"flow": "coupling"} for row in table("coupling")], "flow", "bits/dim")
    axes.set_ylabel("bits/dim")
    axes.margins(x=0.4)


def patches(axes: Axes) -> None:
    """Bits/dim by patch size."""
    line(axes, table("patches"), "model.patch_size", "bits/dim")
    axes.set(xlabel="side of a patch", ylabel="bits/dim")


def widths(axes: Axes) -> None:
    """Bits/dim over the products of a run, by width."""
    rows = [row | size_of(int(row["model.width"])) for row in table("widths")]
    line(axes, rows, "flops", "bits/dim", linestyle="")
    for row in {row["model.width"]: row for row in rows}.values():
        text = f"width {row['model.width']:g}\n{row['parameters'] / 1e6:.2f} M"
        axes.annotate(text, (row["flops"], row["bits/dim"]), (8, 4), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", xlabel="FLOPs of a step's products", ylabel="bits/dim")
    axes.margins(x=0.3)


def size_of(width: int) -> Row:
    """Parameters, and FLOPs of a training step's products, of configs/sweeps/widths.py at a width."""
    config = widths_recipe.get_config()
    config.model.width = width
    recipe = Recipe(config)
    mesh, fields = recipe.mesh(), config.train
    state = abstract_state(recipe.train_config, mesh)
    images = jax.ShapeDtypeStruct((fields.batch_size, *recipe.model.image_shape), np.uint8)
    labels = jax.ShapeDtypeStruct((fields.batch_size,), np.int32)
    traced = compiled_step(recipe.train_config, mesh).trace(state, images, labels, jax.random.key(0))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.sampling_variables["params"]))
    return {"parameters": parameters, "flops": program_flops(traced.jaxpr)}


def updates(axes: Axes) -> None:
    """Updates of fixed-point decoding along the training."""
    rows = table("updates")
    for name in [name for name in rows[0] if name.startswith("block ")]:
        line(axes, rows, "step", name, name)
    axes.axhline(rows[0]["most"], color="black", ls=":", lw=1)
    axes.set(xlabel="training step", ylabel="updates to 1e-4", ylim=(0, None))


def density(axes: Axes) -> None:
    """The flow as a classifier and a judge of outliers."""
    rows = table("density")
    shown = {"accuracy": "Bayes' rule,\naccuracy", "AUROC against digits": "AUROC,\ndigits"}
    shown |= {"AUROC against noise": "AUROC,\nnoise"}
    line(axes, [{"x": text, "y": row[key]} for key, text in shown.items() for row in rows], "x", "y")
    axes.set_ylim(0, 1.05)
    axes.margins(x=0.3)


def exactness(axes: Axes) -> None:
    """Errors of the inverse."""
    line(axes, table("exactness"), "dtype", "largest error of the inverse")
    axes.set(yscale="log", ylabel="largest error, [-1, 1] units")
    axes.margins(x=0.4)


FIGURES: tuple[Callable[[Axes], None], ...] = (
    noise, multiplier, guidance, unconditional, volume, depth, directions, coupling, patches, widths, density, updates,
    exactness,
)  # fmt: skip


def main() -> None:
    """Draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of the pictures; all if none is given")
    names = parser.parse_args().names or [draw.__name__ for draw in FIGURES]
    for draw in (draw for draw in FIGURES if draw.__name__ in names):
        figure = Figure(figsize=(5.6, 3.6), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.grid(alpha=0.3, which="both")
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize="small")
        figure.savefig(FOLDER / f"{draw.__name__}.png", dpi=130)


if __name__ == "__main__":
    main()
