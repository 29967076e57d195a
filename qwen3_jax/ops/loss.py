"""Losses, in float32.

Shapes: B batch, T tokens, D hidden_size, V vocabulary, N tokens of a chunk, E experts, X any axes (layers, rows).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from qwen3_jax.ops import cpu
from sharding import partition_spec, split_axes

_HEAD_AXES = ("vocab", "embed")
_CHUNK_BYTES = 2**31  # of float32 logits at a time, on each device


@jax.custom_vjp
def linear_cross_entropy(
    hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of the logits `hidden head^T`, and how often the target has the largest: two sums over all tokens,
    each times its weight, float32 [].

    The logits, the largest array of a training step by far, exist for a chunk of tokens at a time, and once: their
    gradients are taken where they are made. (The plain form would keep them, or compute them twice.) On a mesh the head
    is gathered over its "embed" axis for all chunks together, and its gradient is scattered back once. `weights_BT` has
    no gradient.
    """
    return _on_mesh(hidden_BTD, head_VD, targets_BT, weights_BT, gradient=False)[0]


def _forward(
    hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    sums, gradients = _on_mesh(hidden_BTD, head_VD, targets_BT, weights_BT, gradient=True)
    assert gradients is not None
    return sums, gradients


def _backward(
    gradients: tuple[jax.Array, jax.Array], of_sums: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None, None]:
    of_hidden_BTD, of_head_VD = gradients
    of_loss, _ = of_sums
    return (of_hidden_BTD * of_loss).astype(of_hidden_BTD.dtype), of_head_VD * of_loss, None, None


linear_cross_entropy.defvjp(_forward, _backward)


def _on_mesh(
    hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, *, gradient: bool
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array] | None]:
    """The two sums and, if asked for, the gradients of the first by `hidden_BTD` and `head_VD`."""
    local = functools.partial(_local, gradient=gradient)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(hidden_BTD, head_VD, targets_BT, weights_BT)
    tokens = partition_spec(("batch", "length"), mesh, targets_BT.shape)
    hidden = partition_spec(("batch", "length", None), mesh, hidden_BTD.shape)
    head = partition_spec(_HEAD_AXES, mesh, head_VD.shape)
    none = jax.sharding.PartitionSpec()
    out_specs = ((none, none), (hidden, head) if gradient else None)
    split = jax.shard_map(local, in_specs=(hidden, head, tokens, tokens), out_specs=out_specs, check_vma=False)
    return split(hidden_BTD, head_VD, targets_BT, weights_BT)


def _local(
    hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, *, gradient: bool
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array] | None]:
    """`_on_mesh` for the tokens and the part of the head of one device."""
    dtype, embed, vocab = hidden_BTD.dtype, split_axes("embed"), split_axes("vocab")
    token_axes = split_axes("batch") + split_axes("length")
    weight_VD = head_VD.astype(dtype)
    if embed:
        weight_VD = jax.lax.all_gather(weight_VD, embed, axis=1, tiled=True)
    rows = jnp.arange(len(weight_VD)) + (jax.lax.axis_index(vocab) * len(weight_VD) if vocab else 0)

    def chunk(
        of_head_VD: jax.Array, tokens: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array | None]]:
        x_ND, target_N, weight_N = tokens
        logits_NV = jnp.einsum("ND,VD->NV", x_ND, weight_VD, preferred_element_type=jnp.float32)
        is_target_NV = target_N[:, None] == rows
        largest_N = logits_NV.max(axis=1)
        peak_N = jax.lax.pmax(largest_N, vocab) if vocab else largest_N
        exp_NV = jnp.exp(logits_NV - peak_N[:, None])
        total_N, of_target_N = exp_NV.sum(axis=1), jnp.where(is_target_NV, logits_NV, 0).sum(axis=1)
        if vocab:
            total_N, of_target_N = jax.lax.psum((total_N, of_target_N), vocab)
        loss = ((jnp.log(total_N) + peak_N - of_target_N) * weight_N).sum()
        best = ((of_target_N >= peak_N) * weight_N).sum()
        if not gradient:
            return of_head_VD, (loss, best, None)
        of_logits_NV = (exp_NV / total_N[:, None] - is_target_NV) * weight_N[:, None]
        of_logits_NV = cpu.write_once(of_logits_NV.astype(dtype))
        of_head_VD += jnp.einsum("NV,ND->VD", of_logits_NV, x_ND, preferred_element_type=jnp.float32)
        return of_head_VD, (loss, best, of_logits_NV @ weight_VD)

    tokens = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), targets_BT.reshape(-1), weights_BT.reshape(-1)
    chunks = _num_chunks(targets_BT.size, len(weight_VD))
    tokens = jax.tree.map(lambda x: x.reshape(chunks, -1, *x.shape[1:]), tokens)
    of_head_VD, parts = jax.lax.scan(chunk, jnp.zeros(weight_VD.shape if gradient else (), jnp.float32), tokens)
    loss, best, of_hidden = parts
    sums = jax.tree.map(lambda x: jax.lax.psum(x.sum(), token_axes), (loss, best))
    if of_hidden is None:
        return sums, None
    if vocab:
        of_hidden = jax.lax.psum(of_hidden, vocab)
    of_head_VD = of_head_VD.astype(dtype)
    if embed:
        of_head_VD = jax.lax.psum_scatter(of_head_VD, embed, scatter_dimension=1, tiled=True)
    of_head_VD = jax.lax.psum(of_head_VD, tuple(axis for axis in token_axes if axis not in embed))
    return sums, (of_hidden.reshape(hidden_BTD.shape), of_head_VD.astype(head_VD.dtype))


def _num_chunks(tokens: int, vocab: int) -> int:
    """The fewest that divide the tokens into chunks of at most `_CHUNK_BYTES` of logits."""
    least = -(-tokens * vocab * 4 // _CHUNK_BYTES)
    return next(n for n in range(least, tokens + 1) if tokens % n == 0)


def load_balance_loss(counts_XE: jax.Array, prob_sum_XE: jax.Array, tokens_X: jax.Array) -> jax.Array:
    """E * sum_i f_i p_i, [X]; 1 when balanced, 0 without tokens (Qiu et al. 2025, arXiv 2501.11873).

    f_i is the share of the choices that went to expert i (no gradient), p_i the mean softmax probability. Which tokens
    the loss is balanced over is decided by the sums given: those of all devices and all micro-batches of a step make
    it the global-batch loss. `counts_XE` may cover more tokens than `prob_sum_XE`, and so may `tokens_X`: it is then a
    part of the loss of the tokens that `tokens_X` counts.
    """
    counts_XE = jax.lax.stop_gradient(counts_XE)
    fraction_XE = counts_XE / jnp.maximum(counts_XE.sum(axis=-1, keepdims=True), 1)
    prob_XE = prob_sum_XE / jnp.maximum(tokens_X, 1)[..., None]
    return counts_XE.shape[-1] * (fraction_XE * prob_XE).sum(axis=-1)
