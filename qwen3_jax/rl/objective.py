"""The objective of a policy that learns from its own samples: `qwen3_jax.ops.policy` on packed rows.

Shapes: A micro-batches, B rows of one, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qwen3_jax.model import head_weight
from qwen3_jax.ops.loss import token_logprobs
from qwen3_jax.ops.policy import Policy, Sequences, policy_sums
from qwen3_jax.train.next_token import NextToken
from qwen3_jax.train.objective import Batch, BatchArray, Metrics, Sums


class PolicyGradient(NextToken):
    """The policy loss of each sampled token; `loss_weights` are 1 there and 0 at prompts, forced tokens and padding.

    Beside the arrays of packed rows a batch has, at each target, the sequence's `advantages` and what the sampler said
    (`sampler_logprobs`). With several updates from one rollout it has `old_logprobs` too, and `is_first` [1]: in the
    first update the policy is the one that sampled, and its ratio is exactly 1, since `old_logprobs` are then its own.
    With a reference it has `ref_logprobs`.
    """

    def __init__(self, policy: Policy, updates: int, *student: Any) -> None:
        super().__init__(*student)
        self.policy = policy
        names = ["advantages", "sampler_logprobs"]
        names += ["old_logprobs"] if updates > 1 else []
        names += ["ref_logprobs"] if policy.kl_coef else []
        shape = self.arrays["tokens"].shape
        extra = {name: BatchArray(shape, jnp.float32, ("batch", "length")) for name in names}
        if updates > 1:
            extra["is_first"] = BatchArray((1,), jnp.bool_, (None,))
        self.arrays: Mapping[str, BatchArray] = {**self.arrays, **extra}

    def totals(self, params: Any, micro_batches: Batch) -> Sums:
        masks_ABT, segments_ABT = micro_batches["loss_weights"], micro_batches["segment_ids"]
        counts_A = jax.vmap(lambda *parts: Sequences.of(*parts).counts())(masks_ABT, segments_ABT)
        return super().totals(params, micro_batches) | {"policy": jax.tree.map(jnp.sum, counts_A)}

    def token_losses(self, params: Any, batch: Batch, hidden_BTD: jax.Array) -> tuple[jax.Array, jax.Array, Sums]:
        """`(sum of the tokens' losses, each entropy [B, T], sums for metrics)`; only the first has a gradient."""
        scores = token_logprobs(hidden_BTD, head_weight(self.model.config, params), batch["targets"])
        old_BT = jax.lax.stop_gradient(scores.logprob)
        if "old_logprobs" in batch:
            old_BT = jnp.where(batch["is_first"], old_BT, batch["old_logprobs"])
        sequences = Sequences.of(batch["loss_weights"], batch["segment_ids"])
        others = (batch["advantages"], batch.get("ref_logprobs"), batch["sampler_logprobs"])
        loss, sums = policy_sums(self.policy, sequences, scores.logprob, old_BT, *others)
        entropy_BT = jax.lax.stop_gradient(scores.entropy)
        return loss, entropy_BT, {"policy": sums | {"entropy": (sequences.mask_BT * entropy_BT).sum()}}

    def denominator(self, totals: Sums) -> jax.Array:
        return self.policy.denominator(totals["policy"])

    def metrics(self, sums: Sums, totals: Sums) -> Metrics:
        tokens = jnp.maximum(totals["policy"]["tokens"], 1)
        policy = {f"policy/{name}": value / tokens for name, value in sums["policy"].items()}
        return super().metrics(sums, totals) | policy
