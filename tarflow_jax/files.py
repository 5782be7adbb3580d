"""Files on a local disk or in an object store (gs://): atomic writes, locks, npz archives and hashes."""

import contextlib
import errno
import hashlib
import io
import math
import os
import socket
import uuid
import zipfile
from collections.abc import Iterator
from typing import IO

import filelock
import fsspec
import numpy as np
from etils import epath

from tarflow_jax.errors import UserError, one_line

MAX_ARRAY_BYTES = 64 * 2**30  # 50,000 images of 512x512 take 37 GiB
_MAX_DEFLATED = 1032  # bytes that one byte can unpack to, see zlib's technical details

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, quota or file size left
# No cached listings, since other processes write too. A server may never answer a request; TensorStore then retries.
fsspec.config.conf.setdefault("gcs", {}).update(use_listings_cache=False, requests_timeout=120)
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "30")
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
_FAILED = ("ABORTED:", "DEADLINE_EXCEEDED:", "PERMISSION_DENIED:", "UNAVAILABLE:")  # prefixes of TensorStore's errors
_unfinished: set[epath.Path] = set()


@contextlib.contextmanager
def replacing(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """Yields a binary file to write, which replaces `path` only if the body succeeds. Creates the folder."""
    path = epath.Path(path)
    if is_remote(path):  # an object appears once it is complete
        buffer = io.BytesIO()
        yield buffer
        path.write_bytes(buffer.getvalue())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"  # two containers may share a process id
    _unfinished.add(temporary)
    try:
        with naming(path), temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        _unfinished.discard(temporary)


@contextlib.contextmanager
def naming(path: epath.PathLike) -> Iterator[None]:
    """Adds the path to the error of a full disk, which names no file."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL and error.filename is None:
            error.filename = os.fspath(path)
        raise


def remove_unfinished() -> None:
    """Removes partly written files, for a process about to exit without unwinding its stack."""
    for temporary in tuple(_unfinished):
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def sole_user(folder: epath.PathLike) -> Iterator[None]:
    """Locks a folder for this process, and creates it if it does not exist. Object stores have no locks.

    On a disk, even one that several hosts share, the lock is released however the process ends. Raises UserError if
    another process holds it.
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if is_remote(folder):
        yield
        return
    owner = folder / ".owner"
    lock = filelock.FileLock(folder / ".lock", blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        holder = owner.read_text() if owner.exists() else "another process"
        raise UserError(f"{holder} works in {folder}; wait for it, or stop it") from None
    with lock:
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield


def storage_failed(error: BaseException) -> bool:
    """Whether the disk or object store failed, not its content. Clients of object stores do not raise OSError."""
    client = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or client in ("aiohttp", "gcsfs", "google") or str(error).startswith(_FAILED)


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    with replacing(path) as file:
        file.write(text.encode())


def write_npz(path: epath.PathLike, **arrays: np.ndarray) -> None:
    """Writes a NumPy archive atomically."""
    with replacing(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_npz(path: epath.PathLike, names: tuple[str, ...], max_bytes: int = MAX_ARRAY_BYTES) -> dict[str, np.ndarray]:
    """Reads those of the named arrays that an npz file holds; raises UserError if it is damaged or not an npz file.

    Never unpickles. Before allocating an array, checks its claimed size against the bytes in the file, `max_bytes` and
    this machine's memory.
    """
    path = epath.Path(path)
    if not (path.exists() if is_remote(path) else os.path.isfile(path)):  # opening a pipe would block
        raise FileNotFoundError(f"{path} not found; expected an npz file")
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            members = archive.namelist()
            return {name: _read_array(archive, name, max_bytes) for name in names if f"{name}.npy" in members}
    except Exception as error:  # NumPy and zipfile raise nearly anything on damaged files
        raise UserError(f"{path} is not a readable npz file: {one_line(error)}") from error


def _read_array(archive: zipfile.ZipFile, name: str, max_bytes: int) -> np.ndarray:
    entry = archive.getinfo(f"{name}.npy")
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        claimed, held = math.prod(shape) * dtype.itemsize, entry.file_size - file.tell()
    if dtype.hasobject:
        raise UserError(f"array {name} holds Python objects, which are never loaded; save numbers")
    if claimed != held or held > _MAX_DEFLATED * entry.compress_size:
        raise UserError(f"array {name} claims {claimed} bytes, but the file does not hold that many")
    allowed = min(max_bytes, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if claimed > allowed:
        raise UserError(f"array {name} unpacks to {claimed} bytes, more than the {allowed} allowed")
    with archive.open(entry) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def sha256(path: epath.PathLike) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is in an object store, which cannot append to files."""
    return "://" in os.fspath(path)
