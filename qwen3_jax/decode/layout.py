"""How weights and state lie on a mesh while decoding, by `sharding.DECODE_RULES`.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding

from qwen3_jax.config import ModelConfig
from qwen3_jax.decode.loop import DecodeState
from qwen3_jax.model import Qwen3, unstack_layers
from sharding import DECODE_RULES, axis_rules, constrain, named_shardings, partition_spec

Tree = TypeVar("Tree")


def row_axes(tree: Tree) -> Tree:
    """Logical axes of arrays whose first axis is the rows: they lie where tokens are chosen."""
    return jax.tree.map(lambda x: ("sample_batch", *[None] * (x.ndim - 1)), tree)


def state_axes(state: DecodeState) -> DecodeState:
    """Logical axes of each array of a state, as a tuple of names in its place."""
    return dataclasses.replace(row_axes(dataclasses.replace(state, cache=None)), cache=state.cache.axes)


def lay_out(tree: Tree, axes: Tree) -> Tree:
    """Arrays laid out over the mesh in context, within a program."""
    return jax.tree.map(lambda x, names: constrain(x, *names), tree, axes)


@axis_rules(DECODE_RULES)
def weight_shapes(config: ModelConfig, mesh: Mesh, dtype: Any) -> Any:
    """The weights, one entry per layer, as shapes and shardings."""
    init = Qwen3(config, stacked=False).init
    boxed: Any = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding),
        nn.unbox(boxed),
        named_shardings(boxed, mesh),
    )


@axis_rules(DECODE_RULES)
def shapes(tree: Tree, axes: Tree, mesh: Mesh) -> Tree:
    """Shapes and shardings of what `lay_out` lays out."""

    def struct(x: Any, names: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, partition_spec(names, mesh, x.shape))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(struct, tree, axes)


def place_weights(config: ModelConfig, params: Any) -> Any:
    """Weights, stacked or per layer, as decoding wants them: per layer, and where the mesh in context should hold them.
    Those that are there already are not copied."""
    params = unstack_layers(config, nn.unbox(params))
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return params
    return jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), params, weight_shapes(config, mesh, jnp.float32))
