"""The optimizer of a run: the learning rate of each step and the update rule."""

import dataclasses
from typing import Any

import jax
import optax
from jax.typing import DTypeLike

from tarflow_jax.errors import UserError
from tarflow_jax.training.muon import is_hidden_matrix, muon

NAMES = ("adamw", "muon")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW for all parameters, as in the PyTorch release, or Muon for the hidden matrices and AdamW for the rest.

    Attributes:
      num_steps: length of the run.
      learning_rate: peak of AdamW's schedule. The rate grows linearly from `final_learning_rate` to its peak over
        `warmup_steps`, then falls back along a cosine.
      beta1, beta2: decay rates of AdamW's moments.
      weight_decay: decoupled weight decay of every parameter.
      clip_norm: largest global norm of the gradient; 0 disables clipping.
      ema_decay: decay of the exponential moving average of the parameters; 0 keeps none.
      name: "adamw" or "muon". Muon orthogonalizes the momentum of each hidden matrix by five Newton-Schulz steps
        (Jordan et al. 2024).
      muon_learning_rate: peak of Muon's schedule; 0 with "adamw".

    Raises:
      ValueError: one line naming the field.
    """

    num_steps: int
    learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    beta1: float
    beta2: float
    weight_decay: float
    clip_norm: float
    ema_decay: float
    name: str = "adamw"
    muon_learning_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise UserError(f"optimizer.name is {self.name!r}; expected one of {', '.join(NAMES)}")
        for name in (
            "learning_rate", "final_learning_rate", "warmup_steps", "weight_decay", "clip_norm", "muon_learning_rate",
        ):  # fmt: skip
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"optimizer.{name} is {getattr(self, name)}; expected a number from 0")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}; expected 0 to less than 1")
        if (self.name == "muon") != (self.muon_learning_rate > 0):
            raise UserError(
                f"optimizer.muon_learning_rate is {self.muon_learning_rate} with optimizer.name {self.name!r}; "
                "expected a positive number with 'muon', 0 otherwise"
            )

    def schedule(self, peak: float | None = None) -> optax.Schedule:
        """Returns linear warm-up to `peak` (default: `learning_rate`) and cosine decay to `final_learning_rate`."""
        return optax.warmup_cosine_decay_schedule(
            init_value=self.final_learning_rate,
            peak_value=self.learning_rate if peak is None else peak,
            warmup_steps=self.warmup_steps,
            decay_steps=max(self.num_steps, self.warmup_steps + 1),
            end_value=self.final_learning_rate,
        )

    def transformation(self, dtype: DTypeLike = "float32") -> optax.GradientTransformation:
        """Returns the update rule; `dtype` is that of the network's matmuls."""
        update = optax.adamw(self.schedule(), b1=self.beta1, b2=self.beta2, weight_decay=self.weight_decay)
        if self.name == "muon":
            hidden = muon(self.schedule(self.muon_learning_rate), self.weight_decay, dtype)
            update = optax.partition({"muon": hidden, "adamw": update}, _labels)
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), update) if self.clip_norm else update


def _labels(params: Any) -> Any:
    """Labels every parameter "muon" or "adamw"."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if is_hidden_matrix(path) else "adamw", params)
