"""Packing of examples into rows of fixed length, and the targets of the packed rows.

T: `sequence_length`, N: tokens of one example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence, Sized
from typing import Generic, Protocol, TypeVar

import numpy as np

# More open rows leave less padding, but more documents are drawn before the first row is complete. With documents of
# 4,096 to 32,768 tokens in rows of 32,768, 16 open rows leave 5 % of padding, and 8 leave 7 %.
OPEN_ROWS = 16
MAX_AGE = 4 * OPEN_ROWS

S = TypeVar("S", bound=Sized)


class Segment(Sized, Protocol):
    """What is packed: ids, and a mask that is 1 for those in the loss."""

    @property
    def tokens_N(self) -> np.ndarray: ...
    @property
    def loss_mask_N(self) -> np.ndarray: ...


@dataclasses.dataclass(eq=False)
class OpenRow(Generic[S]):
    """A row that is being filled: its items, their total tokens, and how many rows were closed while it was open."""

    items: list[S]
    used: int
    age: int = 0


class OpenRows(Generic[S]):
    """Best-fit packing: the rows that are being filled.

    An item goes to the row where it leaves the least free space. If it fits in none, it opens a row; if there are then
    too many, one is closed: the fullest, or the oldest once MAX_AGE rows were closed while it was open. No item waits
    forever.

    length: tokens of a row. most: rows that may be open.
    """

    def __init__(self, length: int, most: int = OPEN_ROWS) -> None:
        self._length, self._most = length, most
        self.rows: list[OpenRow[S]] = []  # oldest first

    def add(self, item: S) -> list[S] | None:
        """Adds an item of at most T tokens. Returns the items of the row that was closed, if one was."""
        fitting = [row for row in self.rows if row.used + len(item) <= self._length]
        if fitting:
            best = max(fitting, key=lambda row: row.used)
            best.items.append(item)
            best.used += len(item)
            return None
        self.rows.append(OpenRow([item], len(item)))
        if len(self.rows) <= self._most:
            return None
        oldest = self.rows[0]
        closed = oldest if oldest.age >= MAX_AGE else max(self.rows[:-1], key=lambda row: row.used)
        self.rows.remove(closed)
        for row in self.rows[:-1]:
            row.age += 1
        return closed.items


def to_arrays(row: Sequence[Segment], length: int, pad_id: int) -> dict[str, np.ndarray]:
    """The arrays of a row: its tokens, and what each position predicts.

    Position t predicts token t + 1 if that is in the same segment; its weight is 1 if that is in the loss.

    Returns:
      {"tokens", "targets", "segment_ids", "positions": [T] int32; "loss_weights": [T] float32}. Segments count from 1,
      0 is padding; positions count from 0 in each segment. A position without a target (the last one of a segment, and
      padding) has target `pad_id` and weight 0.
    """
    arrays = {
        "tokens": np.full(length, pad_id, np.int32),
        "targets": np.full(length, pad_id, np.int32),
        "loss_weights": np.zeros(length, np.float32),
        "segment_ids": np.zeros(length, np.int32),
        "positions": np.zeros(length, np.int32),
    }
    start = 0
    for number, example in enumerate(row, start=1):
        stop = start + len(example)
        arrays["tokens"][start:stop] = example.tokens_N
        arrays["targets"][start : stop - 1] = example.tokens_N[1:]
        arrays["loss_weights"][start : stop - 1] = example.loss_mask_N[1:]
        arrays["segment_ids"][start:stop] = number
        arrays["positions"][start:stop] = np.arange(len(example))
        start = stop
    return arrays
