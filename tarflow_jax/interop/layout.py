"""Our variables as named tensors: the names and shapes that a config determines.

A tensor's name is its path, "params/block_0/layers/qkv/kernel". Letters: T tokens, D token dimension,
C width, L layers of the block, N heads, H head dimension.
"""

from collections.abc import Mapping
from typing import Any

from tarflow_jax.errors import UserError
from tarflow_jax.flow.config import TarFlowConfig
from tarflow_jax.flow.transformer import MLP_EXPANSION

Shape = tuple[int, ...]


def params_shapes(config: TarFlowConfig) -> dict[str, Shape]:
    """Shapes of the parameters, "block_0/project_in/kernel" and so on, in plain arithmetic."""
    shapes = {}
    for k, depth in enumerate(config.depths):
        for name, shape in {**_embedding_shapes(config), **_layer_shapes(config, depth)}.items():
            shapes[f"block_{k}/{name}"] = shape
    return shapes


def variables_shapes(config: TarFlowConfig) -> dict[str, Shape]:
    """Shapes of all variables: "params/..." and, in VP mode, "prior/variance" [T, D]."""
    shapes = {f"params/{name}": shape for name, shape in params_shapes(config).items()}
    if config.volume_preserving:
        shapes["prior/variance"] = (config.num_tokens, config.token_dim)
    return shapes


def _embedding_shapes(config: TarFlowConfig) -> dict[str, Shape]:
    width, token_dim = config.width, config.token_dim
    outputs = token_dim * (1 if config.volume_preserving else 2)
    shapes: dict[str, Shape] = {
        "position_embedding": (config.num_tokens, width),
        "project_in/kernel": (token_dim, width),
        "project_in/bias": (width,),
        "project_out/kernel": (width, outputs),
        "project_out/bias": (outputs,),
    }
    if config.num_classes:
        shapes["class_embedding"] = (config.num_classes, width)
    return shapes


def _layer_shapes(config: TarFlowConfig, depth: int) -> dict[str, Shape]:
    width, heads, head_dim = config.width, config.num_heads, config.head_dim
    one_layer: dict[str, Shape] = {
        "attention_norm/scale": (width,),
        "attention_norm/bias": (width,),
        "qkv/kernel": (width, 3, heads, head_dim),
        "qkv/bias": (3, heads, head_dim),
        "attention_out/kernel": (heads, head_dim, width),
        "attention_out/bias": (width,),
        "mlp_norm/scale": (width,),
        "mlp_norm/bias": (width,),
        "mlp_in/kernel": (width, MLP_EXPANSION * width),
        "mlp_in/bias": (MLP_EXPANSION * width,),
        "mlp_out/kernel": (MLP_EXPANSION * width, width),
        "mlp_out/bias": (width,),
    }
    return {f"layers/{name}": (depth, *shape) for name, shape in one_layer.items()}


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}/{rest}": leaf for rest, leaf in flatten(value).items()})
        else:
            flat[name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def check_tensors(what: str, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Compares the names and shapes found in `what` with the expected ones.

    Raises:
      ValueError: naming the first tensor that is missing, unexpected, or of another shape.
    """
    if missing := sorted(expected.keys() - found.keys()):
        raise UserError(f"{what} lacks tensor {missing[0]}{_more(missing)}; the file is incomplete")
    if extra := sorted(found.keys() - expected.keys()):
        raise UserError(f"{what} has tensor {extra[0]}{_more(extra)}, which no TarFlow of this shape has")
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise UserError(f"{what}: tensor {name} has shape {list(found[name])}; expected {list(shape)}")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
