"""What XLA's CPU backend wants written otherwise: the one place for it.

`jax.lax.platform_dependent` takes these when a program is lowered for a CPU, and drops them when it is for a TPU,
wherever it is compiled. Numbers are the same up to rounding.

Shapes: B batch, T tokens, D inputs, F outputs, V vocabulary, S keys, K key-value heads, G queries per key-value head,
H head_dim.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def linear_bf16(x_BTD: jax.Array, weight_FD: jax.Array) -> jax.Array:
    """[B, T, F] float32. The bfloat16 kernel, a tenth of the time of widening the weights, takes two rows or more and
    gives float32."""
    single = x_BTD.shape[0] * x_BTD.shape[1] == 1
    rows_BTD = jnp.concatenate([x_BTD, x_BTD]) if single else x_BTD
    out_BTF = jnp.einsum("BTD,FD->BTF", rows_BTD, weight_FD, preferred_element_type=jnp.float32)
    return out_BTF[:1] if single else out_BTF


def lookup_bf16(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """Rows of a bfloat16 table, read as bits: read as numbers, the whole table would be widened first."""
    bits_VD = jax.lax.bitcast_convert_type(table_VD, jnp.uint16)
    return jax.lax.bitcast_convert_type(bits_VD[ids_BT], jnp.bfloat16)


def cache_dtype(dtype: Any) -> Any:
    """That of a cache for activations of `dtype`. An update of a bfloat16 array widens and narrows all of it, and sums
    of products are taken in float32 anyway. A dtype is in the shapes, so the mesh or the backend decides here."""
    return jnp.float32 if platform() == "cpu" else dtype


def platform() -> str:
    """Of the devices of the mesh in context, or of the default ones: what the next program will be lowered for."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() if device is None else str(device.platform)


def attend_one(q_BKG1H: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, mask_B1S: jax.Array) -> jax.Array:
    """Attention of one query a row, all in float32; [B, K, G, 1, H]. Sums of products, since small dots would run one
    by one, and copy the keys."""
    scores_BKGS = (q_BKG1H[:, :, :, 0, :, None] * k_BKHS[:, :, None]).sum(axis=-2) * k_BKHS.shape[2] ** -0.5
    scores_BKGS = jnp.where(mask_B1S[:, None], scores_BKGS, jnp.finfo(jnp.float32).min)
    weights_BKGS = jax.nn.softmax(scores_BKGS, axis=-1)
    return (weights_BKGS[..., None] * v_BKSH[:, :, None]).sum(axis=-2)[:, :, :, None]


def keep_in_loop(x: Any) -> Any:
    """`x`, of which nothing may be computed before the loop it is used in: widened weights would be, a second copy."""
    return jax.lax.optimization_barrier(x)


def write_once(x: jax.Array) -> jax.Array:
    """`x`, for two products to read: XLA would compute it for each of them anew, in the order that suits it."""
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)
