"""Run files to configurations: names, lists of one, the model of a directory, and what a typing error is told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import DENSE, yaml_fields

from qwen3_jax.cli.config_file import describe_keys, load_config, load_stages
from qwen3_jax.cli.infer import main as infer
from qwen3_jax.cli.main import main as qwen3_jax
from qwen3_jax.cli.train import main as train
from qwen3_jax.config import ModelConfig
from qwen3_jax.serve import shipped_model
from qwen3_jax.train import TrainConfig

ROOT = Path(__file__).parents[2]


def _write(path: Path, **changes: Any) -> Path:
    """A run file with these keys changed; None removes one."""
    fields = {
        "model": yaml_fields(DENSE),
        "data": {
            "sources": [{"name": "a", "paths": ["a.jsonl"]}, {"name": "b", "paths": ["b.jsonl"]}],
            "tokenizer": "t",
            "sequence_length": 8,
            "batch_size": 2,
        },
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2},
        "output_dir": "out",
        "steps": 6,
        **changes,
    }
    path.write_text(yaml.safe_dump({key: value for key, value in fields.items() if value is not None}))
    return path


def _checkpoint(directory: Path) -> str:
    (directory / "config.json").write_text(json.dumps(DENSE.to_hf()))
    return str(directory)


def test_the_model_may_be_a_directory_a_name_or_a_file(tmp_path: Path) -> None:
    directory = _checkpoint(tmp_path)
    for model, expected in (
        (directory, DENSE),
        ("qwen3-0.6b", ModelConfig.preset("qwen3-0.6b")),
        (str(ROOT / "configs" / "model" / "qwen3-8b.yaml"), ModelConfig.preset("qwen3-8b")),
    ):
        path = _write(tmp_path / "run.yaml", model=model)
        assert load_config(TrainConfig, path).model == expected
        changed = load_config(TrainConfig, path, ["--model.rope_theta", "5e5"])
        assert changed.model == dataclasses.replace(expected, rope_theta=5e5)
        assert load_config(TrainConfig, _write(tmp_path / "run.yaml"), ["--model", model]).model == expected


def test_where_a_run_begins_gives_model_and_tokenizer(tmp_path: Path) -> None:
    directory = _checkpoint(tmp_path)
    data = {"sources": [{"name": "a", "paths": ["a.jsonl"]}], "sequence_length": 8, "batch_size": 2}
    path = _write(tmp_path / "run.yaml", model=None, data=data, eval_data={**data, "tokenizer": "own"})
    config = load_config(TrainConfig, path, ["--init_from", directory, "--model.max_position_embeddings", "99"])
    assert config.model == dataclasses.replace(DENSE, max_position_embeddings=99)
    assert (config.data.tokenizer, config.eval_data and config.eval_data.tokenizer) == (directory, "own")
    plan = _write(tmp_path / "plan.yaml", model=None, init_from=directory, stages={"s": {"steps": 3}})
    assert load_stages(TrainConfig, plan)["s"].model == DENSE


def test_the_recipe_of_fine_tuning_needs_a_checkpoint_and_files_alone(tmp_path: Path) -> None:
    words = ["--init_from", _checkpoint(tmp_path), "--data.sources.chats.paths", "c.jsonl"]
    config = load_config(TrainConfig, ROOT / "configs" / "post" / "sft.yaml", [*words, "--data.sequence_length", "64"])
    assert (config.model, config.data.sources[0].paths) == (DENSE, ("c.jsonl",))


def test_a_source_is_changed_by_its_name_and_one_path_is_a_list_of_one(tmp_path: Path) -> None:
    path = _write(tmp_path / "run.yaml")
    for value, paths in (("x.jsonl", ("x.jsonl",)), ("[x.jsonl, 'y/*.txt']", ("x.jsonl", "y/*.txt"))):
        config = load_config(TrainConfig, path, ["--data.sources.b.paths", value, "--data.sources.b.weight", "3"])
        assert [(source.name, source.paths, source.weight) for source in config.data.sources] == [
            ("a", ("a.jsonl",), 1.0),
            ("b", paths, 3.0),
        ]


def test_what_a_key_holds_as_a_mapping_is_changed_by_name(tmp_path: Path) -> None:
    sources = [{"name": "a", "paths": ["a.jsonl"], "label_weights": {"kind": {"x": 2.0}}}]
    data = {"sources": sources, "tokenizer": "t", "sequence_length": 8, "batch_size": 2}
    words = ["--data.sources.a.label_weights.kind.y", "3", "--data.sources.a.label_weights.long", "{z: 1}"]
    config = load_config(TrainConfig, _write(tmp_path / "run.yaml", data=data), words)
    assert config.data.sources[0].label_weights == {"kind": {"x": 2.0, "y": 3.0}, "long": {"z": 1.0}}


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({}, ["--data.sources.c.paths", "x"], "data.sources.c: no such name; use one of a, b"),
        ({}, ["--data.batch_size", "0"], "--data.batch_size: 0; use a number >= 1"),
        ({}, ["--data.sources.a.weight", "0"], "--data.sources.a.weight: 0.0; use a number > 0"),
        ({}, ["--optimizer.learning_rate", "fast"], "--optimizer.learning_rate: 'fast'; use a value of type float"),
        ({"mesh": {"fsdp": 0}}, [], "run.yaml: mesh.fsdp: 0; use a number >= 1"),
        ({}, ["--model.head_dim", "3"], "--model.head_dim: 3 is odd"),
        ({"model": None}, ["--init_from", "nowhere"], "--init_from: 'nowhere' does not exist; use a directory"),
        (
            {},
            ["--data.sources.a.paths", "x", "y"],
            "y: use --section.key value, and for several values",
        ),
        ({}, ["--data.sources.a.path", "x"], "--data.sources.a.path: no such key; did you mean --data.sources.paths?"),
        ({}, ["--sed", "1"], "--sed: no such key; did you mean --seed?"),
        ({"model": None}, [], "run.yaml: model: missing; set it, or init_from, whose it then is"),
        ({"steps": None}, [], "run.yaml: steps: missing; set it"),
        ({"data": {"sources": []}}, [], "run.yaml: data.tokenizer: missing; set it, or init_from"),
        ({"stepz": 3}, [], "run.yaml: stepz: no such key; did you mean steps?"),
        ({}, ["--eval_data.tokenizer", "t"], "run.yaml: eval_data.sources: missing; set it"),
        (
            {"optimizer": {"learning_rte": 1, "warmup_steps": 2}},
            [],
            "optimizer.learning_rte: no such key; did you mean",
        ),
        ({"data": {"sources": [{"nam": "a"}]}}, [], "data.sources.nam: no such key; did you mean data.sources.name?"),
        ({"mesh": {"qqqq": 1}}, [], "mesh.qqqq: no such key; use one of data, fsdp, expert, context, tensor, topology"),
        ({"model": "qwen3-9b"}, [], "model preset: 'qwen3-9b' is unknown; use one of qwen3-0.6b"),
        ({"model": "Qwen/Qwen3-0.6B"}, [], "model preset: 'Qwen/Qwen3-0.6B' is unknown"),
        ({"model": [1]}, [], "model"),
        ({"model": [1]}, ["--init_from", str(shipped_model())], "model"),
    ],
)
def test_what_is_mistyped_is_told_what_was_meant(
    tmp_path: Path, changes: dict[str, Any], overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        load_config(TrainConfig, _write(tmp_path / "run.yaml", **changes), overrides)
    assert message in str(error.value)


def test_every_key_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    """By the docstring of its class; in lines that fit a terminal."""
    text = describe_keys(TrainConfig)
    assert max(map(len, text.splitlines())) <= 80
    for key, says in (
        ("--data.batch_size", "rows of a step, over all processes."),
        ("--data.sources.NAME.licence", "for the catalogue;"),
        ("--optimizer.b2", "of AdamW. (default: 0.95)"),
        ("--checkpoint_every", "steps between checkpoints;"),
        ("--mesh.tensor", "shards heads, MLP columns and vocabulary (Megatron). (default: 1)"),
    ):
        _, _, rest = text.partition(f"  {key}\n")
        assert rest.strip().startswith(says), key
    with pytest.raises(SystemExit):
        train(["--help"])
    assert text in capsys.readouterr().out


@pytest.mark.parametrize("main", [train, infer, qwen3_jax])
def test_each_command_says_its_version(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("qwen3-jax 0.")


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        (
            infer,
            ["--prompt", "x", "--thinking-buget", "4"],
            "--thinking-buget: no such argument; did you mean --thinking-b",
        ),
        (infer, ["--promt", "hi"], "--promt: no such argument; did you mean --prompt?"),
        (infer, [], "one of the arguments --prompt --input is required; infer.py --help"),
        (infer, ["--prompt", "x", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (
            qwen3_jax,
            ["suggest", "--modle", "x", "--tokens", "1T", "--params", "1B"],
            "--modle: no such argument; did you mean --model?",
        ),
        (qwen3_jax, ["tokenise"], "invalid choice: 'tokenise'"),
        (train, [], "the following arguments are required: config; train.py"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    main: Any, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}") or message in line
