"""Weights in and out: PyTorch checkpoints of the reference, and a model folder others can load."""

from tarflow_jax.interop.model_folder import SavedModel, load_model, push_model, save_model
from tarflow_jax.interop.student_folder import load_student, save_student
from tarflow_jax.interop.torch_checkpoint import load_torch, save_torch

__all__ = [
    "SavedModel",
    "load_model",
    "load_student",
    "load_torch",
    "push_model",
    "save_model",
    "save_student",
    "save_torch",
]
