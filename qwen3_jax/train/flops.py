"""Arithmetic of a training step and what the hardware could do."""

from __future__ import annotations

import timeit
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen3_jax.chips import BY_DEVICE_KIND
from qwen3_jax.config import ModelConfig


def train_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs that one token's forward and backward pass needs: 6 per active matmul weight, and causal attention.

    What is recomputed (remat) or padded (expert capacity) does not count: it is overhead, not use.
    """
    matmul = config.num_active_params
    if not config.tie_word_embeddings:
        matmul -= config.vocab_size * config.hidden_size  # looked up, not multiplied
    heads = config.num_attention_heads * config.head_dim
    # Scores and values, forward and backward: 12 * T * heads, halved by the causal mask.
    return 6.0 * matmul + 6.0 * config.num_hidden_layers * heads * sequence_length


def peak_flops(devices: Sequence[jax.Device], dtype: str) -> tuple[float, str]:
    """`(FLOP/s of all devices together, where the figure is from)`. `dtype`: that the step computes in."""
    kind = devices[0].device_kind
    if kind in BY_DEVICE_KIND:
        return BY_DEVICE_KIND[kind].peak_flops * len(devices), f"data sheet of {kind}"
    # For others, above all CPUs, whose virtual devices share one set of cores: a matmul on each of this process's
    # devices at once, the best of four.
    n, own = 512 if devices[0].platform == "cpu" else 8192, jax.local_devices()
    mesh = Mesh(np.array(own), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec("device"))
    with jax.set_mesh(mesh):
        x = jax.jit(lambda: jnp.ones((len(own), n, n), dtype), out_shardings=sharding)()
        multiply = jax.jit(jnp.matmul, out_shardings=sharding).lower(x, x).compile()
    best = min(timeit.repeat(lambda: multiply(x, x).block_until_ready(), number=1, repeat=4))
    return 2 * n**3 * len(devices) / best, f"{dtype} matmuls of {n} on {len(own)} x {kind}, measured"
