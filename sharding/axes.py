"""Logical axes and their rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

# Logical axis -> mesh axes it is split over. One table serves every mesh: an axis of size 1 splits nothing.
AXIS_RULES: dict[str, tuple[str, ...]] = {
    # weights
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "expert": ("expert",),
    "router": (),
    "norm": (),
    # activations
    "batch": ("data", "fsdp", "expert"),
    "length": (),
    "group": ("data", "fsdp", "expert"),
    "routed_group": ("data", "fsdp"),  # token groups once the experts hold the expert axis
    "capacity": (),
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_kv_heads": ("tensor",),
    "act_mlp": ("tensor",),
    "act_vocab": ("tensor",),
}


def partition_spec(
    names: Sequence[str | None], mesh: Mesh | AbstractMesh, shape: Sequence[int] | None = None
) -> PartitionSpec:
    """The PartitionSpec of an array whose axes have these logical names (None: not split).

    Raises:
      ValueError: an unknown name, two axes that want the same mesh axis, or (where `shape` is given) an axis whose
        size its mesh axes do not divide.
    """
    owner: dict[str, str] = {}
    spec: list[tuple[str, ...] | None] = []
    for i, name in enumerate(names):
        if name is not None and name not in AXIS_RULES:
            raise ValueError(f"logical axis: {name!r} is unknown; one of {', '.join(AXIS_RULES)} fits")
        axes = tuple(axis for axis in AXIS_RULES.get(name or "", ()) if mesh.shape.get(axis, 1) > 1)
        for axis in axes:
            if axis in owner:
                raise ValueError(f"mesh axis {axis!r} is wanted by both {owner[axis]!r} and {name!r} of {tuple(names)}")
            owner[axis] = name or ""
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if shape is not None and shape[i] % parts:
            raise ValueError(f"mesh: {'x'.join(axes)} = {parts} does not divide axis {name!r} of size {shape[i]}")
        spec.append(axes or None)
    return PartitionSpec(*spec)


def num_parts(name: str) -> int:
    """Into how many parts the mesh in context (`jax.set_mesh`) splits a logical axis; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(axis, 1) for axis in AXIS_RULES[name])


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
