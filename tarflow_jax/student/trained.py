"""A trained student, and the flow that it belongs to."""

import dataclasses
from typing import Any

from tarflow_jax.errors import UserError
from tarflow_jax.fingerprint import fingerprint
from tarflow_jax.flow import TarFlowConfig
from tarflow_jax.student.config import StudentConfig


@dataclasses.dataclass(frozen=True)
class TrainedStudent:
    """A student's weights.

    Attributes:
      config: its shape.
      variables: {"params": …}.
      flow: `fingerprint` of the variables of the flow that it inverts.
    """

    config: StudentConfig
    variables: dict[str, Any]
    flow: str

    def check_flow(self, config: TarFlowConfig, variables: Any) -> None:
        """Raises ValueError where it is of another flow, of which it reads every number."""
        self.config.check_flow(config)
        if self.flow != (found := fingerprint(variables)):
            raise UserError(
                f"the student here was trained for the flow {self.flow}, not for this one, {found}; "
                "run launch.distill again, in a folder without it"
            )
