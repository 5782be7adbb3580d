"""The table of the networks' variables, with the shape, sharding and PyTorch name of each.

A new parameter of a network needs a new row here. Shapes are computed from a config without tracing, because untrusted
files are checked against them. Letters: T tokens, D token dimension, C width, L layers of the block, N heads, H head
dimension, 4C hidden units of the MLP, 2D outputs of a block (D in VP mode), triangle D (D - 1) / 2.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

from jax.sharding import PartitionSpec

from tarflow_jax.errors import UserError
from tarflow_jax.flow.config import TarFlowConfig
from tarflow_jax.flow.transformer import MLP_EXPANSION

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One row of the table.

    Attributes:
      name: the end of its path. "prior/…" and "constants/…" belong to the flow, all others to every block; those in
        "layers/" have the block's layers stacked along a first axis.
      dims: its dimensions without that first axis, each a letter (see `_shape`) or a number, followed by ":axis" if it
        is sharded over that axis of the mesh. "inputs -> outputs" is a dense kernel, "-> outputs" a dense bias;
        PyTorch flattens each side into one dimension.
      torch: its name in the reference's state dict, within its block or layer; "" if the reference lacks it.
      torch_dims: the reference's dimensions, if they do not follow from `dims`.
      when: the field of the config that must be set (not 0 or False) for the variable to exist; "" for always.
    """

    name: str
    dims: str
    torch: str
    torch_dims: str = ""
    when: str = ""

    @property
    def in_block(self) -> bool:
        return not self.name.startswith(("prior/", "constants/"))

    @property
    def stacked(self) -> bool:
        """Whether its first axis is over the layers of a block."""
        return self.name.startswith("layers/")

    @functools.cached_property
    def letters(self) -> tuple[str, ...]:
        """The letter of each axis, "L" first if it is stacked."""
        return tuple(word.partition(":")[0] for word in self._words)

    @functools.cached_property
    def spec(self) -> PartitionSpec:
        """The mesh axis that each axis is sharded over; P() if it is replicated."""
        mesh_axes = [word.partition(":")[2] or None for word in self._words]
        return PartitionSpec(*mesh_axes) if any(mesh_axes) else PartitionSpec()

    @functools.cached_property
    def input_axes(self) -> tuple[int, ...]:
        """The axes that a dense kernel contracts; () for anything else."""
        inputs, arrow, _ = self.dims.partition("->")
        return tuple(range(self.stacked, self.stacked + len(inputs.split()))) if arrow else ()

    @functools.cached_property
    def output_axes(self) -> tuple[int, ...]:
        """The output axes of a dense kernel or bias; () for anything else."""
        first = self.stacked + len(self.input_axes)
        return tuple(range(first, len(self.letters))) if "->" in self.dims else ()

    def shape(self, config: TarFlowConfig, depth: int) -> Shape:
        """Returns its shape in a block of `depth` layers."""
        return _shape(self.letters, config, depth)

    def torch_shape(self, config: TarFlowConfig) -> Shape:
        """Returns the reference's shape, of one layer if stacked here: [out, in] for a kernel, [out] for its bias."""
        if self.torch_dims:
            return _shape(self.torch_dims.split(), config)
        if not self.output_axes:
            return _shape(self.letters[self.stacked :], config)
        sides = [[self.letters[axis] for axis in axes] for axes in (self.output_axes, self.input_axes)]
        return tuple(math.prod(_shape(side, config)) for side in sides if side)

    @property
    def _words(self) -> list[str]:
        """Each axis as "letter" or "letter:mesh axis"."""
        return ["L"] * self.stacked + self.dims.replace("->", "").split()


# In the order in which files store them.
PARAMETERS = (
    Parameter("position_embedding", "T C:fsdp", "pos_embed", when="position_embeddings"),
    Parameter("project_in/kernel", "D -> C:fsdp", "proj_in.weight"),
    Parameter("project_in/bias", "-> C", "proj_in.bias"),
    Parameter("project_out/kernel", "C:fsdp -> 2D", "proj_out.weight"),
    Parameter("project_out/bias", "-> 2D", "proj_out.bias"),
    Parameter("final_norm", "C", "final_norm.weight", when="final_norm"),
    Parameter("start_token", "D", "sos_embed", "1 1 D", when="start_token"),
    Parameter("project_lower/kernel", "C:fsdp -> triangle", "", when="triangular"),
    Parameter("project_lower/bias", "-> triangle", "", when="triangular"),
    Parameter("class_embedding", "classes C:fsdp", "class_embed", "classes 1 C", when="num_classes"),
    Parameter("noise_in/kernel", "C:fsdp -> 4C:tensor", "time_embed.mlp.0.weight", when="noise_conditional"),
    Parameter("noise_in/bias", "-> 4C:tensor", "time_embed.mlp.0.bias", when="noise_conditional"),
    Parameter("noise_out/kernel", "4C:tensor -> C:fsdp", "time_embed.mlp.2.weight", when="noise_conditional"),
    Parameter("noise_out/bias", "-> C", "time_embed.mlp.2.bias", when="noise_conditional"),
    Parameter("null_condition", "condition", "", when="standardizes_condition"),
    Parameter("condition_in/kernel", "condition -> C:fsdp", "proj_txt.weight", when="condition_dim"),
    Parameter("condition_in/bias", "-> C", "proj_txt.bias", when="condition_dim"),
    Parameter("next_condition_in/kernel", "condition -> C:fsdp", "", when="condition_by_token"),
    Parameter("next_condition_in/bias", "-> C", "", when="condition_by_token"),
    Parameter("layers/attention_norm/scale", "C", "attention.norm.weight"),
    Parameter("layers/attention_norm/bias", "C", "attention.norm.bias"),
    Parameter("layers/qkv/kernel", "C:fsdp -> 3 N:tensor H", "attention.qkv.weight"),
    Parameter("layers/qkv/bias", "-> 3 N:tensor H", "attention.qkv.bias"),
    Parameter("layers/attention_out/kernel", "N:tensor H -> C:fsdp", "attention.proj.weight"),
    Parameter("layers/attention_out/bias", "-> C", "attention.proj.bias"),
    Parameter("layers/mlp_norm/scale", "C", "mlp.norm.weight"),
    Parameter("layers/mlp_norm/bias", "C", "mlp.norm.bias"),
    Parameter("layers/mlp_in/kernel", "C:fsdp -> 4C:tensor", "mlp.main.0.weight"),
    Parameter("layers/mlp_in/bias", "-> 4C:tensor", "mlp.main.0.bias"),
    Parameter("layers/mlp_out/kernel", "4C:tensor -> C:fsdp", "mlp.main.2.weight"),
    Parameter("layers/mlp_out/bias", "-> C", "mlp.main.2.bias"),
    Parameter("prior/variance", "T D", "var", when="volume_preserving"),
    Parameter("constants/orders", "blocks T", "", when="random_orders"),
    Parameter("constants/mean", "T D", "", when="is_sequence"),
    Parameter("constants/std", "T D", "", when="is_sequence"),
    Parameter("constants/condition_mean", "condition", "", when="standardizes_condition"),
    Parameter("constants/condition_std", "condition", "", when="standardizes_condition"),
    Parameter("constants/null_prefix", "prefix condition", "", when="has_prefix"),
)
# The one parameter that a student's blocks have and a flow's do not.
GUIDANCE = Parameter("guidance/kernel", "16 -> C:fsdp", "")
AUTOENCODER = Parameter("autoencoder", "", "")  # every parameter of an autoencoder is replicated


def params_shapes(config: TarFlowConfig) -> dict[str, Shape]:
    """Returns the shapes of the parameters, "block_0/project_in/kernel" and so on."""
    blocks = [(k, depth, _rows(config, k)) for k, depth in enumerate(config.depths)]
    return {f"block_{k}/{row.name}": row.shape(config, depth) for k, depth, rows in blocks for row in rows}


def variables_shapes(config: TarFlowConfig) -> dict[str, Shape]:
    """Returns the shapes of all variables: "params/…", "prior/…" and "constants/…"."""
    shapes = {f"params/{name}": shape for name, shape in params_shapes(config).items()}
    return shapes | {row.name: row.shape(config, depth=0) for row in _rows(config, None)}


def student_shapes(config: Any) -> dict[str, Shape]:
    """Returns the shapes of the variables of a student with this `StudentConfig`."""
    rows = [*_rows(config.shape, 0), *([GUIDANCE] if config.max_guidance else [])]
    depths = enumerate(config.shape.depths)
    return {f"params/block_{j}/{row.name}": row.shape(config.shape, depth) for j, depth in depths for row in rows}


def row_of(path: str) -> Parameter:
    """Returns the row of a variable, or of its optimizer moment, by its path; raises UserError if there is none."""
    if "/autoencoder/" in f"/{path}":
        return AUTOENCODER
    for row in (*PARAMETERS, GUIDANCE):
        if f"/{path}".endswith(f"/{row.name}"):
            return row
    raise UserError(f"{path} matches no row of tarflow_jax/runtime/parameters.py; add one for a new parameter")


def _rows(config: TarFlowConfig, block: int | None) -> list[Parameter]:
    """Returns the rows of a block, by its index, or of the flow (None)."""
    rows = (row for row in PARAMETERS if row.in_block == (block is not None))
    rows = (row for row in rows if not row.when or getattr(config, row.when))
    unconditioned = block is not None and not config.is_conditioned(block)
    return [row for row in rows if not (unconditioned and "condition" in row.name)]


def _shape(letters: Iterable[str], config: TarFlowConfig, depth: int = 0) -> Shape:
    """Returns the sizes of `letters`, some of which may be numbers."""
    sizes = {
        "L": depth,
        "T": config.num_tokens,
        "D": config.token_dim,
        "2D": config.output_dim,
        "triangle": config.triangle_size,
        "C": config.width,
        "4C": MLP_EXPANSION * config.width,
        "N": config.num_heads,
        "H": config.head_dim,
        "classes": config.num_classes,
        "condition": config.condition_dim,
        "prefix": config.condition_length,
        "blocks": config.num_blocks,
    }
    return tuple(int(letter) if letter.isdigit() else sizes[letter] for letter in letters)
