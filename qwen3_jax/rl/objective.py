"""The objective of a policy that learns from its own samples: `qwen3_jax.ops.policy` on packed rows.

Shapes: A micro-batches, B rows of one, T tokens, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qwen3_jax.model import Qwen3, head_weight
from qwen3_jax.ops.loss import token_logprobs
from qwen3_jax.ops.policy import Policy, Sequences, policy_sums
from qwen3_jax.train.flops import train_flops_per_token
from qwen3_jax.train.frozen import Frozen
from qwen3_jax.train.next_token import NextToken
from qwen3_jax.train.objective import Batch, BatchArray, Metrics, Sums
from qwen3_jax.train.step import over_filled

# Mean exp|log p of the trainer - log p of the sampler|; above it, the two are not the same policy.
_AGREEMENT = {"policy/sampler_ratio": 1.05}


class PolicyGradient(NextToken):
    """The policy loss of each sampled token; `loss_weights` are 1 there and 0 at prompts, forced tokens and padding.

    Beside the arrays of packed rows a batch has, at each target, the sequence's `advantages` and what the sampler said
    (`sampler_logprobs`).

    In the first update of a step the policy is the one that sampled, and its ratio is exactly 1: `old_logprobs` are the
    policy's own, from the same forward pass. For later ones they are scored before the first.
    """

    def __init__(self, policy: Policy, updates: int, reference: Frozen | None, *student: Any) -> None:
        super().__init__(*student)
        self.policy, self.reference, self.updates, self.may_be_empty = policy, reference, updates, True
        self.limits = _AGREEMENT
        shape = self.arrays["tokens"].shape
        extra = {
            name: BatchArray(shape, jnp.float32, ("batch", "length")) for name in ("advantages", "sampler_logprobs")
        }
        self.arrays: Mapping[str, BatchArray] = {**self.arrays, **extra, **(reference.arrays if reference else {})}
        forward = self.tokens * train_flops_per_token(self.model.config, shape[1]) / 3
        self.flops += forward * (updates - 1) / updates + (forward if reference else 0)

    def before(self, params: Any, micro_batches: Batch) -> Batch:
        """`old_logprobs` and `is_first` where there are several updates, and `ref_logprobs` with a reference."""
        found: Batch = {}
        if self.updates > 1:
            count = len(micro_batches["tokens"])
            first = count // self.updates
            later_ABT = self._logprobs(self.model, params, {name: x[first:] for name, x in micro_batches.items()})
            found["old_logprobs"] = jnp.concatenate(
                [jnp.zeros_like(later_ABT, shape=(first, *later_ABT.shape[1:])), later_ABT]
            )
            found["is_first"] = jnp.arange(count) < first
        if self.reference is not None:
            reference = self.reference.params(micro_batches)
            found["ref_logprobs"] = self._logprobs(self.reference.model, reference, micro_batches)
        return found

    def totals(self, params: Any, micro_batches: Batch) -> Sums:
        masks_ABT, segments_ABT = micro_batches["loss_weights"], micro_batches["segment_ids"]
        counts_A = jax.vmap(lambda *parts: Sequences.of(*parts).counts())(masks_ABT, segments_ABT)
        return super().totals(params, micro_batches) | {"policy": jax.tree.map(jnp.sum, counts_A)}

    def token_losses(self, params: Any, batch: Batch, hidden_BTD: jax.Array) -> tuple[jax.Array, jax.Array, Sums]:
        """`(sum of the tokens' losses, each entropy [B, T], sums for metrics)`; only the first has a gradient."""
        scores = token_logprobs(hidden_BTD, head_weight(self.model.config, params), batch["targets"])
        old_BT = jax.lax.stop_gradient(scores.logprob)
        if self.updates > 1:
            old_BT = jnp.where(batch["is_first"], old_BT, batch["old_logprobs"])
        sequences = Sequences.of(batch["loss_weights"], batch["segment_ids"])
        others = (batch["advantages"], batch.get("ref_logprobs"), batch["sampler_logprobs"])
        loss, sums, largest = policy_sums(self.policy, sequences, scores.logprob, old_BT, *others)
        entropy_BT = jax.lax.stop_gradient(scores.entropy)
        sums |= {"entropy": (sequences.mask_BT * entropy_BT).sum()}
        return loss, entropy_BT, {"policy": sums, "largest": largest}

    def denominator(self, totals: Sums) -> jax.Array:
        return self.policy.denominator(totals["policy"])

    def metrics(self, sums: Sums, totals: Sums) -> Metrics:
        tokens = jnp.maximum(totals["policy"]["tokens"], 1)
        policy = {f"policy/{name}": value / tokens for name, value in sums["policy"].items()}
        largest = {f"policy/largest_{name}": value for name, value in sums["largest"].items()}
        return super().metrics(sums, totals) | policy | largest

    def _logprobs(self, model: Qwen3, params: Any, micro_batches: Batch) -> jax.Array:
        """[A, B, T], of the targets; 0 where a micro-batch is padding alone."""
        head_VD = head_weight(model.config, params)

        def score(found_ABT: jax.Array, part: Batch) -> jax.Array:
            output: Any = model.apply({"params": params}, part["tokens"], part["positions"], part["segment_ids"])
            logprobs_BT = token_logprobs(output.hidden, head_VD, part["targets"]).logprob
            return found_ABT.at[part["number"]].set(logprobs_BT)

        parts = {name: micro_batches[name] for name in ("tokens", "positions", "segment_ids", "targets")}
        nothing_ABT = jnp.zeros(parts["tokens"].shape, jnp.float32)
        return over_filled(score, nothing_ABT, parts | {"number": jnp.arange(len(nothing_ABT))})
