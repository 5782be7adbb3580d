"""The shape of a student, and what it learns to follow."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from tarflow_jax.errors import UserError
from tarflow_jax.flow import TarFlowConfig

METHODS = ("hidden_alignment", "hidden_distillation", "naive")
_OF_THE_FLOW = ("image_size", "image_channels", "patch_size", "num_classes")


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """Everything that determines a student's parameters and its arithmetic.

    Attributes:
      shape: of its transformers: one block more than the flow has, the last of which denoises.
      method: what its blocks learn beside the clean image ("Bidirectional Normalizing Flow", arXiv 2512.10953): under
        "hidden_alignment" a linear head on the hidden state behind each block is compared with the flow's trajectory;
        under "hidden_distillation" the next block reads what that head says, and nothing else; "naive" has no such
        heads.
      max_guidance: w_max, up to which it takes guidance weights; 0 for none.

    Raises ValueError: one line naming the field.
    """

    shape: TarFlowConfig
    method: str = "hidden_alignment"
    max_guidance: float = 0.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"student.method is {self.method!r}; expected one of {', '.join(METHODS)}")
        if not 0 <= self.max_guidance < math.inf:
            raise UserError(f"student.max_guidance is {self.max_guidance}; expected a number from 0")
        if self.max_guidance and not self.shape.num_classes:
            raise UserError(
                f"student.max_guidance is {self.max_guidance}, but the flow has no classes to guide by; set it to 0"
            )
        if self.shape.num_blocks < 2:
            raise UserError(f"a student has a block for each of the flow's and one more, not {self.shape.num_blocks}")

    @classmethod
    def of_flow(
        cls, flow: TarFlowConfig, width: int, layers_per_block: tuple[int, ...], **fields: Any
    ) -> "StudentConfig":
        """For a flow of this shape.

        Args:
          width: 0 is the flow's.
          layers_per_block: of each block of the student, or one number for all.
          fields: as of the class.
        """
        blocks, depths = flow.num_blocks + 1, tuple(layers_per_block)
        if len(depths) not in (1, blocks):
            raise UserError(
                f"student.layers_per_block lists {len(depths)} blocks; expected {blocks}, one for each of the "
                "flow's and one that denoises, or one number for all"
            )
        shape = dataclasses.replace(
            flow,
            width=width or flow.width,
            num_blocks=blocks,
            layers_per_block=depths if len(depths) == blocks else depths * blocks,
            volume_preserving=False,
            triangular=False,
            noise_conditional=False,
            input_limit=0,
            image_limit=0,
        )
        return cls(shape, **fields)

    @property
    def dtype(self) -> str:
        """Of its matrix products."""
        return self.shape.dtype

    @property
    def num_flow_blocks(self) -> int:
        """F."""
        return self.shape.num_blocks - 1

    def reads_tokens(self, j: int) -> bool:
        """Whether block number j of the student reads tokens, not the hidden state of the block before."""
        return j == 0 or self.method == "hidden_distillation"

    def has_head(self, j: int) -> bool:
        """Whether block number j has a head: the last one's makes the image."""
        return j == self.num_flow_blocks or self.method != "naive"

    def check_flow(self, flow: TarFlowConfig) -> None:
        """Raises ValueError where it cannot be a student of a flow of this shape."""
        for name in _OF_THE_FLOW:
            if getattr(self.shape, name) != getattr(flow, name):
                raise UserError(
                    f"the student has {name} {getattr(self.shape, name)}, the flow {getattr(flow, name)}; "
                    "it is of another flow"
                )
        if self.num_flow_blocks != flow.num_blocks:
            raise UserError(
                f"the student is of a flow of {self.num_flow_blocks} blocks; this one has {flow.num_blocks}"
            )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` is its inverse."""
        return {"shape": self.shape.to_dict(), "method": self.method, "max_guidance": self.max_guidance}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "StudentConfig":
        """From a dictionary, as read from JSON; ValueError for unknown, missing or wrong fields."""
        types = {"shape": (dict,), "method": (str,), "max_guidance": (int, float)}
        if fields.keys() != types.keys() or any(type(fields[name]) not in types[name] for name in types):
            raise UserError(f"student is {str(dict(fields))[:200]}; expected a shape, a method and max_guidance")
        shape = TarFlowConfig.from_dict(fields["shape"])
        return cls(shape, fields["method"], float(fields["max_guidance"]))
