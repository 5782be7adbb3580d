"""Plots the rows of benchmarks/optimizers.py: test bits/dim against FLOPs by width, and losses by steps.

python -m benchmarks.optimizers_plot --rows=docs/results/widths.jsonl --out=docs/results/optimizers_widths.png

For each width and optimizer, the learning rate with the lowest test figure is prominent; the others are faint.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from tarflow_jax.likelihood import LOG_2PI, bits_per_dim

COLOURS = {"adamw": "tab:orange", "muon": "tab:blue"}


def to_bits(loss: float) -> float:
    """Bits/dim of a loss, with uniform noise."""
    return bits_per_dim(-(loss + 0.5 * LOG_2PI), 1)


def optimizer(row: dict[str, Any]) -> str:
    """Its name; the recipe's own is muon."""
    return row["overrides"].get("optimizer.name", "muon")


def tera(row: dict[str, Any]) -> float:
    """TFLOP of the run's products."""
    return row["flops_per_step"] * row["steps"] / 1e12


def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best row of each width, in order."""
    widths = sorted({row["overrides"]["model.width"] for row in rows})
    return [
        min((row for row in rows if row["overrides"]["model.width"] == width), key=lambda row: row["bits_per_dim"])
        for width in widths
    ]


def main() -> None:
    """Draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = [row for row in map(json.loads, args.rows.read_text().splitlines()) if "bits_per_dim" in row]
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    by_flops, by_step = figure.subplots(1, 2)
    for name, colour in COLOURS.items():
        of = [row for row in rows if optimizer(row) == name]
        flops = [tera(row) for row in of]
        by_flops.plot(flops, [row["bits_per_dim"] for row in of], "o", color=colour, alpha=0.25, ms=4)
        chosen = best(of)
        flops = [tera(row) for row in chosen]
        by_flops.plot(flops, [row["bits_per_dim"] for row in chosen], "o-", color=colour, label=name)
        for row, x in zip(chosen, flops, strict=True):
            width = row["overrides"]["model.width"]
            by_flops.annotate(str(width), (x, row["bits_per_dim"]), (4, 4), textcoords="offset points", fontsize=8)
            curve = row["curve"]
            bits = [to_bits(point["loss"]) for point in curve]
            shade = 0.35 + 0.65 * width / 256
            by_step.plot([point["step"] for point in curve], bits, color=colour, alpha=shade, label=f"{name}, {width}")
    by_flops.set(xscale="log", xlabel="TFLOP of the run's products", ylabel="test bits/dim")
    by_flops.xaxis.set_minor_formatter(NullFormatter())
    by_flops.set_xticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
    by_step.set(xlabel="step", ylabel="training bits/dim", ylim=(None, 6))
    for axes in (by_flops, by_step):
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
    figure.savefig(args.out, dpi=130)


if __name__ == "__main__":
    main()
