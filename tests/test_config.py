"""ModelConfig: published sizes, both spellings of config.json, and every refusal by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from qwen3_jax.cli.config_file import load_config, load_plan
from qwen3_jax.config import ModelConfig, RopeScaling, presets_dir
from qwen3_jax.curate.filters import FilterConfig
from qwen3_jax.curate.fuse import FuseConfig
from qwen3_jax.model import Qwen3
from qwen3_jax.serve import shipped_model
from qwen3_jax.train import TrainConfig, link_stages
from sharding import MeshConfig

# Published sizes: weights, key-value cache bytes per token in bfloat16.
PUBLISHED = {
    "qwen3-0.6b": (596_049_920, 114_688),
    "qwen3-1.7b": (1_720_574_976, 114_688),
    "qwen3-4b": (4_022_468_096, 147_456),
    "qwen3-8b": (8_190_735_360, 147_456),
    "qwen3-14b": (14_768_307_200, 163_840),
    "qwen3-32b": (32_762_123_264, 262_144),
    "qwen3-30b-a3b": (30_532_122_624, 98_304),
    "qwen3-235b-a22b": (235_093_634_560, 192_512),
}
DENSE, MOE = ModelConfig.preset("qwen3-0.6b"), ModelConfig.preset("qwen3-30b-a3b")
YARN = RopeScaling(factor=4.0, original_max_position_embeddings=32_768)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    """The formula, the weights that `init` would make, and the published figure are the same number."""
    config = ModelConfig.preset(name)
    weights, cache_bytes = PUBLISHED[name]
    assert config.num_params == weights
    shapes = jax.eval_shape(Qwen3(config, stacked=True).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == weights
    assert 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim == cache_bytes
    assert config.vocab_size == 151_936
    assert config.head_dim == 128
    assert config.rope_theta == 1e6
    assert config.max_position_embeddings == 40_960
    assert config.norm_topk_prob


def test_active_parameters() -> None:
    assert round(MOE.num_active_params / 1e9, 2) == 3.35
    assert round(ModelConfig.preset("qwen3-235b-a22b").num_active_params / 1e9, 2) == 22.19
    assert DENSE.num_active_params == DENSE.num_params


@pytest.mark.parametrize("path", sorted(presets_dir().glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_loads(path: Path) -> None:
    config = ModelConfig.preset(path.stem)
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_the_released_sizes_are_all_there() -> None:
    assert PUBLISHED.keys() <= {path.stem for path in presets_dir().glob("*.yaml")}


def test_unknown_preset_names_the_known() -> None:
    with pytest.raises(ValueError, match=r"model preset: 'qwen3-7b' is unknown; use one of .*qwen3-8b.*"):
        ModelConfig.preset("qwen3-7b")


VARIANTS = {
    "dense": DENSE,
    "dense, YaRN": dataclasses.replace(DENSE, rope_scaling=YARN, max_position_embeddings=131_072),
    "moe": MOE,
    "moe, mixed": dataclasses.replace(MOE, decoder_sparse_step=2, mlp_only_layers=(1, 5), norm_topk_prob=False),
    "moe, YaRN": dataclasses.replace(
        MOE, rope_scaling=dataclasses.replace(YARN, attention_factor=1.2, beta_fast=24.0, beta_slow=2.0)
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    """Through the released spelling, through a file, and through transformers 5, which renames and adds keys."""
    config = VARIANTS[name]
    raw = config.to_hf()
    assert ModelConfig.from_hf(raw) == config
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    assert ModelConfig.from_hf(tmp_path) == ModelConfig.from_hf(tmp_path / "config.json") == config

    reference = pytest.importorskip("transformers", reason="the reference is not installed: pip install -e '.[parity]'")
    hf = (reference.Qwen3MoeConfig if config.num_experts else reference.Qwen3Config)(**raw)
    hf.dtype = "bfloat16"
    newer = hf.to_dict()
    assert "rope_parameters" in newer
    assert "rope_theta" not in newer
    assert newer["dtype"] == "bfloat16"
    assert ("num_local_experts" in newer) == (config.num_experts > 0)
    assert ModelConfig.from_hf(newer) == config
    hf.save_pretrained(tmp_path / "saved")
    assert ModelConfig.from_hf(tmp_path / "saved") == config


def test_released_file() -> None:
    """The keys of a released Qwen3-0.6B config.json, as published."""
    released = {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    assert ModelConfig.from_hf(released) == DENSE


def test_older_rope_spelling() -> None:
    """`type` for `rope_type`, as older cards write it."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert ModelConfig.from_hf({**DENSE.to_hf(), "rope_scaling": scaling}).rope_scaling == YARN
    plain = {**DENSE.to_hf(), "rope_scaling": {"rope_type": "default"}}
    assert ModelConfig.from_hf(plain) == DENSE


def test_a_list_of_eos_ids_is_kept() -> None:
    assert ModelConfig.from_hf({**DENSE.to_hf(), "eos_token_id": [151645]}).eos_token_id == 151645
    config = ModelConfig.from_hf({**DENSE.to_hf(), "eos_token_id": [151645, 151643]})
    assert json.loads(json.dumps(config.to_hf()))["eos_token_id"] == [151645, 151643]
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_neutral_values_and_provenance_are_accepted() -> None:
    """Keys of Qwen3-Coder-30B-A3B's config.json, and of a checkpoint that unsloth wrote."""
    coder = {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0}
    assert ModelConfig.from_hf({**MOE.to_hf(), **coder, "unsloth_version": "2025.9.1"}) == MOE


def test_both_spellings_may_agree() -> None:
    yarn = dataclasses.replace(MOE, rope_scaling=YARN)
    both = {**yarn.to_hf(), "rope_parameters": {**YARN_HF, "rope_theta": 1e6}, "num_local_experts": 128}
    assert ModelConfig.from_hf(both) == yarn


YARN_HF = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "linear": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, r"rope_scaling\.rope_type: 'linear'"),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"rope_scaling\.rope_type: 'dynamic'"),
    "llama3": (
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}},
        r"rope_parameters\.rope_type: 'llama3'",
    ),
    "yarn, no factor": ({"rope_scaling": {k: v for k, v in YARN_HF.items() if k != "factor"}}, "YaRN needs factor"),
    "yarn, null factor": ({"rope_scaling": {**YARN_HF, "factor": None}}, "YaRN needs factor"),
    "yarn, no length": ({"rope_scaling": {"type": "yarn", "factor": 4}}, "original_max_position_embeddings"),
    "yarn, mscale": ({"rope_scaling": {**YARN_HF, "mscale": 0.7}}, "rope_scaling: mscale not supported"),
    "yarn, factor < 1": ({"rope_scaling": {**YARN_HF, "factor": 0.5}}, r"rope_scaling\.factor: 0\.5"),
    "sliding window": ({"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window: True"),
    "sliding layers": ({"layer_types": ["sliding_attention"] * 28}, "layer_types: .*use all 'full_attention'"),
    "attention_bias": ({"attention_bias": True}, "attention_bias: True"),
    "attention_dropout": ({"attention_dropout": 0.1}, r"attention_dropout: 0\.1"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
    "unknown key": ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers not supported"),
    "shared expert": ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size: 64 .*; use 0"),
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, r"quantised \(fp8\); use bfloat16 weights"),
    "YaRN in one spelling": (
        {"rope_scaling": YARN_HF, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        "rope_scaling: RopeScaling.*, but rope_parameters: 'default'; use the same in both, or one",
    ),
    "YaRN in the other": (
        {"rope_scaling": {"type": "default"}, "rope_parameters": {**YARN_HF, "rope_theta": 1e6}},
        "rope_scaling: 'default', but rope_parameters: RopeScaling",
    ),
    "two thetas": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        r"rope_theta: 1000000.0, but rope_parameters.rope_theta: 10000.0; use the same",
    ),
    "scaling as text": ({"rope_scaling": "yarn"}, "rope_scaling: 'yarn'; use an object or null"),
    "factor as text": ({"rope_scaling": {**YARN_HF, "factor": "4"}}, r"rope_scaling\.factor: '4'; use a number"),
    "number as text": ({"num_hidden_layers": "28"}, "num_hidden_layers: '28'; use a whole number"),
    "fraction": ({"hidden_size": 1024.5}, "hidden_size: 1024.5; use a whole number"),
    "truth for a number": ({"vocab_size": True}, "vocab_size: True; use a whole number"),
    "too large": ({"rope_theta": 10**400}, "rope_theta: 10*; use a number"),
    "too large for a size": ({"hidden_size": 10**400}, "hidden_size: 10*; use a whole number"),
    "not finite": ({"rope_theta": float("nan")}, "rope_theta: nan; use a number"),
    "text for a truth": ({"tie_word_embeddings": "false"}, "tie_word_embeddings: 'false'; use true or false"),
    "eos as text": ({"eos_token_id": "151645"}, "eos_token_id: '151645'; use a whole number or a list of them"),
    "layer types as text": ({"layer_types": "full_attention"}, "layer_types: 'full_attention' is not supported"),
    "experts in a dense model": (
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        r"config\.json: moe_intermediate_size, num_experts, num_experts_per_tok not supported",
    ),
}
REFUSED |= {
    f"model_type {kind}": ({"model_type": kind}, f"model_type: {kind!r} is not supported")
    for kind in ("qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_next", "qwen3_vl", "llama", None)
}


@pytest.mark.parametrize("case", REFUSED)
def test_from_hf_refuses(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({**DENSE.to_hf(), **changes})


REQUIRED = """vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    intermediate_size max_position_embeddings rope_theta rms_norm_eps tie_word_embeddings num_experts
    num_experts_per_tok moe_intermediate_size norm_topk_prob decoder_sparse_step mlp_only_layers""".split()


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_key_is_named(key: str) -> None:
    """Never filled in: transformers' class defaults are not Qwen3's values."""
    raw = MOE.to_hf()
    del raw[key]
    with pytest.raises(ValueError, match=rf"config\.json: {key} missing"):
        ModelConfig.from_hf(raw)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist; use a directory with a config\.json"):
        ModelConfig.from_hf(tmp_path)
    for text, message in (
        ("{", "not valid JSON"),
        ("[" * 10**5, "not valid JSON"),
        ("[1]", r"\[1\]; use a JSON object"),
    ):
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            ModelConfig.from_hf(tmp_path)


INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "zero": ({"hidden_size": 0}, "hidden_size: 0; use a number > 0"),
    "negative": ({"vocab_size": -1}, "vocab_size: -1; use a number > 0"),
    "heads": ({"num_key_value_heads": 3}, r"num_key_value_heads: 3 does not divide num_attention_heads \(32\)"),
    "odd head": ({"head_dim": 127}, "head_dim: 127 is odd"),
    "top k": ({"num_experts_per_tok": 129}, r"num_experts_per_tok: 129; use at most num_experts \(128\)"),
    "no expert width": ({"moe_intermediate_size": 0}, "moe_intermediate_size: 0; use a number > 0"),
    "sparse step": ({"decoder_sparse_step": 0}, "decoder_sparse_step: 0"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_values(case: str) -> None:
    changes, message = INVALID[case]
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MOE, **changes)


def test_layer_runs() -> None:
    config = dataclasses.replace(MOE, num_hidden_layers=6, mlp_only_layers=(2,))
    assert [config.is_moe_layer(i) for i in range(6)] == [True, True, False, True, True, True]
    assert config.layer_runs == ((0, 2), (2, 3), (3, 6))
    alternating = dataclasses.replace(MOE, num_hidden_layers=4, decoder_sparse_step=2)
    assert [alternating.is_moe_layer(i) for i in range(4)] == [False, True, False, True]
    assert DENSE.layer_runs == ((0, 28),)


def test_the_mesh_of_eight_cpu_devices_loads_and_divides_the_model_that_ships() -> None:
    mesh = load_config(MeshConfig, presets_dir().parent / "mesh" / "cpu8.yaml")
    assert mesh.sizes(8) == {"data": 1, "fsdp": 2, "expert": 2, "context": 1, "tensor": 2}
    model = ModelConfig.preset("qwen3-tiny")
    assert model.num_key_value_heads % mesh.tensor == 0
    assert model.num_experts % mesh.expert == 0
    assert model.hidden_size % mesh.fsdp == 0


CONFIGS = presets_dir().parent
FILES = sorted(CONFIGS.rglob("*.yaml"))
BASE = ["--init_from", str(shipped_model())]  # a recipe of post-training takes its model from there
PARTS = {"filters.yaml": FilterConfig, "fuse.yaml": FuseConfig}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_file_in_configs_loads(path: Path) -> None:
    """As a model, a mesh, a plan or a run; what is none of these is a part that another file includes."""
    if path.parent.name == "model":
        assert load_config(ModelConfig, path) == ModelConfig.preset(path.stem)
    elif path.parent.name in ("mesh", "infer"):
        load_config(MeshConfig, path)
        assert path.parent.name == "mesh" or ModelConfig.preset(path.stem)
    elif path.name in ("optimizer.yaml", "s1.yaml", "s2.yaml", "s3.yaml"):
        included = str(path.relative_to(CONFIGS / "pretrain"))
        assert any(f"!include {included}" in other.read_text() for other in (CONFIGS / "pretrain").glob("*.yaml"))
    elif path.name == "stages.yaml":
        assert any(f"!include {path.name}" in other.read_text() for other in path.parent.glob("*.yaml"))
    elif path.name in PARTS:
        load_config(PARTS[path.name], path)
    elif stages := load_plan(path, BASE if path == CONFIGS / "post" / "toy.yaml" else []):
        trained = [name for name, stage in link_stages(stages).items() if isinstance(stage, TrainConfig)]
        assert trained == (["cold_start", "fusion"] if path.parent.name == "post" else ["s1", "s2", "s3"])
    else:
        short = [] if path.name.startswith("rl") else ["--data.sequence_length", "64"]  # the shipped model has 512
        load_config(TrainConfig, path, [*BASE, *short] if path.parent.name == "post" else [])
