"""The next token of packed rows: the objective of pretraining and of fine-tuning.

Shapes: A micro-batches, B rows of one, T tokens, L routed layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qwen3_jax.model import Qwen3, head_weight
from qwen3_jax.ops.loss import linear_cross_entropy
from qwen3_jax.train.flops import train_flops_per_token
from qwen3_jax.train.objective import Batch, BatchArray, Metrics, Sums
from qwen3_jax.train.router import RouterConfig, router_loss, router_metrics


def packed_arrays(rows: int, length: int) -> dict[str, BatchArray]:
    """Batches of packed documents; `qwen3_jax.data.packing.to_arrays` says what the arrays hold."""
    dtypes = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), jnp.int32) | {"loss_weights": jnp.float32}
    return {name: BatchArray((rows, length), dtype, ("batch", "length")) for name, dtype in dtypes.items()}


class NextToken:
    """The cross-entropy of each target, a mean over all weighted tokens of the step, and what `router` asks for.

    rows, length: of a step's batch.
    """

    def __init__(self, model: Qwen3, rows: int, length: int, router: RouterConfig | None = None) -> None:
        self.model, self.router = model, router or RouterConfig()
        self.arrays: Mapping[str, BatchArray] = packed_arrays(rows, length)
        self.tokens = rows * length
        self.flops = self.tokens * train_flops_per_token(model.config, length)
        self._aux_coef = model.config.router_aux_loss_coef if model.config.num_experts else 0.0

    def totals(self, params: Any, micro_batches: Batch) -> Sums:
        valid_ABT = micro_batches["segment_ids"] > 0
        totals: Sums = {
            "weights": micro_batches["loss_weights"].sum(),
            "tokens": valid_ABT.sum(),
            "rows": valid_ABT.any(axis=2).sum(),
            "micro_batches": len(valid_ABT),
        }
        if self.router.balance_scope == "step_exact" and self._aux_coef and len(valid_ABT) > 1:
            # The exact balance loss weighs each micro-batch's probabilities by the counts of the whole step, so a
            # forward pass counts first. Its sum over rows is the all-reduce over devices, the next over micro-batches.
            # (The loss is linear in the counts, so E gradients kept apart would do without it, at E times the memory.)
            counts_ALE = jax.lax.map(lambda part: self._forward(params, part).router.counts.sum(axis=1), micro_batches)
            totals["counts"] = counts_ALE.sum(axis=0)
        return totals

    def loss(self, params: Any, batch: Batch, totals: Sums, earlier: Sums | None) -> tuple[jax.Array, Sums]:
        out = self._forward(params, batch)
        head_VD = head_weight(self.model.config, params)
        loss, correct = linear_cross_entropy(out.hidden, head_VD, batch["targets"], batch["loss_weights"])
        sums: Sums = {"cross_entropy": loss, "correct": correct}
        loss /= jnp.maximum(totals["weights"], 1)
        if out.router is not None:
            before = None if earlier is None else earlier["router"]
            balance, sums["router"] = router_loss(self.router, self._aux_coef, out.router, totals, before)
            loss += balance
        return loss, sums

    def metrics(self, sums: Sums, totals: Sums) -> Metrics:
        weights = jnp.maximum(totals["weights"], 1)
        metrics = {"loss": sums["cross_entropy"] / weights, "accuracy": sums["correct"] / weights}
        return metrics | (router_metrics(self.router, sums["router"], totals) if "router" in sums else {})

    def _forward(self, params: Any, batch: Batch) -> Any:
        return self.model.apply({"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"])
