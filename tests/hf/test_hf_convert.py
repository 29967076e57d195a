"""`qwen3-jax convert`, both ways."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from reference import torch_model, torch_params
from tiny import DENSE, MOE

from qwen3_jax import hf
from qwen3_jax.checkpoint import Checkpointer
from qwen3_jax.cli import convert
from qwen3_jax.config import ModelConfig
from sharding import MeshConfig, make_mesh


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


def test_another_dtype_is_asked_for(tmp_path: Path) -> None:
    """Both ways; a file that others may read."""
    source = tmp_path / "hf"
    hf.save_checkpoint(source, DENSE, torch_params(DENSE, torch_model(DENSE)))
    run(str(source), str(tmp_path / "orbax"), "--dtype", "bfloat16")
    run(str(tmp_path / "orbax"), str(tmp_path / "back"), "--dtype", "float16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(hf.load_checkpoint(tmp_path / "back", dtype=None)[1])} == {
        "float16"
    }
    assert (tmp_path / "back" / "model.safetensors").stat().st_mode & 0o777 == 0o644
    hf.save_checkpoint(tmp_path / "expected", DENSE, hf.load_checkpoint(source, dtype="bfloat16")[1], dtype="float16")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


def test_the_newest_step_of_a_training_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Saved from a mesh; 10 comes after 9, and 11 was cut short."""
    source, run_dir = tmp_path / "hf", tmp_path / "run"
    hf.save_checkpoint(source, MOE, torch_params(MOE, torch_model(MOE)))
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    params = hf.load_checkpoint(source, mesh=mesh, stacked=True)[1]
    with Checkpointer(run_dir / "checkpoints", keep=2) as checkpointer:
        for step, scale in ((8, 3), (9, 2), (10, 1)):
            scaled = jax.tree.map(lambda x, scale=scale: x * scale, params)
            checkpointer.save(step, scaled, {"count": jnp.zeros(())}, {}, {})
    (run_dir / "checkpoints" / "11.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (run_dir / "config.json").write_text(json.dumps(MOE.to_hf()))
    (run_dir / "tokenizer.json").write_text("{}")
    run(str(run_dir), str(tmp_path / "back"))
    assert f"{run_dir}: weights of step 10\n" in capsys.readouterr().out
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes(), name


def test_a_training_run_without_a_step(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no checkpoint; use a run that has saved one"):
        run(str(tmp_path / "run"), str(tmp_path / "target"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"config\.json"):
        run(str(empty), str(tmp_path / "target"))
    with pytest.raises(ValueError, match="exists; use a new or empty directory"):
        run(str(empty), str(tmp_path))
    assert list(tmp_path.iterdir()) == [empty]
