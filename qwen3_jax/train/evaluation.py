"""The loss on data that is not trained on."""

from __future__ import annotations

from typing import Any

import jax

from qwen3_jax.train.feed import Feed
from qwen3_jax.train.objective import Batch, Objective, Sums
from qwen3_jax.train.step import micro_batches


class HeldOut:
    """The first `batches` batches of `feed`, the same ones each time."""

    def __init__(self, objective: Objective, feed: Feed, batches: int) -> None:
        self._feed, self._batches = feed, batches
        self._first = feed.get_state()

        @jax.jit
        def sums_of(params: Any, batch: Batch) -> tuple[Sums, Sums]:
            micro, shared = micro_batches(objective, batch, 1)
            totals = objective.totals(params, micro | shared)
            return objective.loss(params, batch, totals, None)[1], totals

        @jax.jit
        def loss_of(parts: list[tuple[Sums, Sums]]) -> jax.Array:
            return objective.metrics(*jax.tree.map(lambda *x: sum(x), *parts))["loss"]

        self._sums_of, self._loss_of = sums_of, loss_of

    def loss(self, params: Any) -> float:
        """The objective's loss, as if all batches were one."""
        self._feed.set_state(self._first)
        parts = [self._sums_of(params, self._feed.next(params)) for _ in range(self._batches)]
        return float(self._loss_of(parts))
