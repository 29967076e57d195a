"""What routers are asked for beside an objective's own loss: balance (report, section 3.2) and small logits.

Shapes: L routed layers, B rows of a micro-batch, E experts.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from qwen3_jax.ops.loss import load_balance_loss
from qwen3_jax.ops.moe import RouterStats
from qwen3_jax.train.objective import Metrics, Sums

BalanceScope = Literal["sequence", "micro", "step_running", "step_exact"]


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """What the routers are asked for beside the next token; the balance loss's coefficient is the model's own
    `router_aux_loss_coef`.

    balance_scope: the tokens over which the experts are to be balanced. All four losses are logged, one is trained on.
      step_exact: all tokens of the step (Qiu et al. 2025 at its exact value), whatever the devices and micro-batches;
        with accumulation this takes a forward pass over the whole batch first.
      step_running: the counts of the step's micro-batches so far weigh the probabilities of the present one (the
        buffer of that paper); the mean over micro-batches. Without accumulation it is step_exact.
      micro: each micro-batch, over all devices; the mean over micro-batches.
      sequence: each row of the batch, which packing may have filled with several documents; the mean over rows.
    z_loss_coef: of the mean square of the logits' logsumexp (ST-MoE, Zoph et al. 2022, section 4); they used 1e-3.
    """

    balance_scope: BalanceScope = "step_exact"
    z_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        if self.balance_scope not in get_args(BalanceScope):
            raise ValueError(f"balance_scope: {self.balance_scope!r}; use one of {', '.join(get_args(BalanceScope))}")
        if self.z_loss_coef < 0:
            raise ValueError(f"z_loss_coef: {self.z_loss_coef!r}; use a number >= 0")


def router_loss(
    config: RouterConfig, aux_coef: float, stats: RouterStats, totals: Sums, earlier: Sums | None
) -> tuple[jax.Array, Sums]:
    """A micro-batch's part of the step's balance loss and z-loss, and its sums for `router_metrics`.

    Args:
      stats: of the micro-batch, with leading axes [L, B].
      totals: of the step: `tokens` and `rows` that are not padding, `micro_batches`, and, where step_exact is to be
        trained on with several of these, `counts` [L, E].
      earlier: the sums of the micro-batches before.
    """
    # Rows are sharded: this sum is the all-reduce that makes counts and probabilities those of all devices.
    sums = jax.tree.map(lambda x: x.sum(axis=1), stats)
    counts_so_far_LE = sums.counts if earlier is None else earlier["stats"].counts + sums.counts
    counts_of_step_LE = totals.get("counts", sums.counts)
    tokens_L = jnp.broadcast_to(totals["tokens"], sums.tokens.shape)
    parts = {
        "stats": sums,
        "sequence": load_balance_loss(stats.counts, stats.prob_sum, stats.tokens).sum(axis=1),
        "micro": load_balance_loss(sums.counts, sums.prob_sum, sums.tokens),
        "step_running": load_balance_loss(counts_so_far_LE, sums.prob_sum, sums.tokens),
    }
    exact_L = load_balance_loss(counts_of_step_LE, sums.prob_sum, tokens_L)
    balance_L = {**_means(parts, totals), "step_exact": exact_L}[config.balance_scope]
    return aux_coef * balance_L.mean() + config.z_loss_coef * _z_loss(sums, totals), parts


def router_metrics(config: RouterConfig, parts: Sums, totals: Sums) -> Metrics:
    """`balance_loss` (the one trained on) and `z_loss`, means over layers; the rest per layer.

    router/load [L, E]: each expert's choices over their mean. router/load_max, load_min, load_gini [L] of it (Gini's
    coefficient: 0 where all are equal, 1 - 1/E where one has all). router/dropped [L]: share of choices without a
    slot. router/entropy [L]: mean entropy of the softmax in nats. router/balance_<scope> [L].
    """
    stats: RouterStats = parts["stats"]
    experts = stats.counts.shape[-1]
    total_L = jnp.maximum(stats.counts.sum(axis=-1), 1)
    # Of the counts of all micro-batches, which are known by now even where none were counted first.
    exact_L = load_balance_loss(stats.counts, stats.prob_sum, stats.tokens)
    balance = {**_means(parts, totals), "step_exact": exact_L}
    load_LE = stats.counts * experts / total_L[:, None]
    rank_1E = 2 * jnp.arange(1, experts + 1)[None] - experts - 1
    series = {
        "dropped": stats.dropped / total_L,
        "entropy": stats.entropy_sum / jnp.maximum(stats.tokens, 1),
        "load": load_LE,
        "load_max": load_LE.max(axis=-1),
        "load_min": load_LE.min(axis=-1),
        "load_gini": (jnp.sort(load_LE, axis=-1) * rank_1E).sum(axis=-1) / experts**2,
        **{f"balance_{name}": value_L for name, value_L in balance.items()},
    }
    return {
        "balance_loss": balance[config.balance_scope].mean(),
        "z_loss": _z_loss(stats, totals),
        **{f"router/{name}": value for name, value in series.items()},
    }


def _means(parts: Sums, totals: Sums) -> dict[str, jax.Array]:
    """The balance losses [L] that are means of rows or of micro-batches."""
    return {
        "sequence": parts["sequence"] / jnp.maximum(totals["rows"], 1),
        "micro": parts["micro"] / totals["micro_batches"],
        "step_running": parts["step_running"] / totals["micro_batches"],
    }


def _z_loss(sums: RouterStats, totals: Sums) -> jax.Array:
    return (sums.z_sum / jnp.maximum(totals["tokens"], 1)).mean()
