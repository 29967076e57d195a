"""Whatever stands in a file or on a command line from outside: it is read, or refused in one line.

Each reader gets something that it accepts with one place changed, to any JSON value of any type.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tiny import DENSE, MOE, yaml_fields

from qwen3_jax import hf
from qwen3_jax.cli import infer, main, train
from qwen3_jax.cli.config_file import load_config, load_stages
from qwen3_jax.config import ModelConfig
from qwen3_jax.data import DataConfig, SourceConfig, make_loader, survey
from qwen3_jax.decode import ThinkingTokens, check_request
from qwen3_jax.evaluate.pass_at_k import score_file
from qwen3_jax.serve import shipped_model
from qwen3_jax.serve.answer_file import AnswerFile
from qwen3_jax.serve.input_file import open_lines, read_record
from qwen3_jax.text.chat_format import ChatFormat, format_of
from qwen3_jax.text.prompt import read_prompt
from qwen3_jax.text.tokenizer import load_tokenizer
from qwen3_jax.train import TrainConfig
from sharding import MeshConfig

Json = Any
EXAMPLES = int(os.environ.get("QWEN3_JAX_EXAMPLES", "0")) or 25  # of each reader; `make test-slow` takes more

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["", "a", "true", "-1", "1e999", "\ud800", "\0", "user", "assistant", "gs://", "..", "/", "*"])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def _places(value: Json, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places in nested lists and objects, outermost first."""
    yield at
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from _places(item, (*at, key))


@st.composite
def changed(draw: st.DrawFn, good: Json) -> Json:
    """`good` with one or two places replaced or removed, or with one more key."""
    value = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.sampled_from(list(_places(value))))
        if not at:
            if isinstance(value, dict) and draw(st.booleans()):
                value[draw(st.text(max_size=5))] = draw(VALUES)
                continue
            return draw(VALUES)
        *outer, last = at
        parent = functools.reduce(lambda tree, key: tree[key], outer, value)
        if draw(st.integers(0, 4)) == 0:
            del parent[last]
        else:
            parent[last] = draw(VALUES)
    return value


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b", "reasoning_content": "r", "tool_calls": [{"name": "f", "arguments": {}}]},
    {"role": "tool", "content": "1", "name": "f"},
    {"role": "assistant", "content": "c"},
]
TRAINING = [
    {"text": "a", "labels": {"x": "y"}},
    {"messages": CHAT, "tools": TOOLS, "no_loss": ["b"]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s", "tools": "[]"},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]},
    {"prompt": CHAT[:2], "completion": CHAT[2:]},
    {"prompt": "a", "completion": "b"},
]
THINKING = {"enable_thinking": True}
REQUESTS = [
    {"id": 1, "prompt": "a", "thinking_budget": "auto", "auto_cap": 4, "stop": ["b"], "temperature": 0.5},
    {"messages": CHAT[:2], "tools": TOOLS, "enable_thinking": False, "mode_by_query": True, "top_k": 3, "min_p": 0.1},
    {"text": "a", "seed": 1, "sample": 2, "max_new_tokens": 9, "presence_penalty": 1.0},
    {"prompt_ids": [1, 2], "grace": 3, "answer_reserve": 2, "eos_while_thinking": "stop"},
    {
        "custom_id": "a",
        "body": {"messages": CHAT[:2], "max_tokens": 3, "chat_template_kwargs": {"enable_thinking": True}},
    },
]
RUN = {
    "model": yaml_fields(DENSE),
    "data": {
        "sources": [{"name": "a", "paths": ["a.jsonl"], "tokens": [2, 9], "label_weights": {"x": {"y": 1.0}}}],
        "tokenizer": "t",
        "sequence_length": 8,
        "batch_size": 2,
    },
    "optimizer": {"learning_rate": 0.01, "warmup_steps": 2},
    "mesh": {"fsdp": 2},
    "output_dir": "out",
    "steps": 6,
    "stages": {"one": {"steps": 3}},
}


@functools.cache
def _shipped() -> tuple[Any, ModelConfig, ThinkingTokens]:
    tokenizer = load_tokenizer(shipped_model())
    return tokenizer, ModelConfig.from_hf(shipped_model()), ThinkingTokens.from_tokenizer(tokenizer)


def _dumps(value: Json) -> str:
    return json.dumps(value, ensure_ascii=True)


def _config_json(folder: Path, value: Json) -> None:
    (folder / "config.json").write_text(_dumps(value))
    ModelConfig.from_hf(folder)


def _run_file(folder: Path, value: Json) -> None:
    (folder / "run.yaml").write_text(yaml.safe_dump(value, allow_unicode=False))
    load_stages(TrainConfig, folder / "run.yaml") or load_config(TrainConfig, folder / "run.yaml")


def _mesh_file(folder: Path, value: Json) -> None:
    (folder / "mesh.yaml").write_text(yaml.safe_dump(value))
    load_config(MeshConfig, folder / "mesh.yaml")


def _request(folder: Path, value: Json) -> None:
    (folder / "in.jsonl").write_text(_dumps(value) + "\n")
    tokenizer, config, tokens = _shipped()
    with open_lines(folder / "in.jsonl", lambda text: None) as file:
        for line in file:
            check_request(read_prompt(read_record(line), tokenizer, ChatFormat()).request, config, tokens)


def _documents(path: Path) -> None:
    config = DataConfig((SourceConfig("a", (str(path),)),), str(shipped_model()), sequence_length=512, batch_size=1)
    survey(config)
    next(make_loader(config))


def _document(folder: Path, value: Json) -> None:
    (folder / "a.jsonl").write_text("\n" + _dumps(value) + "\n")
    _documents(folder / "a.jsonl")


def _parquet(folder: Path, value: Json) -> None:
    try:
        table = pa.Table.from_pylist([value, value])
        parquet.write_table(table, folder / "a.parquet")
    except Exception:  # Arrow holds no such value
        return
    _documents(folder / "a.parquet")


def _index_json(folder: Path, value: Json) -> None:
    (folder / "config.json").write_text(json.dumps(DENSE.to_hf()))
    (folder / "model.safetensors.index.json").write_text(_dumps(value))
    hf.load_checkpoint(folder)


def _tokenizer_files(folder: Path, value: Json) -> None:
    (folder / "tokenizer.json").write_text("{}")
    for name in ("tokenizer_config", "generation_config", "config"):
        (folder / f"{name}.json").write_text(_dumps(value))
        format_of(folder)


def _tokenizer_json(folder: Path, value: Json) -> None:
    (folder / "tokenizer.json").write_text(_dumps(value))
    load_tokenizer(folder)


def _answers(folder: Path, value: Json) -> None:
    (folder / "out.jsonl").write_text(_dumps(value) + "\n")
    (folder / "out.jsonl.run.json").write_text(_dumps(value))
    with AnswerFile(folder / "out.jsonl", {"dtype": "float32"}) as answers:
        answers.holds("1", 0, "x")
        answers.write_errors([])


def _scores(folder: Path, value: Json) -> None:
    (folder / "out.jsonl").write_text(_dumps(value) + "\n")
    score_file(folder / "out.jsonl")


READERS: dict[str, tuple[Callable[[Path, Json], None], list[Json]]] = {
    "config.json": (_config_json, [DENSE.to_hf(), MOE.to_hf()]),
    "run file": (_run_file, [RUN, {key: value for key, value in RUN.items() if key != "stages"}]),
    "mesh file": (_mesh_file, [{"data": 1, "fsdp": -1, "topology": "v5p:4x4x4"}]),
    "request": (_request, REQUESTS),
    "document": (_document, TRAINING),
    "parquet": (_parquet, TRAINING),
    "index.json": (_index_json, [{"metadata": {"total_size": 1}, "weight_map": {"a": "model.safetensors"}}]),
    "tokenizer_config.json": (
        _tokenizer_files,
        [
            {"chat_template": "{{ messages[0].content }}", "eos_token_id": [1, 2]},
            {"chat_template": [{"name": "default"}]},
        ],
    ),
    "tokenizer.json": (
        _tokenizer_json,
        [{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}],
    ),
    "scores": (_scores, [{"id": 1, "sample": 0, "content": "a", "answer": "a", "thinking_tokens": 3}]),
    "answers": (_answers, [{"id": 1, "line": 1, "sample": 0, "record": "x"}, {"id": None, "line": 2, "error": "e"}]),
}


def _refusal(read: Callable[[Path, Json], None], folder: Path, value: Json) -> str:
    """What the reader says to a value that it refuses; "accepted" where it does not."""
    try:
        read(folder, value)
    except ValueError as error:
        return str(error) or "\n"
    return "accepted"


@pytest.mark.parametrize("name", READERS)
def test_a_reader_accepts_or_refuses_in_one_line(name: str) -> None:
    read, goods = READERS[name]

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES == 25)
    @given(st.sampled_from(goods).flatmap(changed))
    def check(value: Json) -> None:
        with tempfile.TemporaryDirectory() as folder:
            assert "\n" not in _refusal(read, Path(folder), value)

    check()


def test_what_the_readers_are_given_is_accepted(tmp_path: Path) -> None:
    """Otherwise the changes above would be refused for another reason."""
    for name in ("config.json", "run file", "mesh file", "request", "document", "parquet"):
        read, goods = READERS[name]
        for number, good in enumerate(goods):
            (folder := tmp_path / f"{name}-{number}").mkdir()
            read(folder, good)


FLAGS = [
    "--prompt",
    "--input",
    "--output",
    "--model",
    "--thinking-budget",
    "--mesh",
    "--stop",
    "--json",
    "--dtype",
    "-h",
]
COMMANDS = ["suggest", "plan", "data", "report", "check", "convert", "tokenize", "--json", "--model", "--tokens", "1T"]
KEYS = [
    "no.yaml",
    "--steps",
    "--model.head_dim",
    "--data.sources.a.paths",
    "--stages",
    "--init_from",
    "[",
    "{a",
    "--x=",
    "=",
]


@pytest.mark.parametrize(
    ("command", "known"),
    [(infer.main, FLAGS), (main.main, COMMANDS), (train.main, KEYS)],
    ids=["infer", "main", "train"],
)
def test_a_command_line_is_refused_in_one_line(
    command: Any, known: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of words that belong there and others; no file that they name exists."""
    monkeypatch.chdir(tmp_path)
    words = st.lists(st.sampled_from(known) | st.text(max_size=4) | st.just("nowhere"), max_size=5)
    # Without --prompt alone: it would decode.
    words = words.filter(lambda given: "--prompt" not in given or any(word.startswith("--m") for word in given))

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES == 25)
    @given(words)
    def check(given: list[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            command(given)
        err = capsys.readouterr().err
        assert stop.value.code == 0 or (stop.value.code == 2 and len(err.splitlines()) == 1), (given, err)

    check()
