"""Meshes, axis rules, and a routed model on eight devices against one."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P

from qwen3_jax.config import ModelConfig
from qwen3_jax.model import Qwen3
from qwen3_jax.ops.loss import cross_entropy, load_balance_loss
from sharding import AXIS_RULES, MeshConfig, constrain, make_mesh, named_shardings, partition_spec


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 0}, r"mesh\.data: 0; a number >= 1, or -1 .* fits"),
        ({"tensor": -2}, r"mesh\.tensor: -2; a number >= 1"),
        ({"data": -1, "fsdp": -1}, "at most one axis may be -1"),
    ],
)
def test_mesh_config_refuses(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeshConfig(**sizes)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 3}, r"mesh\.fsdp: -1, but the other axes \(3\) do not divide 8 devices"),
        ({"data": 2, "fsdp": 2}, r"mesh: .* needs 4 devices, there are 8"),
        ({"data": 4, "fsdp": 4}, r"mesh: .* needs 16 devices, there are 8"),
    ],
)
def test_mesh_must_fit_the_devices(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_mesh(MeshConfig(**sizes))


def test_mesh_sizes() -> None:
    assert MeshConfig().sizes(8) == {"data": 1, "fsdp": 8, "expert": 1, "context": 1, "tensor": 1}
    assert MeshConfig(data=2, expert=-1, fsdp=1).sizes(8) == {
        "data": 2,
        "fsdp": 1,
        "expert": 4,
        "context": 1,
        "tensor": 1,
    }
    mesh = make_mesh(MeshConfig(expert=2, tensor=2))
    assert mesh.shape == {"data": 1, "fsdp": 2, "expert": 2, "context": 1, "tensor": 2}
    assert make_mesh(MeshConfig(), jax.devices()[:1]).size == 1


def test_rules_name_mesh_axes_only() -> None:
    axes = {field.name for field in dataclasses.fields(MeshConfig)}
    assert {axis for rule in dataclasses.asdict(AXIS_RULES).values() for axis in rule} == axes


def test_partition_spec() -> None:
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    assert partition_spec(("expert", "mlp", "embed"), mesh, (4, 16, 32)) == P(("expert",), ("tensor",), ("fsdp",))
    assert partition_spec(("batch", "length", None), mesh) == P(("fsdp", "expert"), None, None)
    only_data = make_mesh(MeshConfig(data=8, fsdp=1))
    assert partition_spec(("vocab", "embed"), only_data) == P(None, None)


def test_partition_spec_refuses_by_name() -> None:
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    with pytest.raises(ValueError, match=r"logical axis: 'haeds' is unknown; one of .*heads.* fits"):
        partition_spec(("haeds", "embed"), mesh)
    with pytest.raises(
        ValueError, match=r"mesh axis 'tensor' is wanted by both 'heads' and 'mlp' of \('heads', 'mlp'\)"
    ):
        partition_spec(("heads", "mlp"), mesh)
    with pytest.raises(ValueError, match="mesh axis 'fsdp' is wanted by both 'batch' and 'embed'"):
        partition_spec(("batch", "embed"), mesh)
    with pytest.raises(
        ValueError, match="mesh: fsdp x expert = 4 does not divide axis 'batch' of size 6; 1, 2, 3 or 6 fits"
    ):
        partition_spec(("batch", None), mesh, (6, 8))


def test_key_value_heads_are_replicated_where_they_do_not_divide() -> None:
    """The routed models have 4: under `tensor` 8 each device holds all of them, and its own eighth of the queries."""
    mesh = make_mesh(MeshConfig(fsdp=1, tensor=8))
    assert partition_spec(("kv_heads", "head_dim", "embed"), mesh, (4, 16, 32)) == P(None, None, None)
    assert partition_spec(("heads", "head_dim", "embed"), mesh, (32, 16, 32)) == P(("tensor",), None, None)
    with pytest.raises(
        ValueError, match="tensor = 8 does not divide axis 'heads' of size 12; 1, 2, 3, 4, 6 or 12 fits"
    ):
        partition_spec(("heads",), mesh, (12,))


def test_a_mesh_of_several_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """`data` spans the slices and nothing else does, on the topology of two v5e slices."""
    pytest.importorskip("libtpu", reason="describes TPU topologies: pip install libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2).devices
    mesh = make_mesh(MeshConfig(data=2, tensor=2), devices)
    assert mesh.shape == {"data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    assert [{device.slice_index for device in replica.flat} for replica in mesh.devices] == [{0}, {1}]
    with pytest.raises(ValueError, match=r"mesh\.data: 1 on 2 slices; a multiple of 2 fits"):
        make_mesh(MeshConfig(), devices)


def test_constrain() -> None:
    """Nothing without a mesh; under one, the layout asked for, and the same refusals."""
    x = jnp.zeros((8, 6))
    assert constrain(x, "batch", "heads") is x
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=4, tensor=2))):
        assert jax.jit(lambda x: constrain(x, "batch", "heads"))(x).sharding.spec == P("fsdp", "tensor")
        with pytest.raises(ValueError, match="does not divide axis 'batch' of size 6"):
            constrain(x.T, "batch", None)


def test_named_shardings() -> None:
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    boxed = {"w": nn.LogicallyPartitioned(jnp.zeros((6, 8)), ("heads", "embed")), "step": jnp.zeros(())}
    shardings = named_shardings(boxed, mesh)
    assert shardings["w"].spec == P(("tensor",), ("fsdp",))
    assert shardings["step"].spec == P()


CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=32,
    max_position_embeddings=64,
    rope_theta=10_000.0,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (8, 16)).astype(np.int32)
MODEL = Qwen3(CONFIG, capacity_factor=1.25, group_size=8)
MESHES = {
    "fsdp 8": MeshConfig(fsdp=8),
    "fsdp 2, expert 2, tensor 2": MeshConfig(fsdp=2, expert=2, tensor=2),
    "data 2, expert 4": MeshConfig(data=2, fsdp=1, expert=4),
}


def loss(params: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
    """Cross-entropy plus the balance loss: everything a training step differentiates."""
    out = MODEL.apply({"params": params}, tokens)
    router = out.router
    sums = (x.sum(axis=1) for x in (router.counts_BE, router.prob_sum_BE, router.tokens_B))
    balance = load_balance_loss(*sums).mean()
    return cross_entropy(out.logits[:, :-1], tokens[:, 1:]).mean() + 0.01 * balance, (out.logits, router)


def init(key: jax.Array) -> Any:
    return MODEL.init(key, TOKENS)["params"]


@pytest.fixture(scope="module")
def single() -> tuple[Any, Any]:
    """Params, large enough for logits of order 1, and the result on one device."""
    generator = np.random.default_rng(1)
    shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0)))
    params = jax.tree.map(lambda x: jnp.asarray(0.25 * generator.standard_normal(x.shape), jnp.float32), shapes)
    return params, jax.jit(jax.value_and_grad(loss, has_aux=True))(params, TOKENS)


@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_equal_one(name: str, single: tuple[Any, Any]) -> None:
    """Loss, logits, router statistics and every gradient; tokens are dropped on the way, and the same ones."""
    params, ((value, (logits, router)), grads) = single
    assert router.dropped_B.sum() > 0
    mesh = make_mesh(MESHES[name])
    shardings = named_shardings(jax.eval_shape(init, jax.random.key(0)), mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings)
        tokens = jax.device_put(TOKENS, jax.NamedSharding(mesh, partition_spec(("batch", "length"), mesh)))
        step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(placed, tokens).compile()
        (value_8, (logits_8, router_8)), grads_8 = step(placed, tokens)
    experts = placed["layers_0_2"]["mlp"]["gate_proj"]
    assert experts.addressable_shards[0].data.size * 8 // mesh.shape["data"] == experts.size, "weights are not split"
    chex.assert_trees_all_close(jax.device_get(value_8), jax.device_get(value), rtol=1e-5)
    chex.assert_trees_all_close(jax.device_get(logits_8), jax.device_get(logits), rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(jax.device_get(router_8), jax.device_get(router), rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(jax.device_get(grads_8), jax.device_get(grads), rtol=1e-4, atol=1e-6)
    if mesh.shape["expert"] > 1:
        # To the experts and back, forward and backward, once in the body of each scan. Without any one of the
        # constraints in `moe_capacity` the count differs on one of these meshes, and gathers take their place.
        assert len(collectives(step.as_text(), "all-to-all")) == 4
    if mesh.shape["fsdp"] == mesh.shape["tensor"] == 1:
        # No weight is split but over experts, so a gather could only be of tokens. The one that XLA makes for top_k is
        # of the router's probabilities, [B, T, E] = [8, 16, 4], told by its shape: versions name it differently.
        gathers = collectives(step.as_text(), "all-gather")
        assert [line for line in gathers if "f32[8,16,4]" not in line] == []


def collectives(text: str, kind: str) -> list[str]:
    """The lines of a compiled program that are a collective of this kind."""
    return [line for line in text.splitlines() if re.search(rf" {kind}(-start)?\(", line)]
