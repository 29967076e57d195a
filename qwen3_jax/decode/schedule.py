"""Which request takes which place, and when. Runs on the host, without jax.

A request waits until a place is free. Requests of the same prompt share one prefill: what was read of a prompt is kept
until its last waiting request has a place. Sizes are powers of two, so that programs are few.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from qwen3_jax.decode.opening import DONE, THINKING_ENDS
from qwen3_jax.request import Request, Result

# Sizes are rounded up to a multiple of this, so that similar prompts and lengths share a compiled program.
BUCKET = 32
STEPS = 32  # default of the maximum number of tokens that a row writes before the loop is left
_PREFILL_TOKENS = 16384  # maximum number of tokens in one prefill, padding included: bounds its activations
_FEW = 4  # rows of a prefill or an admission that fills single places


def round_up(n: int, multiple: int = BUCKET) -> int:
    """`n`, rounded up to a multiple."""
    return -(-n // multiple) * multiple


def bucket(n: int, least: int = BUCKET) -> int:
    """The smallest power of two that is at least `n` and at least `least`."""
    return max(least, 1 << (n - 1).bit_length())


def max_prefill_rows(slots: int, parts: int) -> int:
    """How many rows with `slots` prompt slots are prefilled together, where the mesh shards rows into `parts`."""
    return max(_PREFILL_TOKENS // slots // parts * parts, parts)


@dataclasses.dataclass
class Load:
    """What the rows did: `row_steps` of the `steps * rows` places of the loop's steps held a running row.

    admitted: rows that were begun, each with one token from its prompt. prefilled: prompts that were read for them.
    """

    rows: int
    steps: int = 0
    row_steps: int = 0
    admitted: int = 0
    prefilled: int = 0

    @property
    def tokens(self) -> int:
        """Tokens written."""
        return self.admitted + self.row_steps

    @property
    def utilisation(self) -> float:
        """Share of places in use, 0 to 1."""
        return self.row_steps / (self.steps * self.rows) if self.steps else 1.0


@dataclasses.dataclass(eq=False)
class Row:
    """A request from its submission to its end, with what it has written. limit: most tokens that it may write."""

    key: Hashable
    request: Request
    limit: int
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    forced: list[bool] = dataclasses.field(default_factory=list)
    counters: dict[str, int] = dataclasses.field(default_factory=dict)  # of `BudgetState`, after the last token

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.counters["phase"] == DONE

    def result(self) -> Result:
        """What it has written; of a row that goes on, its beginning."""
        counters = self.counters
        return Result(
            token_ids=list(self.token_ids),
            thinking_tokens=counters["thinking"],
            injected_tokens=counters["injected"],
            answer_tokens=counters["answer"],
            thinking_end=THINKING_ENDS[counters["thinking_end"]],
            finish_reason="eos" if counters["stopped"] else "length",
            logprobs=list(self.logprobs),
            forced=list(self.forced),
        )

    def append(self, written: Any, index: int) -> None:
        """Takes what a program wrote in row `index`: as many columns as it counted tokens beyond those known."""
        names = ("phase", "thinking", "injected", "answer", "thinking_end", "stopped", "written")
        self.counters = {name: int(getattr(written.budget, f"{name}_B")[index]) for name in names}
        new = slice(self.counters["written"] - len(self.token_ids))
        self.token_ids += written.tokens_BM[index, new].tolist()
        self.logprobs += written.logprobs_BM[index, new].tolist()
        self.forced += written.forced_BM[index, new].tolist()


@dataclasses.dataclass(frozen=True)
class Event:
    """What one step of a pool did to one row.

    token_ids, logprobs, forced: of the new tokens. result: at the row's end, else None.
    so_far: the row's result up to now.
    """

    key: Hashable
    token_ids: list[int]
    logprobs: list[float]
    forced: list[bool]
    result: Result | None
    so_far: Callable[[], Result] = dataclasses.field(repr=False)


@dataclasses.dataclass(eq=False)
class Reading:
    """Prompts that are prefilled together, padded to `slots` tokens and to `size` prompts. made: what the device has of
    them, set by whoever runs the prefill."""

    prompts: list[Sequence[int]]
    slots: int
    size: int
    made: Any = None


class Admission(NamedTuple):
    """Rows that go to `places`, padded to `size` rows; `sources` says which prompt of the reading each continues."""

    reading: Reading
    rows: list[Row]
    sources: list[int]
    places: list[int]
    size: int


class Schedule:
    """Rows in their places, and those that wait for one.

    parts: into how many the mesh splits rows. steps: most tokens that a row writes before the loop is left.
    fixed: slots of the cache for the prompts and the ring; None: they follow the rows in flight.
    """

    def __init__(self, rows: int, steps: int, parts: int, fixed: tuple[int, int] | None) -> None:
        self.places: list[Row | None] = [None] * rows
        self.load = Load(rows)
        self._steps, self._parts, self._fixed = steps, parts, fixed
        self._rows: dict[Hashable, Row] = {}  # in flight or waiting, in order of submission
        self._waiting: collections.deque[Row] = collections.deque()
        self._waiting_prompts: collections.Counter[Sequence[int]] = collections.Counter()
        self._read: dict[Sequence[int], tuple[Reading, int]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def submit(self, row: Row) -> None:
        """Puts a row at the end of the queue."""
        if row.key in self._rows:
            raise ValueError(f"key: {row.key!r} is in flight; use another one")
        self._rows[row.key] = row
        self._waiting.append(row)
        self._waiting_prompts[row.request.prompt_ids] += 1

    def cancel(self, key: Hashable) -> tuple[int | None, Result | None]:
        """Takes a row out: its place and what it has written; of one that waits, or is not there, neither."""
        row = self._rows.pop(key, None)
        if row is None:
            return None, None
        if row in self._waiting:
            self._waiting.remove(row)
            self._waiting_prompts[row.request.prompt_ids] -= 1
            return None, None
        place = self.places.index(row)
        self.places[place] = None
        return place, row.result()

    def forget_prompts(self) -> None:
        """Drops prefilled prompts: after a change of weights they must be prefilled again."""
        self._read.clear()

    def admissions(self) -> list[Admission]:
        """Gives free places to waiting rows, in their order."""
        placed = []
        for place, row in enumerate(self.places):
            if row is None and self._waiting:
                self.places[place] = new = self._waiting.popleft()
                self._waiting_prompts[new.request.prompt_ids] -= 1
                placed.append((place, new))
        self.load.admitted += len(placed)

        def slots_of(item: tuple[int, Row]) -> int:
            return bucket(len(item[1].request.prompt_ids))

        planned = []
        for slots, group in itertools.groupby(sorted(placed, key=slots_of), key=slots_of):
            items = list(group)
            self._plan_readings([row.request.prompt_ids for _, row in items], slots)
            by_reading: dict[Reading, list[tuple[int, Row, int]]] = {}
            for place, row in items:
                reading, source = self._read[row.request.prompt_ids]
                by_reading.setdefault(reading, []).append((place, row, source))
            for reading, members in by_reading.items():
                places, rows, sources = (list(column) for column in zip(*members, strict=True))
                planned.append(Admission(reading, rows, sources, places, self._size(len(rows))))
        self._waiting_prompts = +self._waiting_prompts  # drops those at zero
        self._read = {prompt: read for prompt, read in self._read.items() if prompt in self._waiting_prompts}
        return planned

    def _plan_readings(self, prompts: Sequence[Sequence[int]], slots: int) -> None:
        unread = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._read]
        self.load.prefilled += len(unread)
        while unread:
            size = min(self._size(len(unread)), max_prefill_rows(slots, self._parts))
            reading = Reading(unread[:size], slots, size)
            self._read |= {prompt: (reading, index) for index, prompt in enumerate(reading.prompts)}
            unread = unread[size:]

    def sizes(self) -> tuple[int, int]:
        """The two numbers of rows that programs have: few, and one for each place."""
        return min(round_up(_FEW, self._parts), len(self.places)), len(self.places)

    def _size(self, count: int) -> int:
        few, all_places = self.sizes()
        return few if count <= few else all_places

    def cache_slots(self, now: tuple[int, int] | None) -> tuple[int, int] | None:
        """Slots that the cache needs for the prompts and the ring until the loop is left again.

        Args:
          now: those that it has; None if there is no cache yet.

        Returns:
          None where no row is in flight.
        """
        rows = [row for row in self.places if row is not None]
        if self._fixed or not rows:
            return self._fixed
        prompt = max(bucket(len(row.request.prompt_ids)) for row in rows)
        written = [max(len(row.token_ids), 1) for row in rows]  # a row's first token comes with its prompt
        ring = max(bucket(min(n + self._steps, row.limit)) for n, row in zip(written, rows, strict=True))
        if now is None:
            return prompt, ring

        def fit(needed: int, held: int) -> int:
            # Shrinking has its price too, a copy and perhaps a program: it waits until three quarters are unused.
            return held if held // 4 < needed <= held else needed

        return fit(prompt, now[0]), fit(ring, now[1])

    def record(self, first: Sequence[tuple[Admission, Any]], written: Any) -> list[Event]:
        """Takes what the programs wrote: events of all rows in flight. Rows that have ended leave their places.

        Args:
          first: of each admission, its first tokens. written: by the loop, of every place.
        """
        in_use = [(place, row) for place, row in enumerate(self.places) if row is not None]
        known = {row: len(row.token_ids) for _, row in in_use}
        for admission, tokens in first:
            for index, row in enumerate(admission.rows):
                row.append(tokens, index)
        steps = []
        for place, row in in_use:
            before = len(row.token_ids)
            row.append(written, place)
            steps.append(len(row.token_ids) - before)
        self.load.steps += max(steps)
        self.load.row_steps += sum(steps)
        events = []
        for place, row in in_use:
            new = slice(known[row], None)
            result = row.result() if row.done else None
            events.append(
                Event(row.key, row.token_ids[new], row.logprobs[new], row.forced[new], result, so_far=row.result)
            )
            if row.done:
                self.places[place] = None
                del self._rows[row.key]
        return events
