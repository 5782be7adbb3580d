"""Training: the recipe, the state, the step, the loop and its checkpoints."""

from tarflow_jax.training.checkpoint import Checkpoints
from tarflow_jax.training.loop import train
from tarflow_jax.training.recipe import Recipe
from tarflow_jax.training.state import TrainConfig, TrainState
from tarflow_jax.training.step import train_step

__all__ = ["Checkpoints", "Recipe", "TrainConfig", "TrainState", "train", "train_step"]
