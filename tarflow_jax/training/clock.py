"""How fast steps are, and a profile of some of them."""

import contextlib
import time

import jax
from etils import epath

from tarflow_jax.errors import UserError


class StepClock:
    """Steps per second, of steps alone: not the first, which is compiled, nor what is done between two steps.

    Attributes:
      first_seconds: of the first step, from the clock's making to its end.
    """

    def __init__(self) -> None:
        self.first_seconds = 0.0
        self._begin, self._last = time.perf_counter(), 0.0
        self._seconds, self._steps, self._rate = 0.0, 0, 0.0

    def step_done(self) -> None:
        """To be called when a step's results are on the host."""
        now = time.perf_counter()
        if not self.first_seconds:
            self.first_seconds = now - self._begin
        elif self._last:
            self._seconds, self._steps = self._seconds + now - self._last, self._steps + 1
        self._last = now

    def pause(self) -> None:
        """To be called after other work than steps: the step that it delayed does not count."""
        self._last = 0.0

    def rate(self) -> float:
        """Steps a second since the last call (if there was none that counts, the last answer); 0 if never known."""
        if self._steps:
            self._rate = self._steps / self._seconds
        self._seconds, self._steps = 0.0, 0
        return self._rate


class Profiler(contextlib.AbstractContextManager["Profiler"]):
    """Writes a `jax.profiler` trace of the steps first .. last; of none where both are 0."""

    def __init__(self, folder: epath.PathLike, steps: tuple[int, int]) -> None:
        """Raises ValueError where `steps` are no range."""
        self._folder, (self._first, self._last) = folder, steps
        self._running = False
        if (self._first or self._last) and not 1 <= self._first <= self._last:
            raise UserError(f"train.profile_steps is {tuple(steps)}; expected (first, last), or (0, 0) for none")

    def step(self, number: int) -> contextlib.AbstractContextManager:
        """Around a step: names it in the trace."""
        if self._first <= number <= self._last and not self._running:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def step_done(self, number: int) -> None:
        """To be called when a step's results are on the host."""
        if self._running and number >= self._last:
            self.__exit__()

    def __exit__(self, *_: object) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
