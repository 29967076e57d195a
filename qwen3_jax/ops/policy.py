"""The loss of a policy that learns from its own samples, on log-probabilities (GRPO, GSPO).

A token counts where the mask is 1: there the model itself chose it. Forced tokens (a stop text, an empty thought) and
what tools return are context: they are in no sum, no mean and no length, and their gradient is exactly 0.

Shapes: B rows, T tokens, S sequences that a row may hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

PolicyKind = Literal["grpo", "gspo", "gspo_token"]
Aggregation = Literal["token-mean", "seq-mean"]
KLKind = Literal["k2", "k3"]
_MAX_LOG_RATIO = 20.0  # exp of it is finite, also squared


@dataclasses.dataclass(frozen=True)
class Policy:
    """What is optimised.

    kind: "grpo", a ratio for each token (Shao et al. 2024, arXiv 2402.03300); "gspo", one for each sequence, the
      geometric mean of its tokens' (Zheng et al. 2025, arXiv 2507.18071); "gspo_token", of the same value, with a
      gradient for each token by its own advantage.
    clip_low, clip_high: a ratio counts from 1 - clip_low to 1 + clip_high. 0.2 and 0.28 are usual for GRPO; GSPO, whose
      ratios are means, takes 3e-4 and 4e-4.
    dual_clip: where the advantage A is negative, the loss is at most -dual_clip * A; None: no limit.
    aggregation: "token-mean", over all tokens of the step (Yu et al. 2025, DAPO, arXiv 2503.14476); "seq-mean", over
      its sequences, of the means over their tokens.
    kl_coef, kl_kind: weight of the divergence from a reference, d = log p_ref - log p: "k2" is d^2 / 2; "k3" has the
      value exp(d) - d - 1, and the gradient of k2, which is that of the divergence where tokens are the policy's own.
    tis_cap: truncated importance sampling: a token's loss is times min(p_old / p_sampler, tis_cap); None: times 1.
    max_sampler_ratio: sequences for which p_old / p_sampler is above it are left out; None: none is.
    """

    kind: PolicyKind = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    aggregation: Aggregation = "token-mean"
    kl_coef: float = 0.0
    kl_kind: KLKind = "k3"
    tis_cap: float | None = None
    max_sampler_ratio: float | None = None

    def __post_init__(self) -> None:
        for name, kinds in (("kind", PolicyKind), ("aggregation", Aggregation), ("kl_kind", KLKind)):
            if (value := getattr(self, name)) not in get_args(kinds):
                raise ValueError(f"{name}: {value!r}; use one of {', '.join(get_args(kinds))}")
        if not 0 <= self.clip_low < 1 or not 0 <= self.clip_high < float("inf"):
            raise ValueError(f"clip_low, clip_high: {self.clip_low}, {self.clip_high}; use [0, 1) and 0 or more")
        if not 0 <= self.kl_coef < float("inf"):
            raise ValueError(f"kl_coef: {self.kl_coef}; use 0 or more")
        for name in ("dual_clip", "tis_cap", "max_sampler_ratio"):
            if (limit := getattr(self, name)) is not None and not limit > 1:
                raise ValueError(f"{name}: {limit}; use a number above 1, or none")

    def denominator(self, counts: Mapping[str, jax.Array]) -> jax.Array:
        """Of the loss of a step, by the `Sequences.counts` of all of it: never a mean of means over micro-batches."""
        return jnp.maximum(counts["tokens" if self.aggregation == "token-mean" else "sequences"], 1)


def policy_loss(
    logprobs_BT: ArrayLike,
    old_logprobs_BT: ArrayLike,
    advantages_BT: ArrayLike,
    mask_BT: ArrayLike,
    *,
    kind: PolicyKind = "grpo",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    aggregation: Aggregation = "token-mean",
    ref_logprobs_BT: ArrayLike | None = None,
    kl_coef: float = 0.0,
    sampler_logprobs_BT: ArrayLike | None = None,
    tis_cap: float | None = None,
    segment_ids_BT: ArrayLike | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`(loss, means over the tokens that count)` of whole sequences, float32; see `Policy` for the settings.

    Args:
      logprobs_BT: of the tokens under the policy, the only argument with a gradient. old_logprobs_BT: under the policy
        as it was when they were sampled. sampler_logprobs_BT: what the sampler said. ref_logprobs_BT: of the reference.
      advantages_BT: the sequence's, at each of its tokens. mask_BT: 1 where the model chose the token, else 0.
      segment_ids_BT: sequences of packed rows, 1, 2, ..., and 0 for padding; None: each row is a sequence.

    Raises:
      ValueError: a setting that does not exist or is out of range; `kl_coef` without a reference.
    """
    policy = Policy(kind, clip_low, clip_high, dual_clip, aggregation, kl_coef, tis_cap=tis_cap)
    sequences = Sequences.of(mask_BT, segment_ids_BT)
    given = (logprobs_BT, old_logprobs_BT, advantages_BT, ref_logprobs_BT, sampler_logprobs_BT)
    arrays: list[Any] = [None if x is None else jnp.asarray(x, jnp.float32) for x in given]
    total, sums, _ = policy_sums(policy, sequences, *arrays)
    counts = sequences.counts()
    tokens = jnp.maximum(counts["tokens"], 1)
    return total / policy.denominator(counts), {name: value / tokens for name, value in sums.items()}


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Which tokens of packed rows count, and to which sequence each belongs.

    mask_BT: 1 where a token counts. places_BT: its sequence's number in the row, below `slots`.
    """

    mask_BT: jax.Array
    places_BT: jax.Array
    slots: int

    @classmethod
    def of(cls, mask_BT: ArrayLike, segment_ids_BT: ArrayLike | None) -> Sequences:
        """By the segments of packed rows; without them, each row is one."""
        mask_BT = jnp.asarray(mask_BT, jnp.float32)
        if segment_ids_BT is None:
            return cls(mask_BT, jnp.zeros(mask_BT.shape, jnp.int32), 1)
        segment_ids_BT, length = jnp.asarray(segment_ids_BT), mask_BT.shape[1]
        places_BT = jnp.where(segment_ids_BT > 0, segment_ids_BT - 1, length)
        return cls(mask_BT * (segment_ids_BT > 0), places_BT, length + 1)

    def counts(self) -> dict[str, jax.Array]:
        """`tokens` that count, and `sequences` that have some; they add up over micro-batches."""
        return {"tokens": self.mask_BT.sum(), "sequences": (self.sums(self.mask_BT) > 0).sum()}

    def sums(self, x_BT: jax.Array) -> jax.Array:
        """Of each sequence, [B, S]."""
        return jax.vmap(lambda x_T, places_T: jax.ops.segment_sum(x_T, places_T, self.slots))(x_BT, self.places_BT)

    def at_tokens(self, x_BS: jax.Array) -> jax.Array:
        """[B, T]: the number of each token's sequence."""
        return jnp.take_along_axis(x_BS, self.places_BT, axis=1)

    def means(self, x_BT: jax.Array) -> jax.Array:
        """[B, T]: at each token, the mean over the tokens of its sequence that count."""
        lengths_BS = self.sums(self.mask_BT)
        return self.at_tokens(self.sums(self.mask_BT * x_BT) / jnp.maximum(lengths_BS, 1))


def policy_sums(
    policy: Policy,
    sequences: Sequences,
    logprobs_BT: jax.Array,
    old_logprobs_BT: jax.Array,
    advantages_BT: jax.Array,
    ref_logprobs_BT: jax.Array | None = None,
    sampler_logprobs_BT: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """`(loss before it is divided by policy.denominator, sums over tokens, largest values)` of a part of a step.

    The first two add up over micro-batches. The last has the largest `sampler_gap`, |log p_old - log p_sampler|.
    """
    mask_BT = sequences.mask_BT

    def log_ratio(above_BT: jax.Array, below_BT: jax.Array) -> jax.Array:
        # Where the mask is 0 a log-probability may be anything, and 0 times infinity would be NaN.
        difference_BT = jnp.where(mask_BT > 0, above_BT - below_BT, 0.0)
        return jnp.clip(difference_BT, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)

    old_logprobs_BT = jax.lax.stop_gradient(old_logprobs_BT)
    log_ratio_BT = log_ratio(logprobs_BT, old_logprobs_BT)
    if policy.kind != "grpo":
        mean_BT = sequences.means(log_ratio_BT)
        own_BT = jax.lax.stop_gradient(mean_BT) + log_ratio(logprobs_BT, jax.lax.stop_gradient(logprobs_BT))
        log_ratio_BT = mean_BT if policy.kind == "gspo" else own_BT
    ratio_BT = jnp.exp(log_ratio_BT)
    low, high = 1 - policy.clip_low, 1 + policy.clip_high
    loss_BT = jnp.maximum(-advantages_BT * ratio_BT, -advantages_BT * jnp.clip(ratio_BT, low, high))
    if policy.dual_clip is not None:
        limit_BT = jnp.where(advantages_BT < 0, -policy.dual_clip * advantages_BT, jnp.inf)
        loss_BT = jnp.minimum(loss_BT, limit_BT)
    terms = {
        "ratio": ratio_BT,
        "clipped_low": (advantages_BT < 0) & (ratio_BT < low),
        "clipped_high": (advantages_BT > 0) & (ratio_BT > high),
        "old_kl": ratio_BT - 1 - log_ratio_BT,
    }
    if sampler_logprobs_BT is not None:
        gap_BT = jax.lax.stop_gradient(log_ratio(old_logprobs_BT, sampler_logprobs_BT))
        terms |= {"sampler_gap": jnp.abs(gap_BT), "sampler_ratio": jnp.exp(jnp.abs(gap_BT))}
        if policy.tis_cap is not None:
            loss_BT *= jnp.minimum(jnp.exp(gap_BT), policy.tis_cap)
        if policy.max_sampler_ratio is not None:
            of_sequence_BT = sequences.at_tokens(sequences.sums(gap_BT))
            is_out_BT = of_sequence_BT > jnp.log(policy.max_sampler_ratio)
            loss_BT, terms["left_out"] = jnp.where(is_out_BT, 0.0, loss_BT), is_out_BT
    if ref_logprobs_BT is not None:
        d_BT = log_ratio(jax.lax.stop_gradient(ref_logprobs_BT), logprobs_BT)
        k2_BT, k3_BT = d_BT**2 / 2, jnp.expm1(d_BT) - d_BT
        kl_BT = k2_BT if policy.kl_kind == "k2" else k2_BT + jax.lax.stop_gradient(k3_BT - k2_BT)
        loss_BT += policy.kl_coef * kl_BT
        terms["kl"] = kl_BT
    elif policy.kl_coef:
        raise ValueError(f"kl_coef: {policy.kl_coef} without ref_logprobs_BT; give the reference's, or use 0")
    weights_BT = mask_BT
    if policy.aggregation == "seq-mean":
        weights_BT /= jnp.maximum(sequences.at_tokens(sequences.sums(mask_BT)), 1)
    sums = {name: (mask_BT * jax.lax.stop_gradient(x_BT)).sum() for name, x_BT in terms.items()}
    largest = {} if sampler_logprobs_BT is None else {"sampler_gap": (mask_BT * terms["sampler_gap"]).max()}
    return (weights_BT * loss_BT).sum(), sums, largest
