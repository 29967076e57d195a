"""Where a run's time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_PHASES = ("step", "compile", "data", "checkpoint", "eval")


class Ledger:
    """Wall time by phase, in seconds, since the run first started, restarts and the time between them included.

    step: forward, backward and update. compile: XLA at work. data: the devices wait for a batch.
    checkpoint: saving, as far as the run waits for it, and restoring. eval: the held-out loss.
    lost: steps that were done again and the time between a crash and the restart. other: the rest.
    """

    def __init__(self) -> None:
        self._began, self._start = time.time(), time.perf_counter()
        self._seconds = dict.fromkeys((*_PHASES, "lost", "other"), 0.0)
        self._booked = 0.0  # since this process started

    def resume(self, earlier: Mapping[str, Any]) -> None:
        """Adds the `state()` of a checkpoint; the time since it that no checkpoint accounts for is lost."""
        lost = self._began - earlier["began"] - sum(earlier["seconds"].values())
        self._began = earlier["began"]
        for name, seconds in earlier["seconds"].items():
            self._seconds[name] += seconds
        self._seconds["lost"] += max(0.0, lost)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Books the time inside to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.book(name, time.perf_counter() - start)

    def book(self, name: str, seconds: float) -> None:
        """Books time to `name`."""
        assert name in _PHASES
        self._seconds[name] += seconds
        self._booked += seconds

    def seconds(self) -> dict[str, float]:
        """By phase, up to now."""
        rest = time.perf_counter() - self._start - self._booked
        return {**self._seconds, "other": self._seconds["other"] + max(0.0, rest)}

    def stepping(self) -> float:
        """Seconds up to now in which nothing kept the run from its steps: the clock that steps are timed by."""
        seconds = self.seconds()
        return seconds["step"] + seconds["data"] + seconds["other"]

    def goodput(self) -> float:
        """Share of all the time that went into steps, 0 to 1."""
        seconds = self.seconds()
        return seconds["step"] / max(sum(seconds.values()), 1e-9)

    def state(self) -> dict[str, Any]:
        """The state for the checkpoint, as JSON data."""
        return {"began": self._began, "seconds": self.seconds()}

    def summary(self) -> str:
        """One line."""
        seconds = self.seconds()
        total = sum(seconds.values())
        parts = ", ".join(f"{name} {value / max(total, 1e-9):.1%}" for name, value in seconds.items() if value > 0)
        return f"{total:,.0f} s since the first start: {parts}"
