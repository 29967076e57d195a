"""A sequence split over the mesh axis `context` so that causal attention is equal work for every device.

Of 2 * P chunks of a sequence, device i of P holds chunks i and 2 * P - 1 - i ("zig-zag" order): its queries then look
at (i + 1) + (2 * P - i) chunks of keys, the same number everywhere. Keys and values are gathered, as in Llama 3
(Grattafiori et al. 2024, section 3.3.2); nothing is approximated. Everything else in the network treats tokens one by
one, or in groups that lie within a chunk, and does not see the order.

Shapes: B batch, T tokens, S = T / (2 * P) tokens of a chunk, C = 2 chunks of a device, K key-value heads, G queries per
key-value head, H head_dim, n pairs of chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sharding import num_parts, partition_spec

AXIS = "context"


def num_chunks() -> int:
    """Into how many chunks the mesh in context cuts a sequence, each of them whole on one device."""
    parts = num_parts("length")
    return 1 if parts == 1 else 2 * parts


def to_zigzag(x: jax.Array) -> jax.Array:
    """[B, T, ...] in the order of the sequence to zig-zag order; `x` itself where the mesh does not split sequences."""
    return _permute(x, _send_to_zigzag)


def from_zigzag(x: jax.Array) -> jax.Array:
    """The inverse of `to_zigzag`."""
    return _permute(x, _send_from_zigzag)


def _permute(x: jax.Array, send: Callable[..., jax.Array]) -> jax.Array:
    parts = num_parts("length")
    if parts == 1:
        return x
    if x.shape[1] % num_chunks():
        raise ValueError(f"sequence length: {x.shape[1]}; a multiple of 2 x context = {num_chunks()} fits")
    names = ("batch", "length", *[None] * (x.ndim - 2))
    spec = partition_spec(names, jax.sharding.get_abstract_mesh(), x.shape)
    return jax.shard_map(functools.partial(send, parts=parts), in_specs=spec, out_specs=spec, check_vma=False)(x)


def _owner(chunk: int, parts: int) -> int:
    """The device that holds a chunk in zig-zag order."""
    return min(chunk, 2 * parts - 1 - chunk)


# Of the two chunks of a device one is even and one odd, in either order, so each order is reached from the other by two
# permutations between devices: one of the even chunks, one of the odd ones.


def _send_to_zigzag(x: jax.Array, parts: int) -> jax.Array:
    even, odd = (
        jax.lax.ppermute(chunk, AXIS, [(i, _owner(2 * i + parity, parts)) for i in range(parts)])
        for parity, chunk in enumerate(jnp.split(x, 2, axis=1))
    )
    is_even = jax.lax.axis_index(AXIS) % 2 == 0
    return jnp.where(is_even, jnp.concatenate([even, odd], axis=1), jnp.concatenate([odd, even], axis=1))


def _send_from_zigzag(x: jax.Array, parts: int) -> jax.Array:
    low, high = jnp.split(x, 2, axis=1)
    is_even = jax.lax.axis_index(AXIS) % 2 == 0
    chunks = jnp.where(is_even, low, high), jnp.where(is_even, high, low)
    received = [
        jax.lax.ppermute(chunk, AXIS, [(_owner(2 * i + parity, parts), i) for i in range(parts)])
        for parity, chunk in enumerate(chunks)
    ]
    return jnp.concatenate(received, axis=1)


def zigzag_order(length: int, parts: int) -> np.ndarray:
    """[T] int32, the place in the sequence of each token in zig-zag order."""
    chunks = np.arange(length, dtype=np.int32).reshape(2 * parts, -1)
    return np.concatenate([chunks[[i, 2 * parts - 1 - i]].ravel() for i in range(parts)])


def gather_sequence(x_BT: jax.Array, parts: int) -> jax.Array:
    """Within a shard_map: this device's two chunks of each row to all chunks, in the order of the sequence."""
    if parts == 1:
        return x_BT
    low, high = jnp.split(jax.lax.all_gather(x_BT, AXIS, axis=0), 2, axis=2)  # [P, B, S, ...] each
    chunks = jnp.concatenate([low, high[::-1]])
    return jnp.moveaxis(chunks, 0, 1).reshape(x_BT.shape[0], -1, *x_BT.shape[2:])


def attend_pairs(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    query_segments_BT: jax.Array,
    segments_BT: jax.Array,
    parts: int,
) -> jax.Array:
    """Attention of this device's two chunks of queries to all keys up to their own, one pair of chunks at a time.

    Args:
      q_BTKGH, query_segments_BT: this device's, in zig-zag order. k_BTKH, v_BTKH, segments_BT: all, in the sequence's.
    """
    device = jax.lax.axis_index(AXIS)
    batch, length, *heads = q_BTKGH.shape
    chunk = length // 2
    q_BCSKGH = q_BTKGH.reshape(batch, 2, chunk, *heads)
    query_segments_BCS = query_segments_BT.reshape(batch, 2, chunk)
    k_BCSKH, v_BCSKH = (x.reshape(batch, 2 * parts, chunk, *x.shape[2:]) for x in (k_BTKH, v_BTKH))
    segments_BCS = segments_BT.reshape(batch, 2 * parts, chunk)
    earlier_SS = jnp.tril(jnp.ones((chunk, chunk), bool))

    # Recomputed in the backward pass: the scores of all pairs would be those of the whole sequence.
    @jax.checkpoint
    def pair(n: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Unnormalised output, largest score and sum of weights of the n-th pair."""
        low = n <= device
        place, key_chunk = jnp.where(low, 0, 1), jnp.where(low, n, n - device - 1)
        query_chunk = jnp.where(low, device, 2 * parts - 1 - device)
        at = functools.partial(jax.lax.dynamic_index_in_dim, axis=1, keepdims=False)
        k_BSKH, v_BSKH = at(k_BCSKH, key_chunk), at(v_BCSKH, key_chunk)
        q_BSKGH = at(q_BCSKGH, place)
        mask_BSS = at(query_segments_BCS, place)[:, :, None] == at(segments_BCS, key_chunk)[:, None, :]
        mask_BSS &= (key_chunk < query_chunk) | earlier_SS
        scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BSKGH, k_BSKH, preferred_element_type=jnp.float32)
        scores = jnp.where(mask_BSS[:, None, None], scores * heads[-1] ** -0.5, jnp.finfo(jnp.float32).min)
        most_BKGT = jax.lax.stop_gradient(scores.max(axis=-1))
        weights = jnp.exp(scores - most_BKGT[..., None])
        out = jnp.einsum("BKGTS,BSKH->BKGTH", weights.astype(q_BTKGH.dtype), v_BSKH, preferred_element_type=jnp.float32)
        return out, most_BKGT, weights.sum(axis=-1)

    numbers_n = jnp.arange(2 * parts + 1)
    out_nBKGTH, most_nBKGT, total_nBKGT = jax.lax.map(pair, numbers_n)
    chunks = []
    for member_n in (numbers_n <= device, numbers_n > device):
        member = member_n[:, None, None, None, None]
        most = jnp.where(member, most_nBKGT, jnp.finfo(jnp.float32).min)
        scale = jnp.where(member, jnp.exp(most - most.max(axis=0)), 0)
        chunks.append((scale[..., None] * out_nBKGTH).sum(axis=0) / (scale * total_nBKGT).sum(axis=0)[..., None])
    out_BKGTH = jnp.concatenate(chunks, axis=3)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).astype(q_BTKGH.dtype)
