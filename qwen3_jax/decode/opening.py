"""How a row begins: the phases, and the phase that a prompt ends in. Runs on the host, without jax."""

from __future__ import annotations

from typing import NamedTuple

from qwen3_jax.config import ModelConfig
from qwen3_jax.request import Request
from qwen3_jax.text.thinking import ThinkingTokens

START, THINK, STOP, ANSWER, DONE = range(5)
UNLIMITED = 2**31 - 1  # the largest int32

# How thinking ended, in the order of their codes. "open" is a thought that has not ended.
THINKING_ENDS = ("open", "natural", "budget", "room", "auto", "off", "none", "eos", "length")
OPEN, NATURAL, BUDGET, ROOM, AUTO, OFF, NONE, EOS, LENGTH = range(9)

MAX_WAIT = 3  # tokens that a cut waits for the rest of a character
_READY, _NEVER = 0.25, 2.0  # probabilities of </think>: by default enough, and one that is never reached


class Opening(NamedTuple):
    """The first state of a row.

    phase: START, THINK, STOP or ANSWER. end: how the thought ended, as an index into THINKING_ENDS.
    forced: what STOP emits. thinking: thinking tokens in the prompt. unfinished: bytes missing from the thought's last
      character. in_tool: inside a tool call of the thought.
    """

    phase: int
    end: int
    forced: tuple[int, ...]
    thinking: int = 0
    unfinished: int = 0
    in_tool: bool = False


def check_request(request: Request, config: ModelConfig, tokens: ThinkingTokens) -> int:
    """The maximum number of new tokens: `max_new_tokens`, or what the prompt leaves of the context.

    Raises:
      ValueError: `field: value; what to use instead`, where the model or the tokenizer does not allow a value.
    """
    context, length = config.max_position_embeddings, len(request.prompt_ids)
    if length >= context:
        raise ValueError(f"prompt_ids: {length} tokens; use at most {context - 1}, one less than the context")
    outside = next((token for token in request.prompt_ids if not 0 <= token < config.vocab_size), None)
    if outside is not None:
        raise ValueError(f"prompt_ids: {outside}; use ids in 0..{config.vocab_size - 1}")
    opening = opening_of(request, tokens)
    max_new = min(request.max_new_tokens, context - length)
    if opening.end in (OPEN, BUDGET) and budget_of(request) < UNLIMITED:
        marker = opening.phase == START
        needed = marker + len(tokens.stop_ids) + request.answer_reserve
        if needed > max_new:
            raise ValueError(
                f"max_new_tokens: {request.max_new_tokens} leaves {max_new} of the context of {context}; a finite "
                f"thinking_budget needs at least {needed} ({marker:d} for <think>, {len(tokens.stop_ids)} for the stop "
                f"text, {request.answer_reserve} for the answer)"
            )
    return max_new


def budget_of(request: Request) -> int:
    """The maximum number of thinking tokens; UNLIMITED for no budget."""
    budget = request.thinking_budget
    if budget == "auto":  # finite, so that the thought is cut where room for the answer ends
        return UNLIMITED - 1 if request.auto_cap is None else min(request.auto_cap, UNLIMITED - 1)
    if budget is None or budget == -1:
        return UNLIMITED
    return min(int(budget), UNLIMITED)


def ready_of(request: Request) -> float:
    """The probability of `</think>` at which the thought ends."""
    if request.thinking_budget != "auto":
        return _NEVER
    return _READY if request.auto_threshold is None else request.auto_threshold


def opening_of(request: Request, tokens: ThinkingTokens) -> Opening:
    """The first state of a row, by its prompt.

    Only the generation prompt counts, which is what follows the last end of a turn. Markers that a user typed come
    before it and open no thought.

    Raises:
      ValueError: the request is non-thinking, but its prompt ends inside a thought.
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
            raise ValueError("thinking: False, but the prompt ends inside an open <think>; use True")
        over = thinking - budget_of(request)
        spent = over >= request.grace or (over > 0 and prompt[-1] in tokens.newlines)
        if spent and not in_tool and (not unfinished or over >= request.grace + MAX_WAIT):
            return Opening(STOP, BUDGET, tokens.stop_ids, thinking)
        return Opening(THINK, OPEN, tokens.stop_ids, thinking, unfinished, in_tool)
    if prompt[-len(tokens.empty_block) :] == tokens.empty_block:
        return Opening(ANSWER, OFF, tokens.stop_ids)
    if turn > 0 and closed:
        return Opening(ANSWER, NATURAL, tokens.stop_ids)
    if not request.thinking or budget_of(request) == 0:
        return Opening(STOP, OFF, tokens.empty_block)
    return Opening(START, OPEN, tokens.stop_ids)
