"""Prints plans as a Markdown table.

python -m launch.plan --config=configs/imagenet64_uncond.py --topology=v5e:4x4 --json=plans.jsonl   # and others
python -m benchmarks.scaling plans.jsonl
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

MFU = 0.4
COLUMNS = (
    "recipe", "devices", "options", "images per step", "state GiB", "temporaries GiB", "of memory", "TFLOP",
    f"hours at {MFU:.0%} MFU", "device-hours",
)  # fmt: skip


def main() -> None:
    """Prints the table, a line per plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", type=Path, help="file that launch.plan --json appended to")
    plans = [json.loads(line) for line in parser.parse_args().plans.read_text().splitlines()]
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for plan in plans:
        print(f"| {' | '.join(row(plan))} |")


def row(plan: dict[str, Any]) -> list[str]:
    """Returns a plan's figures in the order of `COLUMNS`; bytes and FLOPs are those of one device and step."""
    known = ("--config=", "--topology=", "--num_slices=", "--json=")
    options = " ".join(f"`{flag}`" for flag in plan["command"] if not flag.startswith(known))
    (recipe,) = (Path(flag).stem for flag in plan["command"] if flag.startswith("--config="))
    slices = "".join(f"{flag.partition('=')[2]} x " for flag in plan["command"] if flag.startswith("--num_slices="))
    state, temporary = sum(plan["state_bytes"].values()), plan["temporary_bytes"]
    used = (state + temporary + plan["code_bytes"]) / plan["device_memory"]
    hours = math.nan
    if plan["num_steps"] and plan["device_flops"]:
        hours = plan["model_flops"] / (plan["device_flops"] * MFU) * plan["num_steps"] / 3600
    return [
        recipe,
        f"{slices}{plan['topology']}",
        options,
        f"{plan['batch_size']:,}",
        f"{state / 2**30:.2f}",
        "does not fit" if math.isnan(temporary) else f"{temporary / 2**30:.2f}",
        "" if math.isnan(used) else f"{used:.0%}",
        f"{plan['flops'] / 1e12:.2f}",
        "" if math.isnan(hours) else f"{hours:,.1f}",
        "" if math.isnan(hours) else f"{hours * math.prod(plan['mesh'].values()):,.0f}",
    ]


if __name__ == "__main__":
    main()
