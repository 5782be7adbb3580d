"""The tables of docs/scaling.md, out of what launch.plan wrote.

python -m launch.plan --config=configs/imagenet64_uncond.py --topology=v5e:4x4 --json=plans.jsonl   # and others
python -m benchmarks.scaling plans.jsonl
"""

import argparse
import json
from pathlib import Path
from typing import Any

from tarflow_jax.planning.chips import GIB

MFU = 0.4
COLUMNS = (
    "recipe", "chips", "options", "images a step", "state GiB", "temporaries GiB", "of memory", "TFLOP",
    "GB moved", "GB sent", "bound ms", "by", "images/s at most", f"hours at {MFU:.0%}", "chip-hours", "compiled s",
)  # fmt: skip


def main() -> None:
    """Prints a table, a line a plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", type=Path, help="the file that launch.plan --json appended to")
    plans = [json.loads(line) for line in parser.parse_args().plans.read_text().splitlines()]
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for plan in plans:
        print(f"| {' | '.join(row(plan))} |")


def row(plan: dict[str, Any]) -> list[str]:
    """A plan's figures, by `COLUMNS`; bytes, FLOPs and seconds are of one chip and one step."""
    known = ("--config=", "--topology=", "--num_slices=", "--json=")
    options = " ".join(f"`{flag}`" for flag in plan["command"] if not flag.startswith(known))
    (recipe,) = (Path(flag).stem for flag in plan["command"] if flag.startswith("--config="))
    slices = f"{plan['slices']} x " if plan["slices"] > 1 else ""
    state, memory = sum(plan["state_bytes"].values()), plan["device_memory"]
    head = [recipe, f"{slices}{plan['topology']}", options, f"{plan['batch_size']}"]
    if not plan["fits"]:
        return [*head, f"{state / GIB:.2f}", plan["problem"] or "does not fit", *[""] * (len(COLUMNS) - 6)]
    limits, devices, traffic = plan["limits"], plan["devices"], plan["traffic"]
    slowest = max(limits, key=limits.get)
    peak = plan["flops"] / limits["products"]
    seconds = max(plan["model_flops"] / devices / peak / MFU, limits[slowest])
    hours = seconds * plan["num_steps"] / 3600
    sent = sum(collective["bytes"] for collective in traffic["collectives"].values())
    network = sum(collective["network_bytes"] for collective in traffic["collectives"].values())
    return [
        *head,
        f"{state / GIB:.2f}",
        f"{plan['temporary_bytes'] / GIB:.2f}",
        f"{plan['total_bytes'] / memory:.0%}",
        f"{plan['flops'] / 1e12:.2f}",
        f"{traffic['memory_bytes'] / 1e9:.1f}",
        f"{sent / 1e9:.2f}" + (f" + {network / 1e9:.2f}" if plan["slices"] * plan["hosts"] > 1 else ""),
        f"{limits[slowest] * 1e3:.1f}",
        slowest,
        f"{plan['batch_size'] / limits[slowest]:,.0f}",
        f"{hours:,.1f}" if plan["num_steps"] else "",
        f"{hours * devices:,.0f}" if plan["num_steps"] else "",
        f"{plan['compile_seconds']:.0f}",
    ]


if __name__ == "__main__":
    main()
