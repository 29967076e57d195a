"""Root-mean-square normalisation (Zhang and Sennrich 2019)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """`scale * x / rms(x)` over the last axis, computed in float32, returned in x's dtype.

    The rounding to x's dtype comes before the scale, as in the PyTorch reference.
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return jnp.expand_dims(scale.astype(x.dtype), tuple(range(x.ndim - 1))) * normed.astype(x.dtype)
