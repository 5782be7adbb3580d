"""SIGTERM: finish what is being done, save, and stop."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Preempted(Exception):
    """The run was asked to stop and has saved its state."""


class PreemptionGuard:
    """Within `with`, SIGTERM sets `requested` instead of killing the process."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> "PreemptionGuard":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
