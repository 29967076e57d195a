"""Logical axes, and the rules that map them to mesh axes.

"Logical axis" is the meaning of a tensor dim ("heads"); "mesh axis" is an axis of the device mesh ("tensor"). The
current mesh is the one of `jax.set_mesh`; the current rules are those of `axis_rules`.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

Axes = tuple[str, ...]
_BATCH: Axes = ("data", "fsdp", "expert")
_ALL_BUT_DATA: Axes = ("tensor", "fsdp", "expert", "context")


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """The mesh axes that shard each logical axis. One table serves every mesh: a mesh axis of size 1 does nothing.

    relaxed: False: every listed mesh axis must divide the dim, and two dims of an array that list the same mesh axis
      are an error. True: a dim takes the listed mesh axes that divide it and that no earlier dim of the array took.
      "embed" is assigned last and takes what the others left.
    """

    relaxed: bool = False
    # weights
    layers: Axes = ()
    vocab: Axes = ("tensor",)
    embed: Axes = ("fsdp",)
    heads: Axes = ("tensor",)
    kv_heads: Axes = ("tensor",)
    head_dim: Axes = ()
    mlp: Axes = ("tensor",)
    # FSDP shards the experts dim, not `expert_embed`: a TPU gathers and scatters fastest along the major-most dim.
    expert: Axes = ("expert", "fsdp")
    expert_embed: Axes = ()
    gate_up: Axes = ()
    router: Axes = ()
    router_embed: Axes = ("fsdp",)
    norm: Axes = ()
    # activations
    batch: Axes = _BATCH
    attention_batch: Axes = _BATCH  # rows in attention and in the cache
    sample_batch: Axes = _BATCH  # rows in sampling
    length: Axes = ("context",)
    group: Axes = _BATCH
    routed_group: Axes = ("data", "fsdp")  # token groups after the all-to-all, when "expert" shards the experts
    capacity: Axes = ()
    slots: Axes = ()  # of the cache
    act_embed: Axes = ()
    act_expert: Axes = ("expert",)
    act_heads: Axes = ("tensor",)
    act_kv_heads: Axes = ("tensor",)
    act_mlp: Axes = ("tensor",)
    act_vocab: Axes = ("tensor",)

    def __getitem__(self, name: str) -> Axes:
        """The mesh axes of one logical axis; ValueError for an unknown name."""
        axes = getattr(self, name, None)
        if not isinstance(axes, tuple):
            known = ", ".join(name for name, axes in vars(self).items() if isinstance(axes, tuple))
            raise ValueError(f"logical axis: {name!r} is unknown; use one of {known}")
        return axes


AXIS_RULES = AxisRules()
# Decoding moves activations, never weights: each weight is sharded over every axis but `data`. Activations are sharded
# by rows in attention (where the cache is) and in sampling only. The router is replicated: it is small, and an
# all-reduce over all devices is expensive.
DECODE_RULES = AxisRules(
    relaxed=True,
    vocab=_ALL_BUT_DATA,
    embed=_ALL_BUT_DATA,
    heads=_ALL_BUT_DATA,
    kv_heads=_ALL_BUT_DATA,
    mlp=_ALL_BUT_DATA,
    router_embed=(),
    batch=("data",),
    sample_batch=("data", *_ALL_BUT_DATA),
    group=("data",),
    routed_group=("data",),
    act_mlp=_ALL_BUT_DATA,
    act_vocab=_ALL_BUT_DATA,
)
_rules: contextvars.ContextVar[AxisRules] = contextvars.ContextVar("axis_rules", default=AXIS_RULES)
# Key-value heads may be fewer than the devices of the tensor axis. They are small, so they are replicated then.
_REPLICATED_WHERE_INDIVISIBLE = ("kv_heads", "act_kv_heads")


@contextlib.contextmanager
def axis_rules(rules: AxisRules) -> Iterator[None]:
    """Replaces `AXIS_RULES` inside a `with` block or inside a decorated function.

    The rules are not part of `jax.jit`'s cache key: decorate the function that is jitted, not its caller.
    """
    token = _rules.set(rules)
    try:
        yield
    finally:
        _rules.reset(token)


def partition_spec(
    names: Sequence[str | None], mesh: Mesh | AbstractMesh, shape: Sequence[int] | None = None
) -> PartitionSpec:
    """The PartitionSpec of an array whose dims have these logical names (None: not sharded), by the current rules.

    Args:
      shape: of the array. Without it, divisibility is not checked. With it, key-value heads that the mesh axes do not
        divide are replicated.

    Raises:
      ValueError: an unknown name. Unless the rules are relaxed, also: two dims that use the same mesh axis, or a dim
        that its mesh axes do not divide.
    """
    rules = _rules.get()
    owner: dict[str, str] = {}
    spec: list[Axes | None] = [None] * len(names)
    for i, name in sorted(enumerate(names), key=lambda item: rules.relaxed and item[1] == "embed"):
        axes = () if name is None else tuple(axis for axis in rules[name] if mesh.shape.get(axis, 1) > 1)
        if rules.relaxed:
            axes = _dividing([axis for axis in axes if axis not in owner], mesh, None if shape is None else shape[i])
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if shape is not None and shape[i] % parts:
            if name not in _REPLICATED_WHERE_INDIVISIBLE:
                raise ValueError(
                    f"mesh: {' x '.join(axes)} = {parts} does not divide axis {name!r} of size {shape[i]}; "
                    f"use {_divisors(shape[i])}"
                )
            axes = ()
        for axis in axes:
            if axis in owner:
                raise ValueError(f"mesh axis {axis!r} is wanted by both {owner[axis]!r} and {name!r} of {tuple(names)}")
            owner[axis] = name or ""
        spec[i] = axes or None
    return PartitionSpec(*spec)


def _dividing(axes: Sequence[str], mesh: Mesh | AbstractMesh, size: int | None) -> Axes:
    """The axes, in order, whose product still divides `size`; all of them where `size` is None."""
    kept: list[str] = []
    for axis in axes:
        if size is None or size % math.prod(mesh.shape[a] for a in (*kept, axis)) == 0:
            kept.append(axis)
    return tuple(kept)


def _divisors(size: int) -> str:
    fitting = [str(n) for n in range(1, min(size, 1024) + 1) if size % n == 0]
    return " or ".join(filter(None, [", ".join(fitting[:-1]), fitting[-1]])) if fitting else "1"


def split_axes(name: str, size: int | None = None) -> Axes:
    """The axes of the current mesh that shard a logical axis (of this size); empty without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return spec_axes(partition_spec((name,), mesh, None if size is None else (size,)))


def spec_axes(spec: PartitionSpec) -> Axes:
    """All mesh axes in a PartitionSpec."""
    return tuple(jax.tree.leaves(tuple(spec)))


def num_parts(name: str, size: int | None = None) -> int:
    """The number of shards of a logical axis (of this size) on the current mesh; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in split_axes(name, size))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x` with a sharding constraint on the current mesh, from its logical axes; `x` itself without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(names, mesh, x.shape))


def named_shardings(boxed: Any, mesh: Mesh) -> Any:
    """NamedShardings for a tree of flax `LogicallyPartitioned` weights, concrete or abstract; other leaves are
    replicated."""

    def sharding(leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, partition_spec(leaf.names, mesh, leaf.value.shape))

    return jax.tree.map(sharding, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def split_over_replicas(sharding: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """`sharding`, with the largest dim that `data` divides sharded over `data` as well.

    For arrays that only the weight update reads: their replicas along `data` need no copy each (ZeRO-1, Rajbhandari et
    al. 2020). `sharding` itself is returned where no dim divides.
    """
    replicas = sharding.mesh.shape.get("data", 1)
    spec = [*sharding.spec, *(None,) * (len(shape) - len(sharding.spec))]
    shard_shape = sharding.shard_shape(tuple(shape))
    dividing = [dim for dim, size in enumerate(shard_shape) if size % replicas == 0]
    if replicas == 1 or not dividing:
        return sharding
    dim = max(dividing, key=lambda dim: shard_shape[dim])
    split = spec[dim] or ()
    spec[dim] = (*((split,) if isinstance(split, str) else split), "data")
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))
