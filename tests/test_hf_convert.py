"""`qwen3-jax convert`, both ways."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest
from reference import DENSE, MOE, torch_model, torch_params

from qwen3_jax import hf
from qwen3_jax.cli import convert
from qwen3_jax.config import ModelConfig


def run(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    convert.run(parser.parse_args(arguments))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config", [DENSE, dataclasses.replace(MOE, num_hidden_layers=3, mlp_only_layers=(1,), tie_word_embeddings=True)]
)
def test_there_and_back(config: ModelConfig, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bit for bit: the files after both conversions are those before them."""
    source = tmp_path / "hf"
    hf.save_checkpoint(source, config, torch_params(config, torch_model(config)), dtype=dtype)
    (source / "tokenizer.json").write_text("{}")
    (source / "generation_config.json").write_text('{"top_k": 20}')
    run(str(source), str(tmp_path / "orbax"))
    assert sorted(path.name for path in (tmp_path / "orbax").iterdir()) == [
        "config.json",
        "generation_config.json",
        "params",
        "tokenizer.json",
    ]
    assert f"{config.num_params:,} weights" in capsys.readouterr().out
    run(str(tmp_path / "orbax"), str(tmp_path / "back"))
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == sorted(path.name for path in source.iterdir())
    for path in source.iterdir():
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes(), path.name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "orbax"]


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"config\.json"):
        run(str(empty), str(tmp_path / "target"))
    with pytest.raises(ValueError, match="exists; a new or empty directory fits"):
        run(str(empty), str(tmp_path))
    assert list(tmp_path.iterdir()) == [empty]
