"""Stopping a run from outside: SIGTERM, which a machine that is taken away sends, and Ctrl-C."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """While entered, the first SIGTERM or Ctrl-C only asks the run to stop; a second Ctrl-C ends it at once.

    With several processes a signal to one of them stops all, after the same step: jax's coordination service, which
    catches SIGTERM itself, agrees on it.
    """

    def __init__(self) -> None:
        self._name: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def after(self, step: int) -> str | None:
        """The signal to stop by when `step` is done, None to go on. Every process asks after every step."""
        if jax.process_count() == 1:
            return self._name
        return (self._name or "SIGTERM") if multihost_utils.reached_preemption_sync_point(step) else None

    def __enter__(self) -> StopSignal:
        caught = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
        self._before = {number: signal.signal(number, self._catch) for number in caught}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self._name is not None and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._name = signal.Signals(number).name
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # the way to tell the other processes
