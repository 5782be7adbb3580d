"""Variables as named tensors, and the check of a file's names and shapes.

A tensor's name is its path, "params/block_0/layers/qkv/kernel". `runtime.parameters` says which a config determines.
"""

import functools
from collections.abc import Mapping

from flax.traverse_util import flatten_dict, unflatten_dict

from tarflow_jax.errors import UserError
from tarflow_jax.runtime.parameters import Shape

flatten = functools.partial(flatten_dict, sep="/")  # {"a": {"b": x}} -> {"a/b": x}
unflatten = functools.partial(unflatten_dict, sep="/")


def check_tensors(what: str, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Raises ValueError for the first tensor found in `what` that is missing, unexpected, or of another shape."""
    if missing := sorted(expected.keys() - found.keys()):
        raise UserError(f"{what} lacks tensor {missing[0]}{_more(missing)}; the file is incomplete")
    if extra := sorted(found.keys() - expected.keys()):
        raise UserError(f"{what} has tensor {extra[0]}{_more(extra)}, which no TarFlow of this shape has")
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise UserError(f"{what}: tensor {name} has shape {list(found[name])}; expected {list(shape)}")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
