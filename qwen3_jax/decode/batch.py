"""From requests to results: checks, padding, and the two jitted programs.

Shapes: B rows, P prompt slots, M most tokens written.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from qwen3_jax.cache import KVCache
from qwen3_jax.config import ModelConfig
from qwen3_jax.decode import budget as bud
from qwen3_jax.decode.budget import BudgetState, Limits, Markers, ThinkingTokens
from qwen3_jax.decode.loop import DecodeState, Forward, Rows, decode, prefill
from qwen3_jax.decode.request import Request, Result
from qwen3_jax.decode.sampling import Sampling
from qwen3_jax.model import Qwen3, head_weight, unembed, unstack_layers

# Shapes are rounded up to this, so that prompts and lengths of about the same size share a compiled program.
_BUCKET = 32
_STEPS_PER_REPORT = 16


class _Opening(NamedTuple):
    """How a row starts: its phase, the thinking tokens already there, the text STOP will emit, inside a tool call?"""

    phase: int
    thinking: int
    end: int
    forced: tuple[int, ...]
    in_tool: bool = False


def generate(
    config: ModelConfig,
    params: Any,
    requests: Sequence[Request],
    *,
    tokens: ThinkingTokens,
    dtype: Any = None,
    progress: Callable[[int, int, int], None] | None = None,
) -> list[Result]:
    """Continues every prompt, all rows in one batch and one compiled program (report, section 4.3; rules in `budget`).

    Args:
      params: weights of `Qwen3(config)`, stacked or per layer.
      tokens: the ids that the rules speak of.
      dtype: of activations and cache; None takes the embedding table's.
      progress: called every few steps with (rows done, rows, tokens written); the loop is left and entered again for
        it, which changes no token.

    Raises:
      ValueError: `requests[i].field: value; what would fit`.
    """
    if not requests:
        return []
    limits = []
    for i, request in enumerate(requests):
        try:
            limits.append(check_request(request, config, tokens))
        except ValueError as error:
            raise ValueError(f"requests[{i}].{error}") from None
    params = unstack_layers(config, nn.unbox(params))
    model = Qwen3(config, dtype=dtype)
    prompts, rows, state = _pack(requests, limits, config, tokens)
    max_new = _round_up(max(limits))
    unlimited = np.int32(bud.UNLIMITED)
    steps = unlimited if progress is None else np.int32(_STEPS_PER_REPORT)
    decoding = _start(params, prompts, rows, state, steps, model=model, max_new=max_new)
    while progress is not None:
        active, written = jax.device_get((decoding.budget.active_B, decoding.budget.written_B))
        progress(int((~active).sum()), len(requests), int(written.sum()))
        if not active.any():
            break
        decoding = _resume(params, decoding, rows, steps, model=model)
    return _results(decoding)


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
    if request.thinking_budget is None or request.thinking_budget == -1:
        return int(bud.UNLIMITED)
    return min(int(request.thinking_budget), int(bud.UNLIMITED))


def _opening(request: Request, tokens: ThinkingTokens) -> _Opening:
    """The state a prompt leaves behind, read off the generation prompt only: what follows the last end of a turn.

    Markers that a user typed stand before that end and open nothing.
    """
    prompt = request.prompt_ids
    turn = max((i + 1 for i, token in enumerate(prompt) if token in tokens.eos), default=0)
    is_open, closed, in_tool, thinking = False, False, False, 0
    for token in prompt[turn:]:  # given tokens are read by the rules of sampled ones
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
        if thinking >= _budget(request) and not in_tool:
            return _Opening(bud.STOP, thinking, bud.BUDGET, tokens.stop_ids)
        return _Opening(bud.THINK, thinking, bud.OPEN, tokens.stop_ids, in_tool)
    if prompt[-len(tokens.empty_block) :] == tokens.empty_block:
        return _Opening(bud.ANSWER, 0, bud.OFF, tokens.stop_ids)
    if turn > 0 and closed:
        return _Opening(bud.ANSWER, 0, bud.NATURAL, tokens.stop_ids)
    if not request.thinking or _budget(request) == 0:
        return _Opening(bud.STOP, 0, bud.OFF, tokens.empty_block)
    return _Opening(bud.START, 0, bud.OPEN, tokens.stop_ids)


def _pack(
    requests: Sequence[Request], limits: Sequence[int], config: ModelConfig, tokens: ThinkingTokens
) -> tuple[np.ndarray, Rows, BudgetState]:
    """Prompts [B, P] left-padded, and the rows' settings and first states as arrays."""
    batch = len(requests)
    openings = [_opening(request, tokens) for request in requests]
    length = _round_up(max(len(request.prompt_ids) for request in requests))
    prompts = np.zeros((batch, length), np.int32)
    forced: Any = np.zeros((batch, _round_up(max(len(opening.forced) for opening in openings))), np.int32)
    for i, (request, opening) in enumerate(zip(requests, openings, strict=True)):
        prompts[i, length - len(request.prompt_ids) :] = request.prompt_ids
        forced[i, : len(opening.forced)] = opening.forced

    # Host arrays: jit moves them all at once.
    def ints(values: Iterable[int], dtype: Any = np.int32) -> Any:
        return np.fromiter(values, dtype, batch)

    def floats(name: str) -> Any:
        return np.fromiter((getattr(request, name) for request in requests), np.float32, batch)

    def scalar(value: int | None) -> Any:
        return np.int32(-1 if value is None else value)

    eos: Any = np.full(_round_up(len(tokens.eos)), -1, np.int32)
    eos[: len(tokens.eos)] = tokens.eos
    rows = Rows(
        limits=Limits(
            budget_B=ints(_budget(request) for request in requests),
            max_new_B=ints(limits),
            reserve_B=ints(request.answer_reserve for request in requests),
            eos_stops_B=ints(request.eos_while_thinking == "stop" for request in requests) > 0,
            forced_BM=forced,
            forced_len_B=ints(len(opening.forced) for opening in openings),
        ),
        sampling=Sampling(
            temperature_B=floats("temperature"),
            top_p_B=floats("top_p"),
            top_k_B=ints(min(request.top_k, config.vocab_size) for request in requests),
            min_p_B=floats("min_p"),
            seed_B=ints((request.seed for request in requests), np.uint32),
            sample_B=ints(request.sample for request in requests),
        ),
        prompt_len_B=ints(len(request.prompt_ids) for request in requests),
        markers=Markers(
            think=scalar(tokens.think),
            end_think=scalar(tokens.end_think),
            eos_E=eos,
            tool_call=scalar(tokens.tool_call),
            end_tool_call=scalar(tokens.end_tool_call),
            num_tokens=scalar(config.vocab_size if tokens.num_tokens is None else tokens.num_tokens),
        ),
    )
    zeros: Any = np.zeros(batch, np.int32)
    state = BudgetState(
        phase_B=ints(opening.phase for opening in openings),
        thinking_B=ints(opening.thinking for opening in openings),
        forced_at_B=zeros,
        in_tool_B=ints(opening.in_tool for opening in openings) > 0,
        written_B=zeros,
        injected_B=zeros,
        answer_B=zeros,
        thinking_end_B=ints(opening.end for opening in openings),
        stopped_B=zeros > 0,
    )
    return prompts, rows, state


def _forward(model: Qwen3, params: Any) -> Forward:
    def forward(
        tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        out: Any = model.apply({"params": params}, tokens_BT, positions_BT, segment_ids_BT, cache)
        return unembed(out.hidden[:, -1:], head_weight(model.config, params))[:, 0], out.cache

    return forward


@functools.partial(jax.jit, static_argnames=("model", "max_new"))
def _start(
    params: Any,
    prompt_BP: jax.Array,
    rows: Rows,
    budget: BudgetState,
    max_steps: jax.Array,
    *,
    model: Qwen3,
    max_new: int,
) -> DecodeState:
    """Prefill and the loop, one program."""
    forward = _forward(model, params)
    dtype = model.dtype or params["embed_tokens"].dtype
    batch, length = prompt_BP.shape
    cache = KVCache.create(model.config, batch, length, dtype)
    state = prefill(forward, prompt_BP, rows, budget, cache, max_new)
    # The prompt attends over its own slots only; the room for new tokens is added after it.
    state = dataclasses.replace(state, cache=state.cache.extend(max_new))
    return decode(forward, state, rows, max_steps)


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def _resume(params: Any, state: DecodeState, rows: Rows, max_steps: jax.Array, *, model: Qwen3) -> DecodeState:
    """The loop entered again."""
    return decode(_forward(model, params), state, rows, max_steps)


def _results(state: DecodeState) -> list[Result]:
    budget, tokens, logprobs, forced = jax.device_get(
        (state.budget, state.tokens_BM, state.logprobs_BM, state.forced_BM)
    )
    results = []
    for i, written in enumerate(budget.written_B.tolist()):
        results.append(
            Result(
                token_ids=tokens[i, :written].tolist(),
                thinking_tokens=int(budget.thinking_B[i]),
                injected_tokens=int(budget.injected_B[i]),
                answer_tokens=int(budget.answer_B[i]),
                thinking_end=bud.THINKING_ENDS[budget.thinking_end_B[i]],
                finish_reason="stop" if budget.stopped_B[i] else "length",
                logprobs=logprobs[i, :written].tolist(),
                forced=forced[i, :written].tolist(),
            )
        )
    return results


def _round_up(n: int) -> int:
    return -(-n // _BUCKET) * _BUCKET
