"""Measures a trained model.

python -m launch.evaluate --workdir=runs/fashion_mnist --metrics=bits_per_dim
"""

from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from launch import common
from tarflow_jax.distributed import make_mesh
from tarflow_jax.evaluation.bits_per_dim import evaluate_bits_per_dim
from tarflow_jax.flow import TarFlow
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.training import Recipe

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run.")
METRICS = flags.DEFINE_list("metrics", ["bits_per_dim"], "What to measure: bits_per_dim.")
SPLIT = flags.DEFINE_string("split", "test", "Of the data set the model was trained on.")
ALLOW_NOISY = flags.DEFINE_bool(
    "allow_noisy", False, "Score a model trained with Gaussian noise all the same."
)
flags.mark_flags_as_required(["workdir"])


def main(argv: Sequence[str]) -> None:
    """Measures and prints."""
    if unknown := set(METRICS.value) - {"bits_per_dim"}:
        raise ValueError(f"unknown metric {min(unknown)!r}; expected bits_per_dim")
    workdir = Path(WORKDIR.value)
    recipe = Recipe.from_workdir(workdir)
    if recipe.noise.kind != "uniform" and not ALLOW_NOISY.value:
        raise ValueError(
            "bits/dim is defined for models trained with uniform noise, this one's was gaussian; "
            "train with noise.kind=uniform, or pass --allow_noisy"
        )
    mesh = make_mesh()
    pipe = TarFlowPipeline.from_pretrained(workdir, mesh=mesh)
    result = evaluate_bits_per_dim(
        TarFlow(pipe.config),
        pipe.variables,
        recipe.source(SPLIT.value),
        jax.random.key(0),
        batch_size=100 * mesh.size,
        mesh=mesh,
    )
    print(f"bits/dim {result.mean:.4f} ± {result.standard_error:.4f} on {result.num_images} images")


if __name__ == "__main__":
    common.run(main)
