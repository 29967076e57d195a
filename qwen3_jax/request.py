"""What is asked of the decoder and what it answers, one row each. Host data: nothing here knows jax.

Each setting of a request is declared once, with its bounds and its help. The fields of infer.py's records, its flags
and every check follow from that.
"""

from __future__ import annotations

import dataclasses
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal

Check = Callable[[str, Any], None]


def _refuse(name: str, value: Any, instead: str) -> None:
    raise ValueError(f"{name}: {value!r}; use {instead}")


def _whole(low: int, high: int | None = None, *, or_else: Sequence[Any] = ()) -> Check:
    """Whole numbers from `low` to `high`, and the values in `or_else`."""
    span = f"a whole number >= {low}" if high is None else f"a whole number in {low}..{high}"
    instead = " or ".join([span, *(repr(value) for value in or_else if value is not None)])

    def check(name: str, value: Any) -> None:
        if any(value is other or (isinstance(other, str) and value == other) for other in or_else):
            return
        is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not is_whole or value < low or (high is not None and value > high):
            _refuse(name, value, instead)

    return check


def _number(low: float, high: float, *, optional: bool = False) -> Check:
    """Numbers from `low` to `high`; None too where it is optional."""

    def check(name: str, value: Any) -> None:
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not ((is_number and low <= float(value) <= high) or (optional and value is None)):
            _refuse(name, value, f"a number in [{low}, {high}]")

    return check


def _one_of(*values: Any) -> Check:
    def check(name: str, value: Any) -> None:
        if not any(value is allowed or (isinstance(allowed, str) and value == allowed) for allowed in values):
            _refuse(name, value, f"one of {', '.join(map(str, values))}")

    return check


def _temperature(name: str, value: Any) -> None:
    _number(0, 1000)(name, value)
    if 0 < value < 0.001:  # logits divided by it would overflow float32
        _refuse(name, value, "0 (greedy) or a number in [0.001, 1000]")


def _top_p(name: str, value: Any) -> None:
    _number(0, 1)(name, value)
    if value == 0:
        raise ValueError("top_p: 0 keeps no token; use a number in (0, 1]")


def _setting(default: Any, check: Check, help_text: str = "") -> Any:
    """A field with its check. With a `help_text` it is a setting that records and the command line may give."""
    return dataclasses.field(default=default, metadata={"check": check, "help": help_text})


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and how to continue it.

    Raises:
      ValueError: naming the field, its value and what to use instead.

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
    presence_penalty, frequency_penalty: subtracted from the logit of each token that the row has sampled already, once
      and as often as it was sampled; forced tokens and the prompt do not count.
    seed, sample: of the row's random draws; the same two give the same tokens in every batch.
    """

    prompt_ids: Sequence[int]
    thinking_budget: int | Literal["auto"] | None = _setting(
        None,
        _whole(-1, or_else=(None, "auto")),
        "most thinking tokens; -1 (default) is unlimited, 0 turns thinking off; or auto",
    )
    auto_threshold: float | None = _setting(
        None, _number(0, 1, optional=True), "auto: the probability of </think> that ends the thought (default: 0.25)"
    )
    auto_cap: int | None = _setting(
        None, _whole(1, or_else=(None,)), "auto: most thinking tokens (default: what leaves room for an answer)"
    )
    grace: int = _setting(0, _whole(0, 2**30), "tokens beyond the budget that may go by until a line ends")
    count_think_marker: bool = _setting(False, _one_of(True, False), "whether the budget counts a sampled <think>")
    thinking: bool = _setting(True, _one_of(True, False))
    start_in_think: bool | None = _setting(None, _one_of(None, True, False))
    max_new_tokens: int = _setting(256, _whole(1), "most tokens written")
    answer_reserve: int = _setting(1, _whole(0, 2**31 - 1), "tokens that a finite budget keeps for the answer")
    eos_while_thinking: Literal["close", "stop"] = _setting(
        "close", _one_of("close", "stop"), "end of sequence inside a thought: close the thought, or stop"
    )
    allow_empty_answer: bool = _setting(True, _one_of(True, False), "whether an answer may be empty")
    temperature: float = _setting(0.0, _temperature, "0 is greedy")
    top_p: float = _setting(1.0, _top_p, "1 is off")
    top_k: int = _setting(0, _whole(0), "0 is off")
    min_p: float = _setting(0.0, _number(0, 1), "0 is off")
    presence_penalty: float = _setting(0.0, _number(-2, 2), "subtracted from the logits of tokens sampled before")
    frequency_penalty: float = _setting(0.0, _number(-2, 2), "the same, as often as the token was sampled")
    seed: int = _setting(0, _whole(0, 2**32 - 1), "of the random draws (default: 0)")
    sample: int = _setting(0, _whole(0, 2**31 - 1), "number of the sample; each draws its own tokens")

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "prompt_ids", tuple(operator.index(token) for token in self.prompt_ids))
        except TypeError:
            raise ValueError(f"prompt_ids: {self.prompt_ids!r}; use a sequence of whole numbers") from None
        if not self.prompt_ids:
            raise ValueError("prompt_ids: empty; use at least one id")
        for field in dataclasses.fields(self):
            if check := field.metadata.get("check"):
                check(field.name, getattr(self, field.name))
        for name in ("auto_threshold", "auto_cap"):
            if getattr(self, name) is not None and self.thinking_budget != "auto":
                raise ValueError(f"{name}: {getattr(self, name)!r}, but thinking_budget is not 'auto'; leave it out")

    def settings(self) -> dict[str, Any]:
        """The seed, and what else differs from the defaults of this class, but for prompt, mode and sample."""
        fields = {field.name: field.default for field in dataclasses.fields(self) if field.metadata.get("help")}
        found = {name: getattr(self, name) for name, default in fields.items() if getattr(self, name) != default}
        found.pop("sample", None)
        return {"seed": self.seed} | found


# Settings that a record, or the command line, may give under their own name, each with its help.
SETTINGS: dict[str, str] = {
    field.name: field.metadata["help"] for field in dataclasses.fields(Request) if field.metadata.get("help")
}


@dataclasses.dataclass(frozen=True)
class Result:
    """One continuation.

    token_ids: the tokens written, the end-of-sequence token and a forced empty block included.
    thinking_tokens: N, tokens sampled inside the thought (with those already in the prompt's open thought).
    injected_tokens: forced tokens, of the stop text or of the empty block.
    answer_tokens: tokens after the thought, the end-of-sequence token included.
    thinking_end: natural, budget, room (a finite budget was cut, so that an answer fits), auto, off (non-thinking
      mode), none (never opened), eos, or length; open where the result is of a row that has not finished and thinks.
    finish_reason: eos, length, or stop (a stop text).
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
