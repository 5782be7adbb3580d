"""The fastest decoder of each block, found by `launch.tune_decoder` and stored next to the weights.

The file names the weights and guidance that it was tuned for. With others, updates may take longer or stop too far
from the inverse.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from tarflow_jax.errors import UserError
from tarflow_jax.files import write_text
from tarflow_jax.fingerprint import fingerprint
from tarflow_jax.sampling.decoders import Decoder, GaussSeidelJacobi, Jacobi, Sequential
from tarflow_jax.sampling.guidance import Guidance

FILE = "decoder.json"
_KINDS: dict[str, type[Decoder]] = {"sequential": Sequential, "jacobi": Jacobi, "gs_jacobi": GaussSeidelJacobi}
_MAX_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The decoders of all blocks, for each batch size that was measured."""

    decoders: Mapping[int, tuple[Decoder, ...]]  # by batch size, one per block
    weights: str  # `fingerprint` of the variables
    guidance: Guidance | None = None  # used while tuning

    def of(self, batch_size: int) -> tuple[Decoder, ...]:
        """Returns the decoders of the largest measured batch size up to this one, or else of the smallest."""
        fitting = [size for size in self.decoders if size <= batch_size]
        return self.decoders[max(fitting) if fitting else min(self.decoders)]

    def checked_for(self, guidance: Guidance | None) -> "Schedule":
        """Returns itself; raises ValueError unless it was tuned with this guidance."""
        if self.guidance != guidance:
            raise UserError(
                f'decoder "auto" was tuned for {self.guidance or "no guidance"}, not for '
                f"{guidance or 'no guidance'}; run launch.tune_decoder with it, or name a decoder"
            )
        return self

    def check_weights(self, variables: Any) -> None:
        """Raises ValueError unless these are the variables it was tuned for; hashes every parameter."""
        if self.weights != (found := fingerprint(variables)):
            raise UserError(
                f"the decoder schedule was tuned for weights {self.weights}, not for these, {found}; "
                "run launch.tune_decoder again"
            )

    def write(self, folder: epath.PathLike) -> None:
        """Writes folder/decoder.json."""
        kinds = {kind: name for name, kind in _KINDS.items()}
        fields = {
            "weights": self.weights,
            "guidance": dataclasses.asdict(self.guidance) if self.guidance else None,
            "decoders": {
                str(size): [{"kind": kinds[type(decoder)], **dataclasses.asdict(decoder)} for decoder in decoders]
                for size, decoders in self.decoders.items()
            },
        }
        write_text(epath.Path(folder) / FILE, json.dumps(fields, indent=2) + "\n")

    @classmethod
    def read(cls, folder: epath.PathLike, num_blocks: int) -> "Schedule | None":
        """Reads a folder's schedule, None if there is none; raises ValueError if damaged or of another model."""
        path = epath.Path(folder) / FILE
        if not path.exists():
            return None
        try:
            if path.stat().length > _MAX_BYTES:
                raise UserError("it is too large")
            fields = json.loads(path.read_text())
            guidance = None if fields["guidance"] is None else Guidance(**fields["guidance"])
            if not isinstance(fields["weights"], str):
                raise UserError("it does not name the weights")
            decoders = {int(size): tuple(map(_decoder, row)) for size, row in fields["decoders"].items()}
            if not decoders or any(len(row) != num_blocks for row in decoders.values()):
                raise UserError(f"it does not name {num_blocks} decoders, one a block")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is no decoder schedule of this model: {error}; run launch.tune_decoder again"
            ) from error
        return cls(decoders, fields["weights"], guidance)


def _decoder(fields: dict[str, Any]) -> Decoder:
    options = dict(fields)
    return _KINDS[options.pop("kind")](**options)
