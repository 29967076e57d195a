"""The rules of the thinking budget for one row, as plain Python without JAX: what the compiled loop must equal.

Written from the rules alone, apart from `qwen3_jax.decode`, so that a mistake in one of them shows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

UNLIMITED = 2**31 - 1

# Next-token logits after all tokens so far (prompt included).
NextLogits = Callable[[list[int]], Sequence[float]]
# A token from masked logits, for the token at `position` of the sequence (the prompt's first token is at 0).
Choose = Callable[[list[float], int], int]


@dataclasses.dataclass(frozen=True)
class Ids:
    """The ids the rules speak of. Ids from `num_tokens` on decode to nothing."""

    think: int
    end_think: int
    eos: tuple[int, ...]
    tool_call: int
    end_tool_call: int
    num_tokens: int
    stop_text: tuple[int, ...]
    empty_block: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """What one request says."""

    prompt: tuple[int, ...]
    budget: int | None = None
    thinking: bool = True
    max_new_tokens: int = 32
    answer_reserve: int = 1
    eos_stops: bool = False


@dataclasses.dataclass
class Outcome:
    """What one row answers."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    forced: list[bool] = dataclasses.field(default_factory=list)
    thinking: int = 0
    injected: int = 0
    answer: int = 0
    thinking_end: str = "none"
    finish_reason: str = "length"


def greedy(masked: list[float], position: int) -> int:
    """The largest logit; the lowest id among equals."""
    return masked.index(max(masked))


def decode_row(next_logits: NextLogits, row: Row, ids: Ids, choose: Choose = greedy) -> Outcome:
    """Continues one prompt by the rules."""
    out = Outcome()
    budget = UNLIMITED if row.budget in (None, -1) else row.budget
    phase, out.thinking, in_tool = start(row.prompt, ids)
    text: tuple[int, ...] = ()  # what is being forced, from `at` on
    at = 0
    if phase == "CLOSED":
        empty = row.prompt[-len(ids.empty_block) :] == ids.empty_block
        phase, out.thinking_end = "ANSWER", "off" if empty else "natural"
    elif phase == "START" and (not row.thinking or budget == 0):
        phase, out.thinking_end, text = "FORCE", "off", ids.empty_block
    elif phase == "THINK" and out.thinking >= budget and not in_tool:
        phase, out.thinking_end, text = "FORCE", "budget", ids.stop_text

    while len(out.tokens) < row.max_new_tokens:
        token = -1
        if phase != "FORCE":
            banned = {ids.think} if phase == "ANSWER" else set()
            logits = next_logits([*row.prompt, *out.tokens])
            masked = [
                -math.inf if i in banned or i >= ids.num_tokens else float(logit) for i, logit in enumerate(logits)
            ]
            token = choose(masked, len(row.prompt) + len(out.tokens))
        if phase == "THINK" and not in_tool and token != ids.end_think:
            room_used = len(out.tokens) + len(ids.stop_text) + row.answer_reserve
            if budget < UNLIMITED and (out.thinking >= budget or room_used >= row.max_new_tokens):
                phase, out.thinking_end, text = "FORCE", "budget", ids.stop_text
            elif token in ids.eos and not row.eos_stops:
                phase, out.thinking_end, text = "FORCE", "eos", ids.stop_text

        if phase == "FORCE":
            out.tokens.append(text[at])
            out.forced.append(True)
            out.injected += 1
            at += 1
            if at == len(text):
                phase = "ANSWER"
            continue

        out.tokens.append(token)
        out.forced.append(False)
        if phase == "START" and token == ids.think:
            phase = "THINK"
        elif phase in ("START", "ANSWER"):
            phase = "ANSWER"
            out.answer += 1
            if token in ids.eos:
                out.finish_reason = "stop"
                return out
        elif token in ids.eos:  # in no count: it ends the thought, and nothing comes after it
            out.thinking_end, out.finish_reason = "eos", "stop"
            return out
        elif in_tool:
            in_tool = token != ids.end_tool_call
        elif token == ids.end_think:
            phase, out.thinking_end = "ANSWER", "natural"
        elif token == ids.tool_call:
            in_tool = True
        else:
            out.thinking += 1
    if phase == "THINK":
        out.thinking_end = "length"
    return out


def fits(row: Row, ids: Ids) -> bool:
    """Whether the stop text and the reserve fit at all, as a finite budget demands."""
    phase, _, _ = start(row.prompt, ids)
    finite = row.budget not in (None, -1, UNLIMITED)
    if not finite or phase == "CLOSED" or (phase == "START" and (not row.thinking or row.budget == 0)):
        return True
    return (phase == "START") + len(ids.stop_text) + row.answer_reserve <= row.max_new_tokens


def start(prompt: Sequence[int], ids: Ids) -> tuple[str, int, bool]:
    """(phase, thinking tokens so far, inside a tool call) at the end of a prompt: START, THINK, or a CLOSED thought.

    Only what follows the last end of a turn says so; the rules of sampled tokens are the rules of given ones.
    """
    last_eos = max((i for i, token in enumerate(prompt) if token in ids.eos), default=-1)
    phase, thinking, in_tool = "START", 0, False
    for token in prompt[last_eos + 1 :]:
        if phase == "THINK" and in_tool:
            in_tool = token != ids.end_tool_call
        elif phase == "THINK" and token == ids.end_think:
            phase, thinking = "CLOSED", 0  # only an open thought is counted
        elif phase == "THINK" and token == ids.tool_call:
            in_tool = True
        elif phase == "THINK":
            thinking += 1
        elif phase == "START" and token == ids.think:
            phase = "THINK"
    return phase, thinking, in_tool
