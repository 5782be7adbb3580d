"""What a student is trained on: trajectories of real images through the frozen flow."""

from typing import Any

import jax
import jax.numpy as jnp

from tarflow_jax.flow import TarFlow, to_images
from tarflow_jax.student.config import StudentConfig
from tarflow_jax.student.network import Student
from tarflow_jax.student.perception import perceptual_distance

_SOFTENING = 0.01  # c


def flow_trajectory(
    flow: TarFlow, variables: Any, noisy: jax.Array, labels: jax.Array | None, noise_std: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """(latents [B, H, W, K], trajectory [B, F, H, W, K]: what each block reads, as images); with no gradient."""
    (latents, _), sown = flow.apply(variables, noisy, labels, noise_std, mutable=["intermediates"])
    outputs = sown["intermediates"]["block_outputs"][:-1]
    trajectory = jnp.stack([noisy, *(to_images(flow.config, tokens) for tokens in outputs)], axis=1)
    return jax.lax.stop_gradient((latents, trajectory))


def distillation_loss(
    student: StudentConfig,
    variables: Any,
    clean: jax.Array,
    latents: jax.Array,
    trajectory: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    perception: Any = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The sum of the clean image's error and, unless the method is naive, of the errors of the trajectory's F images.

    An image's error on the trajectory is relative to its mean square, which normalises the trajectory; each error D
    then counts as D / (D + c), the divisor detached. So does the perceptual distance of the clean image, weighted.

    Args:
      variables: the student's.
      clean: float32 [B, H, W, K].
      latents: of the same with noise, by the flow as `weights` guide it, float32 [B, H, W, K].
      trajectory: what the flow's blocks read on the way there, float32 [B, F, H, W, K].
      labels: int32 [B], -1 for no class.
      weights: of guidance, float32 [B]; 0 where there is no label.
      perception: parameters of the `Perception` by which `student.perceptual` counts; its distance is one more D.

    Returns (loss, metrics): metrics are scalars, and `block_errors` [F], the relative errors.
    """
    images, found = Student(student).apply(variables, latents, labels, weights)
    image_error = jnp.square(images - clean).mean((1, 2, 3))  # [B]
    metrics = {"image_error": image_error.mean()}
    loss = _adapted(image_error).mean()
    if student.perceptual:
        distance = perceptual_distance(student.shape.num_classes, perception, images, clean)
        metrics["perceptual"] = distance.mean()
        loss = loss + student.perceptual * _adapted(distance).mean()
    if found is not None:
        sizes = jnp.square(trajectory).mean((2, 3, 4))  # [B, F]
        errors = jnp.square(found - trajectory).mean((2, 3, 4)) / sizes
        metrics["block_errors"] = errors.mean(0)
        loss = loss + _adapted(errors).mean(0).sum()
    return loss, metrics | {"loss": loss}


def _adapted(errors: jax.Array) -> jax.Array:
    return errors / (jax.lax.stop_gradient(errors) + _SOFTENING)
