"""Stops a run cleanly on SIGTERM, ctrl-C or a closed terminal, all processes at the same step."""

import itertools
import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_active: "PreemptionGuard | None" = None
_calls = itertools.count(1)  # shared by all guards: JAX numbers its sync points consecutively


class Preempted(Exception):
    """The run was asked to stop; the same command continues it.

    Attributes:
      signal: the number of the signal received.
    """

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.signal = number


class PreemptionGuard:
    """A context in which the first signal does not end the process; poll `requested`, or call `stop_if_requested`.

    A second signal ends it at once, except SIGTERM, which Slurm repeats. If one of several processes
    (`start_processes`) receives SIGTERM, JAX notifies all of them, so all must poll at the same points.

    Attributes:
      signal: the number of the signal received; 0 if none.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "PreemptionGuard":
        global _active
        _active = self
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves SIGHUP
                    self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        global _active
        _active = None
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Returns whether to stop now, the same on all processes."""
        if jax.process_count() > 1 and not self.signal and multihost_utils.reached_preemption_sync_point(next(_calls)):
            self.signal = signal.SIGTERM
        return self.signal != 0

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number != signal.SIGTERM:
            os._exit(128 + number)
        self.signal = self.signal or number


def stop_if_requested() -> None:
    """Raises Preempted if the active `PreemptionGuard` received a signal; call it between batches of work."""
    if _active is not None and _active.requested():
        raise Preempted("asked to stop; run the same command to continue", _active.signal)
