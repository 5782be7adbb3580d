"""The optimizer of a run: its learning rate over the steps, and the update that it makes."""

import dataclasses

import optax

from tarflow_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with decay on every parameter, as the PyTorch release has it; the fields of a recipe's `optimizer`.

    Attributes:
      num_steps: of the whole run.
      learning_rate: at its peak, after `warmup_steps` of linear growth from `final_learning_rate`; then a cosine leads
        back to that.
      beta1, beta2, weight_decay: AdamW's.
      clip_norm: largest norm of the whole gradient; 0 for no clipping.
      ema_decay: of the exponential moving average of the parameters; 0 for none.

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

    def __post_init__(self) -> None:
        for name in ("learning_rate", "final_learning_rate", "warmup_steps", "weight_decay", "clip_norm"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"optimizer.{name} is {getattr(self, name)}; expected a number from 0")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}; expected 0 to less than 1")

    def schedule(self) -> optax.Schedule:
        """Learning rate of a step: linear warm-up, then a cosine, from and to `final_learning_rate`."""
        return optax.warmup_cosine_decay_schedule(
            init_value=self.final_learning_rate,
            peak_value=self.learning_rate,
            warmup_steps=self.warmup_steps,
            decay_steps=max(self.num_steps, self.warmup_steps + 1),
            end_value=self.final_learning_rate,
        )

    def transformation(self) -> optax.GradientTransformation:
        """The update rule."""
        adamw = optax.adamw(self.schedule(), b1=self.beta1, b2=self.beta2, weight_decay=self.weight_decay)
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), adamw) if self.clip_norm else adamw
