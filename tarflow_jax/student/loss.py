"""The student's loss on trajectories of real images through the frozen flow, with an optional perceptual distance."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from tarflow_jax.noise import to_float
from tarflow_jax.student.network import Student

_SOFTENING = 0.01  # c


def distillation_loss(
    student: Student,
    variables: Any,
    clean: jax.Array,
    latents: jax.Array,
    trajectory: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    perception: Any = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sums the errors of the clean image and of the F images of the trajectory.

    An error on the trajectory is divided by that image's mean square. Each error D then counts as D / (D + c), with no
    gradient through the divisor.

    Args:
      variables: the student's.
      clean: float32 [B, H, W, K].
      latents: of noisy `clean`, encoded by the flow with guidance `weights`, float32 [B, H, W, K].
      trajectory: the inputs of the flow's blocks in that encoding, float32 [B, F, H, W, K].
      labels: int32 [B], -1 for no class.
      weights: guidance weights, float32 [B]; 0 where there is no label.
      perception: parameters of `Perception`, needed if `config.perceptual` is not 0.

    Returns (loss, metrics): metrics are scalars, and `block_errors` [F], the relative errors.
    """
    images, predicted = student.apply(variables, latents, labels, weights)
    image_error = jnp.square(images - clean).mean((1, 2, 3))  # [B]
    metrics = {"image_error": image_error.mean()}
    loss = _adapted(image_error).mean()
    if student.config.perceptual:
        distance = perceptual_distance(student.config.shape.num_classes, perception, images, clean)
        metrics["perceptual"] = distance.mean()
        loss = loss + student.config.perceptual * _adapted(distance).mean()
    errors = jnp.square(predicted - trajectory).mean((2, 3, 4)) / jnp.square(trajectory).mean((2, 3, 4))  # [B, F]
    loss = loss + _adapted(errors).mean(0).sum()
    return loss, metrics | {"block_errors": errors.mean(0), "loss": loss}


def _adapted(errors: jax.Array) -> jax.Array:
    return errors / (jax.lax.stop_gradient(errors) + _SOFTENING)


class PerceptionOutput(NamedTuple):
    """A `Perception` network's features and logits."""

    scales: list[jax.Array]  # float32 [B, H, W, C], from the finest to the coarsest
    logits: jax.Array  # [B, num_classes]


class Perception(nn.Module):
    """A small classifier of images [B, H, W, K], float32 in [-1, 1] or integers, whose features teach a student.

    Evaluation does not use it: the classifier of `launch.evaluate` has another architecture and seed.
    """

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> PerceptionOutput:
        x, scales = to_float(images), []
        for width in (24, 48, 96):
            for _ in range(2):
                x = nn.gelu(nn.Conv(width, (3, 3))(x))
            scales.append(x)
            x = nn.pool(x, 0.0, jax.lax.add, (2, 2), (2, 2), "VALID") / 4.0
        return PerceptionOutput(scales, nn.Dense(self.num_classes)(x.mean((1, 2))))


def perceptual_distance(num_classes: int, params: Any, images: jax.Array, others: jax.Array) -> jax.Array:
    """Returns the squared distance [B] between normalised features, averaged over positions and scales.

    This is LPIPS (arXiv 1801.03924) without learned weights.
    """

    def directions(x: jax.Array) -> list[jax.Array]:
        scales = Perception(num_classes).apply({"params": params}, x).scales
        return [x * jax.lax.rsqrt(jnp.square(x).sum(3, keepdims=True) + 1e-4) for x in scales]

    pairs = zip(directions(images), directions(others), strict=True)
    return jnp.stack([jnp.square(a - b).sum(3).mean((1, 2)) for a, b in pairs]).mean(0)
