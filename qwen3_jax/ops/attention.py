"""Grouped-query attention (Ainslie et al. 2023): over complete sequences, and of new tokens over a cache.

Complete sequences (training and prefill) use the splash kernel on a TPU, cuDNN on a GPU, and blocks of plain XLA on a
CPU. On a mesh each device computes its own rows, heads and queries.

Shapes: B batch, T queries, S keys, N query heads, K key-value heads, G = N / K queries per key-value head, H head_dim.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import NamedSharding, PartitionSpec

from qwen3_jax.ops import cpu, zigzag
from sharding import num_parts, partition_spec

_MIN_BLOCK, _MAX_BLOCKS = 128, 8  # queries per block and blocks per sequence, on a CPU
_LANES, _SPLASH_BLOCK = 128, 1024  # lanes of a TPU tile; maximum queries and keys per block of the kernel


def causal_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """Attention of each token to the tokens of its own segment up to itself; [B, T, N, H] in q's dtype.

    Where the mesh shards sequences (axis `context`), all four arrays are in zig-zag order, see `ops.zigzag`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    heads, kv_heads = q_BTNH.shape[2], k_BTKH.shape[2]
    parts, head_parts = num_parts("length"), num_parts("act_heads", heads)
    if kv_heads % head_parts:  # repeat key-value heads, so that each device gets the ones of its own queries
        copies = head_parts // math.gcd(kv_heads, head_parts)
        k_BTKH, v_BTKH = (jnp.repeat(x, copies, axis=2) for x in (k_BTKH, v_BTKH))
    kernel = _splash_kernel(heads // head_parts, q_BTNH.shape[1], parts)
    local = functools.partial(_local_attention, parts=parts)
    if mesh.empty:
        return local(kernel, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    q_spec = partition_spec(("attention_batch", "length", "act_heads", None), mesh, q_BTNH.shape)
    kv_spec = partition_spec(("attention_batch", "length", "act_kv_heads", None), mesh, k_BTKH.shape)
    ids_spec = partition_spec(("attention_batch", "length"), mesh, segment_ids_BT.shape)
    queries = PartitionSpec(None, zigzag.AXIS if parts > 1 else None)
    kernel_spec = None if kernel is None else kernel.manual_sharding_spec(NamedSharding(mesh, queries))
    specs = (kernel_spec, q_spec, kv_spec, kv_spec, ids_spec)
    split = jax.shard_map(local, in_specs=specs, out_specs=q_spec, check_vma=False)
    return split(kernel, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


def _local_attention(
    kernel: splash.SplashAttentionKernel | None,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    parts: int,
) -> jax.Array:
    """Attention on one device: its queries over the keys of all `parts` shards of the sequence."""
    k_BSKH, v_BSKH, keys_BS = (zigzag.gather_sequence(x, parts) for x in (k_BTKH, v_BTKH, segment_ids_BT))
    inputs = q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, keys_BS
    platforms: dict[str, Any] = {}
    if kernel is not None:
        platforms["tpu"] = functools.partial(splash_attention, kernel)
    # Added on a GPU only: on other backends jax.nn raises while tracing it.
    if jax.default_backend() == "gpu" and parts == 1 and q_BTNH.dtype == jnp.bfloat16:
        platforms["cuda"] = _cudnn_attention
    return jax.lax.platform_dependent(*inputs, **platforms, default=functools.partial(plain_attention, parts=parts))


def plain_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, queries_BT: jax.Array, keys_BS: jax.Array, *, parts: int
) -> jax.Array:
    """Attention in plain XLA; scores and softmax in float32. `queries_BT`, `keys_BS`: segment ids.

    Each block of queries computes scores for the keys up to its end only, which saves almost half of the work.
    """
    if parts > 1:
        q_BTKGH = q_BTNH.reshape(*q_BTNH.shape[:2], k_BSKH.shape[2], -1, q_BTNH.shape[-1])
        return zigzag.attend_pairs(q_BTKGH, k_BSKH, v_BSKH, queries_BT, keys_BS, parts).reshape(q_BTNH.shape)
    length = q_BTNH.shape[1]
    mask_BTS = (queries_BT[:, :, None] == keys_BS[:, None, :]) & jnp.tril(jnp.ones((length, length), bool))[None]
    block = max(_MIN_BLOCK, -(-length // _MAX_BLOCKS))
    k_BKHS, v_BKSH = k_BSKH.transpose(0, 2, 3, 1), v_BSKH.transpose(0, 2, 1, 3)
    out = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        queries, keys = slice(start, stop), slice(stop)
        out.append(attention(q_BTNH[:, queries], k_BKHS[..., keys], v_BKSH[:, :, keys], mask_BTS[:, queries, keys]))
    return jnp.concatenate(out, axis=1)


def _splash_kernel(heads: int, length: int, parts: int) -> splash.SplashAttentionKernel | None:
    """The causal kernel for one device's heads and sequences of `length`; None where no block size of at least
    `_LANES` divides a shard of the sequence."""
    block = math.gcd(length // parts, _SPLASH_BLOCK)
    if block % _LANES:
        return None
    mask = splash_mask.CausalMask((length, length))
    if parts > 1:
        mask.q_sequence = zigzag.zigzag_order(length, parts)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        use_fused_bwd_kernel=True,
    )
    return splash.make_splash_mha(
        splash_mask.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=parts,
        residual_checkpoint_name="attention",
    )


def splash_attention(
    kernel: splash.SplashAttentionKernel,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    queries_BT: jax.Array,
    keys_BS: jax.Array,
) -> jax.Array:
    """Attention by JAX's block-sparse flash kernel for TPUs."""
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q_BTNH * q_BTNH.shape[-1] ** -0.5, k_BSKH, v_BSKH))
    out_BNTH: Any = jax.vmap(kernel)(q, k, v, splash.SegmentIds(queries_BT, keys_BS))
    return out_BNTH.transpose(0, 2, 1, 3)


def _cudnn_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, queries_BT: jax.Array, keys_BS: jax.Array
) -> jax.Array:
    mask_B1TS = (queries_BT[:, :, None] == keys_BS[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_B1TS, is_causal=True, implementation="cudnn")


def attention_before_write(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    cached: tuple[jax.Array, jax.Array],
    mask_BTS: jax.Array,
    slot: jax.Array,
) -> jax.Array:
    """Attention of new tokens to the cache before they are written to it, and to each other; [B, T, N, H].

    The softmax runs over two parts, old slots and new tokens, so that no copy of the cache with the new tokens is made.

    Args:
      mask_BTS: the slots each token may attend to once the new tokens are in slots `slot` .. `slot + T - 1`.
    """
    length, (k_BKHS, v_BKSH) = q_BTNH.shape[1], cached
    slots_11S = jnp.arange(mask_BTS.shape[-1])[None, None]
    old_BTS = mask_BTS & ((slots_11S < slot) | (slots_11S >= slot + length))
    new_BTT = jax.lax.dynamic_slice_in_dim(mask_BTS, slot, length, 2)
    q_BKGTH = _grouped(q_BTNH, k_BTKH.shape[2])
    dtype = q_BTNH.dtype
    parts = [
        (k_BKHS.astype(dtype), v_BKSH.astype(dtype), old_BTS),
        (k_BTKH.transpose(0, 2, 3, 1), v_BTKH.transpose(0, 2, 1, 3), new_BTT),
    ]
    scores = [_scores(q_BKGTH, k_BKHS, mask_BTS) for k_BKHS, _, mask_BTS in parts]
    largest = functools.reduce(jnp.maximum, (score.max(axis=-1, keepdims=True) for score in scores))
    weights = [jnp.exp(score - largest) for score in scores]
    total = sum(weight.sum(axis=-1, keepdims=True) for weight in weights)
    out_BKGTH = sum(
        jnp.einsum("BKGTS,BKSH->BKGTH", (weight / total).astype(dtype), v_BKSH, preferred_element_type=jnp.float32)
        for weight, (_, v_BKSH, _) in zip(weights, parts, strict=True)
    )
    return jnp.asarray(out_BKGTH).astype(dtype).transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


def attention(q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Attention of each query to its unmasked keys; [B, T, N, H] in q's dtype. Scores and softmax in float32."""
    length, q_BKGTH = q_BTNH.shape[1], _grouped(q_BTNH, k_BKHS.shape[1])

    def on_cpu(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        attend = cpu.attend_one if length == 1 else _attend
        return attend(q.astype(jnp.float32), k.astype(jnp.float32), v.astype(jnp.float32), mask).astype(q.dtype)

    out = jax.lax.platform_dependent(q_BKGTH, k_BKHS, v_BKSH, mask_BTS, cpu=on_cpu, default=_attend)
    return out.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


def _attend(q_BKGTH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    k_BKHS, v_BKSH = k_BKHS.astype(q_BKGTH.dtype), v_BKSH.astype(q_BKGTH.dtype)
    weights = jax.nn.softmax(_scores(q_BKGTH, k_BKHS, mask_BTS), axis=-1).astype(q_BKGTH.dtype)
    return jnp.einsum("BKGTS,BKSH->BKGTH", weights, v_BKSH)


def _scores(q_BKGTH: jax.Array, k_BKHS: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    scores = jnp.einsum("BKGTH,BKHS->BKGTS", q_BKGTH, k_BKHS, preferred_element_type=jnp.float32)
    # The smallest finite number, not -inf: with -inf, a padding query without any unmasked key would give NaN.
    return jnp.where(mask_BTS[:, None, None], scores * q_BKGTH.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)


def _grouped(q_BTNH: jax.Array, kv_heads: int) -> jax.Array:
    """[B, K, G, T, H]."""
    batch, length, _, head_dim = q_BTNH.shape
    return q_BTNH.reshape(batch, length, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
