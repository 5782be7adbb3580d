"""Which parameter lies where: a table from the end of a parameter's name to the axes of the mesh."""

import math
import re
from collections import defaultdict
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tarflow_jax.errors import UserError

# Each state leaf's path must match exactly one rule. Optimizer moments and averages end in the same names as
# their parameters, so they lie where those lie.
RULES: tuple[tuple[str, P], ...] = (
    (r"layers/qkv/kernel", P(None, "fsdp", None, "tensor", None)),  # [L, C, 3, N, H]
    (r"layers/qkv/bias", P(None, None, "tensor", None)),  # [L, 3, N, H]
    (r"layers/attention_out/kernel", P(None, "tensor", None, "fsdp")),  # [L, N, H, C]
    (r"layers/attention_out/bias", P()),
    (r"layers/mlp_in/kernel", P(None, "fsdp", "tensor")),  # [L, C, 4C]
    (r"layers/mlp_in/bias", P(None, "tensor")),  # [L, 4C]
    (r"layers/mlp_out/kernel", P(None, "tensor", "fsdp")),  # [L, 4C, C]
    (r"layers/mlp_out/bias", P()),
    (r"layers/\w+_norm/(scale|bias)", P()),
    (r"project_in/kernel", P(None, "fsdp")),  # [D, C]
    (r"project_out/kernel", P("fsdp")),  # [C, 2D]
    (r"project_(in|out)/bias", P()),
    (r"(position|class)_embedding", P(None, "fsdp")),  # [T, C], [num_classes, C]
    (r"prior/variance", P()),  # [T, D]
    (r"step|count", P()),
)


def shardings(mesh: Mesh, tree: Any) -> Any:
    """The sharding of every leaf of a state or of variables, by its name.

    Args:
      mesh: of `make_mesh`.
      tree: arrays or shapes (`jax.eval_shape`).

    Raises:
      ValueError: a leaf matches no rule or several, or a mesh axis does not divide its dimension.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(mesh, leaf_name(path), leaf.shape)), tree
    )


def summary(mesh: Mesh, tree: Any) -> str:
    """One line a group of like-named, like-sharded leaves: count, numbers, where they lie."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = re.sub(r"block_\d+", "block_*", leaf_name(path))
        spec = _spec(mesh, leaf_name(path), leaf.shape)
        axes = ", ".join("·" if axis is None else str(axis) for axis in spec) or "replicated"
        groups[name, axes].append(math.prod(leaf.shape))
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    lines = [f"mesh: {shape}"]
    lines += [f"  {name:<48} {len(n):>3} x {sum(n):>12,}  {axes}" for (name, axes), n in groups.items()]
    return "\n".join(lines)


def _spec(mesh: Mesh, name: str, shape: tuple[int, ...]) -> P:
    matches = [spec for pattern, spec in RULES if re.search(rf"(^|/)({pattern})$", name)]
    if len(matches) != 1:
        raise UserError(f"{name} {shape} matches {len(matches)} sharding rules; expected exactly one")
    for size, axis in zip(shape, matches[0], strict=False):
        if axis is not None and size % mesh.shape[axis]:
            raise UserError(
                f"{name} {shape} cannot be cut in {mesh.shape[axis]} along its dimension of {size}; "
                f"choose a mesh.{axis} that divides it"
            )
    return matches[0]


def leaf_name(path: tuple[Any, ...]) -> str:
    """A leaf's path in its tree, as "variables/params/block_0/…"."""
    return "/".join(str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path)
