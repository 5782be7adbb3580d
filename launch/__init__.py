"""The commands: `python -m launch.NAME`.

From its first import on, a command exits at once on SIGTERM, SIGINT or SIGHUP and leaves no file half-written. Only
training finishes its step and saves first (`runtime.PreemptionGuard`).
"""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType


def exit_code(number: int) -> int:
    """Returns the exit code of a command that a signal stopped: 75 for SIGTERM, 130 for SIGINT, 129 for SIGHUP."""
    return os.EX_TEMPFAIL if number == signal.SIGTERM else 128 + number


def on_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    """Installs a handler of SIGTERM, SIGINT and SIGHUP, but of none that is ignored, as SIGHUP is under nohup."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def end_at_signals() -> None:
    """Has signals end the process. All commands but training call it again once JAX has replaced SIGTERM's handler."""
    on_signals(_end)


def _end(number: int, frame: FrameType | None) -> None:
    # No exception: one raised in a callback is lost, and C++ threads may outlive the interpreter.
    if files := sys.modules.get("tarflow_jax.files"):
        files.remove_unfinished()
    os.write(2, b"stopped: asked to stop; run the same command again\n")
    os._exit(exit_code(number))


if sys.argv[0] == "-m":  # as `python -m` has it while it looks for the command; others may import this package
    end_at_signals()
