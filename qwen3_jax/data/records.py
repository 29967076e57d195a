"""What a record of a training file holds: a text or a conversation, in one of the shapes that people keep them in.

| keys | taken for |
|---|---|
| `text` | a text |
| `messages` (and `tools`) | a conversation, in the shape that `qwen3_jax.text.chat` takes |
| `conversations` (`from`, `value`; and `system`, `tools`) | a conversation (ShareGPT) |
| `instruction`, `output` (and `input`, `system`, `history`) | a user's turn and its answer (Alpaca) |
| `prompt`, `completion` | a user's turn and its answer; or two lists of messages, the second in the loss |

A key with the value null counts as absent, and other keys are ignored.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from qwen3_jax.data.config import Labels
from qwen3_jax.data.source import Document
from qwen3_jax.text.records import parse_record

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bot", "function_call"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}


@dataclasses.dataclass(frozen=True)
class Record:
    """A text, or the messages of a conversation with their tools.

    given: how many of the messages come before those that are learnt. no_loss: texts whose tokens are not in the loss.
    shape: what the record was taken for, where its keys are not `text` or `messages`.
    """

    text: str | None = None
    messages: tuple[Any, ...] = ()
    tools: list[Any] | None = None
    given: int = 0
    no_loss: tuple[str, ...] = ()
    labels: Labels = dataclasses.field(default_factory=dict)
    shape: str = ""

    def words(self) -> str:
        """All that is written in it: the text, or the contents and thoughts of the messages."""
        if self.text is not None:
            return self.text
        held = (message.get(key) for message in self.messages for key in ("reasoning_content", "content"))
        return "\n".join(part for part in held if part)


def read_record(document: Document) -> Record:
    """The record of a document that is not token ids. The messages are checked where they are rendered.

    Raises:
      ValueError: `reason`, which does not name the document.
    """
    if document.form == "text":
        text = document.content.decode("utf-8-sig" if document.start == 0 else "utf-8")
        return Record(text=text.rstrip("\r\n"))
    fields = {key: value for key, value in parse_record(document.content).items() if value is not None}
    labels = fields.get("labels", {})
    if not isinstance(labels, dict) or not all(isinstance(value, str | None) for value in labels.values()):
        raise ValueError(f"labels: {labels!r}; use an object of strings")
    labels = {label: value for label, value in labels.items() if value is not None}
    if "text" in fields and "messages" in fields:
        raise ValueError('"text" and "messages": both; use one of them')
    if "text" in fields:
        return Record(text=_string(fields, "text"), labels=labels)
    no_loss = fields.get("no_loss", [])
    if not isinstance(no_loss, list) or not all(isinstance(literal, str) and literal for literal in no_loss):
        raise ValueError(f"no_loss: {no_loss!r}; use a list of strings that are not empty")
    record = _conversation(fields)
    if not all(isinstance(message, dict) for message in record.messages):
        raise ValueError("messages: not all are objects; use objects with role and content")
    if not any(message.get("role") == "assistant" for message in record.messages[record.given :]):
        raise ValueError("messages: no assistant turn; use at least one")
    return dataclasses.replace(record, no_loss=tuple(no_loss), labels=labels)


def _conversation(fields: dict[str, Any]) -> Record:
    """The messages and tools of a record, by the table above."""
    if "messages" in fields:
        return Record(messages=tuple(_list(fields, "messages")), tools=_tools(fields))
    if "conversations" in fields:
        turns = _list(fields, "conversations")
        system = [{"role": "system", "content": _string(fields, "system")}] if fields.get("system") else []
        messages = (*system, *(_sharegpt(turn, f"conversations[{i}]") for i, turn in enumerate(turns)))
        return Record(messages=messages, tools=_tools(fields), shape="ShareGPT (conversations)")
    if "instruction" in fields and "output" in fields:
        parts = [_string(fields, name) for name in ("instruction", "input") if fields.get(name)]
        rounds = [*_history(fields), ("\n".join(parts), _string(fields, "output"))]
        system = [{"role": "system", "content": _string(fields, "system")}] if fields.get("system") else []
        messages = (*system, *(message for pair in rounds for message in _pair(*pair)))
        return Record(messages=messages, shape="Alpaca (instruction, input, output)")
    if "prompt" in fields and "completion" in fields:
        prompt, completion = fields["prompt"], fields["completion"]
        shape = "prompt and completion, a user's turn and its answer"
        if isinstance(prompt, str) and isinstance(completion, str):
            return Record(messages=_pair(prompt, completion), shape=shape)
        given = _list(fields, "prompt")
        messages = (*given, *_list(fields, "completion"))
        return Record(messages=messages, tools=_tools(fields), given=len(given), shape=f"{shape} (messages)")
    raise ValueError(
        f"an object with the keys {', '.join(map(repr, fields)) or '(none)'}; use text, messages, conversations, "
        "instruction and output, or prompt and completion"
    )


def _sharegpt(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise ValueError(f"{where}: {turn!r:.60}; use an object with from and value")
    turn = {key: value for key, value in turn.items() if value is not None}
    if "role" in turn:
        return turn
    speaker, value = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise ValueError(f"{where}.from: {speaker!r:.60}; use one of {', '.join(_ROLES)}")
    if not isinstance(value, str):
        raise ValueError(f"{where}.value: {value!r:.60}; use a string")
    if speaker != "function_call":
        return {"role": _ROLES[speaker], "content": value}
    try:
        call = json.loads(value)
    except ValueError:
        raise ValueError(f"{where}.value: {value!r:.60}; use the JSON of a call, with name and arguments") from None
    return {"role": "assistant", "content": "", "tool_calls": call if isinstance(call, list) else [call]}


def _pair(question: str, answer: str) -> tuple[dict[str, str], dict[str, str]]:
    return {"role": "user", "content": question}, {"role": "assistant", "content": answer}


def _history(fields: dict[str, Any]) -> list[tuple[str, str]]:
    rounds = fields.get("history", [])
    is_pairs = isinstance(rounds, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in rounds)
    if not is_pairs or not all(isinstance(text, str) for pair in rounds for text in pair):
        raise ValueError(f"history: {rounds!r:.60}; use a list of pairs, question and answer")
    return [(question, answer) for question, answer in rounds]


def _tools(fields: dict[str, Any]) -> list[Any] | None:
    tools = fields.get("tools")
    if isinstance(tools, str):  # the list as JSON text, as Parquet files hold it
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise ValueError(f"tools: {tools!r:.60}; use a list, or its JSON text") from None
    if not isinstance(tools, list | None):
        raise ValueError(f"tools: {tools!r:.60}; use a list")
    return tools


def _string(fields: dict[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise ValueError(f"{name}: {value!r:.60}; use a string")
    return value


def _list(fields: dict[str, Any], name: str) -> list[Any]:
    value = fields[name]
    if isinstance(value, str) and value.lstrip().startswith("["):  # the list as JSON text, as Parquet files hold it
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"{name}: {value!r:.60}; use a list, or its JSON text") from None
    if not isinstance(value, list):
        raise ValueError(f"{name}: {value!r:.60}; use a list")
    return value
