"""Matrix products and embedding look-ups, in the form that is fastest on each backend.

Shapes: B batch, T tokens, D inputs, F outputs, V vocabulary.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from qwen3_jax.ops import cpu


def linear(x: jax.Array, weight: jax.Array, *, inputs: int = 1, dtype: jnp.dtype | None = None) -> jax.Array:
    """`weight` [out..., in...] times `x` [B, T, in...]: [B, T, out...], where `in...` are the last `inputs` dims.

    Args:
      dtype: of the result; None is x's dtype. Inputs are multiplied in x's dtype.
    """
    # Two-dim weights: XLA's CPU backend transposes three-dim ones before each loop.
    outputs = weight.shape[: weight.ndim - inputs]
    weight_FD = weight.reshape(math.prod(outputs), -1).astype(x.dtype)
    x_BTD = x.reshape(*x.shape[:2], -1)

    def plain(x_BTD: jax.Array, weight_FD: jax.Array) -> jax.Array:
        return jnp.einsum("BTD,FD->BTF", x_BTD, weight_FD, preferred_element_type=dtype)

    def native(x_BTD: jax.Array, weight_FD: jax.Array) -> jax.Array:
        return cpu.linear_bf16(x_BTD, weight_FD).astype(dtype or x.dtype)

    if x.dtype == jnp.bfloat16:
        out_BTF = jax.lax.platform_dependent(x_BTD, weight_FD, cpu=native, default=plain)
    else:
        out_BTF = plain(x_BTD, weight_FD)
    return out_BTF.reshape(*x.shape[:2], *outputs)


def lookup(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """[B, T, D] rows of the table."""
    if table_VD.dtype == jnp.bfloat16:
        return jax.lax.platform_dependent(table_VD, ids_BT, cpu=cpu.lookup_bf16, default=lambda t, i: t[i])
    return table_VD[ids_BT]
