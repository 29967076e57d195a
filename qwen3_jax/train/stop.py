"""Stopping a run from outside: SIGTERM, which a machine that is taken away sends, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """While entered, the first SIGTERM or Ctrl-C only asks the run to stop; a second Ctrl-C ends it at once.

    With several processes a signal to one of them stops all, after the same step: jax's coordination service, which
    catches SIGTERM itself, agrees on it.
    """

    def __init__(self, announce: Callable[[str], None]) -> None:
        self._announce = announce
        self._name: str | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._times_asked = 0

    def asked(self) -> str | None:
        """The signal to stop by, None to go on. Every process asks after every step, and equally often."""
        if jax.process_count() == 1:
            return self._name
        self._times_asked += 1  # jax's step number; a run's own starts anew in each stage of a plan
        return (self._name or "SIGTERM") if multihost_utils.reached_preemption_sync_point(self._times_asked) else None

    def __enter__(self) -> StopSignal:
        # Python's own handlers run when the main thread comes back from XLA, which may be never. A signal's
        # byte is written to the wakeup socket at once, and a thread reads it.
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno())
        caught = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
        self._before = {number: signal.signal(number, lambda *_: None) for number in caught}
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *raised: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._writer.close()

    def _listen(self) -> None:
        with self._reader:
            while byte := self._reader.recv(1):
                if byte[0] not in self._before:
                    continue
                if self._name is not None and byte[0] == signal.SIGINT:
                    os._exit(128 + signal.SIGINT)
                self._name = signal.Signals(byte[0]).name
                self._announce(f"{self._name}: stopping after this step; Ctrl-C ends the run at once")
                if jax.process_count() > 1:
                    os.kill(os.getpid(), signal.SIGTERM)  # jax passes SIGTERM on to the other processes
