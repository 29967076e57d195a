"""Logical axes and their rules."""

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
    """The mesh axes that each logical axis is split over. One table serves every mesh: an axis of size 1 splits
    nothing.

    relaxed: an axis is split over those of its mesh axes that divide it and that no axis before it took, "embed" over
      what all the others leave; otherwise all must divide it, and two that want the same mesh axis are an error.
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
    # Experts, not their columns: a TPU gathers and scatters along the first axis of an array as it lies in memory.
    expert: Axes = ("expert", "fsdp")
    expert_embed: Axes = ()
    gate_up: Axes = ()
    router: Axes = ()
    router_embed: Axes = ("fsdp",)
    norm: Axes = ()
    # activations
    batch: Axes = _BATCH
    attention_batch: Axes = _BATCH  # rows within attention, and of a cache
    sample_batch: Axes = _BATCH  # rows where tokens are chosen
    length: Axes = ("context",)
    group: Axes = _BATCH
    routed_group: Axes = ("data", "fsdp")  # token groups once the experts hold the expert axis
    capacity: Axes = ()
    slots: Axes = ()  # of a cache
    act_embed: Axes = ()
    act_expert: Axes = ("expert",)
    act_heads: Axes = ("tensor",)
    act_kv_heads: Axes = ("tensor",)
    act_mlp: Axes = ("tensor",)
    act_vocab: Axes = ("tensor",)

    def __getitem__(self, name: str) -> Axes:
        """The mesh axes of one logical axis; ValueError for an unknown one."""
        axes = getattr(self, name, None)
        if not isinstance(axes, tuple):
            known = ", ".join(name for name, axes in vars(self).items() if isinstance(axes, tuple))
            raise ValueError(f"logical axis: {name!r} is unknown; one of {known} fits")
        return axes


AXIS_RULES = AxisRules()
# A step of decoding has few tokens, so that activations move and weights do not: each lies once on the devices that
# share a part of the batch, whatever their axes are called. Only attention, as the cache, and the choice of tokens are
# split by rows. The router is small, and a sum over all devices dear.
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
# Fewer than the devices of a tensor axis in the larger models, and small: what does not divide is replicated.
_REPLICATED_WHERE_INDIVISIBLE = ("kv_heads", "act_kv_heads")


@contextlib.contextmanager
def axis_rules(rules: AxisRules) -> Iterator[None]:
    """Other rules than `AXIS_RULES` within a `with` block, or within a function that this decorates. `jax.jit` does not
    see them: decorate what is jitted."""
    token = _rules.set(rules)
    try:
        yield
    finally:
        _rules.reset(token)


def partition_spec(
    names: Sequence[str | None], mesh: Mesh | AbstractMesh, shape: Sequence[int] | None = None
) -> PartitionSpec:
    """The PartitionSpec of an array whose axes have these logical names (None: not split), by the rules in context.

    Key-value heads that their mesh axes do not divide are replicated, where `shape` is given.

    Raises (unless the rules are relaxed):
      ValueError: an unknown name, two axes that want the same mesh axis, or (where `shape` is given) an axis whose
        size its mesh axes do not divide.
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
                    f"{_divisors(shape[i])} fits"
                )
            axes = ()
        for axis in axes:
            if axis in owner:
                raise ValueError(f"mesh axis {axis!r} is wanted by both {owner[axis]!r} and {name!r} of {tuple(names)}")
            owner[axis] = name or ""
        spec[i] = axes or None
    return PartitionSpec(*spec)


def _dividing(axes: Sequence[str], mesh: Mesh | AbstractMesh, size: int | None) -> Axes:
    """Of these axes, in their order, those that divide what the ones before them leave of `size`; None: all."""
    kept: list[str] = []
    for axis in axes:
        if size is None or size % math.prod(mesh.shape[a] for a in (*kept, axis)) == 0:
            kept.append(axis)
    return tuple(kept)


def _divisors(size: int) -> str:
    fitting = [str(n) for n in range(1, min(size, 1024) + 1) if size % n == 0]
    return " or ".join(filter(None, [", ".join(fitting[:-1]), fitting[-1]])) if fitting else "1"


def split_axes(name: str, size: int | None = None) -> Axes:
    """The axes over which the mesh in context (`jax.set_mesh`) splits a logical axis (of this size); none without a
    mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return spec_axes(partition_spec((name,), mesh, None if size is None else (size,)))


def spec_axes(spec: PartitionSpec) -> Axes:
    """All mesh axes that a PartitionSpec splits an array over."""
    return tuple(jax.tree.leaves(tuple(spec)))


def num_parts(name: str, size: int | None = None) -> int:
    """Into how many parts the mesh in context splits a logical axis (of this size); 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in split_axes(name, size))


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


def split_over_replicas(sharding: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """As `sharding`, and the largest part of an axis that `data` divides is split over it too; where there is none, the
    copies stay. For what only an update of the weights reads (ZeRO-1, Rajbhandari et al. 2020)."""
    copies = sharding.mesh.shape.get("data", 1)
    spec = [*sharding.spec, *(None,) * (len(shape) - len(sharding.spec))]
    parts = sharding.shard_shape(tuple(shape))
    dividing = [axis for axis, size in enumerate(parts) if size % copies == 0]
    if copies == 1 or not dividing:
        return sharding
    axis = max(dividing, key=lambda axis: parts[axis])
    split = spec[axis] or ()
    spec[axis] = (*((split,) if isinstance(split, str) else split), "data")
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))
