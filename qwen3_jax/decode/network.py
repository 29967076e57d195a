"""The network as the loop calls it.

Shapes: B rows, T tokens, D hidden_size.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qwen3_jax.cache import KVCache
from qwen3_jax.decode.loop import Forward, last_place
from qwen3_jax.model import Qwen3, head_weight, unembed
from qwen3_jax.ops import cpu
from sharding import constrain


def network(model: Qwen3, params: Any) -> Forward:
    """The forward pass that turns only each row's last token into logits."""

    def forward(
        tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        weights, tokens_BT = jax.lax.platform_dependent((params, tokens_BT), cpu=cpu.keep_in_loop, default=lambda x: x)
        out: Any = model.apply({"params": weights}, tokens_BT, positions_BT, segment_ids_BT, cache)
        last_B = last_place(segment_ids_BT)[:, None, None]
        hidden_B1D = jnp.take_along_axis(out.hidden, last_B, axis=1)
        logits_BV = unembed(hidden_B1D, head_weight(model.config, weights))[:, 0]
        # Whole rows on each device: choosing a token makes tens of passes over the vocabulary.
        return constrain(logits_BV, "sample_batch", None), out.cache

    return forward
