"""Files on a local disk or in an object store (gs://): written whole or not at all, and their hashes."""

import contextlib
import hashlib
import io
import json
import os
import socket
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO

import filelock
import numpy as np
from etils import epath

from tarflow_jax.errors import UserError

LEASE_S = 300
MAX_ARRAY_BYTES = 64 * 2**30  # 50,000 images of 512x512 take 37 GiB
_NPZ_DAMAGE = (ValueError, KeyError, OSError, EOFError, MemoryError, AttributeError, NotImplementedError)


_unfinished: set[epath.Path] = set()


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
    _unfinished.add(temporary)
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # there only if the body failed
        _unfinished.discard(temporary)


def remove_unfinished() -> None:
    """Removes the files that are being written, for a process that ends here and now."""
    for temporary in tuple(_unfinished):
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def sole_user(folder: epath.PathLike) -> Iterator[None]:
    """Keeps other processes that ask for the same out of a folder, which is made if it is missing.

    On a disk by a lock that ends with the process, however that ends, and that hosts which share the disk see. In an
    object store by a lease: renewed every minute, void after `LEASE_S` seconds.

    Raises:
      ValueError: another process is in it.
    """
    folder, me = epath.Path(folder), f"process {os.getpid()} on {socket.gethostname()}"
    folder.mkdir(parents=True, exist_ok=True)
    if is_remote(folder):
        with _lease(folder / "lease.json", me):
            yield
        return
    owner = folder / ".owner"
    lock = filelock.FileLock(folder / ".lock", blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        other = owner.read_text() if owner.exists() else "another process"
        raise UserError(f"{other} works in {folder}; wait for it, or stop it") from None
    with lock:
        owner.write_text(me)
        yield


@contextlib.contextmanager
def _lease(path: epath.Path, me: str) -> Iterator[None]:
    found = json.loads(path.read_text()) if path.exists() else {"until": 0}
    if found["until"] > time.time():
        raise UserError(
            f"{found['owner']} works in {path.parent}; wait for it, or stop it (if it was killed, this ends by itself "
            f"in {found['until'] - time.time():.0f} s)"
        )
    ended = threading.Event()

    def renew() -> None:
        while True:
            path.write_text(json.dumps({"owner": me, "until": time.time() + LEASE_S}))
            if ended.wait(60):
                return

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        path.unlink(missing_ok=True)


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


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is in an object store, where a file cannot be appended to."""
    return "://" in os.fspath(path)
