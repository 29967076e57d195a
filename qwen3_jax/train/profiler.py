"""A trace of some steps, by JAX's profiler."""

from __future__ import annotations

from pathlib import Path

import jax


class Profiler:
    """Traces the steps `first` to `last` of a window, or those of them that a run takes; None traces nothing."""

    def __init__(self, window: tuple[int, int] | None, directory: Path) -> None:
        self._window, self._directory, self._running = window, directory, False

    def start(self, step: int) -> None:
        """To be called before each step is handed to the devices."""
        if self._window and not self._running and self._window[0] <= step <= self._window[1]:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # it hooks into every thread, and Orbax starts and ends some meanwhile
            jax.profiler.start_trace(str(self._directory), profiler_options=options)
            self._running = True

    def ends_with(self, step: int) -> bool:
        return self._running and self._window is not None and step == self._window[1]

    def stop(self) -> None:
        """To be called when the devices have done the last step of the trace; nothing to do where there is none."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
