"""Meshes and axis rules."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sharding import (
    AXIS_RULES,
    DECODE_RULES,
    MeshConfig,
    axis_rules,
    constrain,
    make_mesh,
    named_shardings,
    num_parts,
    partition_spec,
    processes,
    skip_absent_tpu,
    split_over_replicas,
)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 0}, r"mesh\.data: 0; use a number >= 1, or -1 .*"),
        ({"tensor": -2}, r"mesh\.tensor: -2; use a number >= 1"),
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
    axes = set(MeshConfig().axes)
    for table in (AXIS_RULES, DECODE_RULES):
        rules = [rule for rule in dataclasses.asdict(table).values() if isinstance(rule, tuple)]
        assert {axis for rule in rules for axis in rule} == axes


def test_partition_spec() -> None:
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    assert partition_spec(("vocab", "embed"), mesh, (16, 32)) == P(("tensor",), ("fsdp",))
    assert partition_spec(("expert", "mlp", "expert_embed"), mesh, (4, 16, 32)) == P(
        ("expert", "fsdp"), ("tensor",), None
    )
    assert partition_spec(("batch", "length", None), mesh) == P(("fsdp", "expert"), None, None)
    only_data = make_mesh(MeshConfig(data=8, fsdp=1))
    assert partition_spec(("vocab", "embed"), only_data) == P(None, None)


def test_partition_spec_refuses_by_name() -> None:
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    with pytest.raises(ValueError, match=r"logical axis: 'haeds' is unknown; use one of .*heads.*"):
        partition_spec(("haeds", "embed"), mesh)
    with pytest.raises(
        ValueError, match=r"mesh axis 'tensor' is wanted by both 'heads' and 'mlp' of \('heads', 'mlp'\)"
    ):
        partition_spec(("heads", "mlp"), mesh)
    with pytest.raises(ValueError, match="mesh axis 'fsdp' is wanted by both 'batch' and 'embed'"):
        partition_spec(("batch", "embed"), mesh)
    with pytest.raises(
        ValueError, match="mesh: fsdp x expert = 4 does not divide axis 'batch' of size 6; use 1, 2, 3 or 6"
    ):
        partition_spec(("batch", None), mesh, (6, 8))


def test_key_value_heads_are_replicated_where_they_do_not_divide() -> None:
    """The routed models have 4: under `tensor` 8 each device holds all of them, and its own eighth of the queries."""
    mesh = make_mesh(MeshConfig(fsdp=1, tensor=8))
    assert partition_spec(("kv_heads", "head_dim", "embed"), mesh, (4, 16, 32)) == P(None, None, None)
    assert partition_spec(("heads", "head_dim", "embed"), mesh, (32, 16, 32)) == P(("tensor",), None, None)
    with pytest.raises(ValueError, match="tensor = 8 does not divide axis 'heads' of size 12; use 1, 2, 3, 4, 6 or 12"):
        partition_spec(("heads",), mesh, (12,))


def test_decoding_splits_weights_as_far_as_they_divide() -> None:
    """A weight lies once on the devices of a part of the batch: an axis takes what divides it, "embed" the rest."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    with axis_rules(DECODE_RULES):
        assert partition_spec(("heads", "head_dim", "embed"), mesh, (32, 16, 64)) == P(("tensor", "fsdp"), None, None)
        assert partition_spec(("kv_heads", "head_dim", "embed"), mesh, (4, 16, 64)) == P(("tensor",), None, ("fsdp",))
        assert partition_spec(("embed", "heads", "head_dim"), mesh, (64, 6, 16)) == P(("tensor",), ("fsdp",), None)
        assert partition_spec(("attention_batch", "act_kv_heads"), mesh, (3, 4)) == P(None, ("tensor",))
        assert partition_spec(("batch", None), mesh, (8, 64)) == P(None, None)
        with jax.set_mesh(mesh):
            assert (num_parts("sample_batch"), num_parts("sample_batch", 6), num_parts("sample_batch", 3)) == (8, 2, 1)
    assert partition_spec(("batch", None), mesh, (8, 64)) == P(("fsdp",), None)


def test_rules_hold_within_what_they_decorate() -> None:
    mesh = make_mesh(MeshConfig(fsdp=8))

    @axis_rules(DECODE_RULES)
    def rows(size: int) -> P:
        return partition_spec(("batch",), mesh, (size,))

    assert rows(6) == P(None)
    with pytest.raises(ValueError, match="does not divide axis 'batch' of size 6"):
        partition_spec(("batch",), mesh, (6,))
    with (
        axis_rules(DECODE_RULES),
        pytest.raises(ValueError, match=r"'rows' is unknown; use one of layers, .*, batch, .*"),
    ):
        partition_spec(("rows",), mesh)


@pytest.fixture
def describe_slices(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sequence[jax.Device]]:
    """The devices of slices that are not there, by topology and number."""
    pytest.importorskip("libtpu", reason="describes TPU topologies: pip install libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

    def describe(name: str, **options: int) -> Sequence[jax.Device]:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices

    return describe


def test_mesh_axes_may_share_an_axis_of_the_network(describe_slices: Callable[..., Sequence[jax.Device]]) -> None:
    """8 is no product of sides of 4 x 4 x 4."""
    mesh = make_mesh(MeshConfig(data=8, fsdp=8), describe_slices("v5p:4x4x4"))
    assert len({tuple(device.coords) for device in mesh.devices.flat}) == 64


def test_a_mesh_of_several_slices(describe_slices: Callable[..., Sequence[jax.Device]]) -> None:
    """`data` spans the slices and nothing else does, on the topology of two v5e slices."""
    devices = describe_slices("v5e:2x2", num_slices=2)
    mesh = make_mesh(MeshConfig(data=2, tensor=2), devices)
    assert mesh.shape == {"data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    assert [{device.slice_index for device in replica.flat} for replica in mesh.devices] == [{0}, {1}]
    with pytest.raises(ValueError, match=r"mesh\.data: 1 on 2 slices; use a multiple of 2"):
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


@pytest.mark.parametrize(
    ("spec", "shape", "split"),
    [
        (P(), (8, 4), P("data", None)),
        (P("fsdp", None), (8, 6), P("fsdp", "data")),  # parts of 4 and 6
        (P(None, "fsdp"), (3, 24), P(None, ("fsdp", "data"))),
        (P(), (3,), P()),
        (P(), (), P()),
    ],
)
def test_copies_are_split(spec: P, shape: tuple[int, ...], split: P) -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert split_over_replicas(NamedSharding(mesh, spec), shape) == NamedSharding(mesh, split)
    alone = NamedSharding(make_mesh(MeshConfig(fsdp=8)), spec)
    assert split_over_replicas(alone, shape) == alone


def test_no_tpu_is_looked_for_where_none_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where libtpu is installed for planning, it would print a page. Another accelerator, or JAX_PLATFORMS, decides."""
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: asked.append((name, value)))
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(processes, "_has_tpu", lambda: True)
    skip_absent_tpu()
    monkeypatch.setattr(processes, "_has_tpu", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    skip_absent_tpu()
    assert asked == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    skip_absent_tpu()
    assert asked == [("jax_platforms", "cpu")]
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    skip_absent_tpu()
    assert len(asked) == 1
