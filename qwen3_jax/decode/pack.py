"""Requests to arrays, on the host.

Shapes: B rows, P prompt slots, F longest forced text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from qwen3_jax.config import ModelConfig
from qwen3_jax.decode.budget import BudgetState, Limits, Markers
from qwen3_jax.decode.loop import Rows
from qwen3_jax.decode.opening import START, UNLIMITED, Opening, budget_of, opening_of, ready_of
from qwen3_jax.decode.sampling import Sampling
from qwen3_jax.decode.schedule import round_up
from qwen3_jax.request import Request
from qwen3_jax.text.thinking import ThinkingTokens


class Packed(NamedTuple):
    """Rows as host arrays, which jit transfers all at once.

    prompt_BP: padded on the right. there_BP: false at the padding.
    """

    prompt_BP: Any
    there_BP: Any
    rows: Rows
    budget: BudgetState


def pack(
    requests: Sequence[Request],
    limits: Sequence[int],
    config: ModelConfig,
    tokens: ThinkingTokens,
    *,
    prompt_slots: int,
) -> Packed:
    """The rows' prompts, settings and first states; `limits` are what `check_request` gave for each."""
    prompts = pack_prompts([request.prompt_ids for request in requests], prompt_slots)
    return Packed(*prompts, *pack_rows(requests, limits, config, tokens))


def pack_prompts(prompts: Sequence[Sequence[int]], slots: int) -> tuple[Any, Any]:
    """`(prompt_BP, there_BP)` for P = `slots`."""
    prompt_BP: Any = np.zeros((len(prompts), slots), np.int32)
    for row, ids in zip(prompt_BP, prompts, strict=True):
        row[: len(ids)] = ids
    lengths: Any = np.fromiter(map(len, prompts), np.int32, len(prompts))
    return prompt_BP, np.arange(slots) < lengths[:, None]


def pack_rows(
    requests: Sequence[Request], limits: Sequence[int], config: ModelConfig, tokens: ThinkingTokens
) -> tuple[Rows, BudgetState]:
    """The rows' settings and first states."""
    batch = len(requests)
    openings = [opening_of(request, tokens) for request in requests]
    texts = (tokens.stop_ids, tokens.empty_block)  # the same width whichever of them these rows need
    forced: Any = np.zeros((batch, round_up(max(map(len, texts)))), np.int32)
    for row, opening in zip(forced, openings, strict=True):
        row[: len(opening.forced)] = opening.forced

    def ints(values: Iterable[int], dtype: Any = np.int32) -> Any:
        return np.fromiter(values, dtype, batch)

    def floats(values: Iterable[float]) -> Any:
        return np.fromiter(values, np.float32, batch)

    def field(name: str, dtype: Any = np.float32) -> Any:
        return np.fromiter((getattr(request, name) for request in requests), dtype, batch)

    def budget(request: Request, opening: Opening) -> int:
        counted = request.count_think_marker and opening.phase == START
        return budget_of(request) - (counted and budget_of(request) < UNLIMITED)

    rows = Rows(
        limits=Limits(
            budget_B=ints(map(budget, requests, openings)),
            grace_B=field("grace", np.int32),
            ready_B=floats(map(ready_of, requests)),
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
        prompt_len_B=ints(len(request.prompt_ids) for request in requests),
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
    return rows, state


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
