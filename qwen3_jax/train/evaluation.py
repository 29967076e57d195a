"""The loss on data that is not trained on."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qwen3_jax.model import Qwen3, head_weight
from qwen3_jax.ops.loss import linear_cross_entropy
from qwen3_jax.train.feed import Feed
from qwen3_jax.train.step import Batch


class HeldOut:
    """The first `batches` batches of `feed`, the same ones each time."""

    def __init__(self, model: Qwen3, feed: Feed, batches: int) -> None:
        self._feed, self._batches = feed, batches
        self._first = feed.get_state()

        def sums(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
            out: Any = model.apply({"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"])
            head_VD, weights_BT = head_weight(model.config, params), batch["loss_weights"]
            return linear_cross_entropy(out.hidden, head_VD, batch["targets"], weights_BT)[0], weights_BT.sum()

        self._sums = jax.jit(sums)

    def loss(self, params: Any) -> float:
        """Mean over all weighted tokens, in nats."""
        self._feed.set_state(self._first)
        sums = [self._sums(params, next(self._feed)) for _ in range(self._batches)]
        total, weight = jax.device_get(jax.tree.map(lambda *parts: jnp.stack(parts).sum(), *sums))
        return float(total / max(weight, 1))
