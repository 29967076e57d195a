"""Checkpoints to and from transformers, bit for bit, and straight to the mesh."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from reference import to_params, torch, torch_model
from safetensors.numpy import load_file
from safetensors.torch import save_file
from tiny import DENSE, MOE
from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM

from qwen3_jax import hf
from qwen3_jax.config import ModelConfig
from qwen3_jax.model import Qwen3, stack_layers
from sharding import AXIS_RULES, DECODE_RULES, AxisRules, MeshConfig, axis_rules, make_mesh, named_shardings

CONFIGS = {
    "dense": DENSE,
    "tied": dataclasses.replace(DENSE, tie_word_embeddings=True),
    "moe": MOE,
    "mixed": dataclasses.replace(MOE, num_hidden_layers=4, mlp_only_layers=(0, 2), tie_word_embeddings=True),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


def boxed_shapes(config: ModelConfig, stacked: bool) -> Any:
    model = Qwen3(config, stacked=stacked)
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def random_params(config: ModelConfig, stacked: bool = False, dtype: Any = jnp.float32, seed: int = 0) -> Any:
    """Weights that are all different, also those that `init` sets to one."""
    rng = np.random.default_rng(seed)
    shapes = nn.unbox(boxed_shapes(config, stacked))
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), dtype), shapes)


def assert_identical(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(actual)[0], jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype, path
        assert np.asarray(a).shape == b.shape, path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


@pytest.mark.parametrize("dtype", DTYPES)
def test_loads_what_transformers_saves(config: ModelConfig, dtype: str, tmp_path: Path) -> None:
    """The expected params come from a mapping written apart from the one under test; all weights are random."""
    model = torch_model(config).to(DTYPES[dtype])
    expected = to_params(config, dict(model.named_parameters()))
    model.save_pretrained(tmp_path)
    loaded_config, params = hf.load_checkpoint(tmp_path)
    assert loaded_config == dataclasses.replace(config, **ids(loaded_config))
    assert_identical(params, expected)
    kept = hf.load_checkpoint(tmp_path, dtype=None)[1]
    assert_identical(kept, jax.tree.map(lambda x: x.astype(dtype), expected))
    assert_identical(hf.load_checkpoint(tmp_path, stacked=True)[1], stack_layers(config, expected))


def ids(config: ModelConfig) -> dict[str, Any]:
    """Token ids, which transformers fills in."""
    return {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


@pytest.mark.parametrize("dtype", DTYPES)
def test_transformers_loads_what_is_saved(config: ModelConfig, dtype: str, tmp_path: Path) -> None:
    params = random_params(config, dtype=jnp.dtype(dtype))
    target = tmp_path / "checkpoint"
    hf.save_checkpoint(target, config, params)
    kind = Qwen3MoeForCausalLM if config.num_experts else Qwen3ForCausalLM
    model, info = kind.from_pretrained(target, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == DTYPES[dtype]
    back = to_params(config, dict(model.named_parameters()))
    assert_identical(jax.tree.map(lambda x: x.astype(dtype), back), params)


def test_writes_released_names(tmp_path: Path) -> None:
    config = CONFIGS["mixed"]
    params = random_params(config)
    hf.save_checkpoint(tmp_path / "c", config, params, dtype="bfloat16")
    tensors = load_file_as_float32(tmp_path / "c" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert "model.layers.2.mlp.gate_proj.weight" in tensors
    assert tensors["model.layers.3.mlp.gate.weight"].shape == (8, 40)
    written = tensors["model.layers.3.mlp.experts.5.down_proj.weight"]
    np.testing.assert_array_equal(written, params["layer_3"]["mlp"]["down_proj"][5].astype(jnp.bfloat16))
    written = tensors["model.layers.1.self_attn.o_proj.weight"]
    np.testing.assert_array_equal(written, params["layer_1"]["self_attn"]["o_proj"].reshape(40, 64).astype("bfloat16"))
    assert json.loads((tmp_path / "c" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]


def load_file_as_float32(path: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(x, np.float32) for name, x in load_file(path).items()}


def test_fused_experts_are_read(tmp_path: Path) -> None:
    """The spelling in which transformers holds them: gate's rows before up's. Swapped, every expert would differ."""
    model = torch_model(MOE)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in state
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(MOE.to_hf()))
    expected = to_params(MOE, dict(model.named_parameters()))
    assert_identical(hf.load_checkpoint(tmp_path)[1], expected)
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    assert_identical(hf.load_checkpoint(tmp_path, mesh=mesh)[1], expected)


def test_files_of_limited_size(tmp_path: Path) -> None:
    limit = 20_000
    params = random_params(MOE)
    hf.save_checkpoint(tmp_path / "c", MOE, params, max_shard_bytes=limit)
    files = sorted((tmp_path / "c").glob("*.safetensors"))
    index = json.loads((tmp_path / "c" / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = {path.name: sum(x.nbytes for x in load_file(path).values()) for path in files}
    assert max(sizes.values()) <= limit
    assert index["metadata"]["total_size"] == sum(sizes.values()) == 4 * MOE.num_params
    assert set(index["weight_map"].values()) == set(sizes)
    assert_identical(hf.load_checkpoint(tmp_path / "c")[1], params)
    model = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "c")
    assert_identical(to_params(MOE, dict(model.named_parameters())), params)


def test_a_tensor_larger_than_the_limit_has_its_own_file(tmp_path: Path) -> None:
    params = random_params(DENSE)
    hf.save_checkpoint(tmp_path / "c", DENSE, params, max_shard_bytes=1)
    assert len(list((tmp_path / "c").glob("*.safetensors"))) == 3 + 2 * 11
    assert_identical(hf.load_checkpoint(tmp_path / "c")[1], params)


@pytest.mark.parametrize("rules", [AXIS_RULES, DECODE_RULES], ids=["training", "decoding"])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", ["dense", "mixed"])
def test_straight_to_the_mesh_and_back(name: str, stacked: bool, rules: AxisRules, tmp_path: Path) -> None:
    config = CONFIGS[name]
    params = random_params(config, stacked)
    hf.save_checkpoint(tmp_path / "c", config, params)
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    with axis_rules(rules):
        with jax.set_mesh(mesh):
            loaded = hf.load_checkpoint(tmp_path / "c", mesh=mesh, stacked=stacked)[1]
        wanted = named_shardings(boxed_shapes(config, stacked), mesh)
    split = 0
    for x, sharding, whole in zip(*map(jax.tree.leaves, (loaded, wanted, params)), strict=True):
        assert x.sharding == sharding
        split += not sharding.is_fully_replicated
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])
    assert split > 5
    hf.save_checkpoint(tmp_path / "again", config, loaded)
    assert_same_files(tmp_path / "c", tmp_path / "again")


def assert_same_files(a: Path, b: Path) -> None:
    assert sorted(path.name for path in a.iterdir()) == sorted(path.name for path in b.iterdir())
    for path in a.iterdir():
        assert path.read_bytes() == (b / path.name).read_bytes(), path.name


def test_both_layouts_and_boxes_write_the_same_files(tmp_path: Path) -> None:
    config = CONFIGS["mixed"]
    params = random_params(config)
    boxed = jax.tree.map(
        lambda box, x: box.replace_boxed(x),
        boxed_shapes(config, stacked=False),
        params,
        is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned),
    )
    hf.save_checkpoint(tmp_path / "plain", config, params)
    hf.save_checkpoint(tmp_path / "stacked", config, stack_layers(config, params))
    hf.save_checkpoint(tmp_path / "boxed", config, boxed)
    hf.save_checkpoint(tmp_path / "numpy", config, jax.tree.map(np.asarray, params))
    hf.save_checkpoint(tmp_path / "fortran", config, jax.tree.map(np.asfortranarray, params))
    for name in ("stacked", "boxed", "numpy", "fortran"):
        assert_same_files(tmp_path / "plain", tmp_path / name)


@pytest.mark.parametrize("stacked", [False, True])
def test_the_host_holds_one_share_at_a_time(stacked: bool, tmp_path: Path) -> None:
    """64 MB in 32 tensors of 2 MB. A reader that gathers the checkpoint first has 64 MB above the result, one that
    builds whole stacked weights 20 MB. One share is a quarter of a weight; the one before it may not be freed yet."""
    config = ModelConfig(
        vocab_size=2048,
        hidden_size=256,
        num_hidden_layers=10,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=2048,
        max_position_embeddings=64,
        rope_theta=10_000.0,
    )
    hf.save_checkpoint(tmp_path / "c", config, random_params(config, stacked))
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, expert=2))
    hf.load_checkpoint(tmp_path / "c", mesh=mesh, stacked=stacked)  # what jax caches is not counted
    tracemalloc.start()
    try:
        params = hf.load_checkpoint(tmp_path / "c", mesh=mesh, stacked=stacked)[1]
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(x.nbytes for x in jax.tree.leaves(params)) > 64e6
    share = 2048 * 256 * 4 // 4 * (10 if stacked else 1)
    assert share * 0.5 < peak - held < 2 * share + 1.5e6


def test_the_host_holds_one_file_at_a_time_when_saving(tmp_path: Path) -> None:
    """15 MB of bfloat16 in 19 files, of which the largest is 1 MB; NumPy allocates what is converted."""
    config = dataclasses.replace(DENSE, vocab_size=2048, hidden_size=256, intermediate_size=2048, num_hidden_layers=4)
    params = random_params(config)
    limit = 2048 * 256 * 2
    hf.save_checkpoint(tmp_path / "once", config, params, dtype="bfloat16", max_shard_bytes=limit)  # jax's caches
    tracemalloc.start()
    try:
        hf.save_checkpoint(tmp_path / "c", config, params, dtype="bfloat16", max_shard_bytes=limit)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(x.nbytes for x in jax.tree.leaves(params)) // 2 > 10 * limit
    assert limit < peak < 1.9 * limit


def test_a_checkpoint_of_several_dtypes(tmp_path: Path) -> None:
    """A float32 router among bfloat16 weights; stacked, layers of both kinds share one array that holds both."""
    params = random_params(MOE)
    hf.save_checkpoint(tmp_path / "c", MOE, params)
    tensors = {name: torch.tensor(x) for name, x in load_file(tmp_path / "c" / "model.safetensors").items()}
    router = "model.layers.1.mlp.gate.weight"
    save_file(
        {name: x if name == router else x.bfloat16() for name, x in tensors.items()},
        tmp_path / "c" / "model.safetensors",
    )
    kept = hf.load_checkpoint(tmp_path / "c", dtype=None)[1]
    assert kept["layer_0"]["mlp"]["router"].dtype == jnp.bfloat16
    assert_identical(kept["layer_1"]["mlp"]["router"], params["layer_1"]["mlp"]["router"])
    kept = hf.load_checkpoint(tmp_path / "c", dtype=None, stacked=True)[1]["layers_0_2"]["mlp"]
    assert kept["router"].dtype == jnp.float32
    assert kept["down_proj"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(kept["router"][1], params["layer_1"]["mlp"]["router"])


def test_progress_sees_every_weight(tmp_path: Path) -> None:
    seen: list[Any] = []

    def track(items: Any) -> Any:
        for item in items:
            seen.append(item)
            yield item

    hf.save_checkpoint(tmp_path / "c", DENSE, random_params(DENSE), track=track)
    assert [part.name for part in seen[:2]] == ["lm_head.weight", "model.embed_tokens.weight"]
    seen.clear()
    params = hf.load_checkpoint(tmp_path / "c", track=track)[1]
    assert len(seen) == len(jax.tree.leaves(params))
