"""What is wrong with a checkpoint is said before any of it is loaded, and nothing half-written is left."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import torch, torch_model, torch_params
from safetensors.torch import load_file, save_file
from tiny import DENSE, MOE

from qwen3_jax import hf
from qwen3_jax.config import ModelConfig
from qwen3_jax.text.tokenizer import load_tokenizer

TIED = dataclasses.replace(DENSE, tie_word_embeddings=True)
EMBED = "model.embed_tokens.weight"
UNSOUND = "model.safetensors is not a valid safetensors file"
Tensors = dict[str, torch.Tensor]


def random_params(config: ModelConfig) -> dict[str, Any]:
    return torch_params(config, torch_model(config))


def checkpoint(directory: Path, config: ModelConfig = DENSE, **kwargs: Any) -> Path:
    hf.save_checkpoint(directory / "c", config, random_params(config), **kwargs)
    return directory / "c"


def rewrite(directory: Path, change: Callable[[Tensors], Any]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def refused(directory: Path) -> str:
    """The message of the refusal: one line; no weight is read, since the weights' track is never asked for one."""

    def untouched(leaves: Any) -> Any:
        pytest.fail("began to load")

    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        hf.load_checkpoint(directory, track=untouched)
    return str(error.value)


def test_files_of_a_whole_set_need_no_index(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    expected = hf.load_checkpoint(path)[1]
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    (path / "model.safetensors").unlink()
    for i, part in enumerate((names[:3], names[3:]), 1):
        save_file({name: tensors[name] for name in part}, path / f"model-{i:05d}-of-00002.safetensors")
    chex.assert_trees_all_equal(hf.load_checkpoint(path)[1], expected)
    (path / "model-00001-of-00002.safetensors").unlink()
    assert "holds model-00002-of-00002.safetensors; use model.safetensors, or" in refused(path)


def test_what_is_no_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "model.safetensors is a git-lfs pointer; fetch the file with git lfs pull" in refused(path)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    assert "holds pytorch_model.bin; use model.safetensors" in refused(path)
    (path / "config.json").rename(path / "adapter_config.json")
    assert "holds an adapter (LoRA), not a model; merge it into its base model first" in refused(path)
    for load in (hf.load_checkpoint, load_tokenizer):
        with pytest.raises(ValueError, match=r"'Qwen/Qwen3-0\.6B' does not exist; .* Hub.* --local-dir Qwen3-0\.6B"):
            load("Qwen/Qwen3-0.6B")


@pytest.mark.parametrize(
    ("rename", "advice"),
    [
        (lambda name: f"_orig_mod.{name}", "remove the prefix '_orig_mod.'"),
        (lambda name: name.removeprefix("model."), "add the prefix 'model.'"),
        (lambda name: name.replace("model.", "model.language_model."), "language_model"),
    ],
)
def test_a_prefix_too_many_or_too_few_is_named(tmp_path: Path, rename: Callable[[str], str], advice: str) -> None:
    path = checkpoint(tmp_path, TIED)
    tensors = load_file(path / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()}, path / "model.safetensors")
    said = refused(path)
    assert advice in said
    assert " is missing" in said
    assert " is unknown" in said


Q = "model.layers.1.self_attn.q_proj.weight"
CHANGES: dict[str, tuple[ModelConfig, Callable[[Tensors], Any], str]] = {
    "missing": (DENSE, lambda t: t.pop(Q), f"{Q} is missing"),
    "unknown": (DENSE, lambda t: t.update(bias=torch.zeros(2)), "bias is unknown"),
    "shape": (DENSE, lambda t: t.update({Q: torch.zeros(64, 39)}), f"{Q} has shape [64, 39], not [64, 40]"),
    "transposed": (DENSE, lambda t: t.update({Q: t[Q].T.contiguous()}), f"{Q} has shape [40, 64], not [64, 40]"),
    "int8": (DENSE, lambda t: t.update({Q: t[Q].to(torch.int8)}), f"{Q} has elements of type I8"),
    "fp8": (DENSE, lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)}), f"{Q} has elements of type F8_E4M3"),
    "float64": (DENSE, lambda t: t.update({Q: t[Q].double()}), f"{Q} has elements of type F64"),
    "head of an untied model": (DENSE, lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
    "other head of a tied model": (
        TIED,
        lambda t: t.update({"lm_head.weight": t[EMBED] + 1}),
        "tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight",
    ),
    "head of another shape": (
        TIED,
        lambda t: t.update({"lm_head.weight": torch.zeros(96, 41)}),
        "lm_head.weight has shape [96, 41], not [96, 40]",
    ),
    "expert": (
        MOE,
        lambda t: t.pop("model.layers.0.mlp.experts.7.up_proj.weight"),
        "model.layers.0.mlp.experts.7.up_proj.weight is missing",
    ),
    "dense layer of an MoE model": (
        MOE,
        lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(56, 40)}),
        "model.layers.0.mlp.up_proj.weight is unknown",
    ),
    "odd rows in fused experts": (
        MOE,
        lambda t: t.update({"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(8, 49, 40)}),
        "model.layers.0.mlp.experts.gate_up_proj is unknown",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_tensors(case: str, tmp_path: Path) -> None:
    config, change, message = CHANGES[case]
    directory = checkpoint(tmp_path, config)
    rewrite(directory, change)
    assert refused(directory).startswith(f"model: {str(directory)!r}: {message}")


def test_fused_experts_of_another_number_or_width(tmp_path: Path) -> None:
    def fuse(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.0.mlp.experts.")]:
            del tensors[name]
        tensors["model.layers.0.mlp.experts.gate_up_proj"] = torch.zeros(8, 50, 40)
        tensors["model.layers.0.mlp.experts.down_proj"] = torch.zeros(9, 40, 24)

    directory = checkpoint(tmp_path, MOE)
    rewrite(directory, fuse)
    message = refused(directory)
    assert "experts.8.down_proj.weight is unknown" in message
    assert "experts.0.gate_proj.weight has shape [25, 40], not [24, 40]" in message


def test_many_problems_are_counted(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path)
    rewrite(directory, lambda t: [t.pop(name) for name in list(t) if ".layers.0." in name])
    message = refused(directory)
    assert message.count(" is missing") == 5
    assert message.endswith("; and 6 more")


def test_equal_head_of_a_tied_model_and_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, TIED)
    plain = hf.load_checkpoint(directory)[1]
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8, dtype=torch.float64)}
    rewrite(directory, lambda t: t.update({"lm_head.weight": t[EMBED].clone(), **buffer}))
    loaded = hf.load_checkpoint(directory)[1]
    jax.tree.map(np.testing.assert_array_equal, loaded, plain)


def test_no_files(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere")
    directory = checkpoint(tmp_path)
    (directory / "model.safetensors").unlink()
    assert refused(directory).startswith(f"model: {str(directory)!r} holds no weights; ")
    (directory / "config.json").unlink()
    assert "config.json" in refused(directory)


@pytest.mark.parametrize("missing", [1, 1000])
def test_truncated_data(missing: int, tmp_path: Path) -> None:
    directory = checkpoint(tmp_path)
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-missing])
    assert f"{UNSOUND} (" in refused(directory)


@pytest.mark.parametrize("kept", [0, 5, 8, 100])
def test_truncated_header(kept: int, tmp_path: Path) -> None:
    directory = checkpoint(tmp_path)
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert f"{UNSOUND} (" in refused(directory)


def test_not_safetensors(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path)
    file = directory / "model.safetensors"
    content = file.read_bytes()
    garbled = {
        "trailing bytes": content + b"\0",
        "header": content[:8] + b"x" + content[9:],
        "shape": content.replace(b'"shape":[96,40]', b'"shape":[96,39]', 1),
        "another format": b"PK\3\4" * 100,
    }
    for name, bad in garbled.items():
        assert bad != content
        file.write_bytes(bad)
        assert f"{UNSOUND} (" in refused(directory), name


def test_index(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, max_shard_bytes=30_000)
    index = directory / "model.safetensors.index.json"
    original = index.read_text()
    placed = json.loads(original)["weight_map"]
    first, last = placed[EMBED], max(placed.values())

    index.write_text(json.dumps({"weight_map": {**placed, EMBED: last}}))
    message = refused(directory)
    assert f"{EMBED} is not in {last}, where the index lists it" in message
    assert f"{EMBED} is in {first}, but not in the index" in message
    for wrong in ({}, {"weight_map": {EMBED: None}}, {"weight_map": [last]}):
        index.write_text(json.dumps(wrong))
        assert "not an index of safetensors files" in refused(directory)
    index.write_text(original)
    (directory / "model.safetensors").write_bytes(b"")
    assert "holds both model.safetensors and model.safetensors.index.json" in refused(directory)
    (directory / "model.safetensors").unlink()
    (directory / first).unlink()
    assert refused(directory).endswith(f"{first} is listed in the index but does not exist")


@pytest.mark.parametrize("dtype", ["int8", "float64", "float8_e4m3fn", "half-ish"])
def test_dtype(dtype: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"dtype: '{dtype}'; use one of float32, bfloat16, float16"):
        hf.load_checkpoint(checkpoint(tmp_path), dtype=dtype)
    with pytest.raises(ValueError, match="dtype: "):
        hf.save_checkpoint(tmp_path / "d", DENSE, random_params(DENSE), dtype=dtype)


def test_params_that_do_not_fit(tmp_path: Path) -> None:
    params = random_params(DENSE)
    params["norm"] = params["norm"][:-1]
    params["bias"] = params.pop("lm_head")
    with pytest.raises(
        ValueError, match=r"params: lm_head is missing; bias is unknown; norm has shape \[39\], not \[40\]"
    ):
        hf.save_checkpoint(tmp_path / "c", DENSE, params)
    params = random_params(DENSE)
    params["norm"] = params["norm"].astype(jnp.bfloat16)
    with pytest.raises(ValueError, match="dtype: None, but the weights have bfloat16, float32; use one of these"):
        hf.save_checkpoint(tmp_path / "c", DENSE, params)
    assert not list(tmp_path.iterdir())


def test_an_existing_target_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    directory = checkpoint(tmp_path)  # an empty directory is as good as none
    before = (directory / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(ValueError, match="exists; use a new or empty directory"):
        checkpoint(tmp_path)
    assert (directory / "model.safetensors").stat().st_mtime_ns == before


def test_an_interrupted_save_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(parts: Any) -> Any:
        yield from parts[:20]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint(tmp_path, track=interrupted)
    assert not list(tmp_path.iterdir())
