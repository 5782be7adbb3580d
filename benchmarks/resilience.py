"""What a checkpoint every hundred steps costs, and the input pipeline: shares of a training step, in one run.

    python -m benchmarks.resilience --recipe=fashion_mnist [--steps=20] [--repeats=7]

Three runs of the recipe's own step take turns: on one batch that stays on the device, on batches from the data, and
the same with a checkpoint at the first step, written and sealed while the others are taken. What the checkpoint adds
to such a run is told as a share of a hundred steps: a machine's noise over a hundred would hide it.
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
from tarflow_jax.runtime import Rows, split_cpu
from tarflow_jax.training import Checkpoints, Recipe
from tarflow_jax.training.step import recipe_state, recipe_step

CHECKPOINT_EVERY = 100


class Trainer:
    """A recipe's training, some steps at a time."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        fields, data = recipe.config.train, recipe.config.data
        self.mesh, self.key = recipe.mesh(), jax.random.key(0)
        self.step, _ = recipe_step(recipe, self.mesh)
        self.state = recipe_state(recipe, self.mesh, self.key)
        rows = Rows(self.mesh, fields.batch_size)

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
        """A function that takes `steps` steps and returns the last metrics."""

        def steps_taken() -> Any:
            before: dict[str, Any] | None = None
            for i in range(steps):
                batch = next(self.batches) if read else self.fixed
                with jax.set_mesh(self.mesh):
                    self.state, metrics = self.step(self.state, *batch, self.key)
                self.taken += 1
                if save and i == 0:
                    self.checkpoints.save(self.taken, self.state, self.config)
                if before is not None:
                    np.asarray(before["loss"])  # one step behind, as the loop does
                before = metrics
            if save:
                self.checkpoints.wait()  # so that the next run does not pay for this one
            return metrics

        return steps_taken


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="fashion_mnist", help="a file of configs/")
    parser.add_argument("--steps", type=int, default=20, help="of a run")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each")
    parser.add_argument("--json", metavar="FILE", help="where to write the figures")
    args = parser.parse_args()
    config = importlib.import_module(f"configs.{args.recipe}").get_config()
    split_cpu(config.train.batch_size // config.train.accumulation)
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
