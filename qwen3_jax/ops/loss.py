"""Losses, in float32. Shapes: B batch, T tokens, V vocabulary, L layers, E experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Negative log-likelihood of each target, [B, T] float32."""
    logits = logits_BTV.astype(jnp.float32)
    target = jnp.take_along_axis(logits, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - target


def load_balance_loss(counts_LE: jax.Array, prob_sum_LE: jax.Array, tokens_L: jax.Array) -> jax.Array:
    """E * sum_i f_i p_i, averaged over layers; 1 when balanced (Qiu et al. 2025, arXiv 2501.11873).

    f_i is the share of the choices that went to expert i (no gradient), p_i the mean softmax probability. Which batch
    the loss is balanced over is decided by the sums given: those of all devices and all micro-batches of a step make
    it the global-batch loss. `counts_LE` may cover more tokens than `prob_sum_LE`, which must cover `tokens_L`.
    """
    counts_LE = jax.lax.stop_gradient(counts_LE)
    fraction_LE = counts_LE / jnp.maximum(counts_LE.sum(axis=-1, keepdims=True), 1)
    prob_LE = prob_sum_LE / jnp.maximum(tokens_L, 1)[:, None]
    return (counts_LE.shape[-1] * (fraction_LE * prob_LE).sum(axis=-1)).mean()
