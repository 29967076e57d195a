"""Log-probabilities and losses, in float32.

Shapes: B batch, T tokens, D hidden_size, V vocabulary, N tokens of a chunk, E experts (or a teacher's
hidden_size), X any axes (layers, rows).

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
) -> tuple[jax.Array, TokenScores]:
    """`(cross-entropy, scores of the tokens)`; the first is a sum over all tokens of all devices, each token times its
    weight, float32 [].

    It is that of `token_logprobs`, for three products with the head in place of four: cotangents are known to be the
    weights, so each chunk's gradient is taken while its logits are there. `weights_BT` and the scores have no gradient.
    """
    scores = token_logprobs(hidden_BTD, head_VD, targets_BT)
    return _cross_entropy(scores, weights_BT), scores


def _cross_entropy_forward(*inputs: jax.Array) -> tuple[tuple[jax.Array, TokenScores], tuple[jax.Array, jax.Array]]:
    hidden_BTD, head_VD, targets_BT, weights_BT = inputs
    scores, gradients = _on_mesh(hidden_BTD, head_VD, targets_BT, (-weights_BT, None))
    return (_cross_entropy(scores, weights_BT), scores), gradients


def _cross_entropy_backward(
    gradients: tuple[jax.Array, jax.Array], of_results: tuple[jax.Array, TokenScores]
) -> tuple[jax.Array, jax.Array, None, None]:
    (of_hidden_BTD, of_head_VD), of_sum = gradients, of_results[0]
    return (of_hidden_BTD * of_sum).astype(of_hidden_BTD.dtype), of_head_VD * of_sum, None, None


linear_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _cross_entropy(scores: TokenScores, weights_BT: jax.Array) -> jax.Array:
    # A sum over global arrays whose rows are sharded: this is the all-reduce over the devices' tokens.
    return -(scores.logprob * weights_BT).sum()


def _on_mesh(
    hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, cotangents: _Cotangents | None
) -> tuple[TokenScores, Any]:
    """The scores and, given their cotangents, the gradients by `hidden_BTD` and `head_VD`."""
    mesh = jax.sharding.get_abstract_mesh()
    tokens = partition_spec(("batch", "length"), mesh, targets_BT.shape)
    vocab, embed = _head_axes(head_VD, tokens)

    def local(
        hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, cotangents: _Cotangents | None
    ) -> tuple[TokenScores, Any]:
        """For the tokens and the part of the head of one device. Collectives over no axis do nothing."""
        weight_VD = jax.lax.all_gather(head_VD.astype(hidden_BTD.dtype), embed, axis=1, tiled=True)
        rows, length = targets_BT.shape
        chunks = _num_chunks(rows * length, len(weight_VD))
        parts = jax.tree.map(lambda x: x.reshape(chunks, -1, *x.shape[2:]), (hidden_BTD, targets_BT, cotangents))
        of_head_VD = jnp.zeros(weight_VD.shape if cotangents else (), jnp.float32)  # chunks add up in float32
        of_head_VD, results = jax.lax.scan(functools.partial(_chunk, weight_VD, vocab), of_head_VD, parts)
        scores, of_hidden_BTD = jax.tree.map(lambda x: x.reshape(rows, length, *x.shape[2:]), results)
        if cotangents is None:
            return scores, None
        return scores, _sum_gradients(of_hidden_BTD, of_head_VD, head_VD.dtype, spec_axes(tokens), vocab, embed)

    if mesh.empty:
        return local(hidden_BTD, head_VD, targets_BT, cotangents)
    hidden, head = jax.sharding.PartitionSpec(*tokens, None), jax.sharding.PartitionSpec(vocab, embed)
    out_specs = (tokens, None if cotangents is None else (hidden, head))
    split = jax.shard_map(local, in_specs=(hidden, head, tokens, tokens), out_specs=out_specs, check_vma=False)
    return split(hidden_BTD, head_VD, targets_BT, cotangents)


def _head_axes(head_VD: jax.Array, tokens: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes that share the vocabulary of a head, and those that its width is all-gathered over.

    A token's logits must be on devices that hold the same tokens, and the parts of a gathered head on devices that hold
    others: sums then have each token and each part of the head once, whatever the axis rules.
    """
    token_axes = spec_axes(tokens)
    spec = partition_spec(("vocab", "embed"), jax.sharding.get_abstract_mesh(), head_VD.shape)
    vocab = tuple(axis for axis in spec_axes(spec[:1]) if axis not in token_axes)
    return vocab, tuple(axis for axis in spec_axes(spec[1:]) if axis in token_axes)


def _sum_gradients(
    of_hidden_BTD: jax.Array,
    of_head_VD: jax.Array,
    dtype: Any,
    token_axes: tuple[str, ...],
    vocab: tuple[str, ...],
    embed: tuple[str, ...],
) -> tuple[jax.Array, jax.Array]:
    """One device's gradients to those of all of them.

    The gradient of a token is a sum over the vocabulary, whose parts are on several devices: an all-reduce. That of the
    head is a sum over all tokens: a reduce-scatter (the all-gather's transpose), then an all-reduce.
    """
    of_head_VD = of_head_VD.astype(of_hidden_BTD.dtype)
    of_head_VD = jax.lax.psum_scatter(of_head_VD, embed, scatter_dimension=1, tiled=True)
    of_head_VD = jax.lax.psum(of_head_VD, tuple(axis for axis in token_axes if axis not in embed))
    return jax.lax.psum(of_hidden_BTD, vocab), of_head_VD.astype(dtype)


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


def divergence_loss(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    teacher_hidden_BTE: jax.Array,
    teacher_head_VE: jax.Array,
    weights_BT: jax.Array,
    *,
    beta: float,
    temperature: float = 1.0,
) -> jax.Array:
    """The weighted mean of `token_divergences`, float32 []; 0 where all weights are. Differentiable by `hidden_BTD` and
    `head_VD`."""
    share_BT = weights_BT / jnp.maximum(weights_BT.sum(), jnp.finfo(jnp.float32).tiny)
    loss, _ = token_divergences(
        hidden_BTD, head_VD, teacher_hidden_BTE, teacher_head_VE, share_BT, beta=beta, temperature=temperature
    )
    return loss


def token_divergences(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    teacher_hidden_BTE: jax.Array,
    teacher_head_VE: jax.Array,
    weights_BT: jax.Array,
    *,
    beta: float,
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """`(sum of J times weight, J of each token [B, T])`, how far a student is from its teacher, float32, in nats.

    P is the teacher's distribution over the whole vocabulary and Q the student's, both at `temperature`. The
    generalised Jensen-Shannon divergence (Agarwal et al. 2024, arXiv 2306.13649) is with M = beta P + (1 - beta) Q

        J = beta KL(P || M) + (1 - beta) KL(Q || M)

    and, since that tends to 0 at both ends, KL(P || Q) at beta 0 and KL(Q || P) at beta 1. Where P and Q are equal, J
    and its gradient are exactly 0. The sum is differentiable by `hidden_BTD` and `head_VD`: its gradient is made in the
    same pass, chunk by chunk. The teacher, the weights and the second result have no gradient.

    E: hidden_size of the teacher, whose vocabulary is the student's.

    Raises:
      ValueError: the vocabularies differ, beta is outside [0, 1], or the temperature is not above 0.
    """
    if len(head_VD) != len(teacher_head_VE):
        raise ValueError(f"teacher: {len(teacher_head_VE)} entries; use one with the student's {len(head_VD)}")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: {beta!r}; use a number in [0, 1]")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: {temperature!r}; use a number above 0")
    kind = (float(beta), float(temperature))
    return _divergences(kind, hidden_BTD, head_VD, teacher_hidden_BTE, teacher_head_VE, weights_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergences(kind: tuple[float, float], *inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    divergence_BT, _ = _divergences_on_mesh(kind, *inputs, takes_gradient=False)
    return (divergence_BT * inputs[-1]).sum(), divergence_BT


def _divergences_forward(kind: tuple[float, float], *inputs: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Any]:
    divergence_BT, gradients = _divergences_on_mesh(kind, *inputs, takes_gradient=True)
    return ((divergence_BT * inputs[-1]).sum(), divergence_BT), gradients


def _divergences_backward(kind: tuple[float, float], gradients: Any, of_results: tuple[jax.Array, jax.Array]) -> Any:
    of_hidden_BTD, of_head_VD = gradients
    of_sum = of_results[0]
    return (of_hidden_BTD * of_sum).astype(of_hidden_BTD.dtype), of_head_VD * of_sum, None, None, None


_divergences.defvjp(_divergences_forward, _divergences_backward)


def _divergences_on_mesh(
    kind: tuple[float, float],
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    teacher_hidden_BTE: jax.Array,
    teacher_head_VE: jax.Array,
    weights_BT: jax.Array,
    *,
    takes_gradient: bool,
) -> tuple[jax.Array, Any]:
    """J of each token and, if asked for, the gradients of the weighted sum by `hidden_BTD` and `head_VD`."""
    mesh = jax.sharding.get_abstract_mesh()
    tokens = partition_spec(("batch", "length"), mesh, weights_BT.shape)
    # The same rows of both heads must meet: the teacher's vocabulary is split as the student's is.
    vocab, embed = _head_axes(head_VD, tokens)
    _, teacher_embed = _head_axes(teacher_head_VE, tokens)

    def local(hidden_BTD: jax.Array, head_VD: jax.Array, *others: jax.Array) -> tuple[jax.Array, Any]:
        """For the tokens and the parts of the heads of one device."""
        teacher_hidden_BTE, teacher_head_VE, weights_BT = others
        weight_VD = jax.lax.all_gather(head_VD.astype(hidden_BTD.dtype), embed, axis=1, tiled=True)
        teacher_VE = teacher_head_VE.astype(teacher_hidden_BTE.dtype)
        teacher_VE = jax.lax.all_gather(teacher_VE, teacher_embed, axis=1, tiled=True)
        rows, length = weights_BT.shape
        chunks = _num_chunks(rows * length, 2 * len(weight_VD))
        inputs = (hidden_BTD, teacher_hidden_BTE, weights_BT)
        parts = jax.tree.map(lambda x: x.reshape(chunks, -1, *x.shape[2:]), inputs)
        of_head_VD = jnp.zeros(weight_VD.shape if takes_gradient else (), jnp.float32)
        step = functools.partial(_divergence_chunk, kind, weight_VD, teacher_VE, vocab, takes_gradient)
        of_head_VD, results = jax.lax.scan(step, of_head_VD, parts)
        divergence_BT, of_hidden_BTD = jax.tree.map(lambda x: x.reshape(rows, length, *x.shape[2:]), results)
        if not takes_gradient:
            return divergence_BT, None
        gradients = _sum_gradients(of_hidden_BTD, of_head_VD, head_VD.dtype, spec_axes(tokens), vocab, embed)
        return divergence_BT, gradients

    inputs = (hidden_BTD, head_VD, teacher_hidden_BTE, teacher_head_VE, weights_BT)
    if mesh.empty:
        return local(*inputs)
    spec = jax.sharding.PartitionSpec
    hidden, head, teacher_head = spec(*tokens, None), spec(vocab, embed), spec(vocab, teacher_embed)
    in_specs = (hidden, head, hidden, teacher_head, tokens)
    out_specs = (tokens, (hidden, head) if takes_gradient else None)
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*inputs)


def _divergence_chunk(
    kind: tuple[float, float],
    weight_VD: jax.Array,
    teacher_VE: jax.Array,
    vocab: tuple[str, ...],
    takes_gradient: bool,
    of_head_VD: jax.Array,
    tokens: Any,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array | None]]:
    """J of some tokens and their gradient; that of the head is added to `of_head_VD`."""
    beta, temperature = kind
    x_ND, teacher_NE, weight_N = tokens
    pairs = ((teacher_NE, teacher_VE), (x_ND, weight_VD))
    # One array of both: two softmaxes may be compiled to different roundings, and equal ones would differ a little.
    logits = [jnp.einsum("ND,VD->NV", x, weight, preferred_element_type=jnp.float32) for x, weight in pairs]
    scaled_2NV = jnp.stack(logits) / temperature
    peak_2N1 = jax.lax.pmax(scaled_2NV.max(axis=-1, keepdims=True), vocab)
    total_2N1 = jax.lax.psum(jnp.exp(scaled_2NV - peak_2N1).sum(axis=-1, keepdims=True), vocab)
    log_total_2N1 = peak_2N1 + jnp.log(total_2N1)
    p_NV, q_NV = jnp.exp(scaled_2NV - log_total_2N1)
    # log Q/P from the difference of the logits, not of two logarithms: 0 where they are equal, in any rounding.
    ratio_NV = (logits[1] - logits[0]) / temperature - (log_total_2N1[1] - log_total_2N1[0])
    below_NV, above_NV = jnp.minimum(ratio_NV, 0), jnp.maximum(ratio_NV, 0)
    if beta == 0:  # KL(P || Q)
        divergence_N = jax.lax.psum((p_NV * -ratio_NV).sum(axis=1), vocab)
        of_logits_NV = jnp.where(ratio_NV <= 0, p_NV * jnp.expm1(below_NV), -q_NV * jnp.expm1(-above_NV))  # Q - P
    elif beta == 1:  # KL(Q || P)
        divergence_N = jax.lax.psum((q_NV * ratio_NV).sum(axis=1), vocab)
        of_logits_NV = q_NV * (ratio_NV - divergence_N[:, None])
    else:
        # log M/P, without overflow on either side of Q = P, and exactly 0 there, as a logaddexp is not.
        of_below_NV = jnp.log1p((1 - beta) * jnp.expm1(below_NV))
        of_above_NV = ratio_NV + jnp.log1p(beta * jnp.expm1(-above_NV))
        mixed_NV = jnp.where(ratio_NV <= 0, of_below_NV, of_above_NV)
        sums = (p_NV * -mixed_NV).sum(axis=1), (q_NV * (ratio_NV - mixed_NV)).sum(axis=1)
        of_p_N, of_q_N = jax.lax.psum(sums, vocab)  # KL(P || M) and KL(Q || M)
        divergence_N = beta * of_p_N + (1 - beta) * of_q_N
        of_logits_NV = (1 - beta) * q_NV * (ratio_NV - mixed_NV - of_q_N[:, None])
    if not takes_gradient:
        return of_head_VD, (divergence_N, None)
    of_logits_NV *= weight_N[:, None] / temperature
    of_logits_NV = cpu.write_once(of_logits_NV.astype(x_ND.dtype))
    of_head_VD += jnp.einsum("NV,ND->VD", of_logits_NV, x_ND, preferred_element_type=jnp.float32)
    return of_head_VD, (divergence_N, of_logits_NV @ weight_VD)


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
