"""Rows that are refilled while they run: a finished row's place takes the next request, the others go on.

A pool is a surface on which a file of prompts, rollouts or a server each write their own loop:

    pool = Pool(config, params, tokens=tokens, rows=64, max_new=1024)
    for key, request in requests:
        pool.submit(key, request)
    while events := pool.step():
        ...

Before each step, prompts of new requests are prefilled and put in free places, and the cache is resized to the rows in
flight: its prompt slots to the longest prompt, its ring to the longest continuation. The tokens of a row depend on none
of this, only on its own request, except where rounding decides between two tokens that are nearly tied.

With several processes, all of them must make the same calls in the same order. The results that a step depends on are
replicated, so all processes make the same decisions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import numpy as np

from qwen3_jax.config import ModelConfig
from qwen3_jax.decode import programs
from qwen3_jax.decode.loop import DecodeState, Rows
from qwen3_jax.decode.opening import check_request
from qwen3_jax.decode.pack import pack_markers, pack_prompts, pack_rows
from qwen3_jax.decode.schedule import STEPS, Admission, Event, Load, Reading, Row, Schedule, bucket, max_prefill_rows
from qwen3_jax.decode.weights import decoding_weights
from qwen3_jax.model import Qwen3
from qwen3_jax.request import Request, Result
from qwen3_jax.text.thinking import ThinkingTokens
from sharding import num_parts

_compiled: set[Any] = set()  # programs that this process has compiled, by kind and shapes


class Pool:
    """`rows` places that decode together.

    config, params, tokens, dtype: as for `generate`.
    rows: number of places. The mesh's batch axes should divide it; otherwise XLA pads and copies.
    max_new: maximum number of new tokens of any request.
    steps: maximum number of tokens that a row writes in a step, besides its first.
    max_prompt: maximum number of tokens of any prompt. The cache is then allocated once, for such prompts and `max_new`
      tokens, and never resized, so that `warm_up` can compile every program. With None, it is resized to the rows in
      flight.
    announce: called with (what, seconds) for each program that this process compiles.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        *,
        tokens: ThinkingTokens,
        rows: int,
        max_new: int,
        dtype: Any = None,
        steps: int = STEPS,
        max_prompt: int | None = None,
        announce: Callable[[str, float], None] | None = None,
    ) -> None:
        self._config, self._tokens, self._announce = config, tokens, announce
        self._max_new, self._steps, self._max_prompt = bucket(max_new), steps, max_prompt
        self._params = decoding_weights(config, params, dtype)
        self._dtype = self._params["embed_tokens"].dtype
        self._model = Qwen3(config, dtype=self._dtype)
        self._markers = programs.replicate(pack_markers(tokens, config.vocab_size))
        self._parts = num_parts("attention_batch")
        fixed = None if max_prompt is None else (bucket(max_prompt), self._max_new)
        self._schedule = Schedule(rows, steps, self._parts, fixed)
        self._state: DecodeState | None = None
        self._rows: Rows | None = None
        self._cancelled: set[int] = set()

    def __len__(self) -> int:
        """Requests in flight or waiting."""
        return len(self._schedule)

    @property
    def load(self) -> Load:
        """What the rows did."""
        return self._schedule.load

    def submit(self, key: Hashable, request: Request) -> None:
        """Adds a request; the first step that has a free place begins it. Submit long prompts first where you can.

        Raises:
          ValueError: `field: value; what to use instead`. The rows in flight go on.
        """
        limit = check_request(request, self._config, self._tokens)
        if limit > self._max_new:
            raise ValueError(
                f"max_new_tokens: {request.max_new_tokens}; use at most {self._max_new}, the max_new of this pool"
            )
        length = len(request.prompt_ids)
        if self._max_prompt is not None and length > self._max_prompt:
            raise ValueError(
                f"prompt_ids: {length} tokens; use at most {self._max_prompt}, the max_prompt of this pool"
            )
        self._schedule.submit(Row(key, request, limit))

    def cancel(self, key: Hashable) -> Result | None:
        """Ends a request; returns what it has written, None if it has not begun or is unknown."""
        place, result = self._schedule.cancel(key)
        if place is not None:
            self._cancelled.add(place)
        return result

    def set_weights(self, params: Any) -> None:
        """Replaces the weights, from the next step on. They may have any layout that `decoding_weights` accepts.

        Rows in flight keep the keys and values that the old weights made. Weights of one layout always run the same
        program. The old weights are freed first: at most the given and the decoding layout are in memory.
        """
        self._schedule.forget_prompts()
        self._params = None
        self._params = decoding_weights(self._config, params, self._dtype)

    def step(self) -> list[Event]:
        """Begins waiting requests where places are free, and writes up to `steps` tokens in each row.

        Returns:
          An event for each row in flight; none when there is nothing to do.
        """
        self._end_cancelled()
        admissions = self._schedule.admissions()
        if not any(self._schedule.places):
            return []
        self._fit_cache()
        first = [(admission, self._admit(admission)) for admission in admissions]
        written = self._decode(self._steps)
        first, written = jax.device_get(([tokens for _, tokens in first], written))
        return self._schedule.record(list(zip(admissions, first, strict=True)), written)

    def warm_up(self) -> None:
        """Compiles every program that the pool will run.

        Raises:
          ValueError: `max_prompt` was not given; the shapes then follow the requests.
        """
        if self._max_prompt is None:
            raise ValueError("max_prompt: None; give the pool the length of the longest prompt")
        self._fit_cache()
        row = Row(None, Request((0,), max_new_tokens=1), 1)
        few, every = self._schedule.sizes()
        beyond = len(self._schedule.places)  # no place: the row is dropped
        slots = bucket(1)
        while slots <= bucket(self._max_prompt):
            for size in {min(size, max_prefill_rows(slots, self._parts)) for size in (few, every)}:
                for count in {few, every}:
                    self._admit(Admission(Reading([(0,)], slots, size), [row], [0], [beyond], count))
            slots *= 2
        self._decode(0)
        self._cancelled.add(beyond)
        self._end_cancelled()

    def _decode(self, steps: int) -> Any:
        """Runs the loop for `steps` tokens per row; returns what it wrote."""
        assert self._state is not None
        column: Any = np.int32(0)  # a host scalar goes to the devices of every process
        state = dataclasses.replace(self._state, column=column)
        with self._compiling("decoding", self._shape):
            self._state, written = programs.resume(
                self._params, state, self._rows, self._markers, np.int32(steps), model=self._model
            )
        return written

    def _admit(self, admission: Admission) -> Any:
        """Prefills the prompts, unless an earlier admission did, and puts the rows in their places."""
        reading, rows, sources, places, size = admission
        if reading.made is None:
            spare = [reading.prompts[0]] * (reading.size - len(reading.prompts))
            prompts = pack_prompts([*reading.prompts, *spare], reading.slots)
            with self._compiling("prefill", f"{reading.size} x {reading.slots}"):
                reading.made = programs.prefill(self._params, *prompts, model=self._model)
        spare_rows = size - len(rows)  # repeats of the first row, put nowhere
        padded = [*rows, *rows[:1] * spare_rows]
        new = pack_rows([row.request for row in padded], [row.limit for row in padded], self._config, self._tokens)
        at: Any = np.array([*places, *[len(self._schedule.places)] * spare_rows], np.int32)
        source: Any = np.array([*sources, *[0] * spare_rows], np.int32)
        with self._compiling("admission", f"{size} of {reading.size} x {reading.slots} to {self._shape}"):
            self._state, self._rows, first = programs.admit(
                self._state, self._rows, reading.made, source, *new, self._markers, at
            )
        return first

    def _fit_cache(self) -> None:
        """Allocates or resizes the cache for what the rows in flight need until the loop is left again."""
        cache = None if self._state is None else self._state.cache
        now = None if cache is None else (cache.prompt_slots, cache.ring_slots)
        slots = self._schedule.cache_slots(now)
        if slots is None or slots == now:
            return
        if self._state is None:
            rows = len(self._schedule.places)
            with self._compiling("start", f"{rows} x ({slots[0]} + {slots[1]})"):
                template = programs.template(self._config, self._tokens)
                self._state, self._rows = programs.empty_state(
                    *template, model=self._model, rows=rows, slots=slots, columns=bucket(self._steps)
                )
            return
        with self._compiling("resizing", f"{self._shape} to {slots[0]} + {slots[1]}"):
            self._state = dataclasses.replace(self._state, cache=programs.resize(self._state.cache, slots=slots))

    def _end_cancelled(self) -> None:
        if self._cancelled and self._state is not None:
            ended = np.isin(np.arange(len(self._schedule.places)), list(self._cancelled))
            self._state = dataclasses.replace(self._state, budget=programs.end(self._state.budget, ended))
        self._cancelled.clear()

    @property
    def _shape(self) -> str:
        assert self._state is not None
        cache = self._state.cache
        return f"{len(self._schedule.places)} x ({cache.prompt_slots} + {cache.ring_slots})"

    @contextlib.contextmanager
    def _compiling(self, what: str, shapes: str) -> Iterator[None]:
        """Announces a program that this process runs for the first time, with the duration of the call: it compiles."""
        start = time.perf_counter()
        yield
        program = (what, shapes, self._model, bucket(self._steps), jax.sharding.get_abstract_mesh())
        if program not in _compiled and self._announce is not None:
            self._announce(f"{what} {shapes}", time.perf_counter() - start)
        _compiled.add(program)
