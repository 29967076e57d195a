"""Responses to be judged: answers that infer.py wrote, or conversations that end with the assistant's turn."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3_jax.text import chat
from qwen3_jax.text.records import parse_record

_ANSWER = "the answers of infer.py, or messages that end with an assistant's turn"


@dataclasses.dataclass(frozen=True)
class Response:
    """One response to one query.

    key: its id and the number of the sample. line: of the query in the file that it is from.
    query: tells the query from others, whatever flags it has.
    record: what a judge reads, and what is kept for training. messages: the conversation before the response.
    is_complete: it ended by itself, and its thought was not cut.
    settings: that it was sampled with, its seed among them; empty where the line does not say.
    """

    key: tuple[Any, int]
    line: int
    query: str
    record: Mapping[str, Any]
    messages: Sequence[Mapping[str, Any]]
    thought: str
    answer: str
    is_complete: bool = True
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def text(self) -> str:
        """Thought and answer."""
        return f"{self.thought}\n{self.answer}"

    def for_training(self) -> dict[str, Any]:
        """The record of a training file, without verdict and provenance."""
        turn = {"role": "assistant", "reasoning_content": self.thought, "content": self.answer}
        turn = turn if self.thought else {"role": "assistant", "content": self.answer}
        kept = {name: value for name, value in self.record.items() if name not in ("messages", "prompt")}
        return {"id": self.key[0], "sample": self.key[1], "messages": [*self.messages, turn], **kept}


def read_response(line: bytes, number: int) -> Response | None:
    """The response on a line of a file, None for an answer that infer.py could not give.

    Raises:
      ValueError: `field: value; what to use instead`.
    """
    record = parse_record(line)
    if "error" in record:
        return None
    if isinstance(record.get("content"), str) and isinstance(record.get("thinking"), str):
        return _of_answer(record, number)
    messages = record.get("messages") or []
    chat.validate_messages(messages)
    if messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls"):
        raise ValueError(f"messages: the last turn is not an answer of the assistant; use {_ANSWER}")
    thought, answer = chat.thought_and_answer(messages[-1])
    return _response(record, number, messages[:-1], thought, answer)


def _of_answer(record: Mapping[str, Any], number: int) -> Response:
    if "messages" not in record and not isinstance(record.get("prompt"), str):
        raise ValueError(f"messages: missing, and no prompt; use {_ANSWER} to either")
    messages = record.get("messages", [{"role": "user", "content": record.get("prompt")}])
    chat.validate_messages(messages)
    end = record.get("thinking_end")
    ended = record.get("finish_reason") != "length" and end not in ("budget", "room", "auto")
    if end is not None:  # a flag or a budget may have turned thinking off
        record = {**record, "enable_thinking": end != "off"}
    found = _response(record, record.get("line", number), messages, record["thinking"], record["content"])
    return dataclasses.replace(found, is_complete=ended, settings=record.get("settings", {}))


# What infer.py tells of an answer; the text is in the conversation.
_OF_INFER = {"id", "sample", "line", "record", "settings", "thinking", "content", "token_ids", "logprobs", "forced"}
_OF_INFER |= {"mode_rule", "thinking_tokens", "injected_tokens", "answer_tokens", "thinking_end", "finish_reason"}


def _response(
    record: Mapping[str, Any], line: int, messages: Sequence[Mapping[str, Any]], thought: str, answer: str
) -> Response:
    if not isinstance(record.get("labels") or {}, dict):
        raise ValueError(f"labels: {record['labels']!r:.60}; use an object of texts")
    kept = {name: value for name, value in record.items() if name not in _OF_INFER}
    kept["messages"] = messages
    flag = chat.flag_mode(messages)
    kept.setdefault("enable_thinking", True if flag is None else flag)
    key = record.get("id", line), record.get("sample", 0)
    return Response(key, line, query_of(messages), kept, messages, thought.strip("\n"), answer.strip())


def query_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """A digest of a conversation that flags do not change."""
    plain = [(message["role"], chat.without_flags(message["content"] or "")) for message in messages]
    return hashlib.sha256(json.dumps([turn for turn in plain if turn != ("system", "")]).encode()).hexdigest()[:16]


def provenance_of(source: Path) -> dict[str, Any]:
    """How the answers of a file came about, as infer.py has left it beside them; empty where it has not."""
    path = source.with_name(source.name + ".run.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
