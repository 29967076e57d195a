"""Choosing the next token, each row by its own settings and its own random key.

Penalties come first, then filters in the order temperature, top-k, top-p, min-p, as in transformers. There is no sort:
the smallest logit that stays is found by bisection over the bits of a float32, in 32 passes over the vocabulary
whatever k and p are. Equal logits stay or go together.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Sampling:
    """Sampling settings of each row.

    temperature_B: 0 is greedy. top_p_B: 1 keeps all. top_k_B: 0 keeps all. min_p_B: 0 keeps all.
    presence_B: taken off the logits of tokens that the row has sampled. frequency_B: the same, times how often.
    seed_B: the request's own seed, uint32. sample_B: which of its samples the row is.
    """

    temperature_B: jax.Array
    top_p_B: jax.Array
    top_k_B: jax.Array
    min_p_B: jax.Array
    presence_B: jax.Array
    frequency_B: jax.Array
    seed_B: jax.Array
    sample_B: jax.Array


def row_keys(settings: Sampling, position_B: jax.Array) -> jax.Array:
    """[B] keys, folded from a row's seed, its sample number and the position of the token to draw.

    Neither the slot nor the batch enters, nor how many draws were discarded: a row's tokens are its own.
    """

    def key(seed: jax.Array, sample: jax.Array, position: jax.Array) -> jax.Array:
        base = jax.random.key(seed, impl="threefry2x32")
        return jax.random.fold_in(jax.random.fold_in(base, sample), position)

    return jax.vmap(key)(settings.seed_B, settings.sample_B, position_B)


def _largest_threshold(keys_BV: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """[B] largest uint32 t for which `enough(keys >= t)` holds, given that it holds for 0 and is monotone in t."""

    def bit(i: jax.Array, threshold_B: jax.Array) -> jax.Array:
        candidate_B = threshold_B | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(enough(keys_BV >= candidate_B[:, None]), candidate_B, threshold_B)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros(keys_BV.shape[0], jnp.uint32))


def _ordered_bits(x: jax.Array) -> jax.Array:
    """float32 to uint32, order kept."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0, x), jnp.uint32)  # -0.0 and 0.0 are equal
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def filter_logits(logits_BV: jax.Array, settings: Sampling) -> jax.Array:
    """Logits after temperature, with -inf where top-k, top-p or min-p forbids the token."""
    scaled_BV = logits_BV / jnp.where(settings.temperature_B > 0, settings.temperature_B, 1)[:, None]
    keys_BV = _ordered_bits(scaled_BV)
    k_B = jnp.where(settings.top_k_B > 0, settings.top_k_B, logits_BV.shape[-1])
    keep_BV = keys_BV >= _largest_threshold(keys_BV, lambda m: m.sum(axis=-1) >= k_B)[:, None]
    probs_BV = jax.nn.softmax(jnp.where(keep_BV, scaled_BV, -jnp.inf), axis=-1)
    top_p_B = settings.top_p_B
    threshold_B = _largest_threshold(keys_BV, lambda m: jnp.where(m, probs_BV, 0).sum(axis=-1) >= top_p_B)
    keep_BV &= (keys_BV >= threshold_B[:, None]) | (top_p_B >= 1)[:, None]
    keep_BV &= probs_BV >= settings.min_p_B[:, None] * probs_BV.max(axis=-1, keepdims=True)
    return jnp.where(keep_BV, scaled_BV, -jnp.inf)


def penalise(logits_BV: jax.Array, counts_BV: jax.Array, settings: Sampling) -> jax.Array:
    """Logits less the penalties for what the row sampled before, `counts_BV` times each; forced tokens and the prompt
    count in none (the presence and frequency penalties of the OpenAI API)."""

    def less() -> jax.Array:
        counts = counts_BV.astype(jnp.float32)
        return logits_BV - settings.presence_B[:, None] * (counts > 0) - settings.frequency_B[:, None] * counts

    return jax.lax.cond(((settings.presence_B != 0) | (settings.frequency_B != 0)).any(), less, lambda: logits_BV)


def choose(
    logits_BV: jax.Array, allowed_BV: jax.Array, counts_BV: jax.Array, settings: Sampling, position_B: jax.Array
) -> jax.Array:
    """[B] next tokens: the likeliest allowed one where temperature is 0, else a draw from the filtered distribution."""
    logits_BV = jnp.where(allowed_BV, penalise(logits_BV, counts_BV, settings), -jnp.inf)
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def sample() -> jax.Array:
        filtered_BV = filter_logits(logits_BV, settings)
        draw_B = jax.vmap(jax.random.categorical)(row_keys(settings, position_B), filtered_BV)
        return jnp.where(settings.temperature_B > 0, draw_B.astype(jnp.int32), greedy_B)

    return jax.lax.cond((settings.temperature_B > 0).any(), sample, lambda: greedy_B)
