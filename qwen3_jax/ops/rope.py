"""Rotary position embedding (Su et al. 2021) with adjusted base frequency and YaRN (Peng et al. 2023).

Shapes: B batch, T tokens, N heads, H head_dim, R = H / 2 rotation planes.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_jax.config import ModelConfig


def rope_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """`(inverse frequencies [R] in radians per position, float32; factor on cos and sin)`, computed as in transformers.

    With YaRN, planes that rotate more than `beta_fast` times over the original length keep their frequency. Planes that
    rotate less than `beta_slow` times have it divided by `factor`. The planes between are blended linearly.
    """
    dim, base = config.head_dim, config.rope_theta
    # Each step in float32, as in the reference: at position 100,000 a difference in rounding becomes visible.
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    plain = np.float32(1.0) / np.power(np.float32(base), exponents, dtype=np.float32)
    yarn = config.rope_scaling
    if yarn is None:
        return plain, 1.0

    def plane_of(rotations: float) -> float:
        return dim * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(plane_of(yarn.beta_fast)), 0)
    high = min(math.ceil(plane_of(yarn.beta_slow)), dim - 1)
    ramp = (np.arange(dim // 2, dtype=np.float32) - low) / np.float32(max(high - low, 0.001))
    unscaled = 1 - np.clip(ramp, 0, 1)
    blended = plain / np.float32(yarn.factor) * (1 - unscaled) + plain * unscaled
    factor = yarn.attention_factor
    if factor is None:
        factor = 0.1 * math.log(yarn.factor) + 1.0
    return blended.astype(np.float32), factor


def rope_tables(config: ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`(cos, sin)` [B, T, R] in float32 for integer positions."""
    inverse_R, factor = rope_frequencies(config)
    angles_BTR = positions_BT.astype(jnp.float32)[..., None] * inverse_R[None, None]
    return jnp.cos(angles_BTR) * factor, jnp.sin(angles_BTR) * factor


def apply_rope(x_BTNH: jax.Array, cos_BTR: jax.Array, sin_BTR: jax.Array) -> jax.Array:
    """Rotates planes (i, i + R) of each head, the half-split layout of the released weights."""
    dtype = x_BTNH.dtype
    cos, sin = cos_BTR[:, :, None].astype(dtype), sin_BTR[:, :, None].astype(dtype)
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
