"""Loads and saves weights: model folders, the Hugging Face hub, and PyTorch checkpoints of the reference."""

from tarflow_jax.interop.model_folder import (
    READY_MADE,
    TEXT_TO_IMAGE,
    SavedModel,
    check_path,
    load_model,
    load_student,
    local_folder,
    local_target,
    push_model,
    save_model,
    shipped,
)
from tarflow_jax.interop.t5 import load_t5, t5_embeddings
from tarflow_jax.interop.torch_weights import load_torch, save_torch

__all__ = [
    "READY_MADE",
    "TEXT_TO_IMAGE",
    "SavedModel",
    "check_path",
    "load_model",
    "load_student",
    "load_t5",
    "load_torch",
    "local_folder",
    "local_target",
    "push_model",
    "save_model",
    "save_torch",
    "shipped",
    "t5_embeddings",
]
