"""The shape of a student, and its trained weights."""

import dataclasses
import functools
from typing import Any, ClassVar

from tarflow_jax.errors import UserError
from tarflow_jax.fingerprint import fingerprint
from tarflow_jax.flow import TarFlowConfig
from tarflow_jax.options import Options, option


@dataclasses.dataclass(frozen=True)
class StudentConfig(Options):
    """Everything that determines a student's parameters and arithmetic.

    A student has one block more than its flow; the last one denoises. It learns by "hidden alignment" (Bidirectional
    Normalizing Flow, arXiv 2512.10953): the tokens after each block are compared with the flow's trajectory.
    """

    group: ClassVar[str] = "student"

    flow: TarFlowConfig
    width: int = option(0, "Width of the student's residual stream; 0 for the flow's.")
    layers_per_block: tuple[int, ...] = option(
        (2,), "Layers per block, from the flow's last block to its first and the denoiser; or one number.", low=1
    )
    max_guidance: float = option(0.0, "Largest guidance weight that the student accepts; 0 for no guidance.")
    perceptual: float = option(0.0, "Weight of the perceptual distance of the clean images; 0 for none.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flow.condition_dim:
            raise UserError(f"the flow has a condition of {self.flow.condition_dim} numbers, which no student takes")
        if self.flow.image_bits == 0:
            raise UserError("the flow is of latents, which no student takes")
        for name in ("perceptual", "max_guidance"):
            if getattr(self, name) and not self.flow.num_classes:
                raise UserError(f"student.{name} is {getattr(self, name)}, but the flow has no classes; set it to 0")
        if len(self.layers_per_block) not in (1, self.num_blocks):
            raise UserError(
                f"student.layers_per_block lists {len(self.layers_per_block)} blocks; expected {self.num_blocks}, one "
                "for each of the flow's and one that denoises, or one number for all"
            )
        _ = self.shape  # validates it

    @property
    def num_blocks(self) -> int:
        return self.flow.num_blocks + 1

    @functools.cached_property
    def shape(self) -> TarFlowConfig:
        """The shape of its transformers: the flow's, without the options that only a density needs."""
        depths = self.layers_per_block
        return dataclasses.replace(
            self.flow,
            width=self.width or self.flow.width,
            num_blocks=self.num_blocks,
            layers_per_block=depths if len(depths) == self.num_blocks else depths * self.num_blocks,
            volume_preserving=False,
            triangular=False,
            noise_conditional=False,
            input_limit=0.0,
            image_limit=0.0,
            output_limit=0.0,
            start_token=False,
            final_norm=False,
            position_init=self.flow.position_init if self.flow.position_embeddings else "normal",
        )


@dataclasses.dataclass(frozen=True)
class TrainedStudent:
    """A student's weights."""

    config: StudentConfig
    variables: dict[str, Any]  # {"params": …}
    flow: str  # `fingerprint` of the variables of its flow

    def check_flow(self, variables: Any) -> None:
        """Raises UserError unless it was trained for this flow; hashes every parameter."""
        flow = fingerprint(variables)
        if self.flow != flow:
            raise UserError(
                f"the student here was trained for the flow {self.flow}, not for this one, {flow}; "
                "run launch.distill again, in a folder without it"
            )
