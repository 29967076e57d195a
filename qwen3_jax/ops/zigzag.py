"""A sequence sharded over the mesh axis `context` so that causal attention is equal work for every device.

The sequence is cut into 2 * P chunks. Device i of P holds chunks i and 2 * P - 1 - i ("zig-zag" order). Its queries
attend to (i + 1) + (2 * P - i) = 2 * P + 1 chunks of keys, the same number on every device. For P = 4:

    chunk of the sequence   0  1  2  3  4  5  6  7
    held by device          0  1  2  3  3  2  1  0

    device     0      1      2      3
    chunks     0 7    1 6    2 5    3 4
    key chunks that the queries attend to, # per chunk, ^ where only the keys up to the query are visible:
      low      ^          #^         ##^        ###^         1, 2, 3, 4 chunks
      high     #######^   ######^    #####^     ####^        8, 7, 6, 5 chunks: 9 on every device

Contiguous shards would give the last device about P times the work of the first. Keys and values are all-gathered, as
in Llama 3 (Grattafiori et al. 2024, section 3.3.2); the result is exact. The rest of the network treats tokens one by
one, or in groups within a chunk, and does not depend on the order.

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
    """The number of chunks into which the current mesh cuts a sequence; each chunk is on one device."""
    parts = num_parts("length")
    return 1 if parts == 1 else 2 * parts


def to_zigzag(x: jax.Array) -> jax.Array:
    """`x` [B, T, ...] from sequence order to zig-zag order; `x` itself where the mesh does not shard sequences.

    Raises:
      ValueError: the number of chunks does not divide T.
    """
    return _permute(x, _send_to_zigzag)


def from_zigzag(x: jax.Array) -> jax.Array:
    """The inverse of `to_zigzag`."""
    return _permute(x, _send_from_zigzag)


def _permute(x: jax.Array, send: Callable[..., jax.Array]) -> jax.Array:
    parts = num_parts("length")
    if parts == 1:
        return x
    if x.shape[1] % num_chunks():
        raise ValueError(f"sequence length: {x.shape[1]}; use a multiple of 2 x context = {num_chunks()}")
    names = ("batch", "length", *[None] * (x.ndim - 2))
    spec = partition_spec(names, jax.sharding.get_abstract_mesh(), x.shape)
    return jax.shard_map(functools.partial(send, parts=parts), in_specs=spec, out_specs=spec, check_vma=False)(x)


def _owner(chunk: int, parts: int) -> int:
    """The device that holds a chunk in zig-zag order."""
    return min(chunk, 2 * parts - 1 - chunk)


# Chunks i and 2 * P - 1 - i have different parity: every device holds one even and one odd chunk, in either order. Each
# order is therefore reached from the other by two permutations between devices, one of the even chunks and one of the
# odd chunks. (A `ppermute` sends one array per device, so all chunks cannot move in one.)


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
    """[T] int32: for each token in zig-zag order, its index in the sequence."""
    chunks = np.arange(length, dtype=np.int32).reshape(2 * parts, -1)
    return np.concatenate([chunks[[i, 2 * parts - 1 - i]].ravel() for i in range(parts)])


def gather_sequence(x_BT: jax.Array, parts: int) -> jax.Array:
    """Inside a shard_map: all-gathers each row from this device's two chunks to the sequence, in sequence order."""
    if parts == 1:
        return x_BT
    low, high = jnp.split(jax.lax.all_gather(x_BT, AXIS, axis=0), 2, axis=2)  # [P, B, S, ...] each
    chunks = jnp.concatenate([low, high[::-1]])  # device i's high chunk is the i-th from the end
    return jnp.moveaxis(chunks, 0, 1).reshape(x_BT.shape[0], -1, *x_BT.shape[2:])


def attend_pairs(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    query_segments_BT: jax.Array,
    segments_BT: jax.Array,
    parts: int,
) -> jax.Array:
    """Causal attention of this device's two chunks of queries, one (query chunk, key chunk) pair at a time.

    There are 2 * P + 1 pairs on every device. Pairs n <= i are the low chunk i with key chunks 0 .. i; the others are
    the high chunk with key chunks 0 .. 2 * P - 1 - i. The pairs of a query chunk are combined as in flash attention.

    Args:
      q_BTKGH, query_segments_BT: of this device, in zig-zag order.
      k_BTKH, v_BTKH, segments_BT: of complete rows, in sequence order.
    """
    device = jax.lax.axis_index(AXIS)
    batch, length, *heads = q_BTKGH.shape
    chunk = length // 2
    q_BCSKGH = q_BTKGH.reshape(batch, 2, chunk, *heads)
    query_segments_BCS = query_segments_BT.reshape(batch, 2, chunk)
    k_BCSKH, v_BCSKH = (x.reshape(batch, 2 * parts, chunk, *x.shape[2:]) for x in (k_BTKH, v_BTKH))
    segments_BCS = segments_BT.reshape(batch, 2 * parts, chunk)
    earlier_1SS = jnp.tril(jnp.ones((chunk, chunk), bool))[None]

    # Recomputed in the backward pass: stored scores of all pairs would need as much memory as full attention scores.
    @jax.checkpoint
    def pair(n: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Unnormalised output, largest score and sum of weights of the n-th pair."""
        low = n <= device
        which, key_chunk = jnp.where(low, 0, 1), jnp.where(low, n, n - device - 1)
        query_chunk = jnp.where(low, device, 2 * parts - 1 - device)
        at = functools.partial(jax.lax.dynamic_index_in_dim, axis=1, keepdims=False)
        k_BSKH, v_BSKH = at(k_BCSKH, key_chunk), at(v_BCSKH, key_chunk)
        q_BSKGH = at(q_BCSKGH, which)
        mask_BSS = at(query_segments_BCS, which)[:, :, None] == at(segments_BCS, key_chunk)[:, None, :]
        mask_BSS &= (key_chunk < query_chunk) | earlier_1SS
        scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BSKGH, k_BSKH, preferred_element_type=jnp.float32)
        scores = jnp.where(mask_BSS[:, None, None], scores * heads[-1] ** -0.5, jnp.finfo(jnp.float32).min)
        max_BKGT = jax.lax.stop_gradient(scores.max(axis=-1))
        weights = jnp.exp(scores - max_BKGT[..., None])
        out = jnp.einsum("BKGTS,BSKH->BKGTH", weights.astype(q_BTKGH.dtype), v_BSKH, preferred_element_type=jnp.float32)
        return out, max_BKGT, weights.sum(axis=-1)

    numbers_n = jnp.arange(2 * parts + 1)
    out_nBKGTH, max_nBKGT, total_nBKGT = jax.lax.map(pair, numbers_n)
    chunks = []
    for member_n in (numbers_n <= device, numbers_n > device):  # pairs of the low chunk, pairs of the high chunk
        member = member_n[:, None, None, None, None]
        # A finite minimum, not -inf: -inf - -inf would be NaN.
        maxima = jnp.where(member, max_nBKGT, jnp.finfo(jnp.float32).min)
        scale = jnp.where(member, jnp.exp(maxima - maxima.max(axis=0, keepdims=True)), 0)
        chunks.append((scale[..., None] * out_nBKGTH).sum(axis=0) / (scale * total_nBKGT).sum(axis=0)[..., None])
    out_BKGTH = jnp.concatenate(chunks, axis=3)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).astype(q_BTKGH.dtype)
