"""SIGTERM, with which schedulers and preempted machines take leave: save, and stop, all processes at one place."""

import itertools
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

_active: "PreemptionGuard | None" = None
_calls = itertools.count(1)  # of all guards: JAX wants the numbers of its sync points to go up by one


class Preempted(Exception):
    """The run was asked to stop; the same command continues it."""


class PreemptionGuard:
    """Within `with`, SIGTERM does not kill the process; whoever works asks `requested`, or `stop_if_requested`.

    Of several processes (`start_processes`) JAX tells all once one of them got the signal, so all must ask at the same
    places.
    """

    def __init__(self) -> None:
        self._requested = False
        self._outer: PreemptionGuard | None = None
        self._previous: Any = None

    def __enter__(self) -> "PreemptionGuard":
        global _active
        self._outer, _active = _active, self
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _active
        _active = self._outer
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def requested(self) -> bool:
        """Whether to stop here: the same answer on all processes."""
        if jax.process_count() > 1 and not self._requested:
            self._requested = multihost_utils.reached_preemption_sync_point(next(_calls))
        return self._requested

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True


def stop_if_requested() -> None:
    """Raises Preempted within a `PreemptionGuard` that was asked to stop; to be called between batches of work."""
    if _active is not None and _active.requested():
        raise Preempted("asked to stop; run the same command to continue")
