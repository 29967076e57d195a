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

Markers = tuple[int, int]  # the ids of <think> and </think>


def in_thought(batch: Batch, markers: Markers) -> jax.Array:
    """[B, T] bool: whether the target is inside a thought or ends it. A thought is what follows `<think>`, up to
    `</think>` or the end of its document; the empty block of a non-thinking answer is one too."""
    tokens_BT, places_BT = batch["tokens"], jnp.arange(batch["tokens"].shape[1])[None]

    def last(is_there_BT: jax.Array) -> jax.Array:
        return jax.lax.cummax(jnp.where(is_there_BT, places_BT, -1), axis=1)

    opened, closed = (last(tokens_BT == marker) for marker in markers)
    return (opened > closed) & (opened >= last(batch["positions"] == 0))


def packed_arrays(rows: int, length: int) -> dict[str, BatchArray]:
    """Batches of packed documents; `qwen3_jax.data.packing.to_arrays` says what the arrays hold."""
    dtypes = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), jnp.int32) | {"loss_weights": jnp.float32}
    return {name: BatchArray((rows, length), dtype, ("batch", "length")) for name, dtype in dtypes.items()}


class NextToken:
    """The cross-entropy of each target, a mean over all weighted tokens of the step, and what `router` asks for.

    rows, length: of a step's batch. markers: if given, the loss is also reported apart for thoughts and for the rest.
    """

    def __init__(
        self,
        model: Qwen3,
        rows: int,
        length: int,
        router: RouterConfig | None = None,
        markers: Markers | None = None,
    ) -> None:
        self.model, self.router, self._markers = model, router or RouterConfig(), markers
        self.arrays: Mapping[str, BatchArray] = packed_arrays(rows, length)
        self.tokens, self.updates, self.may_be_empty = rows * length, 1, False
        self.limits: Mapping[str, float] = {}
        self.flops = self.tokens * train_flops_per_token(model.config, length)
        self._aux_coef = model.config.router_aux_loss_coef if model.config.num_experts else 0.0

    def before(self, params: Any, micro_batches: Batch) -> Batch:
        return {}

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
            inputs = {name: micro_batches[name] for name in ("tokens", "positions", "segment_ids")}
            counts_ALE = jax.lax.map(lambda part: self._forward(params, part).router.counts.sum(axis=1), inputs)
            totals["counts"] = counts_ALE.sum(axis=0)
        return totals

    def loss(self, params: Any, batch: Batch, totals: Sums, earlier: Sums | None) -> tuple[jax.Array, Sums]:
        out = self._forward(params, batch)
        loss, losses_BT, sums = self.token_losses(params, batch, out.hidden)
        sums |= {"loss": loss, **self._apart(losses_BT, batch)}
        loss /= self.denominator(totals)
        if out.router is not None:
            before = None if earlier is None else earlier["router"]
            balance, sums["router"] = router_loss(self.router, self._aux_coef, out.router, totals, before)
            loss += balance
        return loss, sums

    def token_losses(self, params: Any, batch: Batch, hidden_BTD: jax.Array) -> tuple[jax.Array, jax.Array, Sums]:
        """`(weighted sum of the tokens' losses, each of them [B, T], other sums)`; only the first has a gradient."""
        head_VD, weights_BT = head_weight(self.model.config, params), batch["loss_weights"]
        loss, scores = linear_cross_entropy(hidden_BTD, head_VD, batch["targets"], weights_BT)
        return loss, -scores.logprob, {"correct": (scores.is_best * weights_BT).sum()}

    def denominator(self, totals: Sums) -> jax.Array:
        """Of the sum of the tokens' losses, over the whole update."""
        return jnp.maximum(totals["weights"], 1)

    def metrics(self, sums: Sums, totals: Sums) -> Metrics:
        metrics = {"loss": sums["loss"] / self.denominator(totals)}
        if "correct" in sums:
            metrics["accuracy"] = sums["correct"] / self.denominator(totals)
        for part in ("thought", "answer") if self._markers else ():
            total, count = sums[part]
            metrics[f"loss_{part}"] = jnp.where(count > 0, total / count, jnp.nan)  # a batch may have none
        return metrics | (router_metrics(self.router, sums["router"], totals) if "router" in sums else {})

    def _apart(self, losses_BT: jax.Array, batch: Batch) -> Sums:
        """`(sum of losses, sum of weights)` of the thoughts' tokens and of the others."""
        if self._markers is None:
            return {}
        weights_BT, is_thought_BT = batch["loss_weights"], in_thought(batch, self._markers)
        parts = {"thought": weights_BT * is_thought_BT, "answer": weights_BT * ~is_thought_BT}
        return {name: ((losses_BT * part_BT).sum(), part_BT.sum()) for name, part_BT in parts.items()}

    def _forward(self, params: Any, batch: Batch) -> Any:
        return self.model.apply({"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"])
