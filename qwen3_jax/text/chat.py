r"""Qwen3's chat format: conversations to ids with loss-mask spans, `/think` flags, splitting thoughts from answers.

`render` produces the text of Qwen3's official template (report, Table 9), without Jinja. There are three departures:

1. Two versions of the template were released. They differ where an assistant's `content` is None: the first fails, the
   second takes it as empty. `render` follows the second.
2. Where the template silently drops content (unknown roles, content as a list of parts, thoughts or tool calls of
   anyone but the assistant, misspelled keys), `render` raises an error that names the field.
3. The template turns thinking off only for the boolean false; 0, None and "false" leave it on. `render` refuses them.

`render` ignores flags: a `/no_think` is an instruction that the model was trained to follow. Code that acts on flags
uses `flag_mode`, whose parsing rule is this project's.

The above describes the hybrid models of April 2025. Other models have one mode (`Modes`) and no flags:

- "thinking" (Thinking-2507) always thinks. The generation prompt ends in an open `<think>\n`; `enable_thinking=False`
  is refused.
- "instruct" (Instruct-2507) never thinks. The generation prompt has no think block, whatever `enable_thinking` is. An
  assistant's content is written unchanged, and its `reasoning_content` is dropped.

`qwen3_jax.text.chat_format` says which of them a model's directory has.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from qwen3_jax.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
Modes = Literal["hybrid", "thinking", "instruct"]

ROLES = ("system", "user", "assistant", "tool")
ASSISTANT_HEADER = "<|im_start|>assistant\n"  # the complete generation prompt when thinking is on
OPEN_THOUGHT = "<think>\n"
EMPTY_THOUGHT = OPEN_THOUGHT + "\n</think>\n\n"
# Report, section 4.3: closes a thought whose budget is used up. 24 tokens with Qwen3's tokenizer.
STOP_TEXT = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
    "\n</think>\n\n"
)
STOP_SENTENCE = STOP_TEXT.removesuffix("\n</think>\n\n")  # the part of it that is inside the think block

_ANY_KEYS = frozenset({"role", "content", "name", "tool_call_id"})  # the template ignores the last two
_ASSISTANT_KEYS = frozenset({"reasoning_content", "tool_calls"})

_TOOLS_INTRO = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>"""
_TOOLS_OUTRO = """
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""

_FENCED_CODE = re.compile(r"^[ \t]*(```+|~~~+)[^`\n]*$.*?(?:^[ \t]*\1[`~]*[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
_INLINE_CODE = re.compile(r"(?<!`)(`+)(?!`)(?:(?!\n[ \t]*\n).)+?(?<!`)\1(?!`)", re.DOTALL)
_OBJECT = "\ufffc"  # Unicode's object replacement character
_FLAG = re.compile(r"(?<!\S)/(no[_ ])?think(?!\S)")


@dataclasses.dataclass(frozen=True)
class Span:
    """Ids `start` to `stop` (exclusive) of one turn.

    For "assistant", the span holds the ids that the model generates: those after `<|im_start|>assistant\\n`, up to and
    including `<|im_end|>`. For "system", "user" and "tool" (consecutive results share a turn), it is the complete turn,
    from `<|im_start|>` to `<|im_end|>`. The newline after `<|im_end|>` and the generation prompt are in no span.
    """

    role: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation as text, as the ids of that text, and as spans of these ids, in order."""

    text: str
    ids: tuple[int, ...]
    spans: tuple[Span, ...]

    def loss_mask(self) -> list[int]:
        """For each id, 1 if the assistant generates it, else 0."""
        mask = [0] * len(self.ids)
        for span in self.spans:
            if span.role == "assistant":
                mask[span.start : span.stop] = [1] * (span.stop - span.start)
        return mask


def render(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool = True,
    add_generation_prompt: bool = True,
    modes: Modes = "hybrid",
) -> Rendered:
    r"""Renders a conversation as Qwen3's template does (report, section 4.3).

    Thoughts of assistant turns before the last user query are dropped. The last assistant turn always has a think
    block, which may be empty. If an assistant's earlier content begins with newlines, they form one token with the
    newline of its header; the span starts after that token, since a model cannot generate it.

    Args:
      modes: of the model, see the top of this file.

    Raises:
      ValueError: naming the field, its value and what to use instead.
    """
    pieces: list[str] = []
    ids: list[int] = []
    spans: list[Span] = []
    turns, prompt = _written(messages, tools, enable_thinking, add_generation_prompt, modes)
    for role, turn in turns:
        # Encoding turn by turn gives the ids of the complete text: every cut is beside <|im_start|> or <|im_end|>, and
        # tokenizers split the text at these markers first.
        turn_ids = tokenizer.encode(turn)
        start = len(ids) + (_header_length(turn_ids, tokenizer) if role == "assistant" else 0)
        ids += turn_ids
        spans.append(Span(role, start, len(ids)))
        ids += tokenizer.encode("\n")
        pieces += [turn, "\n"]
    ids += tokenizer.encode(prompt)
    return Rendered("".join([*pieces, prompt]), tuple(ids), tuple(spans))


def render_text(
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool = True,
    add_generation_prompt: bool = True,
    modes: Modes = "hybrid",
) -> str:
    """The text of `render` alone."""
    turns, prompt = _written(messages, tools, enable_thinking, add_generation_prompt, modes)
    return "".join(f"{turn}\n" for _, turn in turns) + prompt


def validate_messages(messages: Sequence[Message]) -> None:
    """Refuses a conversation that cannot be rendered without losing content.

    A message is `{"role": ..., "content": str}`. An assistant's message may also have `reasoning_content: str` and
    `tool_calls`, a list of `{"function": {"name": str, "arguments": object or str}}` or of the inner objects alone, and
    its content may be None. `name` and `tool_call_id` are accepted and ignored. A key with value None counts as absent.

    Raises:
      ValueError: naming the field, its value and what to use instead.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages: {messages!r:.60}; use a list of one message or more")
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where}: {message!r:.60}; use an object with role and content")
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"{where}.role: {role!r:.60}; use one of {', '.join(ROLES)}")
        known = _ANY_KEYS | _ASSISTANT_KEYS if role == "assistant" else _ANY_KEYS
        for key, value in message.items():
            if key not in known and value is not None:
                raise ValueError(f"{where}.{key}: unknown for role {role}; use one of {', '.join(sorted(known))}")
        content, thought = message.get("content"), message.get("reasoning_content")
        if not isinstance(content, str) and not (role == "assistant" and content is None):
            raise ValueError(f"{where}.content: {content!r:.60}; use a string")
        if thought is not None and not isinstance(thought, str):
            raise ValueError(f"{where}.reasoning_content: {thought!r:.60}; use a string")
        _validate_tool_calls(message.get("tool_calls"), f"{where}.tool_calls")


def round_starts(messages: Sequence[Message]) -> list[int]:
    """The indices of the user queries (a user message that holds a tool's result is none): each begins a round. A
    conversation without queries is one round."""
    return [i for i, message in enumerate(messages) if _is_query(message)] or [0]


def loses_thoughts(messages: Sequence[Message]) -> bool:
    """Whether an assistant turn before the last round has a thought, which `render` drops."""
    return any(
        message["role"] == "assistant"
        and (message.get("reasoning_content") or "</think>" in (message.get("content") or ""))
        for message in messages[: round_starts(messages)[-1]]
    )


def flag_mode(messages: Sequence[Message]) -> bool | None:
    """The mode that the conversation's flags select: True thinking, False non-thinking, None without a flag.

    A flag is `/think`, `/no_think` or `/no think` (as typeset in the report), in lower case and between white space, in
    a system or user turn. The last flag wins. Not flags: text in assistant and tool turns; text between the first
    `<tool_response>` and the last `</tool_response>` of a turn; fenced and inline code; parts of a longer word, such as
    URLs, paths (`/think/x`), `/think.`, `/no_thinking` and `/nothink`, which the models were not trained on.
    `enable_thinking=False` takes precedence over flags; the caller must apply it.
    """
    validate_messages(messages)
    for message in reversed(messages):
        if message["role"] in ("system", "user"):
            flags = _FLAG.findall(_prose(message["content"]))
            if flags:
                return flags[-1] == ""
    return None


def without_flags(text: str) -> str:
    """A system or user turn without its flags and the white space before them; unlike `flag_mode`, in code too."""
    return re.sub(rf"\s*{_FLAG.pattern}", "", text)


def thought_and_answer(message: Message) -> tuple[str, str]:
    """Both parts of an assistant's turn, as `render` takes them: the thought apart, or inside the content."""
    content, thought = message.get("content") or "", message.get("reasoning_content")
    if thought is not None:
        return thought, content
    if "</think>" not in content:
        return "", content
    thought = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
    return thought, content.split("</think>")[-1].lstrip("\n")


def split_ids(ids: Sequence[int], *, think: int, end_think: int, in_think: bool = False) -> tuple[list[int], list[int]]:
    """Splits the ids of a turn into thought and answer, without the `<think>` and `</think>` markers.

    A thought begins at the start if `in_think` (the prompt ended inside it) or if the first id is `think`. A later
    `<think>` (in a tool call, in a quotation) does not begin a thought. The thought ends at the first `</think>`, or
    with the last id. Markers after it stay in the answer.
    """
    ids = list(ids)
    if not in_think:
        if ids[:1] != [think]:
            return [], ids
        ids = ids[1:]
    if end_think not in ids:
        return ids, []
    end = ids.index(end_think)
    return ids[:end], ids[end + 1 :]


def _written(
    messages: Sequence[Message], tools: Any, enable_thinking: bool, add_generation_prompt: bool, modes: Modes
) -> tuple[list[tuple[str, str]], str]:
    """Role and text of each turn, and the generation prompt, empty where none is asked for."""
    validate_messages(messages)
    if not isinstance(tools, list | tuple | None):
        raise ValueError(f"tools: {tools!r:.60}; use a list of JSON objects")
    for i, tool in enumerate(tools or ()):
        if not isinstance(tool, Mapping):
            raise ValueError(f"tools[{i}]: {tool!r}; use a JSON object")
        _refuse_non_json(tool, f"tools[{i}]")
    if not isinstance(enable_thinking, bool):
        raise ValueError(f"enable_thinking: {enable_thinking!r}; use true or false")
    if modes == "thinking" and not enable_thinking:
        raise ValueError("enable_thinking: False, but this model has no non-thinking mode; use True")
    turns = list(_turns(messages, tools or (), thoughts=modes != "instruct"))
    opening = {"hybrid": "" if enable_thinking else EMPTY_THOUGHT, "thinking": OPEN_THOUGHT, "instruct": ""}
    return turns, ASSISTANT_HEADER + opening[modes] if add_generation_prompt else ""


def _turns(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, thoughts: bool
) -> Iterator[tuple[str, str]]:
    """Role and text of each turn, from `<|im_start|>` to `<|im_end|>`."""
    if tools:
        system = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
        signatures = "".join("\n" + _json(tool) for tool in tools)
        yield "system", f"<|im_start|>system\n{system}{_TOOLS_INTRO}{signatures}{_TOOLS_OUTRO}<|im_end|>"
    queries = [i for i, message in enumerate(messages) if _is_query(message)]
    last_query = queries[-1] if queries else len(messages) - 1
    for role, group in itertools.groupby(enumerate(messages), key=lambda pair: pair[1]["role"]):
        if role == "tool":
            results = "".join(f"\n<tool_response>\n{message['content']}\n</tool_response>" for _, message in group)
            yield role, f"<|im_start|>user{results}<|im_end|>"
            continue
        for i, message in group:
            if role == "assistant":
                last = i == len(messages) - 1
                yield role, _assistant_turn(message, after_query=i > last_query, last=last, thoughts=thoughts)
            elif not (role == "system" and i == 0 and tools):
                yield role, f"<|im_start|>{role}\n{message['content']}<|im_end|>"


def _is_query(message: Message) -> bool:
    if message["role"] != "user":
        return False
    return not (message["content"].startswith("<tool_response>") and message["content"].endswith("</tool_response>"))


def _assistant_turn(message: Message, *, after_query: bool, last: bool, thoughts: bool) -> str:
    thought, content = thought_and_answer(message) if thoughts else ("", message.get("content") or "")
    turn = ASSISTANT_HEADER
    if thoughts and after_query and (last or thought):
        thought, answer = thought.strip("\n"), content.lstrip("\n")
        turn += f"<think>\n{thought}\n</think>\n\n{answer}"
    else:
        turn += content
    for i, call in enumerate(message.get("tool_calls") or ()):
        function = call.get("function") or call
        arguments = function["arguments"]
        arguments = arguments if isinstance(arguments, str) else _json(arguments)
        turn += "\n" if i or content else ""
        turn += f'<tool_call>\n{{"name": "{function["name"]}", "arguments": {arguments}}}\n</tool_call>'
    return turn + "<|im_end|>"


def _header_length(turn_ids: list[int], tokenizer: Tokenizer) -> int:
    """Number of ids of the assistant's header, including one that also covers the start of the content."""
    length = 1
    while len(tokenizer.decode(turn_ids[:length])) < len(ASSISTANT_HEADER):
        length += 1
    return length


def _prose(text: str) -> str:
    """`text` with each tool result and each piece of code replaced by one character, neither space nor backtick."""
    start, stop = text.find("<tool_response>"), text.rfind("</tool_response>")
    if 0 <= start < stop:
        text = text[:start] + _OBJECT + text[stop + len("</tool_response>") :]
    return _INLINE_CODE.sub(_OBJECT, _FENCED_CODE.sub(_OBJECT, text))


def _validate_tool_calls(calls: Any, where: str) -> None:
    if calls is None:
        return
    if not isinstance(calls, list | tuple):
        raise ValueError(f"{where}: {calls!r:.60}; use a list")
    for i, call in enumerate(calls):
        function = (call.get("function") or call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise ValueError(f"{where}[{i}]: {call!r:.60}; use an object with a function")
        name, arguments = function.get("name"), function.get("arguments")
        if not isinstance(name, str):
            raise ValueError(f"{where}[{i}].name: {name!r:.60}; use a string")
        if not isinstance(arguments, str | Mapping):
            raise ValueError(f"{where}[{i}].arguments: {arguments!r:.60}; use a JSON object, or its text")
        _refuse_non_json(arguments, f"{where}[{i}].arguments")


def _refuse_non_json(value: Any, where: str) -> None:
    try:
        _json(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {value!r:.60}; use a JSON object ({error})") from None


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
