"""From a record, a line of infer.py's files, to what is asked of the decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qwen3_jax.request import SETTINGS, Request
from qwen3_jax.text import chat
from qwen3_jax.text.query_mode import query_mode
from qwen3_jax.text.tokenizer import Tokenizer

# Qwen3's own settings by mode (model cards and report, section 4.7).
THINKING_SAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0}
NON_THINKING_SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0, "presence_penalty": 1.5}

_FIELDS = ("id", "messages", "prompt", "tools", "answer", "enable_thinking", "mode_by_query", "stop", *SETTINGS)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What one record asks for.

    stop: texts that end the answer and are not part of it. They are looked for in the answer alone, never in a thought
      or in forced text.
    rule: of `query_mode`, that chose the mode; None where it was not asked.
    """

    request: Request
    stop: tuple[str, ...] = ()
    rule: str | None = None

    def with_sample(self, number: int) -> Prompt:
        """The sample `number` after the one that it asks for."""
        request = dataclasses.replace(self.request, sample=self.request.sample + number)
        return dataclasses.replace(self, request=request)


def read_prompt(
    record: Mapping[str, Any], tokenizer: Tokenizer, modes: chat.Modes, defaults: Mapping[str, Any] | None = None
) -> Prompt:
    """What a record asks for.

    Args:
      record: `prompt` (one user turn) or `messages` (a conversation, with `tools`), and any setting of a `Request`;
        `enable_thinking` false puts the empty block into the prompt; `stop`, a text or a list of them;
        `mode_by_query` true leaves the mode to `query_mode` where neither a flag nor `enable_thinking` says it.
        Flags in the text follow `chat.flag_mode`. A model with one mode only knows no flags: see `chat`.
        A field with the value null counts as absent.
      defaults: fields for records that do not have them; sampling is by mode where neither says.

    Raises:
      ValueError: `field: value; what to use instead`.
    """
    record = {name: value for name, value in record.items() if value is not None}
    unknown = [name for name in record if name not in _FIELDS]
    if unknown:
        raise ValueError(f"{unknown[0]}: unknown field; use one of {', '.join(_FIELDS)}")
    if ("prompt" in record) == ("messages" in record):
        raise ValueError("prompt, messages: use exactly one of the two")
    if "prompt" in record and not isinstance(record["prompt"], str):
        raise ValueError(f"prompt: {record['prompt']!r}; use a string")
    messages = record.get("messages", [{"role": "user", "content": record.get("prompt")}])
    fields = {**(defaults or {}), **record}
    enable_thinking = fields.get("enable_thinking", True)
    rendered = chat.render(messages, tokenizer, tools=record.get("tools"), enable_thinking=enable_thinking, modes=modes)
    budget = fields.get("thinking_budget")
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
    chosen = {name: fields[name] for name in SETTINGS if name in fields}
    if budget != "auto":  # defaults for automatic budgets do not concern a record with a budget of its own
        chosen = {name: chosen[name] for name in chosen if not name.startswith("auto_") or name in record}
    sampling = THINKING_SAMPLING if thinks else NON_THINKING_SAMPLING
    request = Request(rendered.ids, thinking=thinking, **{**sampling, **chosen})
    return Prompt(request, _stop_texts(fields.get("stop", ())), rule)


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
