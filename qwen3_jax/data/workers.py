"""Groups of lanes, read in this process or in a worker process.

Both kinds of group give each step's rows together with the state after them, so a reader that works ahead does not
blur the position.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from qwen3_jax.data.config import DataConfig
from qwen3_jax.data.lanes import Lane
from qwen3_jax.data.mixture import Stream, open_streams
from qwen3_jax.text.tokenizer import load_tokenizer

Rows = list[dict[str, np.ndarray]]
State = Mapping[str, Any]  # of lanes, by their number

_AHEAD = 4  # steps that a worker reads ahead
_CHECK_SECONDS = 5.0  # between looks whether the worker is alive


class LaneGroup(Protocol):
    """Some lanes, step by step."""

    def start(self) -> None:
        """Begins to work ahead, where the group does."""
        ...

    def next(self) -> tuple[Rows, State]:
        """The next row of each lane, in order, and the state after them."""
        ...

    def get_state(self) -> State:
        """The state before any row that `next` has not returned yet."""
        ...

    def set_state(self, state: State) -> None:
        """Goes on from `state`, in which other lanes may be, too."""
        ...

    def close(self) -> None:
        """Stops working ahead."""
        ...


class LocalLanes:
    """Lanes read when they are asked for."""

    def __init__(self, config: DataConfig, lanes: Sequence[int], streams: Sequence[Stream]) -> None:
        pad_id = load_tokenizer(config.tokenizer).pad_id
        self._lanes = {str(lane): Lane(config, streams, lane, pad_id) for lane in lanes}

    def start(self) -> None:
        pass

    def next(self) -> tuple[Rows, State]:
        return [lane.next_row() for lane in self._lanes.values()], self.get_state()

    def get_state(self) -> State:
        return {name: lane.get_state() for name, lane in self._lanes.items()}

    def set_state(self, state: State) -> None:
        for name, lane in self._lanes.items():
            lane.set_state(state[name])

    def close(self) -> None:
        pass


class WorkerLanes:
    """Lanes read ahead by a process of their own."""

    def __init__(self, config: DataConfig, lanes: Sequence[int], streams: Sequence[Stream]) -> None:
        self._config, self._lanes = config, list(lanes)
        self._state = LocalLanes(config, lanes, streams).get_state()
        self._process: multiprocessing.process.BaseProcess | None = None

    def start(self) -> None:
        if self._process is None:
            context = multiprocessing.get_context("spawn")  # a fork of a process with jax's threads may hang
            self._queue = context.Queue(_AHEAD)
            arguments = (self._config, self._lanes, self._state, self._queue)
            self._process = context.Process(target=_work, args=arguments, daemon=True, name="qwen3-jax-data")
            self._process.start()

    def next(self) -> tuple[Rows, State]:
        self.start()
        assert self._process is not None
        while True:
            alive = self._process.is_alive()  # asked first: what a process puts before it ends is still there after
            try:
                rows, self._state, error = self._queue.get(timeout=_CHECK_SECONDS)
            except queue.Empty:
                if not alive:
                    raise RuntimeError(f"a data worker ended with exit code {self._process.exitcode}") from None
            else:
                if error is not None:
                    self.close()
                    raise error
                return rows, self._state

    def get_state(self) -> State:
        return self._state

    def set_state(self, state: State) -> None:
        self.close()
        self._state = {str(lane): state[str(lane)] for lane in self._lanes}

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.join()
            self._process = None


def _work(config: DataConfig, lanes: Sequence[int], state: State, steps: Any) -> None:
    """What a worker process does: puts (rows, state, None) for each step, or ([], state, error) and ends."""
    end_with_parent()
    try:
        group = LocalLanes(config, lanes, open_streams(config))
        group.set_state(state)
        while True:
            steps.put((*group.next(), None))
    except Exception as error:
        steps.put(([], state, error))


def end_with_parent() -> None:
    """Makes a child process leave Ctrl-C to its parent, and end when that does, be it by a kill -9."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
