"""Variables as named tensors: checks of names and shapes, and files of safetensors and PyTorch.

A tensor's name is its path in the tree of variables, "params/block_0/layers/qkv/kernel".
"""

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
from flax.traverse_util import flatten_dict, unflatten_dict

from tarflow_jax.errors import MissingPackageError, UserError, one_line
from tarflow_jax.runtime import progress
from tarflow_jax.runtime.parameters import Shape

flatten = functools.partial(flatten_dict, sep="/")  # {"a": {"b": x}} -> {"a/b": x}
unflatten = functools.partial(unflatten_dict, sep="/")


def check_tensors(what: str, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Raises ValueError if a tensor of `what` is missing, unexpected or of the wrong shape."""
    if missing := sorted(expected.keys() - found.keys()):
        raise UserError(f"{what} lacks tensor {missing[0]}; the file is incomplete")
    if extra := sorted(found.keys() - expected.keys()):
        raise UserError(f"{what} has tensor {' '.join(extra[0].split())}, which no model of this shape has")
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise UserError(f"{what}: tensor {name} has shape {list(found[name])}; expected {list(shape)}")


def read_safetensors(path: Path, expected: Mapping[str, Shape], rename: Callable[[str], str] = str) -> dict[str, Any]:
    """Reads a file into a tree of float32 arrays, after checking the name, shape and dtype of every tensor in it.

    `rename` maps a name in the file to an expected one.

    Raises ValueError: not a safetensors file, a header that does not fit the file, or other tensors than expected.
    """
    try:
        # pread, since the pages of a mapped file would count towards this process's memory.
        with safetensors.safe_open(path, framework="np", backend="pread") as file:
            names = {rename(name): name for name in file.keys()}  # noqa: SIM118 (not a mapping)
            found = {name: file.get_slice(stored) for name, stored in names.items()}
            check_tensors(str(path), {name: tensor.get_shape() for name, tensor in found.items()}, expected)
            for name, tensor in found.items():
                if tensor.get_dtype() not in ("F32", "F16", "BF16"):
                    raise UserError(f"{path}: tensor {name} is {tensor.get_dtype()}; expected F32, F16 or BF16")
            tensors = {}
            for name in progress(expected, f"reading {path.name}"):
                tensors[name] = jnp.asarray(file.get_tensor(names[name]).astype(np.float32, copy=False))
            return unflatten(tensors)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is not a valid safetensors file: {one_line(error)}") from error


def import_torch() -> Any:
    """Imports PyTorch; raises MissingPackageError, which says how to install it, if that fails."""
    try:
        import torch
    except ImportError as error:
        raise MissingPackageError("PyTorch checkpoints need PyTorch; install it with `pip install torch`") from error
    return torch


def load_tensors(path: str | os.PathLike[str], mapped: bool = False) -> dict[str, Any]:
    """Reads a file of named PyTorch tensors without executing code in it.

    If `mapped`, tensors are memory-mapped: their bytes are read when used, and can be evicted.

    Raises UserError unless the file holds only tensors.
    """
    torch = import_torch()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # damaged bytes can raise anything in its reader
        reason = one_line(error)
        if "weights only" in reason.lower():  # the rest of the message advises loading it anyway
            reason = "it holds more than tensors, and other objects are never loaded; save `model.state_dict()` alone"
        raise UserError(f"{path} is not a plain PyTorch state dict: {reason}") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
    ):
        raise UserError(f"{path} holds no state dict of tensors; save `model.state_dict()` alone")
    return state
