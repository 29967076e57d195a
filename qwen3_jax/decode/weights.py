"""The decoding layout of the weights: one entry per layer, sharded by `sharding.DECODE_RULES`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from qwen3_jax.config import ModelConfig
from qwen3_jax.model import Qwen3, is_stacked, unstack_layers
from sharding import DECODE_RULES, axis_rules, named_shardings


@axis_rules(DECODE_RULES)
def weight_shapes(config: ModelConfig, mesh: Mesh | None, dtype: Any, *, stacked: bool = False) -> Any:
    """The decoding layout as shapes with shardings; without a mesh, on the default device. `stacked`: the layers of a
    training checkpoint, sharded by the same rules."""
    init = Qwen3(config, stacked=stacked).init
    boxed: Any = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    shapes = nn.unbox(boxed)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: here, shapes) if mesh is None else named_shardings(boxed, mesh)
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding), shapes, shardings)


def decoding_weights(config: ModelConfig, params: Any, dtype: Any = None) -> Any:
    """Weights of any layout (stacked or per layer, any dtype, any sharding) in the decoding layout.

    One compiled program unstacks, casts and reshards them; the same program serves every later set of weights. Weights
    that need neither unstacking nor a cast are moved one by one, and those already in place are not copied.

    Args:
      dtype: of the result; None takes the embedding table's.
    """
    params = nn.unbox(params)
    dtype = jnp.dtype(dtype or params["embed_tokens"].dtype)
    mesh = jax.sharding.get_mesh()
    if is_stacked(config, params) or any(leaf.dtype != dtype for leaf in jax.tree.leaves(params)):
        return _relayout(config, dtype, None if mesh.empty else mesh)(params)
    if mesh.empty:
        return params
    return jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), params, weight_shapes(config, mesh, dtype))


def lower_weights(config: ModelConfig, params: Any, mesh: Mesh, dtype: Any) -> jax.stages.Lowered:
    """The program of `decoding_weights`, lowered for the devices of the mesh; `params` are shapes with shardings."""
    return _relayout(config, jnp.dtype(dtype), mesh).lower(params)


@functools.cache
def _relayout(config: ModelConfig, dtype: Any, mesh: Mesh | None) -> Any:
    """The program for one model, dtype and mesh."""
    to = mesh and jax.tree.map(lambda x: x.sharding, weight_shapes(config, mesh, dtype))

    def relayout(params: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(dtype), unstack_layers(config, params))

    return jax.jit(relayout, out_shardings=to)
