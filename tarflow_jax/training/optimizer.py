"""The optimizer of a run: the learning rate of each step and the update rule."""

import dataclasses
from typing import Any, ClassVar

import jax
import optax
from jax.typing import DTypeLike

from tarflow_jax.errors import UserError
from tarflow_jax.options import Options, option
from tarflow_jax.training.muon import is_hidden_matrix, muon

NAMES = ("adamw", "muon")


@dataclasses.dataclass(frozen=True)
class Optimizer(Options):
    """AdamW for all parameters, as in the PyTorch release, or Muon for the hidden matrices and AdamW for the rest.

    Muon orthogonalizes the momentum of each hidden matrix by five Newton-Schulz steps (Jordan et al. 2024). Learning
    rates rise linearly over `warmup_steps` from `final_learning_rate` to their peak, and a cosine leads back.

    Attributes:
      num_steps: length of the run.

    Raises UserError: one line naming the field.
    """

    group: ClassVar[str] = "optimizer"

    num_steps: int
    learning_rate: float = option(3e-3, "Peak learning rate of AdamW.")
    final_learning_rate: float = option(1e-6, "Learning rate of the first and the last step.")
    warmup_steps: int = option(0, "Steps of linear warm-up.")
    beta1: float = option(0.9, "AdamW's decay of the mean gradient.")
    beta2: float = option(0.95, "AdamW's decay of the mean squared gradient.")
    weight_decay: float = option(1e-4, "Weight decay of every parameter.")
    clip_norm: float = option(1.0, "Largest norm of the whole gradient; 0 for no clipping.")
    ema_decay: float = option(0.0, "Decay of the exponential moving average of the parameters; 0 for none.")
    name: str = option("muon", "muon (hidden matrices; AdamW for the rest), or adamw for all.", choices=NAMES)
    muon_learning_rate: float = option(5e-3, "Peak learning rate of the hidden matrices; 0 with adamw.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta1", "beta2", "ema_decay"):
            if getattr(self, name) >= 1:
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
