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
        "hidden_alignment" the tokens behind each block are compared with the flow's trajectory; under
        "hidden_distillation" too, and the next block reads them and no hidden state; under "naive" nothing.
      max_guidance: w_max, up to which it takes guidance weights; 0 for none.
      perceptual: weight of the distance of the clean image as a `Perception` sees it; 0 for none.

    Raises ValueError: one line naming the field.
    """

    shape: TarFlowConfig
    method: str = "hidden_alignment"
    max_guidance: float = 0.0
    perceptual: float = 0.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"student.method is {self.method!r}; expected one of {', '.join(METHODS)}")
        if not 0 <= self.max_guidance < math.inf:
            raise UserError(f"student.max_guidance is {self.max_guidance}; expected a number from 0")
        if not 0 <= self.perceptual < math.inf:
            raise UserError(f"student.perceptual is {self.perceptual}; expected a number from 0")
        if self.perceptual and not self.shape.num_classes:
            raise UserError(
                f"student.perceptual is {self.perceptual}, but the flow has no classes to learn to see by; set it to 0"
            )
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
        return {**dataclasses.asdict(self), "shape": self.shape.to_dict()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "StudentConfig":
        """From a dictionary, as read from JSON; ValueError for unknown, missing or wrong fields."""
        number = (int, float)
        types = {"shape": (dict,), "method": (str,), "max_guidance": number, "perceptual": number}
        if fields.keys() != types.keys() or any(type(fields[name]) not in types[name] for name in types):
            raise UserError(
                f"student is {str(dict(fields))[:200]}; expected a shape, a method, max_guidance and perceptual"
            )
        numbers = {name: float(fields[name]) for name, allowed in types.items() if allowed is number}
        return cls(TarFlowConfig.from_dict(fields["shape"]), fields["method"], **numbers)
