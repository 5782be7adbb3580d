"""Variables as named tensors, and the check of a file's names and shapes.

A tensor's name is its path, "params/block_0/layers/qkv/kernel". `runtime.parameters` says which a config determines.
"""

from collections.abc import Mapping
from typing import Any

from tarflow_jax.errors import UserError
from tarflow_jax.runtime.parameters import Shape


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
