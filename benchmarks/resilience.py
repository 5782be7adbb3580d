"""Measures the cost of a checkpoint every hundred steps and of the input pipeline, as shares of a training step.

    python -m benchmarks.resilience --recipe=fashion_mnist [--steps=20] [--repeats=7]

Alternates three short runs of the recipe's step: on one batch that stays on the device, on batches from the data, and
on batches from the data with a checkpoint that starts at the first step. Reports the checkpoint's added time as a share
of a hundred steps; in runs of a hundred steps, noise would hide it.
"""

import argparse
import importlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import common
from tarflow_jax.data import Batch, prefetch_to_device, train_batches
from tarflow_jax.runtime import LocalBatch, use_cores_as_devices
from tarflow_jax.training import Checkpoints, Recipe
from tarflow_jax.training.step import compiled_step, new_state

CHECKPOINT_EVERY = 100


class Trainer:
    """Trains a recipe a few steps at a time."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        fields, data = recipe.config.train, recipe.config.data
        self.mesh, self.key = recipe.mesh(), jax.random.key(0)
        self.step = compiled_step(recipe.train_config, self.mesh)
        self.state = new_state(recipe.train_config, self.mesh, self.key)
        rows = LocalBatch(self.mesh, fields.batch_size)

        def put(batch: Batch) -> tuple[jax.Array, jax.Array]:
            return rows.put(batch.image), rows.put(batch.label)

        batches = train_batches(
            recipe.source("train"),
            batch_size=fields.batch_size,
            seed=0,
            flip=data.flip,
            rows=rows.local,
            num_workers=data.num_workers,
        )
        self.batches = prefetch_to_device(batches, put)
        self.fixed = next(self.batches)
        self.config = json.loads(recipe.to_json())
        self.checkpoints = Checkpoints(folder)
        self.taken = 0

    def run(self, steps: int, *, read: bool, save: bool) -> Callable[[], Any]:
        """Returns a function that takes `steps` steps and returns the last metrics."""

        def steps_taken() -> Any:
            before: dict[str, Any] | None = None
            for i in range(steps):
                batch = next(self.batches) if read else self.fixed
                self.state, metrics = self.step(self.state, *batch, self.key)
                self.taken += 1
                if save and i == 0:
                    self.checkpoints.save(self.taken, self.state, self.config)
                if before is not None:
                    np.asarray(before["loss"])  # waits one step behind, like the training loop
                before = metrics
            if save:
                self.checkpoints.wait()  # keeps its cost out of the next run
            return metrics

        return steps_taken


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="fashion_mnist", help="a file of configs/")
    parser.add_argument("--steps", type=int, default=20, help="steps per run")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each kind")
    parser.add_argument("--json", metavar="FILE", help="where to write the figures")
    args = parser.parse_args()
    config = importlib.import_module(f"configs.{args.recipe}").get_config()
    use_cores_as_devices(config.train.batch_size // config.train.accumulation)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(Recipe(config), Path(folder) / "checkpoints")
        runs = {
            "one batch": trainer.run(args.steps, read=False, save=False),
            "batches from the data": trainer.run(args.steps, read=True, save=False),
            "and a checkpoint": trainer.run(args.steps, read=True, save=True),
        }
        figures = common.time_in_turns(runs, args.repeats)
        trainer.checkpoints.close()
    images = args.steps * config.train.batch_size
    print(common.table(f"{args.recipe}, runs of {args.steps} steps", figures, images, None))
    one, read, saved = (row["median_s"] for row in figures.values())
    print(f"  input pipeline: {read / one - 1:+.1%} of a step (goal: under 2 %)")
    share = (saved - read) / (read * CHECKPOINT_EVERY / args.steps)
    print(f"  a checkpoint every {CHECKPOINT_EVERY} steps: {share:+.1%}, {saved - read:+.2f} s each (goal: under 3 %)")
    if args.json:
        common.write_json(args.json, {args.recipe: figures})


if __name__ == "__main__":
    main()
