"""Checks a plan's memory against a GPU's, within 10 %, and measures the MFU to pass to launch.plan as --mfu.

    python -m benchmarks.plan_check imagenet64_cond --batch_size=64 [--config.train.accumulation=2 …]

Runs launch.plan for the GPUs of this machine, then the recipe's training step on them with random images. Exits with 1
if the memory differs. The device must report its peak memory, which CPUs do not.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import common
from tarflow_jax.planning.topology import GPUS
from tarflow_jax.runtime import batch_sharding
from tarflow_jax.training import Recipe
from tarflow_jax.training.step import compiled_step, new_state

TOLERANCE = 0.1  # of the memory


def plan(name: str, topology: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Returns the figures of launch.plan, run in another process because this one's JAX has the real devices."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.jsonl"
        flags = [f"--config=configs/{name}.py", f"--topology={topology}", f"--json={file}", *overrides]
        subprocess.run([sys.executable, "-m", "launch.plan", *flags], check=True)
        return json.loads(file.read_text())


def measure(name: str, overrides: dict[str, Any], repeats: int) -> tuple[int, float]:
    """Returns the fullest device's peak bytes and a step's median seconds, of the recipe on all devices here."""
    config = importlib.import_module(f"configs.{name}").get_config()
    config.update_from_flattened_dict(overrides)
    recipe = Recipe(config)
    mesh, key = recipe.mesh(jax.devices()), jax.random.key(0)
    count, rng = config.train.batch_size, np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *recipe.model.image_shape), np.uint8)
    labels = rng.integers(0, max(recipe.model.num_classes, 1), count).astype(np.int32)
    batch = jax.device_put((images, labels), batch_sharding(mesh))
    step, state = compiled_step(recipe.train_config, mesh), [new_state(recipe.train_config, mesh, key)]

    def run() -> object:
        state[0], metrics = step(state[0], *batch, key)
        return state[0], metrics

    figures = common.time_in_turns({"step": run}, repeats)["step"]
    peaks = [(device.memory_stats() or {})["peak_bytes_in_use"] for device in jax.devices()]
    return max(peaks), figures["median_s"]


def verdict(figures: dict[str, Any], peak_bytes: int, seconds: float) -> tuple[str, bool]:
    """Returns a plan's figures beside what was measured, as text, and whether the plan holds."""
    planned = sum(figures["state_bytes"].values()) + figures["temporary_bytes"] + figures["code_bytes"]
    holds = abs(peak_bytes / planned - 1) <= TOLERANCE
    mfu = figures["model_flops"] / (figures["device_flops"] * seconds)
    lines = [
        f"memory  planned {planned / 2**30:.2f} GiB, measured {peak_bytes / 2**30:.2f} GiB, "
        f"{peak_bytes / planned - 1:+.1%}" + ("" if holds else ": more than 10 % apart"),
        f"a step  {seconds * 1e3:.1f} ms, {mfu:.0%} MFU",
    ]
    return "\n".join(lines), holds


def main() -> int:
    """Plans, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a module of configs")
    parser.add_argument("--batch_size", type=int, required=True, help="images a step, that fit the devices here")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps")
    args, others = parser.parse_known_args()
    overrides = {"train.batch_size": args.batch_size}
    for flag in others:
        field, _, value = flag.removeprefix("--config.").partition("=")
        overrides[field] = int(value) if value.isdigit() else value
    kind = jax.devices()[0].device_kind
    name = next((name for name in GPUS if kind.startswith(f"NVIDIA {name.upper()}")), None)
    if name is None:
        parser.error(f"this is {kind}; expected one of {', '.join(GPUS)}")
    flags = [f"--config.{field}={value}" for field, value in overrides.items()]
    figures = plan(args.recipe, f"{name}:{jax.device_count()}", flags)
    text, holds = verdict(figures, *measure(args.recipe, overrides, args.repeats))
    print(text)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
