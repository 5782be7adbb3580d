"""Files on a local disk or in an object store (gs://): written whole or not at all, and their hashes."""

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator
from typing import IO

from etils import epath


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
