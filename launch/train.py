"""Trains a TarFlow; to continue a run, run the same command again.

python -m launch.train --config=configs/digits.py --workdir=runs/digits [--config.train.num_steps=…]

On several hosts, or as several processes: the same command with --distributed in each.
"""

import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from etils import epath
from ml_collections import config_flags

from launch import cli
from launch.showcase import showcase
from tarflow_jax.figures import class_rows, save_png, to_uint8
from tarflow_jax.likelihood import LOG_2PI
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.runtime import PreemptionGuard
from tarflow_jax.sampling import Guidance
from tarflow_jax.training import Recipe, train
from tarflow_jax.training.loop import evaluate_loss
from tarflow_jax.training.recipe import label_names
from tarflow_jax.training.workdir import write_results

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Train this recipe: configs/digits.py, or a variant, configs/digits.py:smoke."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, local or gs://; created if missing.")
cli.define_process_flags()
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: Sequence[str]) -> None:
    """Trains, draws figures and prints a table."""
    begin = time.perf_counter()
    config, workdir = CONFIG.value, epath.Path(cli.folder("workdir"))
    cli.join_processes()
    recipe = Recipe(config)
    guidance = Guidance(**config.sample.guidance)
    # Reject before training what would be rejected after it.
    guidance.checked_for(recipe.model)
    recipe.source("test")
    figures = workdir / "figures"

    def preview(step: int, variables: dict[str, Any]) -> None:
        pipe = TarFlowPipeline(recipe.model, variables, recipe.noise, mesh=recipe.mesh())
        labels = cli.example_labels(pipe.config.num_classes, 64)
        images = pipe.sample(jax.random.key(0), 64, labels, guidance)
        if jax.process_index() == 0:
            save_png(figures / f"step_{step:07d}.png", class_rows(to_uint8(images), labels, label_names(workdir)))

    state = train(config, workdir, preview)
    variables = state.sampling_variables
    with PreemptionGuard():
        test_loss = evaluate_loss(recipe, variables)
        pipe = TarFlowPipeline(recipe.model, variables, recipe.noise, mesh=recipe.mesh())
        names, multiplier = label_names(workdir), config.sample.denoise_multiplier
        paths = showcase(pipe, figures, guidance, denoise_multiplier=multiplier, names=names)
    if jax.process_index():
        return
    write_results(workdir, {"test loss (nats/dim, less ½ log 2π)": test_loss})  # last: the run is complete
    rows = {
        "steps": int(state.step),
        **({"classes": ", ".join(names[:20]) + ", …" * (len(names) > 20)} if names else {}),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        "test loss (nats/dim, less ½ log 2π)": f"{test_loss:.4f}",
        "nats/dim of noisy data": f"{test_loss + LOG_2PI / 2:.4f}",
        "minutes": f"{(time.perf_counter() - begin) / 60:.1f}",
        "metrics": workdir / "metrics.jsonl",
        **{path.stem: path for path in paths},
    }
    print("\n".join(f"{name:<22} {value}" for name, value in rows.items()))


if __name__ == "__main__":
    cli.run(main)
