"""What goes wrong with checkpoints: damaged files, too little memory, a disk or network; and on which process."""

import contextlib
import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from tarflow_jax.errors import UserError, one_line

T = TypeVar("T")

_DAMAGE = (json.JSONDecodeError, UnicodeDecodeError, EOFError, FileNotFoundError, IsADirectoryError, NotADirectoryError)
# TensorStore raises ValueErrors that begin with a status: of files that are damaged or gone, or of a disk or network.
_DAMAGE_STATUS = re.compile(r"(DATA_LOSS|NOT_FOUND|OUT_OF_RANGE|FAILED_PRECONDITION): ")
_STORAGE_STATUS = re.compile(
    _DAMAGE_STATUS.pattern[:-3] + "|PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED"
    "|RESOURCE_EXHAUSTED|ABORTED|CANCELLED|INTERNAL|UNKNOWN|ALREADY_EXISTS): "
)
_OS_ERROR = re.compile(r"(?:os_error_code='|OS error )(\d+)")


class DamagedError(Exception):
    """Files of a checkpoint are damaged or missing: it is passed over."""


class OutOfMemoryError(UserError, MemoryError):
    """A state does not fit into memory."""


@contextlib.contextmanager
def plain_read_errors(path: epath.Path) -> Iterator[None]:
    """Tells damage, a lack of memory and trouble with a disk or network apart; other errors stay what they are."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while type(cause) is Exception and cause.__cause__:  # Orbax wraps errors of reading an array
            cause = cause.__cause__
        if isinstance(cause, MemoryError) or (
            isinstance(cause, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(cause)
        ):
            raise OutOfMemoryError(
                f"not enough memory to restore {path}: {one_line(cause)}; use more devices (mesh.fsdp), or free some"
            ) from error
        if isinstance(cause, _DAMAGE) or _has_status(cause, _DAMAGE_STATUS):
            raise DamagedError(one_line(cause)) from error
        if isinstance(cause, OSError) or _has_status(cause, _STORAGE_STATUS):
            raise OSError(
                f"could not read {path}: {_reason(cause)}; mend that and run the same command again, or move the "
                "checkpoint elsewhere to use the one before"
            ) from error
        raise


@contextlib.contextmanager
def plain_write_errors(folder: epath.Path) -> Iterator[None]:
    """Tells trouble with a disk or network from other errors, which stay what they are."""
    try:
        yield
    except Exception as error:
        if not (isinstance(error, OSError) or _has_status(error, _STORAGE_STATUS)):
            raise
        full = _errno(error) in (errno.ENOSPC, errno.EDQUOT) or "no space left" in str(error).lower()
        advice = "Free some space, or choose another workdir, then" if full else "When that is mended,"
        raise OSError(
            f"could not write a checkpoint in {folder}: {_reason(error)}; earlier ones are whole. "
            f"{advice} run the same command again"
        ) from error


def on_all_processes(action: Callable[[], T]) -> T:
    """What `action` returns here, once it has succeeded on every process; all call this together.

    Raises what it raised here. If it succeeded here, or showed only damage, but failed on another process:
    DamagedError if that was all, else OSError, with what the other says.
    """
    if jax.process_count() == 1:
        return action()
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    severity = 0 if failure is None else 1 if isinstance(failure, DamagedError) else 2
    said = np.zeros(512, np.uint8)
    text = b"" if failure is None else one_line(failure).encode()[: len(said) - 1]
    said[: len(text) + 1] = [severity, *text]
    everyone = multihost_utils.process_allgather(said)
    process = int(everyone[:, 0].argmax())
    worst = everyone[process, 0]
    if failure is not None and severity == worst:
        raise failure
    if worst:
        text = bytes(everyone[process, 1:]).rstrip(b"\0")
        kind = DamagedError if worst == 1 else OSError
        raise kind(f"process {process}: {text.decode(errors='ignore')}")
    return result


def _has_status(error: BaseException, status: re.Pattern[str]) -> bool:
    return isinstance(error, ValueError) and status.match(str(error)) is not None


def _errno(error: BaseException) -> int | None:
    """Of an OSError, or as TensorStore tells it at the end of a long line."""
    found = _OS_ERROR.search(str(error))
    return int(found[1]) if found else getattr(error, "errno", None)


def _reason(error: BaseException) -> str:
    number, text = _errno(error), one_line(error)
    return text if number is None or os.strerror(number) in text else f"{os.strerror(number)} ({text})"
