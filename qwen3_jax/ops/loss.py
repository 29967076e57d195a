"""Losses, in float32. Shapes: B batch, T tokens, V vocabulary, E experts, X any axes (layers, rows)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Negative log-likelihood of each target, [B, T] float32."""
    logits = logits_BTV.astype(jnp.float32)
    return jax.nn.logsumexp(logits, axis=-1) - _of_target(logits, targets_BT)


def is_best(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """[B, T] bool: no logit is above the target's."""
    # The largest is at hand from the softmax, where an argmax would go over the vocabulary once more.
    return _of_target(logits_BTV, targets_BT) >= logits_BTV.max(axis=-1)


def _of_target(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]


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
