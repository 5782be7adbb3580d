"""Plots docs/lab/optimizers.md's curves: training losses of some trials by steps and by minutes.

python -m benchmarks.optimizers_curves --rows=docs/results/optimizers_trials.jsonl --out=docs/results/optimizers.png
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.optimizers_plot import to_bits

SHOWN = {
    "w64_muon5e-3_adam3e-3_tri": "Muon, triangular, 32 images",
    "w64_muon5e-3_adam3e-3_tri_grid": "… and grid",
    "w64_muon5e-3_adam3e-3_tri_grid_b16x960": "… 16 images",
    "w64_adamw5e-3_tri_grid_b16x960_in10": "the same with AdamW",
    "w64_adamw3e-3_tri_grid_in10_b8x1900": "AdamW, 8 images",
    "w64_muon5e-3_adam3e-3_tri_grid_in10_b8x1500": "Muon, 8 images",
    "w64_muon3e-3_adam3e-3_tri_grid_in10_b8x1500_rotary": "… and rotary",
}


def main() -> None:
    """Draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = {row["name"]: row for row in map(json.loads, args.rows.read_text().splitlines()) if row["seed"] == 0}
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    by_step, by_minutes = figure.subplots(1, 2, sharey=True)
    for name, label in SHOWN.items():
        row = rows[name]
        steps = [point["step"] for point in row["curve"]]
        bits = [to_bits(point["loss"]) for point in row["curve"]]
        dashes = "--" if "AdamW" in label else "-"
        by_step.plot(steps, bits, dashes, label=label)
        by_minutes.plot([step * row["seconds_per_step"] / 60 for step in steps], bits, dashes)
    by_step.set(xlabel="step", ylabel="training bits/dim", ylim=(3.7, 5.5))
    by_minutes.set(xlabel="minutes of steps")
    by_step.legend(fontsize="small")
    for axes in (by_step, by_minutes):
        axes.grid(alpha=0.3)
    figure.savefig(args.out, dpi=130)


if __name__ == "__main__":
    main()
