"""Logical axes and their rules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

Axes = tuple[str, ...]
_BATCH: Axes = ("data", "fsdp", "expert")


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """The mesh axes that each logical axis is split over. One table serves every mesh: an axis of size 1 splits
    nothing."""

    # weights
    layers: Axes = ()
    vocab: Axes = ("tensor",)
    embed: Axes = ("fsdp",)
    heads: Axes = ("tensor",)
    kv_heads: Axes = ("tensor",)
    head_dim: Axes = ()
    mlp: Axes = ("tensor",)
    expert: Axes = ("expert",)
    router: Axes = ()
    norm: Axes = ()
    # activations
    batch: Axes = _BATCH
    length: Axes = ("context",)
    group: Axes = _BATCH
    routed_group: Axes = ("data", "fsdp")  # token groups once the experts hold the expert axis
    capacity: Axes = ()
    slots: Axes = ()  # of a cache
    act_embed: Axes = ()
    act_heads: Axes = ("tensor",)
    act_kv_heads: Axes = ("tensor",)
    act_mlp: Axes = ("tensor",)
    act_vocab: Axes = ("tensor",)

    def __getitem__(self, name: str) -> Axes:
        """The mesh axes of one logical axis; ValueError for an unknown one."""
        axes = getattr(self, name, None)
        if not isinstance(axes, tuple):
            known = ", ".join(field.name for field in dataclasses.fields(self))
            raise ValueError(f"logical axis: {name!r} is unknown; one of {known} fits")
        return axes


AXIS_RULES = AxisRules()
# Fewer than the devices of a tensor axis in the larger models, and small: what does not divide is replicated.
_REPLICATED_WHERE_INDIVISIBLE = ("kv_heads", "act_kv_heads")


def partition_spec(
    names: Sequence[str | None], mesh: Mesh | AbstractMesh, shape: Sequence[int] | None = None
) -> PartitionSpec:
    """The PartitionSpec of an array whose axes have these logical names (None: not split).

    Key-value heads that their mesh axes do not divide are replicated, where `shape` is given.

    Raises:
      ValueError: an unknown name, two axes that want the same mesh axis, or (where `shape` is given) an axis whose
        size its mesh axes do not divide.
    """
    owner: dict[str, str] = {}
    spec: list[Axes | None] = []
    for i, name in enumerate(names):
        axes = () if name is None else tuple(axis for axis in AXIS_RULES[name] if mesh.shape.get(axis, 1) > 1)
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if shape is not None and shape[i] % parts:
            if name not in _REPLICATED_WHERE_INDIVISIBLE:
                raise ValueError(
                    f"mesh: {' x '.join(axes)} = {parts} does not divide axis {name!r} of size {shape[i]}; "
                    f"{_divisors(shape[i])} fits"
                )
            axes = ()
        for axis in axes:
            if axis in owner:
                raise ValueError(f"mesh axis {axis!r} is wanted by both {owner[axis]!r} and {name!r} of {tuple(names)}")
            owner[axis] = name or ""
        spec.append(axes or None)
    return PartitionSpec(*spec)


def _divisors(size: int) -> str:
    fitting = [str(n) for n in range(1, min(size, 1024) + 1) if size % n == 0]
    return " or ".join(filter(None, [", ".join(fitting[:-1]), fitting[-1]])) if fitting else "1"


def split_axes(name: str) -> Axes:
    """The axes over which the mesh in context (`jax.set_mesh`) splits a logical axis; none without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in AXIS_RULES[name] if mesh.shape.get(axis, 1) > 1)


def num_parts(name: str) -> int:
    """Into how many parts the mesh in context splits a logical axis; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in split_axes(name))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, laid out over the mesh in context (`jax.set_mesh`) by its logical axes; `x` itself without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(names, mesh, x.shape))


def named_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Tree of NamedShardings for a tree of flax `LogicallyPartitioned` weights (abstract ones do); leaves without
    logical axes are replicated."""

    def sharding(leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, partition_spec(leaf.names, mesh, leaf.value.shape))

    return jax.tree.map(sharding, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
