"""The student: a second network that learned the inverse of a flow, latents to clean images in one pass.

It is not the flow's inverse, which stays exact; `sampling` has that.
"""

from tarflow_jax.student.config import METHODS, StudentConfig
from tarflow_jax.student.loss import distillation_loss
from tarflow_jax.student.network import Student
from tarflow_jax.student.perception import Perception
from tarflow_jax.student.trained import TrainedStudent

__all__ = ["METHODS", "Perception", "Student", "StudentConfig", "TrainedStudent", "distillation_loss"]
