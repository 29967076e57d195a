"""Log-probabilities and losses, in float32.

Shapes: B batch, T tokens, D hidden_size, V vocabulary, N tokens of a chunk, E experts, X any axes (layers, rows).

Logits [B, T, V] are the largest array of a training step by far, so they exist for a chunk of N tokens at a time. A
chunk is recomputed, or its gradient is taken at once; no chunk is kept. On a mesh one device has this part of a chunk:

    hidden_ND   the device's own tokens (axes "batch" and "length")
    head_VD     its rows of the vocabulary (axis "vocab"), all-gathered over "embed" once for all chunks
    logits_NV   its tokens by its rows; a softmax over V is global after a pmax and a psum of [N] over "vocab"
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qwen3_jax.ops import cpu
from sharding import partition_spec, spec_axes

_CHUNK_BYTES = 2**31  # of float32 logits at a time, on each device


class TokenScores(NamedTuple):
    """How the model rates given tokens. Float32 [B, T] each, in nats.

    logprob: log-probability of the target. entropy: of the distribution that the target is from.
    is_best: 1 where no token is more probable than the target, else 0; it has no gradient.
    """

    logprob: jax.Array
    entropy: jax.Array
    is_best: jax.Array


_Cotangents = tuple[jax.Array, jax.Array | None]  # of logprob and entropy


@jax.custom_vjp
def token_logprobs(hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array) -> TokenScores:
    """What softmax(hidden head^T) gives to the targets; differentiable by `hidden_BTD` and `head_VD`.

    The backward pass computes the logits a second time, chunk by chunk.
    """
    return _on_mesh(hidden_BTD, head_VD, targets_BT, None)[0]


def _logprobs_forward(*inputs: Any) -> tuple[TokenScores, Any]:
    return token_logprobs(*inputs), inputs


def _logprobs_backward(inputs: Any, of_scores: TokenScores) -> tuple[jax.Array, jax.Array, None]:
    hidden_BTD, head_VD, targets_BT = inputs
    _, gradients = _on_mesh(hidden_BTD, head_VD, targets_BT, (of_scores.logprob, of_scores.entropy))
    return *gradients, None


token_logprobs.defvjp(_logprobs_forward, _logprobs_backward)


@jax.custom_vjp
def linear_cross_entropy(
    hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`(cross-entropy, how often the target is the most probable token)`: two sums over all tokens of all devices, each
    token times its weight, float32 [].

    The sums of `token_logprobs`, for three products with the head in place of four: cotangents are known to be the
    weights, so each chunk's gradient is taken while its logits are there. `weights_BT` has no gradient.
    """
    return _weighted_sums(token_logprobs(hidden_BTD, head_VD, targets_BT), weights_BT)


def _cross_entropy_forward(*inputs: jax.Array) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    hidden_BTD, head_VD, targets_BT, weights_BT = inputs
    scores, gradients = _on_mesh(hidden_BTD, head_VD, targets_BT, (-weights_BT, None))
    return _weighted_sums(scores, weights_BT), gradients


def _cross_entropy_backward(
    gradients: tuple[jax.Array, jax.Array], of_sums: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None, None]:
    of_hidden_BTD, of_head_VD = gradients
    return (of_hidden_BTD * of_sums[0]).astype(of_hidden_BTD.dtype), of_head_VD * of_sums[0], None, None


linear_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _weighted_sums(scores: TokenScores, weights_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Sums over global arrays whose rows are sharded: these are the all-reduce over the devices' tokens.
    return -(scores.logprob * weights_BT).sum(), (scores.is_best * weights_BT).sum()


def _on_mesh(
    hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, cotangents: _Cotangents | None
) -> tuple[TokenScores, Any]:
    """The scores and, given their cotangents, the gradients by `hidden_BTD` and `head_VD`."""
    mesh = jax.sharding.get_abstract_mesh()
    tokens = partition_spec(("batch", "length"), mesh, targets_BT.shape)
    token_axes = spec_axes(tokens)
    # A token's logits must be on devices that hold the same tokens, and the parts of a gathered head on devices that
    # hold others: the sums below then have each token and each part of the head once, whatever the axis rules.
    head_axes = partition_spec(("vocab", "embed"), mesh, head_VD.shape)
    vocab = tuple(axis for axis in spec_axes(head_axes[:1]) if axis not in token_axes)
    embed = tuple(axis for axis in spec_axes(head_axes[1:]) if axis in token_axes)

    def local(
        hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, cotangents: _Cotangents | None
    ) -> tuple[TokenScores, Any]:
        """For the tokens and the part of the head of one device. Collectives over no axis do nothing."""
        weight_VD = jax.lax.all_gather(head_VD.astype(hidden_BTD.dtype), embed, axis=1, tiled=True)
        rows, length = targets_BT.shape
        chunks = _num_chunks(rows * length, len(weight_VD))
        tokens = jax.tree.map(lambda x: x.reshape(chunks, -1, *x.shape[2:]), (hidden_BTD, targets_BT, cotangents))
        of_head_VD = jnp.zeros(weight_VD.shape if cotangents else (), jnp.float32)  # chunks add up in float32
        of_head_VD, results = jax.lax.scan(functools.partial(_chunk, weight_VD, vocab), of_head_VD, tokens)
        scores, of_hidden_BTD = jax.tree.map(lambda x: x.reshape(rows, length, *x.shape[2:]), results)
        if cotangents is None:
            return scores, None
        # The gradient of a token is a sum over the vocabulary, whose parts are on several devices: an all-reduce. That
        # of the head is a sum over all tokens: a reduce-scatter (the all-gather's transpose), then an all-reduce.
        of_hidden_BTD = jax.lax.psum(of_hidden_BTD, vocab)
        of_head_VD = of_head_VD.astype(hidden_BTD.dtype)
        of_head_VD = jax.lax.psum_scatter(of_head_VD, embed, scatter_dimension=1, tiled=True)
        of_head_VD = jax.lax.psum(of_head_VD, tuple(axis for axis in token_axes if axis not in embed))
        return scores, (of_hidden_BTD, of_head_VD.astype(head_VD.dtype))

    if mesh.empty:
        return local(hidden_BTD, head_VD, targets_BT, cotangents)
    hidden, head = jax.sharding.PartitionSpec(*tokens, None), jax.sharding.PartitionSpec(vocab, embed)
    out_specs = (tokens, None if cotangents is None else (hidden, head))
    split = jax.shard_map(local, in_specs=(hidden, head, tokens, tokens), out_specs=out_specs, check_vma=False)
    return split(hidden_BTD, head_VD, targets_BT, cotangents)


def _chunk(
    weight_VD: jax.Array, vocab: tuple[str, ...], of_head_VD: jax.Array, tokens: Any
) -> tuple[jax.Array, tuple[TokenScores, jax.Array | None]]:
    """The scores of some tokens and, given cotangents, their gradients; that of the head is added to `of_head_VD`."""
    x_ND, target_N, cotangents = tokens
    ids_V = jax.lax.axis_index(vocab) * len(weight_VD) + jnp.arange(len(weight_VD))
    logits_NV = jnp.einsum("ND,VD->NV", x_ND, weight_VD, preferred_element_type=jnp.float32)
    is_target_NV = target_N[:, None] == ids_V[None]
    peak_N = jax.lax.pmax(logits_NV.max(axis=1), vocab)
    shifted_NV = logits_NV - peak_N[:, None]
    exp_NV = jnp.exp(shifted_NV)
    sums = exp_NV.sum(axis=1), (exp_NV * shifted_NV).sum(axis=1), jnp.where(is_target_NV, logits_NV, 0).sum(axis=1)
    # From here on softmax is over the whole vocabulary: this is the all-reduce over the parts of the head.
    total_N, shifted_N, target_logit_N = jax.lax.psum(sums, vocab)
    log_total_N = jnp.log(total_N)
    entropy_N = log_total_N - shifted_N / total_N
    is_best_N = (target_logit_N >= peak_N).astype(jnp.float32)
    scores = TokenScores(target_logit_N - (log_total_N + peak_N), entropy_N, is_best_N)
    if cotangents is None:
        return of_head_VD, (scores, None)
    of_logprob_N, of_entropy_N = cotangents
    probs_NV = exp_NV / total_N[:, None]
    of_logits_NV = (is_target_NV - probs_NV) * of_logprob_N[:, None]
    if of_entropy_N is not None:  # dH/dlogit = -p (log p + H)
        log_probs_NV = shifted_NV - log_total_N[:, None]
        of_logits_NV -= probs_NV * (log_probs_NV + entropy_N[:, None]) * of_entropy_N[:, None]
    of_logits_NV = cpu.write_once(of_logits_NV.astype(x_ND.dtype))
    of_head_VD += jnp.einsum("NV,ND->VD", of_logits_NV, x_ND, preferred_element_type=jnp.float32)
    return of_head_VD, (scores, of_logits_NV @ weight_VD)


def _num_chunks(tokens: int, vocab: int) -> int:
    """The smallest number of equal chunks of at most `_CHUNK_BYTES` of logits."""
    smallest = -(-tokens * vocab * 4 // _CHUNK_BYTES)
    return next(n for n in range(smallest, tokens + 1) if tokens % n == 0)


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
