"""A saved student: the folder student/ of a saved model, config.json and model.safetensors, both plain data.

config.json holds the student's config, the fingerprint of its flow's weights, and checksums, as the model's own does
(`model_folder`). The parameters are float32, by the names of `runtime.parameters.student_shapes`.
"""

import json
import os
from pathlib import Path

import jax.numpy as jnp

from tarflow_jax.errors import UserError, one_line
from tarflow_jax.files import replacing, sha256
from tarflow_jax.interop.hub import local_folder
from tarflow_jax.interop.layout import check_tensors, flatten, unflatten
from tarflow_jax.interop.model_folder import (
    CONFIG,
    STUDENT,
    WEIGHTS,
    check_weights_file,
    fingerprint,
    read_json,
)
from tarflow_jax.interop.safetensors_file import read_tensors, write_tensors
from tarflow_jax.runtime.parameters import student_shapes
from tarflow_jax.student import StudentConfig, TrainedStudent

FORMAT = "tarflow_jax student"
VERSION = 1
_MAX_BLOCKS = 1 << 12


def save_student(model: str | os.PathLike[str], student: TrainedStudent | None) -> None:
    """Writes a student beside the model in a folder; None removes what an earlier one left."""
    folder = Path(model) / STUDENT
    if student is None:
        for name in (CONFIG, WEIGHTS):
            (folder / name).unlink(missing_ok=True)
        return
    tensors, shapes = flatten(student.variables), student_shapes(student.config)
    check_tensors("the student", {name: array.shape for name, array in tensors.items()}, shapes)
    with replacing(folder / WEIGHTS) as weights, replacing(folder / CONFIG) as description:
        write_tensors(weights, {name: tensors[name] for name in shapes}, dict.fromkeys(shapes, "float32"))
        weights.flush()
        fields = {
            "format": FORMAT,
            "format_version": VERSION,
            "student": student.config.to_dict(),
            "flow": student.flow,
            "weights": {"bytes": weights.tell(), "sha256": sha256(weights.name)},
        }
        fields["sha256"] = fingerprint(fields)
        description.write((json.dumps(fields, indent=2) + "\n").encode())


def load_student(name: str | os.PathLike[str]) -> TrainedStudent | None:
    """The student of a saved model, a folder or the hub's "owner/name"; None if it has none.

    Raises ValueError for another layout version, a damaged file, or files that contradict each other.
    """
    folder = local_folder(name, (f"{STUDENT}/{CONFIG}", f"{STUDENT}/{WEIGHTS}")) / STUDENT
    path, weights = folder / CONFIG, folder / WEIGHTS
    if not path.exists():
        return None
    fields = read_json(path)
    if (fields.get("format"), fields.get("format_version")) != (FORMAT, VERSION):
        raise UserError(f"{path} is not a student's of layout version {VERSION}; save the model again")
    if fields.pop("sha256", None) != fingerprint(fields):
        raise UserError(f"{path} does not match its own checksum: it was damaged or edited; save the model again")
    stored = fields.get("weights")
    if (
        fields.keys() != {"format", "format_version", "student", "flow", "weights"}
        or not isinstance(fields["student"], dict)
        or not isinstance(fields["flow"], str)
        or not isinstance(stored, dict)
        or {key: type(value) for key, value in stored.items()} != {"bytes": int, "sha256": str}
    ):
        raise UserError(f"{path} lacks fields of layout version {VERSION}, or has others; save the model again")
    # Before anything is as long as the number of blocks that the file claims.
    shape = fields["student"].get("flow")
    blocks = shape.get("num_blocks") if isinstance(shape, dict) else None
    if not isinstance(blocks, int) or blocks > _MAX_BLOCKS:
        raise UserError(f"{path} describes a student of {blocks!r} blocks; expected at most {_MAX_BLOCKS}")
    try:
        config = StudentConfig.from_dict(fields["student"])
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    check_weights_file(weights, stored)
    shapes = student_shapes(config)
    tensors = read_tensors(weights, shapes, dict.fromkeys(shapes, "float32"))
    return TrainedStudent(config, unflatten({name: jnp.asarray(array) for name, array in tensors}), fields["flow"])
