"""Forms of operations for XLA's CPU backend.

`jax.lax.platform_dependent` selects them when a program is lowered for a CPU, also where it is compiled elsewhere.
Results equal those of the other backends' forms up to rounding.

Shapes: B batch, T tokens, D inputs, F outputs, V vocabulary, S keys, K key-value heads, G queries per key-value head,
H head_dim.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def linear_bf16(x_BTD: jax.Array, weight_FD: jax.Array) -> jax.Array:
    """[B, T, F] float32, by the CPU's bfloat16 kernel, in a tenth of the time of converting the weights to float32.

    XLA selects that kernel for a float32 result and at least two rows only, so a single row is duplicated.
    """
    single = x_BTD.shape[0] * x_BTD.shape[1] == 1
    rows_BTD = jnp.concatenate([x_BTD, x_BTD]) if single else x_BTD
    out_BTF = jnp.einsum("BTD,FD->BTF", rows_BTD, weight_FD, preferred_element_type=jnp.float32)
    return out_BTF[:1] if single else out_BTF


def lookup_bf16(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """Rows of a bfloat16 table, gathered as integers: XLA would first convert a bfloat16 table to float32."""
    bits_VD = jax.lax.bitcast_convert_type(table_VD, jnp.uint16)
    return jax.lax.bitcast_convert_type(bits_VD[ids_BT], jnp.bfloat16)


def cache_dtype(dtype: Any) -> Any:
    """The dtype of the key-value cache for activations of `dtype`: float32 on a CPU, else `dtype`.

    On a CPU, an in-place update of a bfloat16 array converts all of it to float32 and back, and attention computes in
    float32 anyway. The dtype is part of the shapes, so `platform()` decides here, not `platform_dependent`.
    """
    return jnp.float32 if platform() == "cpu" else dtype


def platform() -> str:
    """The platform that the next program is lowered for: that of the current mesh, or the default backend."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() if device is None else str(device.platform)


def attend_one(q_BKG1H: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, mask_B1S: jax.Array) -> jax.Array:
    """Attention of one query per row, all in float32; [B, K, G, 1, H].

    Written as elementwise products and sums: XLA would run an einsum as many small dots, one after another, and copy
    the keys for each.
    """
    scores_BKGS = (q_BKG1H[:, :, :, 0, :, None] * k_BKHS[:, :, None]).sum(axis=-2) * k_BKHS.shape[2] ** -0.5
    scores_BKGS = jnp.where(mask_B1S[:, None], scores_BKGS, jnp.finfo(jnp.float32).min)
    weights_BKGS = jax.nn.softmax(scores_BKGS, axis=-1)
    return (weights_BKGS[..., None] * v_BKSH[:, :, None]).sum(axis=-2)[:, :, :, None]


def keep_in_loop(x: Any) -> Any:
    """`x`, with a barrier that keeps computations on it inside the loop.

    XLA would otherwise hoist the conversion of bfloat16 weights out of the loop, and hold a float32 copy of all.
    """
    return jax.lax.optimization_barrier(x)


def write_once(x: jax.Array) -> jax.Array:
    """`x`, computed once where two products read it: XLA would otherwise fuse it into both, and compute it twice."""
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)
