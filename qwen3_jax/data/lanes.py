"""Lanes: row r of every batch comes from lane r, an endless stream of rows.

A lane depends on the configuration and its number only. The tokens of a step are therefore the same for any number of
processes and workers, which only divide the lanes among themselves. Of L lanes (L is the batch size), lane r reads the
documents at positions r, r + L, r + 2 L, ... of each source's endless order. Together the lanes read each epoch once,
also where a source has fewer documents than there are lanes:

    position in the order   0  1  2 | 3  4  5 | 6  7  8 | ...      L = 3
    lane                    0  1  2 | 0  1  2 | 0  1  2 | ...
    turn of the lane        0  0  0 | 1  1  1 | 2  2  2 | ...

Each example is drawn from the source with the smallest (tokens drawn + phase) / weight, so the tokens of a lane follow
the weights up to one example of each source. The phase differs from lane to lane. Without it, all lanes would draw from
a rare source in the same step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qwen3_jax.data.config import Labels
from qwen3_jax.data.counts import Counts, LabelCounts
from qwen3_jax.data.examples import Example
from qwen3_jax.data.mixture import Drawn, Mixture, Stream, uniform
from qwen3_jax.data.packing import OpenRow, OpenRows, to_arrays

_GOLDEN = 0.6180339887498949  # its multiples modulo 1 are evenly spread
_MAX_SKIPPED = 1_000_000


@dataclasses.dataclass(frozen=True)
class _Segment:
    """An example in an open row, and its origin: example `part` of the lane's `turn`-th document of a source."""

    example: Example
    source: int
    turn: int
    part: int
    labels: Labels

    def __len__(self) -> int:
        return len(self.example)


class _Cursor:
    """A lane's position in one source."""

    def __init__(self, stream: Stream, lane: int, num_lanes: int) -> None:
        self.stream = stream
        self._lane, self._num_lanes = lane, num_lanes
        self.turn = self.part = 0  # the next example
        self.tokens = 0  # drawn so far
        self.phase: float | None = None
        self._held: tuple[int, Drawn] | None = None

    @property
    def due(self) -> float:
        """The lane draws from the source with the smallest value."""
        if self.phase is None:
            spread = (uniform(self.stream.source.name) + self._lane * _GOLDEN) % 1
            self.phase = spread * len(self.advance().examples[self.part])
        return (self.tokens + self.phase) / self.stream.source.weight

    def document(self, turn: int) -> Drawn:
        """The lane's `turn`-th document."""
        if self._held is None or self._held[0] != turn:
            self._held = turn, self.stream.draw(self._lane + turn * self._num_lanes)
        return self._held[1]

    def advance(self) -> Drawn:
        """The document of the next example. Moves on from documents without further examples."""
        skipped = 0
        while self.part >= len((drawn := self.document(self.turn)).examples):
            skipped = 0 if drawn.eligible else skipped + 1
            if skipped > min(32 * self.stream.num_documents, _MAX_SKIPPED):
                source = self.stream.source
                raise ValueError(
                    f"sources.{source.name}: of {skipped:,} documents in a row none is used; "
                    f"use wider `tokens` than {source.tokens}, other `label_weights`, a larger sequence_length, or "
                    "documents with tokens in the loss"
                )
            self.turn, self.part = self.turn + 1, 0
        return drawn


class Lane:
    """One row of every batch, with an exact state after each row.

    state: the position to start at, of `get_state`, which `refuse_other_order` has accepted; None: the beginning.
    """

    def __init__(self, mixture: Mixture, lane: int, state: Mapping[str, Any] | None = None) -> None:
        self._mixture, self._length = mixture, mixture.config.sequence_length
        self._cursors = [_Cursor(stream, lane, mixture.config.batch_size) for stream in mixture.streams]
        self._open: OpenRows[_Segment] = OpenRows(self._length)
        self._consumed = [LabelCounts() for _ in self._cursors]
        if state is None:
            return
        for cursor, consumed in zip(self._cursors, self._consumed, strict=True):
            name = cursor.stream.source.name
            cursor.turn, cursor.part, cursor.tokens, cursor.phase = state["sources"][name]
            consumed.merge(state["consumed"][name])
        for age, *numbers in state["open_rows"]:
            origins = [numbers[i : i + 3] for i in range(0, len(numbers), 3)]
            items = [self._segment(*origin) for origin in origins if self._is_there(*origin)]
            while (used := sum(map(len, items))) > self._length:  # of files that have changed
                items.pop()
            if items:
                self._open.rows.append(OpenRow(items, used, age))

    def next_row(self) -> dict[str, np.ndarray]:
        """The next row: the arrays [T] of `qwen3_jax.data.packing.to_arrays`.

        Raises:
          ValueError: `file:line: reason` for a malformed document.
        """
        closed = None
        while closed is None:
            source = min(range(len(self._cursors)), key=lambda i: self._cursors[i].due)
            cursor = self._cursors[source]
            cursor.advance()
            segment = self._segment(source, cursor.turn, cursor.part)
            cursor.tokens += len(segment)
            cursor.part += 1
            closed = self._open.add(segment)
        for segment in closed:
            self._consumed[segment.source].add(Counts.of(segment.example, begins=segment.part == 0), segment.labels)
        return to_arrays([segment.example for segment in closed], self._length, self._mixture.pad_id)

    def get_state(self) -> dict[str, Any]:
        """The position after the last row, as JSON data.

        It stores no tokens: each segment of the open rows is stored as the three numbers of its origin.
        """
        names = [cursor.stream.source.name for cursor in self._cursors]
        positions = [[cursor.turn, cursor.part, cursor.tokens, cursor.phase] for cursor in self._cursors]
        return {
            "order": self._mixture.order,
            "sources": dict(zip(names, positions, strict=True)),
            "open_rows": [
                [row.age, *(number for item in row.items for number in (item.source, item.turn, item.part))]
                for row in self._open.rows
            ],
            "consumed": dict(zip(names, map(dataclasses.asdict, self._consumed), strict=True)),
        }

    def _is_there(self, source: int, turn: int, part: int) -> bool:
        """Whether a document still has the example; of files that have changed it may not."""
        return part < len(self._cursors[source].document(turn).examples)

    def _segment(self, source: int, turn: int, part: int) -> _Segment:
        drawn = self._cursors[source].document(turn)
        return _Segment(drawn.examples[part], source, turn, part, drawn.labels)


def refuse_other_order(
    order: Mapping[str, Any], state: Mapping[str, Any], lanes: Iterable[str], *, accept_changed: bool = False
) -> None:
    """Checks that `lanes` can resume from `state`, which maps lanes to their positions.

    accept_changed: whether the sources may have other files than they had.

    Raises:
      ValueError: naming the part of the configuration that differs, or the lane that is missing.
    """
    for saved in state.values():
        then = saved["order"]
        for name, source in order["sources"].items():
            before = then["sources"].get(name)
            if before is None:
                continue
            # A position that was saved before there was a digest has none.
            for key in ("content", "documents") if accept_changed else {"content"} - before.keys():
                before = {**before, key: source[key]}
            then = {**then, "sources": {**then["sources"], name: before}}
            if before["content"] != source["content"]:
                raise ValueError(
                    f"data.sources.{name}: its files ({source['documents']:,} documents, digest {source['content']}) "
                    f"are not those of the checkpoint ({before['documents']:,} documents, digest {before['content']}); "
                    "use those, or --data.accept_changed true to go on with these"
                )
        _refuse_difference(order, then, "data")
    for lane in lanes:
        if lane not in state:
            raise ValueError(f"data: the saved position lacks lane {lane}; use the union of all processes' positions")


def _refuse_difference(now: Any, then: Any, where: str) -> None:
    if isinstance(now, dict) and isinstance(then, dict) and now.keys() == then.keys():
        for key in now:
            _refuse_difference(now[key], then[key], f"{where}.{key}")
    elif now != then:
        now, then = (list(value) if isinstance(value, dict) else value for value in (now, then))
        raise ValueError(f"{where}: {now!r}, but the data position was saved under {then!r}; use {then!r}")
