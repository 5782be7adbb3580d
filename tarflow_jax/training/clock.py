"""Measures steps per second, and profiles a range of steps."""

import contextlib
import time

import jax
from etils import epath

from tarflow_jax.errors import UserError


class StepClock:
    """Measures steps per second. Excludes the first step, which compiles, and any step that follows a pause."""

    def __init__(self) -> None:
        self._last: float | None = None  # when the last step ended, unless other work followed it
        self._seconds, self._steps, self._rate = 0.0, 0, 0.0

    def step_done(self) -> None:
        """Call when a step's results are on the host."""
        now = time.perf_counter()
        if self._last is not None:
            self._seconds, self._steps = self._seconds + now - self._last, self._steps + 1
        self._last = now

    def pause(self) -> None:
        """Call after work between steps, such as an evaluation."""
        self._last = None

    def rate(self) -> float:
        """Returns steps per second since the last call; the previous rate if none were counted, at first 0."""
        if self._steps:
            self._rate = self._steps / self._seconds
        self._seconds, self._steps = 0.0, 0
        return self._rate


class Profiler(contextlib.ExitStack):
    """Writes a `jax.profiler` trace of steps first … last, or none if both are 0. Exiting ends the trace."""

    def __init__(self, folder: epath.PathLike, steps: tuple[int, int]) -> None:
        super().__init__()
        self._folder, (self._first, self._last) = folder, steps
        self._started = False
        if (self._first or self._last) and not 1 <= self._first <= self._last:
            raise UserError(f"train.profile_steps is {tuple(steps)}; expected (first, last), or (0, 0) for none")

    def step(self, number: int) -> contextlib.AbstractContextManager:
        """Enter around a step, to start the trace if it is due and to name the step in it."""
        if self._first <= number <= self._last and not self._started:
            self._started = True
            self.enter_context(jax.profiler.trace(str(self._folder)))
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def step_done(self, number: int) -> None:
        """Call when a step's results are on the host."""
        if number >= self._last:
            self.close()
