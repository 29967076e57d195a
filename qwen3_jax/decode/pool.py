"""Rows that are refilled while they run: a finished row's place takes the next prompt, the others go on.

The loop is left every few steps. Then finished rows are taken out, new prompts run through a prefill of their own and
are put in the free places, and the cache is fitted to the rows in flight: its prompt slots to the longest prompt, its
ring to the longest continuation. Sizes are powers of two, so that programs are few.

None of this shows in the tokens of a row: they depend on its own request alone, up to rounding where a near tie
between two tokens is decided.

Shapes: B rows, A rows admitted together, M most tokens written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_jax.cache import KVCache
from qwen3_jax.config import ModelConfig
from qwen3_jax.decode import budget as bud
from qwen3_jax.decode.batch import prefill_rows, resume
from qwen3_jax.decode.budget import BudgetState, ThinkingTokens
from qwen3_jax.decode.layout import lay_out, place_weights, row_axes, state_axes
from qwen3_jax.decode.loop import DecodeState, Rows
from qwen3_jax.decode.pack import BUCKET, Written, check_request, pack, pack_markers, round_up
from qwen3_jax.model import Qwen3
from qwen3_jax.ops import cpu
from qwen3_jax.request import Request, Result
from sharding import DECODE_RULES, axis_rules, num_parts

Watch = Callable[[Hashable, Callable[[], Result]], bool]

_PREFILL_TOKENS = 16384  # most tokens of one prefill, padding included: bounds its activations
_FEW = 4  # rows of a prefill that fills single places

_compiled: set[Any] = set()  # programs, by what they do and for which shapes

run_prefill = functools.partial(jax.jit, static_argnames=("model", "max_new"))(prefill_rows)


def most_prefill_rows(slots: int, parts: int) -> int:
    """Rows with prompts of so many slots that are prefilled together, where the mesh splits rows into `parts`."""
    return max(_PREFILL_TOKENS // slots // parts * parts, parts)


@dataclasses.dataclass
class Load:
    """What the rows did: `row_steps` of the `steps * rows` places of the loop's steps held a running row.

    admitted: rows that were begun, each with one token from its prefill.
    """

    rows: int
    steps: int = 0
    row_steps: int = 0
    admitted: int = 0

    @property
    def tokens(self) -> int:
        """Tokens written."""
        return self.admitted + self.row_steps

    @property
    def utilisation(self) -> float:
        """Share of places in use, 0 to 1."""
        return self.row_steps / (self.steps * self.rows) if self.steps else 1.0


@dataclasses.dataclass
class _Row:
    """A place in use."""

    key: Hashable
    prompt: int
    max_new: int
    written: int = 1  # by the prefill


class Pool:
    """`rows` places that decode together.

    config, params, tokens, dtype: as for `generate`.
    rows: those of the cache are split over the mesh's batch axes; a number that they do not divide costs copies.
    max_new: most tokens that any request may write.
    steps: the loop is left after so many.
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
        steps: int = 32,
        announce: Callable[[str, float], None] | None = None,
    ) -> None:
        self._parts = num_parts("attention_batch")
        self._config, self._tokens, self._announce = config, tokens, announce
        self._params = place_weights(config, params)
        self._model = Qwen3(config, dtype=dtype)
        self._markers = jax.device_put(pack_markers(tokens, config.vocab_size))
        self._max_new, self._steps = _bucket(max_new), steps
        self._places: list[_Row | None] = [None] * rows
        self._state: DecodeState | None = None
        self._rows: Rows | None = None
        self.load = Load(rows)

    @property
    def free(self) -> int:
        """Places without a row."""
        return self._places.count(None)

    def run(
        self, requests: Iterable[tuple[Hashable, Request]], watch: Watch | None = None
    ) -> Iterator[list[tuple[Hashable, Result]]]:
        """Decodes all requests. Each time that the loop is left it yields the `(key, result)` of the rows that
        finished, if any did. Requests are taken as places become free; long prompts are best put first.

        Args:
          watch: called with each running row, and a function for its result so far, whenever the loop is left; true
            ends the row there.

        Raises:
          ValueError: `field: value; what would fit`, of a request.
        """
        waiting = iter(requests)
        finished: list[tuple[Hashable, Result]] = []
        while True:
            self._admit(list(itertools.islice(waiting, self.free)))
            busy = self.free < len(self._places)
            if busy:
                self._launch()
            yield finished  # whoever takes them works while the device does
            if not busy:
                return
            finished = self._collect(watch)

    def _admit(self, requests: Sequence[tuple[Hashable, Request]]) -> None:
        """Prefills the requests and puts them in free places."""
        new = []
        for key, request in requests:
            limit = check_request(request, self._config, self._tokens)
            if limit > self._max_new:
                raise ValueError(f"max_new_tokens: {request.max_new_tokens}; at most {self._max_new} fits this pool")
            new.append((_Row(key, len(request.prompt_ids), limit), request))
        self.load.admitted += len(new)
        free = (place for place, row in enumerate(self._places) if row is None)
        placed = [(next(free), row, request) for row, request in new]
        for place, row, _ in placed:
            self._places[place] = row
        self._fit_cache()

        def slots_of(item: tuple[int, _Row, Request]) -> int:
            return _bucket(item[1].prompt)

        for slots, group in itertools.groupby(sorted(placed, key=slots_of), key=slots_of):
            waiting = list(group)
            while waiting:
                size = self._prefill_size(len(waiting), slots)
                self._prefill(waiting[:size], slots, size)
                waiting = waiting[size:]

    def _prefill_size(self, waiting: int, slots: int) -> int:
        """Rows of one prefill: one of two sizes for each prompt length, so that programs are few."""
        few = min(round_up(_FEW, self._parts), len(self._places))
        return min(few if waiting <= few else len(self._places), most_prefill_rows(slots, self._parts))

    def _prefill(self, admitted: Sequence[tuple[int, _Row, Request]], slots: int, size: int) -> None:
        limits = [row.max_new for _, row, _ in admitted]
        requests = [request for _, _, request in admitted]
        spare = size - len(admitted)  # repeats of the first row, put nowhere
        packed = pack(
            requests + requests[:1] * spare,
            limits + limits[:1] * spare,
            self._config,
            self._tokens,
            prompt_slots=slots,
        )
        places: Any = np.array([place for place, _, _ in admitted] + [len(self._places)] * spare, np.int32)
        with self._compiling("prefill", f"{size} x {slots}"):
            new = run_prefill(self._params, packed, self._markers, model=self._model, max_new=self._max_new)
        with self._compiling("admission", f"{size} x {slots} to {self._shape}"):
            self._state, self._rows = _put(self._state, self._rows, new, packed.rows, places)

    def _fit_cache(self) -> None:
        """Makes the cache hold what the rows in flight need until the loop is left again."""
        rows = [row for row in self._places if row is not None]
        if not rows:
            return
        prompt = max(_bucket(row.prompt) for row in rows)
        ring = max(_bucket(min(row.written + self._steps, row.max_new)) for row in rows)
        if self._state is None:
            with self._compiling("start", f"{len(self._places)} x ({prompt} + {ring})"):
                self._state, self._rows = empty_state(
                    self._params,
                    *template(self._config, self._tokens),
                    model=self._model,
                    rows=len(self._places),
                    slots=(prompt, ring),
                    max_new=self._max_new,
                )
            return
        cache = self._state.cache
        # Shrinking too has its price, a copy and perhaps a program: it waits until three quarters are unused.
        prompt = cache.prompt_slots if cache.prompt_slots // 4 < prompt <= cache.prompt_slots else prompt
        ring = cache.ring_slots if cache.ring_slots // 4 < ring <= cache.ring_slots else ring
        if (prompt, ring) != (cache.prompt_slots, cache.ring_slots):
            with self._compiling("resizing", f"{self._shape} to {prompt} + {ring}"):
                self._state = dataclasses.replace(self._state, cache=_resize(cache, slots=(prompt, ring)))

    def _launch(self) -> None:
        with self._compiling("decoding", self._shape):
            steps = np.int32(self._steps)
            self._state = resume(self._params, self._state, self._rows, self._markers, steps, model=self._model)

    def _collect(self, watch: Watch | None) -> list[tuple[Hashable, Result]]:
        """Waits for the loop, and takes out the rows that are done."""
        assert self._state is not None
        active, written = jax.device_get((self._state.budget.active_B, self._state.budget.written_B))
        in_use = [(place, row) for place, row in enumerate(self._places) if row is not None]
        steps = [int(written[place]) - row.written for place, row in in_use]
        self.load.steps += max(steps)
        self.load.row_steps += sum(steps)
        for place, row in in_use:
            row.written = int(written[place])
        so_far = Written(self._state)
        done = []
        for place, row in in_use:
            ended = watch is not None and watch(row.key, functools.partial(so_far.result, place))
            if ended or not active[place]:
                done.append((place, row))
        finished = [(row.key, so_far.result(place)) for place, row in done]
        places = [place for place, _ in done]
        if active[places].any():
            self._state = _end(self._state, np.isin(np.arange(len(self._places)), places))
        for place in places:
            self._places[place] = None
        return finished

    @property
    def _shape(self) -> str:
        assert self._state is not None
        return f"{len(self._places)} x ({self._state.cache.prompt_slots} + {self._state.cache.ring_slots})"

    @contextlib.contextmanager
    def _compiling(self, what: str, shapes: str) -> Iterator[None]:
        """Announces how long the first dispatch of a program takes in this process, which is its compilation."""
        start = time.perf_counter()
        yield
        program = (what, shapes, self._model, self._max_new, jax.sharding.get_abstract_mesh())
        if program not in _compiled and self._announce is not None:
            self._announce(f"{what} {shapes}", time.perf_counter() - start)
        _compiled.add(program)


def _bucket(n: int) -> int:
    """The least power of two that holds `n`, at least BUCKET."""
    return max(BUCKET, 1 << (n - 1).bit_length())


def template(config: ModelConfig, tokens: ThinkingTokens) -> tuple[Rows, BudgetState]:
    """Settings and state of one row, for their shapes."""
    packed = pack([Request((0,), max_new_tokens=1)], [1], config, tokens, prompt_slots=1)
    return packed.rows, packed.budget


@functools.partial(jax.jit, static_argnames=("model", "rows", "slots", "max_new"))
@axis_rules(DECODE_RULES)
def empty_state(
    params: Any, settings: Rows, budget: Any, *, model: Qwen3, rows: int, slots: tuple[int, int], max_new: int
) -> tuple[DecodeState, Rows]:
    """`rows` finished rows, with the shapes of `settings` and `budget`, which are of one row.

    Args:
      slots: of the cache, for the prompts and the ring.
    """
    dtype = cpu.cache_dtype(model.dtype or params["embed_tokens"].dtype)
    settings, budget = jax.tree.map(lambda x: jnp.repeat(x, rows, axis=0), (settings, budget))
    state = DecodeState(
        budget=budget.replace(phase_B=jnp.full(rows, bud.DONE, jnp.int32)),
        last_B=jnp.zeros(rows, jnp.int32),
        tokens_BM=jnp.zeros((rows, max_new), jnp.int32),
        logprobs_BM=jnp.zeros((rows, max_new), jnp.float32),
        forced_BM=jnp.zeros((rows, max_new), bool),
        counts_BV=jnp.zeros((rows, model.config.vocab_size), jnp.int32),
        cache=KVCache.create(model.config, rows, slots[0], dtype, slots[1]),
    )
    return lay_out(state, state_axes(state)), lay_out(settings, row_axes(settings))


@functools.partial(jax.jit, donate_argnames=("state", "rows"))
@axis_rules(DECODE_RULES)
def _put(
    state: DecodeState, rows: Rows, new_state: DecodeState, new_rows: Rows, places_A: jax.Array
) -> tuple[DecodeState, Rows]:
    """New rows in these places; those for a place that is not there are left out."""

    def put(old: Any, new: Any) -> Any:
        return jax.tree.map(lambda x, y: x.at[places_A].set(y, mode="drop"), old, new)

    bare, new_bare = (dataclasses.replace(s, cache=None) for s in (state, new_state))
    state = dataclasses.replace(put(bare, new_bare), cache=state.cache.admit(new_state.cache, places_A))
    return lay_out(state, state_axes(state)), lay_out(put(rows, new_rows), row_axes(rows))


@functools.partial(jax.jit, static_argnames="slots")
@axis_rules(DECODE_RULES)
def _resize(cache: KVCache, *, slots: tuple[int, int]) -> KVCache:
    resized = cache.resize(*slots)
    return lay_out(resized, resized.axes)


@functools.partial(jax.jit, donate_argnames="state")
def _end(state: DecodeState, ended_B: jax.Array) -> DecodeState:
    """These rows are over, by their own end or by another's decision."""
    budget = state.budget
    phase_B = jnp.where(ended_B, bud.DONE, budget.phase_B)
    return dataclasses.replace(state, budget=dataclasses.replace(budget, phase_B=phase_B))
