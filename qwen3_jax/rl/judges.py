"""Verdicts while the devices decode, and the same ones on every process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from qwen3_jax.data.source import Document
from qwen3_jax.tasks.judge import Verdict, judge

Verdicts = dict[str, Verdict]  # by the part of the reward


class Judges:
    """Threads that judge; what may hang runs in a process of each thread's own, which is killed at its deadline.

    With several processes each judges its share, by the answers' numbers, since a verdict may depend on the clock: all
    of them then have the same ones.
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="judge")
        self._own: dict[int, Future[Verdicts]] = {}

    def submit(
        self, number: int, document: Document, records: Mapping[str, Mapping[str, Any]], thought: str, answer: str
    ) -> None:
        """Begins to judge answer `number` to the prompt of `document`, by a record for each part of its reward, if it
        is this process's."""
        if number % jax.process_count() == jax.process_index():
            self._own[number] = self._pool.submit(_judged, document, records, thought, answer)

    def collect(self) -> dict[int, Verdicts]:
        """The verdicts on all answers submitted since the last call, by number; waits for them.

        Raises:
          ValueError: of `judge`, after `file:line`, by a record or a verifier that is unfit.
        """
        own, self._own = self._own, {}
        found = {number: verdicts.result() for number, verdicts in own.items()}
        if jax.process_count() == 1:
            return found
        text = json.dumps(found).encode()
        lengths = np.asarray(multihost_utils.process_allgather(np.int32(len(text)))).ravel()
        padded = np.zeros(lengths.max(), np.uint8)
        padded[: len(text)] = np.frombuffer(text, np.uint8)
        rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
        parts = [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]
        return {
            int(number): {name: Verdict(*verdict) for name, verdict in verdicts.items()}
            for part in parts
            for number, verdicts in part.items()
        }


def _judged(document: Document, records: Mapping[str, Mapping[str, Any]], thought: str, answer: str) -> Verdicts:
    try:
        return {name: judge(record, thought, answer) for name, record in records.items()}
    except ValueError as error:
        raise ValueError(f"{document.location}: {error}") from None
