"""A look at the sources before a run: what they are taken for, and every document that it would refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import templates
import yaml
from tiny import TRAINED, yaml_fields

from qwen3_jax.cli.main import main
from qwen3_jax.data import DataConfig, SourceConfig, survey
from qwen3_jax.data.config import Encoding
from qwen3_jax.data.tokenize import tokenize_source
from qwen3_jax.text.tokenizer import train_sentencepiece

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train_sentencepiece(["the user asks for the sum"], tmp_path / "tokenizer.model", vocab_size=400)
    return tmp_path


def _config(folder: Path, *names: str) -> DataConfig:
    sources = tuple(SourceConfig(name.partition(".")[0], (str(folder / name),)) for name in names)
    return DataConfig(sources, str(folder), sequence_length=32, batch_size=2)


def _write(path: Path, *records: Any) -> None:
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))


def test_the_first_document_says_what_a_source_is_taken_for(folder: Path) -> None:
    _write(folder / "text.jsonl", "", {"text": "a"}, {"broken": 1})
    _write(
        folder / "sharegpt.jsonl", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    )
    (folder / "plain.txt").write_text("a\n\nb")
    found = survey(_config(folder, "text.jsonl", "plain.txt"))
    assert (found.lines, found.has_chats) == ((), False)
    found = survey(_config(folder, "text.jsonl", "sharegpt.jsonl"))
    assert (found.lines, found.has_chats) == (("sources.sharegpt: taken for ShareGPT (conversations)",), True)
    _write(folder / "bad.jsonl", "", "{")
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: not valid JSON"):
        survey(_config(folder, "bad.jsonl"))


def test_what_the_directory_is_taken_for_is_said_where_there_are_chats(folder: Path) -> None:
    _write(folder / "chat.jsonl", CHAT)
    _write(folder / "text.jsonl", {"text": "a"})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 151643}))
    (folder / "chat_template.jinja").write_text(templates.INSTRUCT)
    (line,) = survey(_config(folder, "chat.jsonl")).lines
    assert "taken for a base model; conversations are written in Qwen3's instruct format" in line
    assert survey(_config(folder, "text.jsonl")).lines == ()
    tokenize_source(SourceConfig("chat", (str(folder / "chat.jsonl"),)), Encoding(str(folder)), folder / "t", workers=1)
    (folder / "t" / "000000.arrayrecord").rename(folder / "chat.arrayrecord")
    (folder / "t" / "manifest.json").write_text(
        (folder / "t" / "manifest.json").read_text().replace("000000.arrayrecord", "chat.arrayrecord")
    )
    (folder / "t" / "manifest.json").rename(folder / "manifest.json")
    assert survey(_config(folder, "chat.arrayrecord")).has_chats


def test_lint_lists_every_bad_document_and_counts_the_rest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With file and line, before a run meets any of them; a run file without any ends well."""
    long = {"messages": [{"role": "user", "content": "a" * 99}, CHAT["messages"][1]]}
    _write(folder / "chat.jsonl", CHAT, {"text": ""}, "{", long, {"messages": [{"role": "robot"}]}, {"question": "a"})
    run = {
        "model": yaml_fields(TRAINED),
        "data": {
            "sources": [{"name": "chat", "paths": str(folder / "chat.jsonl")}],
            "tokenizer": str(folder),
            "sequence_length": 32,
            "batch_size": 2,
        },
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2},
        "output_dir": str(folder / "out"),
        "steps": 6,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    with pytest.raises(SystemExit) as stop:
        main(["data", "lint", str(folder / "run.yaml")])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    path = re.escape(str(folder / "chat.jsonl"))
    *bad, total = out.splitlines()
    for line, reason in zip(
        bad, (":3: not valid JSON", ":5: messages: no assistant", ":6: an object with the keys"), strict=True
    ):
        assert re.match(path + reason, line)
    assert re.match(
        r"chat: 1 documents, \d+ tokens, \d+ in the loss, about 1 steps of 2 x 32 tokens; 3 bad, "
        r"1 blank texts passed over, 1 truncated, 1 examples dropped",
        total,
    )
    assert "error: 3 documents cannot be read; mend or delete them" in err
    _write(folder / "chat.jsonl", CHAT)
    main(["data", "lint", str(folder / "run.yaml"), "--data.batch_size", "4"])
    assert "steps of 4 x 32 tokens; 0 bad" in capsys.readouterr().out
