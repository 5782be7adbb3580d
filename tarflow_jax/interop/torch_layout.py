"""The reference's tensors (apple/ml-tarflow, PyTorch) and ours: names, shapes, and how one becomes the other.

A Linear's weight [out, in] is our kernel [in, out], with `out` or `in` split into axes. Its qkv outputs are
ordered (q or k or v, head, head dimension), as ours are. It orders the numbers inside a token (channel, row,
column), we (row, column, channel): what reads or writes tokens is permuted here, once, and never at run time.
"""

import math

import numpy as np

from tarflow_jax.flow.config import TarFlowConfig
from tarflow_jax.interop.layout import Shape, variables_shapes

_BLOCK_NAMES = {
    "position_embedding": "pos_embed",
    "class_embedding": "class_embed",
    "project_in/kernel": "proj_in.weight",
    "project_in/bias": "proj_in.bias",
    "project_out/kernel": "proj_out.weight",
    "project_out/bias": "proj_out.bias",
}
_LAYER_NAMES = {
    "attention_norm/scale": "attention.norm.weight",
    "attention_norm/bias": "attention.norm.bias",
    "qkv/kernel": "attention.qkv.weight",
    "qkv/bias": "attention.qkv.bias",
    "attention_out/kernel": "attention.proj.weight",
    "attention_out/bias": "attention.proj.bias",
    "mlp_norm/scale": "mlp.norm.weight",
    "mlp_norm/bias": "mlp.norm.bias",
    "mlp_in/kernel": "mlp.main.0.weight",
    "mlp_in/bias": "mlp.main.0.bias",
    "mlp_out/kernel": "mlp.main.2.weight",
    "mlp_out/bias": "mlp.main.2.bias",
}
# The axis of our tensor that runs over the numbers of a token.
_TOKEN_AXES = {"project_in/kernel": 0, "project_out/kernel": 1, "project_out/bias": 0, "prior/variance": 1}


def torch_names(config: TarFlowConfig, name: str) -> list[str]:
    """The reference's names of one of our variables: one for each layer if it is stacked."""
    if name == "prior/variance":
        return ["var"]
    k, rest = _split(name)
    if rest in _BLOCK_NAMES:
        return [f"blocks.{k}.{_BLOCK_NAMES[rest]}"]
    suffix = _LAYER_NAMES[rest.removeprefix("layers/")]
    return [f"blocks.{k}.attn_blocks.{layer}.{suffix}" for layer in range(config.depths[k])]


def torch_shapes(config: TarFlowConfig) -> dict[str, Shape]:
    """Names and shapes of the reference's whole state dict, buffers included."""
    shapes = {name: array.shape for name, array in constants(config).items()}
    for name, shape in variables_shapes(config).items():
        shapes |= dict.fromkeys(torch_names(config, name), _torch_shape(name, shape))
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
    shape = variables_shapes(config)[name]
    if name.endswith("kernel"):
        parts = [part.T for part in parts]
    if "/layers/" in name:
        return np.stack([part.reshape(shape[1:]) for part in parts])
    return _reorder_tokens(name, parts[0].reshape(shape), _token_order(config))


def to_torch(config: TarFlowConfig, name: str, array: np.ndarray) -> list[np.ndarray]:
    """The reference's tensors `torch_names(config, name)` from one of our variables."""
    shape = _torch_shape(name, array.shape)
    array = _reorder_tokens(name, array, np.argsort(_token_order(config)))
    parts = list(array) if "/layers/" in name else [array]
    if name.endswith("kernel"):
        return [part.reshape(shape[::-1]).T for part in parts]
    return [part.reshape(shape) for part in parts]


def _split(name: str) -> tuple[int, str]:
    """params/block_3/qkv/bias -> 3, qkv/bias."""
    _, block, rest = name.split("/", 2)
    return int(block.removeprefix("block_")), rest


def _torch_shape(name: str, shape: Shape) -> Shape:
    """The reference's shape of one of our variables (of one layer, if it is stacked)."""
    if "/layers/" in name:
        shape = shape[1:]
    if name.endswith("kernel"):
        input_axes = 2 if name.endswith("attention_out/kernel") else 1
        return math.prod(shape[input_axes:]), math.prod(shape[:input_axes])
    if name.endswith("class_embedding"):
        return shape[0], 1, shape[1]
    return (math.prod(shape),) if name.endswith("bias") else shape


def _token_order(config: TarFlowConfig) -> np.ndarray:
    """Indices [D] that put (channel, row, column) in the order (row, column, channel)."""
    patch = (config.image_channels, config.patch_size, config.patch_size)
    return np.arange(config.token_dim).reshape(patch).transpose(1, 2, 0).reshape(-1)


def _reorder_tokens(name: str, array: np.ndarray, order: np.ndarray) -> np.ndarray:
    suffix = name if name.startswith("prior/") else _split(name)[1]
    if suffix not in _TOKEN_AXES:
        return array
    axis = _TOKEN_AXES[suffix]
    halves = range(array.shape[axis] // len(order))  # the output projection writes log_scale and shift
    return np.take(array, np.concatenate([order + half * len(order) for half in halves]), axis)
