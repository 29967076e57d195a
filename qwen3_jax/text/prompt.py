"""From a record, a line of infer.py's files, to what is asked of the decoder."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from qwen3_jax.request import SETTINGS, Request
from qwen3_jax.text import chat
from qwen3_jax.text.chat_format import ChatFormat
from qwen3_jax.text.query_mode import query_mode
from qwen3_jax.text.tokenizer import Tokenizer

# Qwen3's own settings by mode (model cards and report, section 4.7).
THINKING_SAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0}
NON_THINKING_SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0, "presence_penalty": 1.5}

_DEFAULT_ROOM = 1024  # most new tokens where nothing is said
_ANSWER_ROOM = 512  # of these for the answer, where a budget takes more
_PROMPTS = ("messages", "prompt", "text", "prompt_ids")
# What a judge of the answers reads (see `qwen3_jax.tasks.judge`), and training on them; nothing here does.
_FOR_JUDGES = ("answer", "verifier", "labels", "metadata", "tolerance", "min_words", "max_words", "language", "tests")
# Fields that go into the answer's record as they are.
CARRIED = ("messages", "prompt", "tools", "enable_thinking", *_FOR_JUDGES)
_FIELDS = ("id", *_PROMPTS, "tools", "enable_thinking", "mode_by_query", "stop", *_FOR_JUDGES, *SETTINGS)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What one record asks for.

    stop: texts that end the answer and are not part of it. They are looked for in the answer alone, never in a thought
      or in forced text.
    rule: of `query_mode`, that chose the mode; None where it was not asked.
    raw: whether a text is continued as it is, without a chat format.
    """

    request: Request
    stop: tuple[str, ...] = ()
    rule: str | None = None
    raw: bool = False

    def with_sample(self, number: int) -> Prompt:
        """The sample `number` after the one that it asks for."""
        request = dataclasses.replace(self.request, sample=self.request.sample + number)
        return dataclasses.replace(self, request=request)


def read_prompt(
    record: Mapping[str, Any], tokenizer: Tokenizer, form: ChatFormat, defaults: Mapping[str, Any] | None = None
) -> Prompt:
    """What a record asks for.

    Args:
      record: `prompt` (one user turn) or `messages` (a conversation, with `tools`), or `text` or `prompt_ids`, which
        are continued as they are; and any setting of a `Request`. `enable_thinking` false puts the empty block into the
        prompt; `stop`, a text or a list of them; `mode_by_query` true leaves the mode to `query_mode` where neither a
        flag nor `enable_thinking` says it. Flags in the text follow `chat.flag_mode`. A model with one mode only knows
        no flags: see `chat`. A field with the value null counts as absent.
      form: how conversations are written for the model.
      defaults: fields for records that do not have them. Where neither says, sampling is by mode (greedy for `text` and
        `prompt_ids`), and `max_new_tokens` is 1024, or more where a thinking budget needs it.

    Raises:
      ValueError: `field: value; what to use instead`.
    """
    record = {name: value for name, value in record.items() if value is not None}
    unknown = [name for name in record if name not in _FIELDS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], _FIELDS, n=1)
        meant = f"did you mean {near[0]}?" if near else f"use one of {', '.join(_FIELDS)}"
        raise ValueError(f"{unknown[0]}: unknown field; {meant}")
    given = [name for name in _PROMPTS if name in record]
    if len(given) != 1:
        raise ValueError(f"{', '.join(given or _PROMPTS)}: use exactly one of {', '.join(_PROMPTS)}")
    fields = {**(defaults or {}), **record}
    chosen = {name: fields[name] for name in SETTINGS if name in fields}
    budget = fields.get("thinking_budget")
    if budget != "auto":  # defaults for automatic budgets do not concern a record with a budget of its own
        chosen = {name: chosen[name] for name in chosen if not name.startswith("auto_") or name in record}
    chosen.setdefault("max_new_tokens", _room(budget, chosen, tokenizer))
    stop = _stop_texts(fields.get("stop", ()))
    if given[0] in ("text", "prompt_ids"):
        return Prompt(Request(_raw_ids(record, budget, tokenizer), **chosen), stop, raw=True)
    if "prompt" in record and not isinstance(record["prompt"], str):
        raise ValueError(f"prompt: {record['prompt']!r}; use a string")
    messages = record.get("messages", [{"role": "user", "content": record.get("prompt")}])
    enable_thinking, modes = fields.get("enable_thinking", True), form.modes
    rendered = form.render(messages, tokenizer, tools=record.get("tools"), enable_thinking=enable_thinking)
    if modes == "instruct" and budget not in (None, -1):
        raise ValueError(f"thinking_budget: {budget!r}, but this model never thinks; leave it out")
    if modes == "thinking" and budget == 0:
        raise ValueError("thinking_budget: 0, but this model has no non-thinking mode; use a number >= 1")
    # A flag is acted on here, and the decoder writes the empty block; enable_thinking=False put it in the prompt.
    flag, rule = (chat.flag_mode(messages) if modes == "hybrid" else None), None
    is_unsaid = flag is None and "enable_thinking" not in fields and modes == "hybrid"
    if _flag("mode_by_query", fields) and is_unsaid:
        flag, rule = query_mode(messages)
    thinking = modes != "hybrid" or (enable_thinking and flag is not False)
    thinks = thinking and budget != 0 and modes != "instruct"
    sampling = THINKING_SAMPLING if thinks else NON_THINKING_SAMPLING
    return Prompt(Request(rendered.ids, thinking=thinking, **{**sampling, **chosen}), stop, rule)


def _room(budget: Any, chosen: Mapping[str, Any], tokenizer: Tokenizer) -> int:
    """Tokens for the thought that the budget allows, the stop text and an answer; see `_DEFAULT_ROOM`."""
    most, grace = chosen.get("auto_cap") if budget == "auto" else budget, chosen.get("grace", 0)
    if not (isinstance(most, int) and isinstance(grace, int)):
        return _DEFAULT_ROOM
    return max(_DEFAULT_ROOM, most + grace + len(tokenizer.encode(chat.STOP_TEXT)) + _ANSWER_ROOM)


def _raw_ids(record: Mapping[str, Any], budget: Any, tokenizer: Tokenizer) -> Sequence[int]:
    """The ids of a prompt that is continued as it is."""
    for name in ("tools", "enable_thinking", "mode_by_query"):
        if name in record:
            raise ValueError(f"{name}: with text or prompt_ids, which have no chat format; use messages with it")
    if budget == 0:
        raise ValueError("thinking_budget: 0 with text or prompt_ids, which have no modes; leave it out")
    if "prompt_ids" in record:
        return record["prompt_ids"]  # a Request checks them
    if not isinstance(record["text"], str) or not record["text"]:
        raise ValueError(f"text: {record['text']!r}; use a string that is not empty")
    return tokenizer.encode(record["text"])


def _flag(name: str, fields: Mapping[str, Any]) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"{name}: {value!r}; use true or false")
    return value


def _stop_texts(stop: Any) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else stop
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"stop: {stop!r}; use a text that is not empty, or a list of them")
    return tuple(texts)
