"""Which chat format a model's directory has: concluded from what its chat template renders, never from its wording.

Templates are edited, shortened and annotated by whoever publishes a checkpoint. What counts is the text that they
render. A few fixed conversations are rendered with the directory's template, by Jinja, and compared with what `chat`
writes in each of its formats.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen3_jax.text import chat
from qwen3_jax.text.chat import Message, Modes, Rendered
from qwen3_jax.text.tokenizer import GENERATION_CONFIG, Tokenizer

# "own": the format of the directory's template. "ours": the nearest of the formats in `chat`, whatever the template.
TemplateChoice = Literal["own", "ours"]

_END_OF_TEXT = 151643  # <|endoftext|> in the tokenizer.json of every Qwen3 model
_CHANGE = "use --chat-template ours (in a run file data.chat_template: ours)"

_TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
_SYSTEM, _USER = {"role": "system", "content": "S"}, {"role": "user", "content": "Q"}
_ANSWER = {"role": "assistant", "content": "A"}
_THOUGHT = {"role": "assistant", "content": "A", "reasoning_content": "R"}
_INLINE_THOUGHT = {"role": "assistant", "content": "<think>\nR\n</think>\n\nA"}
_RESULT = {"role": "tool", "content": "2"}

# `(conversation, whether it ends in a generation prompt)`
_PLAIN: tuple[tuple[list[Message], bool], ...] = (
    ([_USER], True),
    ([_SYSTEM, _USER, _ANSWER, _USER], True),
    ([_USER, _INLINE_THOUGHT, _USER], True),
    ([_USER, _ANSWER], False),
    ([_USER, _THOUGHT, _USER, _THOUGHT], False),
)
_WITH_TOOLS: tuple[tuple[list[Message], bool], ...] = (
    ([_USER], True),
    ([_SYSTEM, _USER, {**_ANSWER, "tool_calls": [_CALL, _CALL]}, _RESULT, _RESULT], True),
    ([_USER, {"role": "assistant", "content": "", "tool_calls": [_CALL]}, _RESULT, _ANSWER], False),
)


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """How conversations are written for one model.

    modes: of the model, see `chat`.
    conclusion: one line on what was concluded, where that is not obvious; empty where it is.
    refusal: why conversations cannot be written at all. tools_refusal: the same for those with tools.
    is_base: whether the directory is a base model's, to which conversations are new.
    """

    modes: Modes = "hybrid"
    conclusion: str = ""
    refusal: str | None = None
    tools_refusal: str | None = None
    is_base: bool = False

    def render(
        self, messages: Sequence[Message], tokenizer: Tokenizer, *, tools: Any = None, **options: Any
    ) -> Rendered:
        """`chat.render` in this format.

        Raises:
          ValueError: of `chat.render`, or since the directory's template writes something else.
        """
        if self.refusal:
            raise ValueError(self.refusal)
        if self.tools_refusal:
            chat.validate_messages(messages)
            if tools or any(_uses_tools(message) for message in messages):
                raise ValueError(self.tools_refusal)
        return chat.render(messages, tokenizer, tools=tools, modes=self.modes, **options)


def format_of(directory: str | Path, choice: TemplateChoice = "own", *, teaches: bool = False) -> ChatFormat:
    """The format of the model in a checkpoint directory. The first rule that applies decides:

    1. A model whose only `eos_token_id` is `<|endoftext|>`, in generation_config.json or else config.json, is a base
       model. It was not trained on conversations, which are refused, although released base models have a template.
    2. Without a chat template (chat_template.jinja, or in tokenizer_config.json): hybrid with a tokenizer.model, which
       the shipped model has, or where generation_config.json has another `eos_token_id`; else a base model.
    3. The format whose text the template renders. A template that differs in conversations without tools is refused;
       one that differs in those with tools alone (Qwen3-Coder's) is refused tools.

    With `choice` "ours" nothing is refused: the format is the one whose text the template's is nearest to, and hybrid
    without a template. `teaches`: for training, where a base model learns conversations.

    Raises:
      ValueError: naming the file that is not JSON, or the choice.
    """
    if choice not in get_args(TemplateChoice):
        raise ValueError(f"chat_template: {choice!r}; use one of {', '.join(get_args(TemplateChoice))}")
    directory = Path(directory)
    source, template = _chat_template(directory)
    generation, model = _read_json(directory / GENERATION_CONFIG), _read_json(directory / "config.json")
    ends = generation.get("eos_token_id", model.get("eos_token_id"))
    ends_at_text = ends in (_END_OF_TEXT, [_END_OF_TEXT])
    needs_template = "eos_token_id" not in generation and (directory / "tokenizer.json").is_file()
    if ends_at_text or (template is None and needs_template):
        reason = "ends at <|endoftext|> only" if ends_at_text else "has no chat template"
        if ends_at_text and template is not None:
            reason += f", although it has a chat template ({source.name})"
        taken = f"{str(directory)!r} {reason}: taken for a base model"
        modes = "hybrid" if template is None else _compare(template, source, "ours").modes
        if teaches or choice == "ours":
            return ChatFormat(modes, f"{taken}; conversations are written in Qwen3's {modes} format", is_base=True)
        refusal = (
            f"messages: {taken}, without a chat format; use the field text (--raw), or {_CHANGE} to write them in "
        )
        return ChatFormat(modes, taken, f"{refusal}Qwen3's {modes} format", is_base=True)
    return ChatFormat() if template is None else _compare(template, source, choice)


def _compare(template: str, source: Path, choice: TemplateChoice) -> ChatFormat:
    """The format that a template renders."""
    try:
        render = _compiled(template)
    except TemplateError as error:
        raise ValueError(f"{str(source)!r}: not a chat template that Jinja reads ({error})") from None
    all_modes: tuple[Modes, ...] = get_args(Modes)
    found = {modes: _differences(render, modes, _PLAIN, None) for modes in all_modes}
    # the smallest share of conversations that differ
    modes = min(all_modes, key=lambda name: sum(map(bool, found[name])) / len(found[name]))
    plain = next(filter(None, found[modes]), None)
    with_tools = next(filter(None, _differences(render, modes, _WITH_TOOLS, [_TOOL])), None)
    if not plain and not with_tools:
        return ChatFormat(modes)
    what = f"{str(source)!r} differs from Qwen3's {modes} format{'' if plain else ' in tools'}: {plain or with_tools}"
    if choice == "ours":
        return ChatFormat(modes, f"{what}; the {modes} format is used")
    if plain:
        return ChatFormat(modes, what, f"chat template: {what}; {_CHANGE} to write conversations in the {modes} format")
    return ChatFormat(modes, what, None, f"tools: {what}; leave tools out, or {_CHANGE} to write them as Qwen3 does")


def _differences(
    render: Callable[..., str], modes: Modes, conversations: Any, tools: list[dict[str, Any]] | None
) -> list[str]:
    """For each conversation how the template's text differs from that of `modes`, empty where it does not."""
    found = []
    for messages, prompted in conversations:
        # A template that only thinks ignores enable_thinking, which `chat` refuses there.
        for thinking in (True, False) if prompted and modes != "thinking" else (True,):
            options = {"tools": tools, "add_generation_prompt": prompted, "enable_thinking": thinking}
            ours = chat.render_text(messages, **options, modes=modes)
            try:
                found.append(_first_difference(render(messages=messages, **options), ours))
            except Exception as error:  # a template is a program: it may fail in any way
                found.append(f"it fails ({' '.join(str(error).split()):.80})")
    return found


def _first_difference(theirs: str, ours: str) -> str:
    if theirs == ours:
        return ""
    at = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours)))
    place = f"after {ours[max(0, at - 12) : at]!r}" if at else "at the start"
    return f"{place} it writes {theirs[at : at + 24]!r} instead of {ours[at : at + 24]!r}"


class _Generation(Extension):
    """`{% generation %}`, with which templates mark what an assistant writes; its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 (declared by Jinja as an instance's)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compiled(template: str) -> Callable[..., str]:
    """A template's function, with the settings and names that chat templates are written for."""

    def refuse(message: str) -> str:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: form
    return environment.from_string(template).render


def _uses_tools(message: Message) -> bool:
    return message["role"] == "tool" or bool(message.get("tool_calls"))


def _chat_template(directory: Path) -> tuple[Path, str | None]:
    """The file that holds the chat template, and the template; None where there is none."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file, file.read_text(encoding="utf-8")
    file = directory / "tokenizer_config.json"
    template = _read_json(file).get("chat_template")
    if isinstance(template, list):  # several under names
        named = [entry for entry in template if isinstance(entry, Mapping) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if not isinstance(template, str | None):
        raise ValueError(f"{file}: chat_template: {template!r:.40}; use the text of a template")
    return file, template


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where the file does not exist."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {found!r:.40}; use a JSON object")
    return found
