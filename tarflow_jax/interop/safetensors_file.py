"""Named tensors in one safetensors file, written and read one tensor at a time."""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import jax.numpy as jnp
import numpy as np
import safetensors

from tarflow_jax.errors import UserError, one_line
from tarflow_jax.interop.layout import check_tensors
from tarflow_jax.runtime import progress
from tarflow_jax.runtime.parameters import Shape

CODES = {"float32": "F32", "bfloat16": "BF16"}  # dtype -> the format's name for it


def write_tensors(file: IO[bytes], tensors: Mapping[str, Any], dtypes: Mapping[str, str]) -> None:
    """Writes arrays, each cast to its dtype of `CODES`.

    The library's own writer wants all tensors as bytes first, which doubles the memory; this one takes one at a time.
    """
    header, offset = {}, 0
    for name, array in tensors.items():
        end = offset + math.prod(array.shape) * jnp.dtype(dtypes[name]).itemsize
        header[name] = {"dtype": CODES[dtypes[name]], "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # the format aligns the data to eight bytes
    file.write(struct.pack("<Q", len(head)) + head)
    for name, array in progress(tensors.items(), "writing weights"):
        data = np.ascontiguousarray(np.asarray(array).astype(jnp.dtype(dtypes[name])))
        file.write(data.reshape(-1).view(np.uint8).data)


def read_tensors(
    path: Path, shapes: Mapping[str, Shape], dtypes: Mapping[str, str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, array) of the file's dtype, after names, shapes and dtypes were all found as expected.

    Raises ValueError: no safetensors file, a header that does not fit the file, or other tensors than expected.
    """
    with _opened(path) as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        check_tensors(str(path), {name: tensor.get_shape() for name, tensor in found.items()}, shapes)
        for name, tensor in found.items():
            if tensor.get_dtype() != CODES[dtypes[name]]:
                raise UserError(f"{path}: tensor {name} is {tensor.get_dtype()}; expected {CODES[dtypes[name]]}")
    for name in progress(shapes, f"reading {path.name}"):
        # Opened anew: the file is mapped into memory, and its pages count as ours until it is closed.
        with _opened(path) as file:
            array = file.get_tensor(name)
        yield name, array


def _opened(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="np")
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is not a sound safetensors file: {one_line(error)}") from error
