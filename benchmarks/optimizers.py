"""Runs trials of optimizers, schedules and network variants: one row per run, for docs/lab/optimizers.md.

    python -m benchmarks.optimizers --queue=QUEUE.jsonl [--rows=docs/results/optimizers.jsonl]

A trial is a line {"name", "recipe", "overrides", "seeds", "test_images"}: the recipe as `--config` takes it, dotted
fields of its config, and the number of test images to measure (0: all). Runs follow the queue's order, each in its own
process; the queue is read again after each, and runs that have a row are skipped. A row holds the fields that differ
from the recipe, the loss in about 20 windows of the steps, the test figure, matmul FLOPs and seconds per step, and for
digits a classifier's accuracy on the samples.
"""

import argparse
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import json_lines

WINDOWS = 20
WARM_UP = 5  # steps before the clock starts
HOPELESS = 20.0  # a loss


def config_of(recipe: str, overrides: dict[str, Any]) -> Any:
    """The config of configs/NAME.py[:VARIANT] with dotted fields changed."""
    name, _, variant = recipe.partition(":")
    config = importlib.import_module(f"configs.{name}").get_config(variant)
    config.model.unlock()  # fields of TarFlowConfig that recipes leave alone
    with config.ignore_type():  # one depth for all blocks, or one each
        config.update_from_flattened_dict(
            {key: tuple(value) if isinstance(value, list) else value for key, value in overrides.items()}
        )
    return config


def run_trial(trial: dict[str, Any], seed: int) -> dict[str, Any]:
    """Trains, evaluates, and returns the row."""
    import jax

    from benchmarks.digits_classifier import reads
    from tarflow_jax.likelihood import LOG_2PI
    from tarflow_jax.pipeline import TarFlowPipeline
    from tarflow_jax.runtime import BatchRunner
    from tarflow_jax.scoring import dataset_log_prob, loss_of
    from tarflow_jax.training import Recipe

    config = config_of(trial["recipe"], trial["overrides"])
    config.train.seed = seed
    recipe = Recipe(config)
    *curve, last = training(recipe)
    row: dict[str, Any] = {**trial, "seed": seed, **last, "curve": curve}
    variables = row.pop("variables")
    row["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    row["diverged"] = not np.isfinite(curve[-1]["loss"]) or curve[-1]["loss"] > HOPELESS
    if row["diverged"]:
        return row
    source, runner = recipe.source("test"), BatchRunner(recipe.mesh())
    log_probs = dataset_log_prob(runner, recipe.model, variables, source, recipe.noise, jax.random.key(0))
    count = trial.get("test_images", 0) or len(source)
    row["test_loss"] = loss_of(log_probs[:count], recipe.model.num_dims)
    if recipe.noise.kind == "uniform":
        row["bits_per_dim"] = float((row["test_loss"] + 0.5 * LOG_2PI + np.log(128)) / np.log(2))
    if config.data.source == "digits" and recipe.model.num_classes:
        row |= reads(TarFlowPipeline(recipe.model, variables, recipe.noise))
    return row


def training(recipe: Any) -> Iterator[dict[str, Any]]:
    """A point of the curve for each window of the steps; last the variables, and what is known of a step."""
    import jax

    from tarflow_jax.data import prefetch_to_device, train_batches
    from tarflow_jax.planning.flops import program_flops
    from tarflow_jax.runtime import LocalBatch, use_cores_as_devices, use_mesh
    from tarflow_jax.training.loop import run_keys
    from tarflow_jax.training.step import compiled_step, jitted_step, new_state

    fields = recipe.config.train
    use_cores_as_devices(fields.batch_size // fields.accumulation)
    mesh = recipe.mesh()
    init_key, key = run_keys(fields.seed)
    state, step = new_state(recipe.train_config, mesh, init_key), compiled_step(recipe.train_config, mesh)
    rows = LocalBatch(mesh, fields.batch_size)
    batches = train_batches(
        recipe.source("train"), batch_size=fields.batch_size, seed=fields.seed, flip=recipe.config.data.flip
    )
    window = max(fields.num_steps // WINDOWS, 1)
    metrics: list[dict[str, jax.Array]] = []
    flops, began, number = 0.0, time.perf_counter(), 0
    for images, labels in prefetch_to_device(batches, lambda batch: (rows.put(batch.image), rows.put(batch.label))):
        if not flops:
            with use_mesh(mesh):
                flops = program_flops(jitted_step(recipe.train_config, mesh).trace(state, images, labels, key).jaxpr)
        state, of_step = step(state, images, labels, key)
        metrics.append(of_step)
        number += 1
        if number == WARM_UP:
            jax.block_until_ready(state)
            began = time.perf_counter()
        if number % window == 0 or number == fields.num_steps:
            losses, norms = (np.array([m[name] for m in metrics]) for name in ("loss", "grad_norm"))
            point = {"step": number, "loss": float(losses.mean()), "worst_loss": float(losses.max())}
            point |= {"grad_norm": float(np.median(norms)), "worst_grad_norm": float(norms.max())}
            metrics = []
            print(point, flush=True)
            yield point
            if number == fields.num_steps or not point["loss"] < HOPELESS:
                break
    seconds = (time.perf_counter() - began) / max(number - WARM_UP, 1)
    yield {
        "variables": state.sampling_variables,
        "steps": number,
        "images": number * fields.batch_size,
        "flops_per_step": flops,
        "seconds_per_step": seconds,
    }


def next_run(queue: Path, rows: Path) -> tuple[dict[str, Any], int] | None:
    """The first trial and seed without a row."""
    done = {(row["name"], row["seed"]) for row in json_lines(rows)}
    for trial in json_lines(queue):
        for seed in trial.pop("seeds", [0]):
            if (trial["name"], seed) not in done:
                return trial, seed
    return None


def main() -> None:
    """Works through the queue, or does the one run that --run names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queue", type=Path, help="trials, one a line")
    parser.add_argument("--rows", type=Path, default=Path("docs/results/optimizers.jsonl"), help="appended to")
    parser.add_argument("--run", nargs=2, metavar=("TRIAL", "SEED"), help="a trial as JSON, in this process")
    args = parser.parse_args()
    if args.run:
        trial, seed = json.loads(args.run[0]), int(args.run[1])
        git = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()  # before, not after
        row = run_trial(trial, seed) | {"commit": commit}
        with args.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return
    while found := next_run(args.queue, args.rows):
        trial, seed = found
        print(f"== {trial['name']} seed {seed}", flush=True)
        command = [sys.executable, "-m", "benchmarks.optimizers", "--rows", str(args.rows)]
        code = subprocess.run([*command, "--run", json.dumps(trial), str(seed)]).returncode
        if code:  # recorded, so that the queue goes on
            with args.rows.open("a") as file:
                file.write(json.dumps({**trial, "seed": seed, "error": code}) + "\n")


if __name__ == "__main__":
    main()
