"""The references' tensors (apple/ml-tarflow, apple/ml-itarflow) and ours: names, shapes, and how one becomes the other.

A Linear's weight [out, in] is our kernel [in, out], with `out` or `in` split into axes. Its qkv outputs are
ordered (q or k or v, head, head dimension), as ours are. It orders the numbers inside a token (channel, row,
column), we (row, column, channel): what reads or writes tokens is permuted here, once, and never at run time.
"""

import re

import numpy as np

from tarflow_jax.flow.config import TarFlowConfig
from tarflow_jax.runtime.parameters import Parameter, Shape, rows_of, variables_shapes


def torch_names(config: TarFlowConfig, name: str) -> list[str]:
    """The reference's names of one of our variables: one for each layer if it is stacked."""
    (row,) = rows_of(name)
    if not row.in_block:
        return [row.torch]
    k = int(re.findall(r"block_(\d+)/", name)[0])
    if not row.stacked:
        return [f"blocks.{k}.{row.torch}"]
    layers = "head_blocks" if config.noise_conditional else "attn_blocks"
    return [f"blocks.{k}.{layers}.{layer}.{row.torch}" for layer in range(config.depths[k])]


def torch_shapes(config: TarFlowConfig) -> dict[str, Shape]:
    """Names and shapes of the reference's whole state dict, buffers included."""
    shapes = {name: array.shape for name, array in constants(config).items()}
    for name in variables_shapes(config):
        (row,) = rows_of(name)
        shapes |= dict.fromkeys(torch_names(config, name), row.torch_shape(config))
    return shapes


def constants(config: TarFlowConfig) -> dict[str, np.ndarray]:
    """The reference's buffers that no training changes: the causal masks, and in NVP the prior's variance."""
    mask = np.tri(config.num_tokens, dtype=np.float32)
    buffers = {f"blocks.{k}.attn_mask": mask for k in range(config.num_blocks)}
    if not config.volume_preserving:
        buffers["var"] = np.ones((config.num_tokens, config.token_dim), np.float32)
    return buffers


def from_torch(config: TarFlowConfig, name: str, parts: list[np.ndarray]) -> np.ndarray:
    """One of our variables from the reference's tensors `torch_names(config, name)`."""
    (row,) = rows_of(name)
    if row.input_axes:
        parts = [part.T for part in parts]
    shape = row.shape(config, depth=len(parts))
    if row.stacked:
        return np.stack([part.reshape(shape[1:]) for part in parts])
    return _reorder_tokens(row, parts[0].reshape(shape), _token_order(config))


def to_torch(config: TarFlowConfig, name: str, array: np.ndarray) -> list[np.ndarray]:
    """The reference's tensors `torch_names(config, name)` from one of our variables."""
    (row,) = rows_of(name)
    shape = row.torch_shape(config)
    array = _reorder_tokens(row, array, np.argsort(_token_order(config)))
    parts = list(array) if row.stacked else [array]
    if row.input_axes:
        return [part.reshape(shape[::-1]).T for part in parts]
    return [part.reshape(shape) for part in parts]


def _token_order(config: TarFlowConfig) -> np.ndarray:
    """Indices [D] that put (channel, row, column) in the order (row, column, channel)."""
    patch = (config.image_channels, config.patch_size, config.patch_size)
    return np.arange(config.token_dim).reshape(patch).transpose(1, 2, 0).reshape(-1)


def _reorder_tokens(row: Parameter, array: np.ndarray, order: np.ndarray) -> np.ndarray:
    for axis, letter in enumerate(row.letters):
        if letter in ("D", "2D"):
            # In NVP mode the output projection writes log_scale, then shift.
            starts = range(0, array.shape[axis], len(order))
            array = np.take(array, np.concatenate([start + order for start in starts]), axis)
    return array
