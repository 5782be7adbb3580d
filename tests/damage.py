"""Damages the largest file in a folder, as a disk may do, or fills the disk."""

import contextlib
import os
import resource


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_bit(folder):
    path = largest_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(folder):
    path = largest_file(folder)
    os.truncate(path, path.stat().st_size // 2)


@contextlib.contextmanager
def full_disk(max_bytes):
    """Fails to write more than `max_bytes` into any file, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
