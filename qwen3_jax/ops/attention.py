"""Grouped-query attention (Ainslie et al. 2023) and its masks.

Shapes: B batch, T queries, S keys, N query heads, K key-value heads, G = N / K queries per key-value head, H head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen3_jax.ops import cpu

_LEAST_BLOCK, _MOST_BLOCKS = 128, 8  # of queries, where attention is causal


def causal_mask(
    query_positions_BT: jax.Array,
    key_positions_BS: jax.Array,
    query_segments_BT: jax.Array,
    key_segments_BS: jax.Array,
) -> jax.Array:
    """[B, T, S], true where a query may look: the same segment, a position not after its own."""
    same = query_segments_BT[:, :, None] == key_segments_BS[:, None, :]
    return same & (key_positions_BS[:, None, :] <= query_positions_BT[:, :, None])


def attention(q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Softmax attention, scores and softmax in float32; [B, T, N, H] in q's dtype.

    As many keys as queries are the same tokens: no query then looks at a key after its own, whatever the mask says.
    """
    batch, length, _, head_dim = q_BTNH.shape
    q_BKGTH = q_BTNH.reshape(batch, length, k_BKHS.shape[1], -1, head_dim).transpose(0, 2, 3, 1, 4)

    def on_cpu(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        attend = cpu.attend_one if length == 1 else _attend
        return attend(q.astype(jnp.float32), k.astype(jnp.float32), v.astype(jnp.float32), mask).astype(q.dtype)

    block, out = length, []
    if length == k_BKHS.shape[-1]:
        block = max(_LEAST_BLOCK, -(-length // _MOST_BLOCKS))
    for start in range(0, length, block):
        queries, keys = slice(start, start + block), slice(start + block if block < length else None)
        inputs = q_BKGTH[:, :, :, queries], k_BKHS[..., keys], v_BKSH[:, :, keys], mask_BTS[:, queries, keys]
        out.append(jax.lax.platform_dependent(*inputs, cpu=on_cpu, default=_attend))
    return jnp.concatenate(out, axis=3).transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


def _attend(q_BKGTH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    k_BKHS, v_BKSH = k_BKHS.astype(q_BKGTH.dtype), v_BKSH.astype(q_BKGTH.dtype)
    scores = jnp.einsum("BKGTH,BKHS->BKGTS", q_BKGTH, k_BKHS, preferred_element_type=jnp.float32)
    # A large finite number, not -inf: a padding query that may look nowhere then stays finite.
    scores = jnp.where(mask_BTS[:, None, None], scores * q_BKGTH.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q_BKGTH.dtype)
    return jnp.einsum("BKGTS,BKSH->BKGTH", weights, v_BKSH)
