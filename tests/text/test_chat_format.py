"""Which format a directory is taken for: by what its template renders, its eos ids, and what is chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import templates

import qwen3_jax
from qwen3_jax.text.chat import Modes
from qwen3_jax.text.chat_format import ChatFormat, format_of
from qwen3_jax.text.tokenizer import load_tokenizer

BASE, CHAT = {"eos_token_id": 151643}, {"eos_token_id": [151645, 151643]}
USER = {"role": "user", "content": "Q"}
CALLS = [USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}]


def _directory(path: Path, **files: Any) -> Path:
    """A directory with these files: `generation_config` and so on as JSON, `template` as chat_template.jinja."""
    for name, content in {"tokenizer": {}, **files}.items():
        file = path / ("chat_template.jinja" if name == "template" else f"{name}.json")
        file.write_text(content if name == "template" else json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("template", "modes"),
    [(templates.HYBRID, "hybrid"), (templates.THINKING, "thinking"), (templates.INSTRUCT, "instruct")],
)
def test_templates_are_known_by_what_they_render(tmp_path: Path, template: str, modes: Modes) -> None:
    """Also under a name among several, annotated with `{% generation %}`, and whatever their comments say."""
    expected = ChatFormat(modes)
    comment = "{# enable_thinking <think> </think> #}"
    assert format_of(_directory(tmp_path, template=comment + template)) == expected
    (tmp_path / "chat_template.jinja").unlink()
    assert format_of(_directory(tmp_path, tokenizer_config={"chat_template": template})) == expected
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    assert format_of(_directory(tmp_path, tokenizer_config={"chat_template": named})) == expected
    # chat_template.jinja goes before tokenizer_config.json
    assert format_of(_directory(tmp_path, template=templates.CODER)).tools_refusal


def test_the_released_templates_and_the_model_that_ships(tmp_path: Path) -> None:
    assert format_of(Path(qwen3_jax.__file__).parent / "assets" / "qwen3-tiny") == ChatFormat()
    released = Path(__file__).parents[3] / "shared" / "qwen3-tokenizer"
    if not released.is_dir():
        pytest.skip("no released templates")
    for name in ("tokenizer_config.json", "tokenizer_config.later.json"):
        config = json.loads((released / name).read_text(encoding="utf-8"))
        assert format_of(_directory(tmp_path, tokenizer_config=config)) == ChatFormat()


def test_a_template_that_renders_something_else_is_refused_by_its_first_difference(tmp_path: Path) -> None:
    shipped = load_tokenizer(Path(qwen3_jax.__file__).parent / "assets" / "qwen3-tiny")
    found = format_of(_directory(tmp_path, template=templates.OTHER))
    with pytest.raises(
        ValueError, match=r"^chat template: '.*chat_template\.jinja' differs .* it writes '\[user\] Q.*ours"
    ):
        found.render([USER], shipped)
    ours = format_of(tmp_path, "ours")
    assert "differs from Qwen3's hybrid format" in ours.conclusion
    assert ours.render([USER], shipped).text.startswith("<|im_start|>user\nQ")


@pytest.mark.parametrize("template", [templates.CODER, templates.CHATML])
def test_tools_of_another_form_are_refused_and_all_else_is_not(tmp_path: Path, template: str) -> None:
    shipped = load_tokenizer(Path(qwen3_jax.__file__).parent / "assets" / "qwen3-tiny")
    found = format_of(_directory(tmp_path, template=template))
    assert (found.modes, found.refusal) == ("instruct", None)
    assert "differs from Qwen3's instruct format in tools" in found.conclusion
    assert found.render([USER], shipped).text == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    tool = {"role": "tool", "content": "1"}
    for messages, tools in (([USER], [{"name": "f"}]), (CALLS, None), ([*CALLS[:1], tool], None)):
        with pytest.raises(ValueError, match=r"^tools: .*; leave tools out, or .*--chat-template ours"):
            found.render(messages, shipped, tools=tools)
    assert format_of(tmp_path, "ours").render(CALLS, shipped).text.count("<tool_call>") == 1


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (
            {"generation_config": BASE, "template": templates.HYBRID},
            r"ends at <\|endoftext\|> only, although it has a ",
        ),
        ({"config": BASE, "template": templates.INSTRUCT}, r"ends at <\|endoftext\|> only, although it has a chat"),
        ({}, "has no chat template"),
        ({"tokenizer_config": {"chat_template": None}}, "has no chat template"),
    ],
)
def test_a_base_model_says_why_it_takes_no_conversations(tmp_path: Path, files: dict[str, Any], reason: str) -> None:
    """And which setting changes it; training teaches it the format of its template, else the hybrid one."""
    shipped = load_tokenizer(Path(qwen3_jax.__file__).parent / "assets" / "qwen3-tiny")
    found = format_of(_directory(tmp_path, **files))
    with pytest.raises(
        ValueError, match=rf"^messages: '.*' {reason}.*: taken for a base model.*\(--raw\).*chat_template: ours"
    ):
        found.render([USER], shipped)
    modes = "instruct" if files.get("template") == templates.INSTRUCT else "hybrid"
    for taught in (format_of(tmp_path, "ours"), format_of(tmp_path, teaches=True)):
        assert (taught.modes, taught.is_base, taught.refusal) == (modes, True, None)
        assert f"conversations are written in Qwen3's {modes} format" in taught.conclusion


def test_other_ends_than_of_text_make_a_chat_model(tmp_path: Path) -> None:
    """What generation_config.json says goes before what config.json says; a run leaves such a file."""
    files = {"template": templates.INSTRUCT, "generation_config": CHAT, "config": BASE}
    assert format_of(_directory(tmp_path, **files)) == ChatFormat("instruct")
    (tmp_path / "chat_template.jinja").unlink()
    assert format_of(tmp_path) == ChatFormat()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"template": "{% if %}"}, r"chat_template\.jinja': not a chat template that Jinja reads"),
        ({"tokenizer_config": {"chat_template": 3}}, r"tokenizer_config\.json: chat_template: 3; use the text"),
        ({"tokenizer_config": [1]}, r"tokenizer_config\.json: \[1\]; use a JSON object"),
        ({"generation_config": "x"}, r"generation_config\.json: 'x'; use a JSON object"),
    ],
)
def test_files_that_are_none_are_refused_by_name(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        format_of(_directory(tmp_path, **files))


def test_a_file_that_is_no_json_is_refused_by_name(tmp_path: Path) -> None:
    (_directory(tmp_path) / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: not valid JSON"):
        format_of(tmp_path)


def test_a_template_that_fails_or_attacks_is_refused(tmp_path: Path) -> None:
    for template, reason in (
        ("{{ raise_exception('no system') }}", "it fails (no system)"),
        ("{{ ''.__class__.__mro__ }}", "it fails"),
        ("{{ messages.append(1) }}", "it fails"),
    ):
        assert reason in str(format_of(_directory(tmp_path, template=template)).refusal)


def test_the_choice_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^chat_template: 'mine'; use one of own, ours"):
        format_of(_directory(tmp_path), "mine")  # type: ignore[arg-type]
