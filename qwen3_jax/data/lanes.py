"""Lanes: row r of every batch is lane r, an endless stream of its own.

A lane is a function of the configuration and its number alone, so the tokens of step s do not depend on how many
processes or workers share the lanes. Of L lanes (L is the batch size), lane r takes from each source the documents at
r, r + L, r + 2 L, ... of the source's endless order: together they read each epoch once, and it does not matter whether
a source has fewer documents than there are lanes.

Which source comes next is decided per example: the one with the smallest (tokens drawn + phase) / weight. So a lane's
tokens follow the weights up to one example of each source. The phases, which differ from lane to lane, spread the
lanes' turns: without them all lanes would draw from a rare source in the same step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwen3_jax.data.config import DataConfig, Labels
from qwen3_jax.data.counts import Counts, Tally
from qwen3_jax.data.examples import Example
from qwen3_jax.data.mixture import Drawn, Stream, uniform
from qwen3_jax.data.packing import OpenRow, OpenRows, to_arrays
from qwen3_jax.text.tokenizer import fingerprint

_GOLDEN = 0.6180339887498949  # multiples of it modulo 1 lie evenly spread
_MAX_MISFITS = 1_000_000


@dataclasses.dataclass(frozen=True)
class _Segment:
    """An example in an open row, and where it is from: example `part` of the lane's `turn`-th document of a source."""

    example: Example
    source: int
    turn: int
    part: int
    labels: Labels

    def __len__(self) -> int:
        return len(self.example)


class _Cursor:
    """A lane's place in one source."""

    def __init__(self, stream: Stream, lane: int, num_lanes: int) -> None:
        self.stream = stream
        self._lane, self._num_lanes = lane, num_lanes
        self.turn = self.part = 0  # the next example
        self.tokens = 0  # drawn so far
        self.phase: float | None = None
        self._held: tuple[int, Drawn] | None = None

    @property
    def due(self) -> float:
        """The lane draws from the source where this is smallest."""
        if self.phase is None:
            spread = (uniform(self.stream.source.name) + self._lane * _GOLDEN) % 1
            self.phase = spread * len(self.peek().examples[self.part])
        return (self.tokens + self.phase) / self.stream.source.weight

    def document(self, turn: int) -> Drawn:
        """The lane's `turn`-th document."""
        if self._held is None or self._held[0] != turn:
            self._held = turn, self.stream.draw(self._lane + turn * self._num_lanes)
        return self._held[1]

    def peek(self) -> Drawn:
        """The document of the next example; moves on over documents that have none left."""
        misfits = 0
        while self.part >= len((drawn := self.document(self.turn)).examples):
            misfits = 0 if drawn.fits else misfits + 1
            if misfits > min(32 * self.stream.num_documents, _MAX_MISFITS):
                source = self.stream.source
                raise ValueError(
                    f"sources.{source.name}: of {misfits:,} documents in a row none is kept; "
                    f"wider `tokens` than {source.tokens} or other `label_weights` fit"
                )
            self.turn, self.part = self.turn + 1, 0
        return drawn


class Lane:
    """One row of every batch, with exact state after each row."""

    def __init__(self, config: DataConfig, streams: Sequence[Stream], lane: int, pad_id: int) -> None:
        self._length, self._pad_id = config.sequence_length, pad_id
        self._cursors = [_Cursor(stream, lane, config.batch_size) for stream in streams]
        self._open: OpenRows[_Segment] = OpenRows(self._length)
        self._consumed = {stream.source.name: Tally() for stream in streams}
        self._order = order_of(config, streams)

    def next_row(self) -> dict[str, np.ndarray]:
        """The next row, arrays [T]; `qwen3_jax.data.packing.to_arrays` says which.

        Raises:
          ValueError: `file:line: reason` for a document that is malformed.
        """
        closed = None
        while closed is None:
            source = min(range(len(self._cursors)), key=lambda i: self._cursors[i].due)
            cursor = self._cursors[source]
            drawn = cursor.peek()
            segment = _Segment(drawn.examples[cursor.part], source, cursor.turn, cursor.part, drawn.labels)
            cursor.tokens += len(segment)
            cursor.part += 1
            closed = self._open.add(segment)
        for segment in closed:
            name = self._cursors[segment.source].stream.source.name
            self._consumed[name].add(Counts.of(segment.example, begins=segment.part == 0), segment.labels)
        return to_arrays([segment.example for segment in closed], self._length, self._pad_id)

    def get_state(self) -> dict[str, Any]:
        """What `set_state` needs to go on after the last row, fit for JSON.

        Of the open rows it has not the tokens but, for each segment, three numbers that find them again.
        """
        return {
            "order": self._order,
            "sources": {
                cursor.stream.source.name: [cursor.turn, cursor.part, cursor.tokens, cursor.phase]
                for cursor in self._cursors
            },
            "open_rows": [
                [row.age, *(number for item in row.items for number in (item.source, item.turn, item.part))]
                for row in self._open.rows
            ],
            "consumed": {name: tally.to_json() for name, tally in self._consumed.items()},
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Moves to where `get_state` was called, under a configuration of the same order."""
        for cursor in self._cursors:
            cursor.turn, cursor.part, cursor.tokens, cursor.phase = state["sources"][cursor.stream.source.name]
        self._open = OpenRows(self._length)
        for age, *numbers in state["open_rows"]:
            items = [self._segment(*numbers[i : i + 3]) for i in range(0, len(numbers), 3)]
            self._open.rows.append(OpenRow(items, sum(map(len, items)), age))
        self._consumed = {name: Tally.from_json(tally) for name, tally in state["consumed"].items()}

    def _segment(self, source: int, turn: int, part: int) -> _Segment:
        drawn = self._cursors[source].document(turn)
        return _Segment(drawn.examples[part], source, turn, part, drawn.labels)


def order_of(config: DataConfig, streams: Sequence[Stream]) -> dict[str, Any]:
    """All that the order of the tokens depends on; a position means nothing under another one."""
    return {
        "seed": config.seed,
        "shuffle": config.shuffle,
        "batch_size": config.batch_size,
        "sequence_length": config.sequence_length,
        "tokenizer": fingerprint(config.tokenizer),
        "sources": {
            stream.source.name: {
                "documents": stream.num_documents,
                "weight": stream.source.weight,
                "tokens": list(stream.source.tokens) if stream.source.tokens else None,
                "label_weights": stream.source.label_weights,
            }
            for stream in streams
        },
    }


def refuse_other_order(order: Mapping[str, Any], state: Mapping[str, Any], lanes: Sequence[str]) -> None:
    """Refuses the `state` of lanes that `lanes` cannot go on from.

    Raises:
      ValueError: naming what of the configuration is not as it was, or the lane that is missing.
    """
    for saved in state.values():
        _refuse_difference(order, saved["order"], "data")
    missing = [lane for lane in lanes if lane not in state]
    if missing:
        raise ValueError(f"data: the saved position lacks lane {missing[0]}; that of all processes together fits")


def _refuse_difference(now: Any, then: Any, where: str) -> None:
    if isinstance(now, dict) and isinstance(then, dict) and now.keys() == then.keys():
        for key in now:
            _refuse_difference(now[key], then[key], f"{where}.{key}")
    elif now != then:
        now, then = (list(value) if isinstance(value, dict) else value for value in (now, then))
        raise ValueError(f"{where}: {now!r}, but the data position was saved under {then!r}; that fits")
