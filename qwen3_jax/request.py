"""What is asked of the decoder and what it answers; on the host, one row each."""

from __future__ import annotations

import dataclasses
import numbers
import operator
from collections.abc import Sequence
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and how to continue it.

    Raises:
      ValueError: naming the field, its value and what would fit.

    prompt_ids: the prompt's token ids, up to and including the generation prompt.
    thinking_budget: most thinking tokens; None or -1 is unlimited, 0 is non-thinking mode. "auto" ends the thought when
      the model is ready to answer: as soon as it gives `</think>` a probability of `auto_threshold` or more, and after
      `auto_cap` thinking tokens (None: those that leave room for an answer) at the latest.
    grace: thinking tokens beyond the budget that may go by until one ends a line.
    count_think_marker: count the `<think>` that a row writes itself, as the recipe in Qwen3's documentation does, where
      the whole of the first call's output is limited to the budget.
    thinking: False is non-thinking mode: the empty block comes first, the budget is ignored.
    start_in_think: whether the prompt ends inside an open `<think>`; the tokens after that marker count as thinking
      tokens already. None reads it off what follows the prompt's last end-of-sequence id.
    max_new_tokens: most tokens written, forced ones included.
    answer_reserve: tokens kept for the answer when a finite budget is cut for want of room.
    eos_while_thinking: "close" replaces an end-of-sequence token inside a thought by the stop text, "stop" obeys it.
    allow_empty_answer: False keeps an end-of-sequence token from being the first of the answer.
    temperature, top_p, top_k, min_p: sampling; temperature 0 is greedy, 1.0, 0 and 0.0 switch the filters off.
    presence_penalty, frequency_penalty: taken off the logit of each token that the row has sampled already, once and
      times how often; forced tokens and the prompt do not count.
    seed, sample: of the row's random draws; the same two give the same tokens in every batch.
    """

    prompt_ids: Sequence[int]
    thinking_budget: int | Literal["auto"] | None = None
    auto_threshold: float | None = None
    auto_cap: int | None = None
    grace: int = 0
    count_think_marker: bool = False
    thinking: bool = True
    start_in_think: bool | None = None
    max_new_tokens: int = 256
    answer_reserve: int = 1
    eos_while_thinking: Literal["close", "stop"] = "close"
    allow_empty_answer: bool = True
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    sample: int = 0

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "prompt_ids", tuple(operator.index(token) for token in self.prompt_ids))
        except TypeError:
            raise ValueError(f"prompt_ids: {self.prompt_ids!r}; a sequence of whole numbers fits") from None
        if not self.prompt_ids:
            raise ValueError("prompt_ids: empty; at least one id fits")
        if self.thinking_budget is not None and self.thinking_budget != "auto":
            _check_int("thinking_budget", self.thinking_budget, -1, also="'auto'")
        if self.auto_cap is not None:
            _check_int("auto_cap", self.auto_cap, 1)
        if self.auto_threshold is not None:
            _check_float("auto_threshold", self.auto_threshold, 0, 1)
        for name in ("auto_threshold", "auto_cap"):
            if getattr(self, name) is not None and self.thinking_budget != "auto":
                raise ValueError(f"{name}: {getattr(self, name)!r}, but thinking_budget is not 'auto'; none fits")
        _check_int("grace", self.grace, 0, 2**30)
        _check_int("max_new_tokens", self.max_new_tokens, 1)
        _check_int("answer_reserve", self.answer_reserve, 0, 2**31 - 1)
        _check_int("top_k", self.top_k, 0)
        _check_int("sample", self.sample, 0, 2**31 - 1)
        _check_int("seed", self.seed, 0, 2**32 - 1)
        _check_float("temperature", self.temperature, 0, 1000)
        _check_float("top_p", self.top_p, 0, 1)
        _check_float("min_p", self.min_p, 0, 1)
        _check_float("presence_penalty", self.presence_penalty, -2, 2)
        _check_float("frequency_penalty", self.frequency_penalty, -2, 2)
        if 0 < self.temperature < 0.001:  # logits over it would leave float32
            raise ValueError(f"temperature: {self.temperature!r}; 0 (greedy) or a number in [0.001, 1000] fits")
        if self.top_p == 0:
            raise ValueError("top_p: 0 keeps no token; a number in (0, 1] fits")
        flags = dict.fromkeys(("thinking", "count_think_marker", "allow_empty_answer"), (True, False))
        for name, allowed in {**flags, "start_in_think": (None, True, False)}.items():
            if not any(getattr(self, name) is value for value in allowed):
                raise ValueError(f"{name}: {getattr(self, name)!r}; one of {', '.join(map(str, allowed))} fits")
        if self.eos_while_thinking not in ("close", "stop"):
            raise ValueError(f"eos_while_thinking: {self.eos_while_thinking!r}; 'close' or 'stop' fits")


@dataclasses.dataclass(frozen=True)
class Result:
    """One continuation.

    token_ids: the tokens written, the end-of-sequence token and a forced empty block included.
    thinking_tokens: N, tokens sampled inside the thought (with those already in the prompt's open thought).
    injected_tokens: forced tokens, of the stop text or of the empty block.
    answer_tokens: tokens after the thought, the end-of-sequence token included.
    thinking_end: natural, budget, auto, off (non-thinking mode), none (never opened), eos, or length.
    finish_reason: stop or length.
    logprobs: log-probability of each token under the unmodified logits, in nats.
    forced: which tokens were forced.

    `len(token_ids)` is the sum of the three counts, less the thinking tokens of the prompt, and of what is in none of
    them: sampled `<think>` and `</think>`, a tool call inside the thought, an end-of-sequence token that ends it.
    """

    token_ids: list[int]
    thinking_tokens: int
    injected_tokens: int
    answer_tokens: int
    thinking_end: str
    finish_reason: str
    logprobs: list[float]
    forced: list[bool]


def _check_int(name: str, value: Any, low: int, high: int | None = None, also: str = "") -> None:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        fits = f"a whole number >= {low}" if high is None else f"a whole number in {low}..{high}"
        raise ValueError(f"{name}: {value!r}; {fits}{' or ' * bool(also)}{also} fits")


def _check_float(name: str, value: Any, low: float, high: float) -> None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not low <= float(value) <= high:
        raise ValueError(f"{name}: {value!r}; a number in [{low}, {high}] fits")
