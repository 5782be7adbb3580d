"""The student: a second network that learns a flow's inverse and maps latents to clean images in one pass.

The flow's own, exact inverse is in `sampling`.
"""

from tarflow_jax.student.config import StudentConfig, TrainedStudent
from tarflow_jax.student.loss import Perception, distillation_loss
from tarflow_jax.student.network import Student

__all__ = ["Perception", "Student", "StudentConfig", "TrainedStudent", "distillation_loss"]
