"""Loads and saves weights: model folders, the Hugging Face hub, and PyTorch checkpoints of the reference."""

from tarflow_jax.interop.model_folder import (
    READY_MADE,
    SavedModel,
    check_path,
    load_model,
    load_student,
    local_folder,
    push_model,
    save_model,
)
from tarflow_jax.interop.torch_weights import load_torch, save_torch

__all__ = [
    "READY_MADE",
    "SavedModel",
    "check_path",
    "load_model",
    "load_student",
    "load_torch",
    "local_folder",
    "push_model",
    "save_model",
    "save_torch",
]
