"""Files on a local disk or in an object store (gs://): written whole or not at all, and their hashes."""

import contextlib
import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO

import numpy as np
from etils import epath

from tarflow_jax.errors import UserError

MAX_ARRAY_BYTES = 64 * 2**30  # 50,000 images of 512x512 take 37 GiB
_NPZ_DAMAGE = (ValueError, KeyError, OSError, EOFError, MemoryError, AttributeError, NotImplementedError)


@contextlib.contextmanager
def replacing(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """Yields a file to write bytes to; it gets its name, and its folder, if the body succeeds, else it vanishes."""
    path = epath.Path(path)
    if is_remote(path):  # an object appears when all of it is there
        buffer = io.BytesIO()
        yield buffer
        path.write_bytes(buffer.getvalue())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def write_npz(path: epath.PathLike, **arrays: np.ndarray) -> None:
    """Writes a NumPy archive, whole or not at all."""
    with replacing(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_npz(path: epath.PathLike, names: tuple[str, ...], max_bytes: int = MAX_ARRAY_BYTES) -> dict[str, np.ndarray]:
    """The arrays of an npz that are among `names`; never unpickles, and never unpacks more than `max_bytes` of one.

    Raises FileNotFoundError, and ValueError for a file that is no npz of plain arrays.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} not found; expected an npz file")
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            sizes = {info.filename.removesuffix(".npy"): info.file_size for info in archive.infolist()}
        wanted = [name for name in names if name in sizes]
        large = [name for name in wanted if sizes[name] > max_bytes]
        if large:
            raise UserError(f"array {large[0]} unpacks to {sizes[large[0]]} bytes, more than {max_bytes}")
        # Opened here, since np.load leaves a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in wanted}
    except (*_NPZ_DAMAGE, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is not a readable npz file: {error}") from error


def sha256(path: epath.PathLike) -> str:
    """A file's SHA-256, in hexadecimal; read a part at a time."""
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def checksums(folder: epath.Path) -> dict[str, str]:
    """SHA-256 of a folder's files, by their path in it; not of hidden ones, which file managers make and change."""
    found: dict[str, str] = {}
    for path in folder.iterdir():  # epath's walk drops the scheme of an object store
        if path.name.startswith("."):
            continue
        if path.is_dir():
            found |= {f"{path.name}/{name}": digest for name, digest in checksums(path).items()}
        else:
            found[path.name] = sha256(path)
    return found


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is in an object store, where a file cannot be appended to."""
    return "://" in os.fspath(path)
