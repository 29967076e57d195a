"""Requests to arrays and back: checks, the state a prompt leaves behind, padding; on the host.

Shapes: B rows, P prompt slots, M most tokens written, F longest forced text, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from qwen3_jax.config import ModelConfig
from qwen3_jax.decode import budget as bud
from qwen3_jax.decode.budget import BudgetState, Limits, Markers, ThinkingTokens
from qwen3_jax.decode.loop import DecodeState, Rows
from qwen3_jax.decode.sampling import Sampling
from qwen3_jax.request import Request, Result

# Shapes are rounded up to this, so that prompts and lengths of about the same size share a compiled program.
BUCKET = 32
_READY, _NEVER = 0.25, 2.0  # probabilities of </think>: by default enough, and that nothing reaches


class Packed(NamedTuple):
    """Rows as host arrays, which jit moves all at once.

    prompt_BP: padded on the right. there_BP: false at the padding.
    """

    prompt_BP: Any
    there_BP: Any
    rows: Rows
    budget: BudgetState


class _Opening(NamedTuple):
    """How a row starts: its phase, the thinking tokens already there, what STOP will emit and how the thought ended."""

    phase: int
    end: int
    forced: tuple[int, ...]
    thinking: int = 0
    unfinished: int = 0
    in_tool: bool = False


def round_up(n: int, multiple: int = BUCKET) -> int:
    """The least multiple that holds `n`."""
    return -(-n // multiple) * multiple


def check_request(request: Request, config: ModelConfig, tokens: ThinkingTokens) -> int:
    """The most tokens that this request may write: `max_new_tokens`, or what the context leaves.

    Raises:
      ValueError: `field: value; what would fit`, for what only the model or the tokenizer can refuse.
    """
    context, length = config.max_position_embeddings, len(request.prompt_ids)
    if length >= context:
        raise ValueError(f"prompt_ids: {length} tokens; at most {context - 1} fit the context of {context}")
    outside = next((token for token in request.prompt_ids if not 0 <= token < config.vocab_size), None)
    if outside is not None:
        raise ValueError(f"prompt_ids: {outside}; ids in 0..{config.vocab_size - 1} fit")
    opening = _opening(request, tokens)
    max_new = min(request.max_new_tokens, context - length)
    if opening.end in (bud.OPEN, bud.BUDGET) and _budget(request) < bud.UNLIMITED:
        marker = opening.phase == bud.START
        needed = marker + len(tokens.stop_ids) + request.answer_reserve
        if needed > max_new:
            raise ValueError(
                f"max_new_tokens: {request.max_new_tokens} leaves {max_new} of the context of {context}; a finite "
                f"thinking_budget needs at least {needed} ({marker:d} for <think>, {len(tokens.stop_ids)} for the stop "
                f"text, {request.answer_reserve} for the answer)"
            )
    return max_new


def _budget(request: Request) -> int:
    budget = request.thinking_budget
    if budget == "auto":  # finite, so that it is cut where room for the answer ends
        return int(bud.UNLIMITED) - 1 if request.auto_cap is None else min(request.auto_cap, int(bud.UNLIMITED) - 1)
    if budget is None or budget == -1:
        return int(bud.UNLIMITED)
    return min(int(budget), int(bud.UNLIMITED))


def _ready(request: Request) -> float:
    if request.thinking_budget != "auto":
        return _NEVER
    return _READY if request.auto_threshold is None else request.auto_threshold


def _opening(request: Request, tokens: ThinkingTokens) -> _Opening:
    """The state a prompt leaves behind, read off the generation prompt only: what follows the last end of a turn.

    Markers that a user typed stand before that end and open nothing.
    """
    prompt = request.prompt_ids
    turn = max((i + 1 for i, token in enumerate(prompt) if token in tokens.eos), default=0)
    is_open, closed, in_tool, thinking, unfinished = False, False, False, 0, 0
    for token in prompt[turn:]:  # given tokens are read by the rules of sampled ones
        effect = tokens.unfinished.get(token, 0)
        unfinished = effect if effect >= 0 else max(unfinished + effect, 0)
        if is_open and in_tool:
            in_tool = token != tokens.end_tool_call
        elif is_open and token == tokens.tool_call:
            in_tool = True
        elif is_open and token == tokens.end_think:
            is_open, closed, thinking = False, True, 0
        elif is_open:
            thinking += 1
        elif token == tokens.think:
            is_open, closed = True, False
    if is_open if request.start_in_think is None else request.start_in_think:
        if not request.thinking:
            raise ValueError("thinking: False, but the prompt ends inside an open <think>; True fits")
        over = thinking - _budget(request)
        spent = over >= request.grace or (over > 0 and prompt[-1] in tokens.newlines)
        if spent and not in_tool and (not unfinished or over >= request.grace + bud.MAX_WAIT):
            return _Opening(bud.STOP, bud.BUDGET, tokens.stop_ids, thinking)
        return _Opening(bud.THINK, bud.OPEN, tokens.stop_ids, thinking, unfinished, in_tool)
    if prompt[-len(tokens.empty_block) :] == tokens.empty_block:
        return _Opening(bud.ANSWER, bud.OFF, tokens.stop_ids)
    if turn > 0 and closed:
        return _Opening(bud.ANSWER, bud.NATURAL, tokens.stop_ids)
    if not request.thinking or _budget(request) == 0:
        return _Opening(bud.STOP, bud.OFF, tokens.empty_block)
    return _Opening(bud.START, bud.OPEN, tokens.stop_ids)


def pack(
    requests: Sequence[Request],
    limits: Sequence[int],
    config: ModelConfig,
    tokens: ThinkingTokens,
    *,
    prompt_slots: int,
) -> Packed:
    """The rows' prompts, settings and first states; `limits` are what `check_request` gave for each."""
    batch = len(requests)
    openings = [_opening(request, tokens) for request in requests]
    texts = (tokens.stop_ids, tokens.empty_block)  # the same width whichever of them these rows need
    forced: Any = np.zeros((batch, round_up(max(map(len, texts)))), np.int32)
    prompts: Any = np.zeros((batch, prompt_slots), np.int32)
    for i, (request, opening) in enumerate(zip(requests, openings, strict=True)):
        prompts[i, : len(request.prompt_ids)] = request.prompt_ids
        forced[i, : len(opening.forced)] = opening.forced

    def ints(values: Iterable[int], dtype: Any = np.int32) -> Any:
        return np.fromiter(values, dtype, batch)

    def floats(values: Iterable[float]) -> Any:
        return np.fromiter(values, np.float32, batch)

    def field(name: str, dtype: Any = np.float32) -> Any:
        return np.fromiter((getattr(request, name) for request in requests), dtype, batch)

    def budget(request: Request, opening: _Opening) -> int:
        counted = request.count_think_marker and opening.phase == bud.START
        return _budget(request) - (counted and _budget(request) < bud.UNLIMITED)

    prompt_len_B = ints(len(request.prompt_ids) for request in requests)
    rows = Rows(
        limits=Limits(
            budget_B=ints(map(budget, requests, openings)),
            grace_B=field("grace", np.int32),
            ready_B=floats(map(_ready, requests)),
            max_new_B=ints(limits),
            reserve_B=field("answer_reserve", np.int32),
            eos_stops_B=ints(request.eos_while_thinking == "stop" for request in requests) > 0,
            empty_ok_B=field("allow_empty_answer", np.bool_),
            forced_BF=forced,
            forced_len_B=ints(len(opening.forced) for opening in openings),
            close_at_B=ints(opening.forced.index(tokens.end_think) for opening in openings),
        ),
        sampling=Sampling(
            temperature_B=field("temperature"),
            top_p_B=field("top_p"),
            top_k_B=ints(min(request.top_k, config.vocab_size) for request in requests),
            min_p_B=field("min_p"),
            presence_B=field("presence_penalty"),
            frequency_B=field("frequency_penalty"),
            seed_B=field("seed", np.uint32),
            sample_B=field("sample", np.int32),
        ),
        prompt_len_B=prompt_len_B,
    )
    zeros: Any = np.zeros(batch, np.int32)
    state = BudgetState(
        phase_B=ints(opening.phase for opening in openings),
        thinking_B=ints(opening.thinking for opening in openings),
        unfinished_B=ints(opening.unfinished for opening in openings),
        forced_at_B=zeros,
        in_tool_B=ints(opening.in_tool for opening in openings) > 0,
        written_B=zeros,
        injected_B=zeros,
        answer_B=zeros,
        thinking_end_B=ints(opening.end for opening in openings),
        stopped_B=zeros > 0,
    )
    return Packed(prompts, np.arange(prompt_slots) < prompt_len_B[:, None], rows, state)


def pack_markers(tokens: ThinkingTokens, vocab_size: int) -> Markers:
    """`tokens` as arrays, V wide where they speak of every id."""

    def scalar(value: int | None) -> Any:
        return np.int32(-1 if value is None else value)

    def table(values: Iterable[int]) -> Any:
        made: Any = np.zeros(vocab_size, np.bool_)
        made[[token for token in values if token < vocab_size]] = True
        return made

    unfinished: Any = np.zeros(vocab_size, np.int8)
    for token, count in tokens.unfinished.items():
        unfinished[token] = max(count, -3)  # no character lacks more bytes
    return Markers(
        think=scalar(tokens.think),
        end_think=scalar(tokens.end_think),
        eos_V=table(tokens.eos),
        tool_call=scalar(tokens.tool_call),
        end_tool_call=scalar(tokens.end_tool_call),
        num_tokens=scalar(vocab_size if tokens.num_tokens is None else tokens.num_tokens),
        newlines_V=table(tokens.newlines),
        unfinished_V=unfinished,
    )


class Written:
    """What the rows of a state wrote so far, brought to the host when first asked for."""

    def __init__(self, state: DecodeState) -> None:
        self._state = state

    @functools.cached_property
    def _arrays(self) -> Any:
        state = self._state
        return jax.device_get((state.budget, state.tokens_BM, state.logprobs_BM, state.forced_BM))

    def result(self, row: int) -> Result:
        """One row's result; of a row that goes on, its beginning."""
        budget, tokens, logprobs, forced = self._arrays
        written = int(budget.written_B[row])
        return Result(
            token_ids=tokens[row, :written].tolist(),
            thinking_tokens=int(budget.thinking_B[row]),
            injected_tokens=int(budget.injected_B[row]),
            answer_tokens=int(budget.answer_B[row]),
            thinking_end=bud.THINKING_ENDS[budget.thinking_end_B[row]],
            finish_reason="stop" if budget.stopped_B[row] else "length",
            logprobs=logprobs[row, :written].tolist(),
            forced=forced[row, :written].tolist(),
        )


def results(state: DecodeState) -> list[Result]:
    """All rows' results."""
    written = Written(state)
    return [written.result(row) for row in range(state.last_B.shape[0])]
