"""Shared by benchmarks: shapes, FLOPs, alternating timings, tables and their JSON, and calls of launch.evaluate."""

import argparse
import csv
import dataclasses
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.flow import TarFlowConfig
from tarflow_jax.planning import known_chip


class Shape(NamedTuple):
    """What is timed: a model, and a step's images and microbatches."""

    model: TarFlowConfig
    batch: int
    accumulation: int = 1


# Named patch-width-blocks-layers. "remat" and microbatches as the recipes have them: on a CPU, computing again is
# faster than keeping, and few images at a time are faster than many.
SHAPES = {
    "fashion_mnist": Shape(TarFlowConfig(28, 1, 4, 128, 4, 4, num_classes=10, remat="full"), 128, accumulation=4),
    "colour64": Shape(TarFlowConfig(64, 3, 8, 256, 4, 4, remat="full"), 32),
    "deep": Shape(TarFlowConfig(28, 1, 4, 128, 8, 8, num_classes=10, remat="full"), 32),
    "imagenet64": Shape(TarFlowConfig(64, 3, 2, 768, 8, 8, num_classes=1000, dtype="bfloat16"), 64),
}
Run = Callable[[], object]


def parse(documentation: str | None, **extra: dict) -> argparse.Namespace:
    """The command line that both benchmarks share, and options of their own."""
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="fashion_mnist", help="model and batch")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the products; else the shape's")
    parser.add_argument("--reference", metavar="DIR", help="a checkout of apple/ml-tarflow to time beside ours")
    parser.add_argument("--peer", choices=["transformer-flows"], help="a package to time beside ours")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each")
    parser.add_argument("--json", metavar="FILE", help="where to write the figures")
    for name, options in extra.items():
        parser.add_argument(f"--{name}", **options)
    return parser.parse_args()


def shape(args: argparse.Namespace, **changes: str | None) -> Shape:
    """What the command line names; `changes` of the model that are None change nothing."""
    chosen = SHAPES[args.shape]
    changes |= {"dtype": args.dtype or changes.get("dtype")}
    given = {name: value for name, value in changes.items() if value}
    return chosen._replace(model=dataclasses.replace(chosen.model, **given))


def matmul_flops(dtype: str, size: int = 2048) -> float:
    """FLOP/s of one large square product, the best of ten, in this process."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    jax.block_until_ready(product(a))
    return 2.0 * size**3 / min(seconds(lambda: product(a)) for _ in range(10))


def peak_flops(dtype: str) -> tuple[float, str]:
    """(FLOP/s, what they are): the chip's peak where it is known, else the measured rate of a product."""
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    chip = known_chip(kind)
    if chip and dtype == "bfloat16":
        return chip.flops * count, f"{count} x {kind}'s peak"
    return matmul_flops(dtype), "measured matrix product"


def seconds(run: Run) -> float:
    """Of one run, its results on the device included."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def time_in_turns(runs: dict[str, Run], repeats: int) -> dict[str, dict[str, float]]:
    """First call, then medians and quartiles of `repeats` calls; the runs alternate, so that a slow minute hits all."""
    first = {name: seconds(run) for name, run in runs.items()}
    for run in runs.values():
        seconds(run)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run))
    figures = {}
    for name, values in times.items():
        low, median, high = np.percentile(values, [25, 50, 75])
        figures[name] = {"first_s": first[name], "median_s": median, "low_s": low, "high_s": high}
    return figures


def table(title: str, figures: dict[str, dict[str, float]], units: int, rival: str | None) -> str:
    """One line a run: images/s, seconds with their quartiles, first call, and how many times the rival's speed."""
    lines = [title]
    for name, row in figures.items():
        line = (
            f"  {name:24} {units / row['median_s']:9.1f} images/s  {row['median_s']:8.4f} s "
            f"[{row['low_s']:.4f}, {row['high_s']:.4f}]  first {row['first_s']:6.1f} s"
        )
        if rival in figures:
            line += f"  {figures[rival]['median_s'] / row['median_s']:6.2f} x"
        lines.append(line)
    return "\n".join(lines)


def write_json(path: str, results: dict) -> None:
    """The results, with what they were measured on."""
    device = jax.devices()[0]
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{jax.device_count()} x {device.device_kind}",
        "machine": platform.machine(),
    }
    Path(path).write_text(json.dumps({**about, "results": results}, indent=2) + "\n")


def add_row(path: Path, row: dict[str, object]) -> None:
    """Adds a row to a table, which its first row gave the head, and prints it."""
    print(row, flush=True)
    begun = path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if not begun:
            writer.writeheader()
        writer.writerow(row)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, [] if there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def evaluate(*flags: str) -> dict[str, Any]:
    """What launch.evaluate writes with these flags: results, protocol and environment."""
    with tempfile.TemporaryDirectory() as out:
        subprocess.run([sys.executable, "-m", "launch.evaluate", f"--out={out}", *flags], check=True)
        return json.loads(next(Path(out).glob("*.json")).read_text())
