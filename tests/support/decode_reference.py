"""The rules of the thinking budget for one row, as plain Python without JAX: what the compiled loop must equal.

Written from the rules alone, apart from `qwen3_jax.decode`, so that a mistake in one of them shows.
"""

from __future__ import annotations

import codecs
import collections
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
    text: tuple[bytes, ...] = ()  # what each id spells; none given: nothing ends a line or splits a character


@dataclasses.dataclass(frozen=True)
class Row:
    """What one request says."""

    prompt: tuple[int, ...]
    budget: int | None = None
    ready: float | None = None  # an automatic budget: `budget` is then its cap
    grace: int = 0
    count_think_marker: bool = False
    thinking: bool = True
    max_new_tokens: int = 32
    answer_reserve: int = 1
    eos_stops: bool = False
    allow_empty_answer: bool = True
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


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
    budget = limit(row)
    phase, thought, in_tool = start(row.prompt, ids)
    out.thinking = sum(token is not None for token in thought)
    text: tuple[int, ...] = ()  # what is being forced, from `at` on
    at = 0
    if phase == "CLOSED":
        empty = row.prompt[-len(ids.empty_block) :] == ids.empty_block
        phase, out.thinking_end = "ANSWER", "off" if empty else "natural"
    elif phase == "START" and (not row.thinking or budget == 0):
        phase, out.thinking_end, text = "FORCE", "off", ids.empty_block
    elif phase == "THINK" and not in_tool and spent(thought, budget, row.grace, ids):
        phase, out.thinking_end, text = "FORCE", "budget", ids.stop_text
    elif phase == "START" and row.count_think_marker and budget < UNLIMITED:
        budget -= 1
    sampled: collections.Counter[int] = collections.Counter()

    while len(out.tokens) < row.max_new_tokens:
        token = -1
        if phase != "FORCE":
            banned = {ids.think} if phase == "ANSWER" else set()
            if not row.allow_empty_answer and phase in ("START", "ANSWER") and out.answer == 0:
                banned |= set(ids.eos)
            logits = [float(logit) for logit in next_logits([*row.prompt, *out.tokens])]
            masked = [
                -math.inf if i in banned or i >= ids.num_tokens else penalised(logit, sampled[i], row)
                for i, logit in enumerate(logits)
            ]
            token = choose(masked, len(row.prompt) + len(out.tokens))
        if phase == "THINK" and not in_tool and token != ids.end_think:
            room = row.max_new_tokens - row.answer_reserve - len(ids.stop_text) - len(out.tokens)
            broken = missing(thought, ids) == 0 and missing([*thought, token], ids) >= room
            probability = math.exp(logits[ids.end_think]) / sum(math.exp(logit) for logit in logits)
            if spent(thought, budget, row.grace, ids):
                phase, out.thinking_end, text = "FORCE", "budget", ids.stop_text
            elif budget < UNLIMITED and (room <= 0 or broken):
                phase, out.thinking_end, text = "FORCE", "room", ids.stop_text
            elif row.ready is not None and probability >= row.ready and missing(thought, ids) == 0:
                phase, out.thinking_end = "FORCE", "auto"
                text = ids.stop_text[ids.stop_text.index(ids.end_think) :]
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
        sampled[token] += 1
        if phase == "START" and token == ids.think:
            phase = "THINK"
        elif phase in ("START", "ANSWER"):
            phase = "ANSWER"
            out.answer += 1
            if token in ids.eos:
                out.finish_reason = "eos"
                return out
        elif token in ids.eos:  # in no count: it ends the thought, and nothing comes after it
            out.thinking_end, out.finish_reason = "eos", "eos"
            return out
        elif in_tool:
            in_tool = token != ids.end_tool_call
            thought = [*thought, None]
        elif token == ids.end_think:
            phase, out.thinking_end = "ANSWER", "natural"
        elif token == ids.tool_call:
            in_tool = True
            thought = [*thought, None]
        else:
            thought = [*thought, token]
            out.thinking += 1
    if phase == "THINK":
        out.thinking_end = "length"
    return out


def limit(row: Row) -> int:
    """Most thinking tokens; an automatic budget without a cap is finite all the same."""
    unlimited = UNLIMITED if row.ready is None else UNLIMITED - 1
    return unlimited if row.budget in (None, -1) else row.budget


def penalised(logit: float, count: int, row: Row) -> float:
    """The logit of a token that the row has sampled `count` times."""
    return logit - row.presence_penalty * (count > 0) - row.frequency_penalty * count


def spent(thought: Sequence[int | None], budget: int, grace: int, ids: Ids) -> bool:
    """Whether the budget ends this thought; None stands for a token of a tool call."""
    over = sum(token is not None for token in thought) - budget
    last = ids.text[thought[-1]] if ids.text and thought and thought[-1] is not None else b""
    due = over >= grace or (0 < over < grace and last.endswith(b"\n"))
    return due and (missing(thought, ids) == 0 or over >= grace + 3)


def missing(thought: Sequence[int | None], ids: Ids) -> int:
    """Bytes that the last character of a thought lacks, by Python's own UTF-8 decoder."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in thought:
        decoder.decode(ids.text[token] if ids.text and token is not None and token < len(ids.text) else b"<tool>")
    begun, _ = decoder.getstate()
    return 0 if not begun else (4 if begun[0] >= 0xF0 else 3 if begun[0] >= 0xE0 else 2) - len(begun)


def fits(row: Row, ids: Ids) -> bool:
    """Whether the stop text and the reserve fit at all, as a finite budget demands."""
    phase, _, _ = start(row.prompt, ids)
    finite = limit(row) < UNLIMITED
    if not finite or phase == "CLOSED" or (phase == "START" and (not row.thinking or limit(row) == 0)):
        return True
    return (phase == "START") + len(ids.stop_text) + row.answer_reserve <= row.max_new_tokens


def start(prompt: Sequence[int], ids: Ids) -> tuple[str, list[int | None], bool]:
    """(phase, the open thought so far, inside a tool call) at the end of a prompt: START, THINK, or a CLOSED thought.

    Only what follows the last end of a turn says so; the rules of sampled tokens are the rules of given ones.
    """
    last_eos = max((i for i, token in enumerate(prompt) if token in ids.eos), default=-1)
    phase, in_tool = "START", False
    thought: list[int | None] = []
    for token in prompt[last_eos + 1 :]:
        if phase == "THINK" and in_tool:
            in_tool = token != ids.end_tool_call
            thought.append(None)
        elif phase == "THINK" and token == ids.end_think:
            phase, thought = "CLOSED", []  # only an open thought is counted
        elif phase == "THINK" and token == ids.tool_call:
            in_tool = True
            thought.append(None)
        elif phase == "THINK":
            thought.append(token)
        elif phase == "START" and token == ids.think:
            phase = "THINK"
    return phase, thought, in_tool
