"""One optimiser step: next-token loss over the global batch, gradient, AdamW.

Shapes: A micro-batches, B rows of one, T tokens, L routed layers, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from flax import struct

from qwen3_jax.model import Qwen3, head_weight
from qwen3_jax.ops.loss import linear_cross_entropy, load_balance_loss
from qwen3_jax.ops.moe import RouterStats
from sharding import constrain

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Sums = dict[str, Any]  # what adds up over micro-batches


@struct.dataclass
class TrainState:
    """Weights in float32 and the optimiser's state; the optimiser counts the steps."""

    params: Any
    optimizer: Any


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
            raise ValueError(f"balance_scope: {self.balance_scope!r}; one of {', '.join(get_args(BalanceScope))} fits")
        if self.z_loss_coef < 0:
            raise ValueError(f"z_loss_coef: {self.z_loss_coef!r}; a number >= 0 fits")


def make_train_step(
    model: Qwen3,
    optimizer: optax.GradientTransformation,
    accumulation: int,
    router: RouterConfig | None = None,
    shardings: Any = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """`step(state, batch) -> (state, metrics)`, to be jitted.

    The loss is the mean over all weighted tokens of the batch, whatever the mesh and the accumulation; so is the
    balance of the experts with the default scope. With several micro-batches a forward pass over all of them counts
    the choices first: each micro-batch's gradient then weighs its router probabilities by the counts of the whole
    batch, and the sum of the gradients is that of one large batch, exactly. (The balance loss is linear in the counts,
    so E gradients kept apart would do without that pass, at E times the memory.)

    Metrics are scalars, `router/<name>` [L], and `router/load` [L, E]: see `_router_metrics`.

    Args:
      shardings: of the weights. Gradients then lie like them until the optimiser takes its parts: XLA:TPU would split
        them over `data` in each layer, and wait for it there.
    """
    router = router or RouterConfig()
    aux_coef = model.config.router_aux_loss_coef
    counts_first = accumulation > 1 and router.balance_scope == "step_exact" and model.config.num_experts and aux_coef

    def forward(params: Any, batch: Batch) -> Any:
        return model.apply({"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"])

    def loss_fn(params: Any, batch: Batch, totals: Batch, earlier: jax.Array) -> tuple[jax.Array, Sums]:
        """This micro-batch's share of the loss of the whole batch; `earlier` [L, E] are counts of those before it."""
        out = forward(params, batch)
        head_VD = head_weight(model.config, params)
        loss, correct = linear_cross_entropy(out.hidden, head_VD, batch["targets"], batch["loss_weights"])
        sums: Sums = {"loss": loss / totals["weights"], "accuracy": correct / totals["weights"]}
        loss = sums["loss"]
        if out.router is not None:
            sums |= _router_sums(out.router, totals, earlier, accumulation)
            loss += aux_coef * sums["balance"][router.balance_scope].mean()
            loss += router.z_loss_coef * sums["z_loss"].mean()
        return loss, sums

    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        valid_BT = batch["segment_ids"] > 0
        totals = {"weights": batch["loss_weights"].sum(), "tokens": valid_BT.sum(), "rows": valid_BT.any(axis=1).sum()}
        totals = jax.tree.map(lambda total: jnp.maximum(total, 1), totals)
        earlier = jnp.zeros((), jnp.float32)
        if accumulation == 1:
            (_, sums), grads = gradient(state.params, batch, totals, earlier)
        else:
            micro = jax.tree.map(lambda x: _split(x, accumulation), batch)
            if counts_first:
                counts_AL = jax.lax.map(lambda part: forward(state.params, part).router.counts_BE.sum(axis=1), micro)
                totals["counts_LE"] = counts_AL.sum(axis=0)

            def add(carry: Any, part: Batch) -> tuple[Any, None]:
                earlier = carry[0]["router"].counts_BE if "router" in carry[0] else jnp.zeros(())
                (_, sums), grads = gradient(state.params, part, totals, earlier)
                return jax.tree.map(jnp.add, carry, (sums, grads)), None

            first = jax.tree.map(lambda x: x[0], micro)
            shapes = jax.eval_shape(lambda: gradient(state.params, first, totals, earlier))
            (_, sums), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            (sums, grads), _ = jax.lax.scan(add, (sums, grads), micro)
        if shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, shardings)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": sums["loss"], "accuracy": sums["accuracy"], "grad_norm": optax.tree.norm(grads)}
        if model.config.num_experts:
            metrics |= _router_metrics(sums, router.balance_scope)
        return TrainState(params, optimizer_state), metrics

    return step


def _split(x: jax.Array, parts: int) -> jax.Array:
    """[A * B, T] -> [A, B, T], every part spread over the whole mesh as the batch was."""
    strided = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    return constrain(strided, None, "batch", "length")


def _router_sums(stats: RouterStats, totals: Batch, earlier: jax.Array, accumulation: int) -> Sums:
    """A micro-batch's shares of each balance loss [L] and of the z-loss [L], and its statistics summed over rows."""
    sums = jax.tree.map(lambda x: x.sum(axis=1), stats)
    counts_LE, prob_sum_LE = sums.counts_BE, sums.prob_sum_BE
    whole_LE = totals.get("counts_LE", counts_LE)
    by_row_LB = load_balance_loss(stats.counts_BE, stats.prob_sum_BE, stats.tokens_B)
    balance = {
        "sequence": by_row_LB.sum(axis=1) / totals["rows"],
        "micro": load_balance_loss(counts_LE, prob_sum_LE, sums.tokens_B) / accumulation,
        "step_running": load_balance_loss(earlier + counts_LE, prob_sum_LE, sums.tokens_B) / accumulation,
        "step_exact": load_balance_loss(whole_LE, prob_sum_LE, jnp.broadcast_to(totals["tokens"], whole_LE.shape[:1])),
    }
    return {"balance": balance, "z_loss": sums.z_sum_B / totals["tokens"], "router": sums}


def _router_metrics(sums: Sums, scope: BalanceScope) -> Metrics:
    """`balance_loss` (the one trained on) and `z_loss`, means over layers; the rest per layer.

    router/load [L, E]: each expert's choices over their mean. router/load_max, load_min, load_gini [L] of it (Gini's
    coefficient: 0 where all are equal, 1 - 1/E where one has all). router/dropped [L]: share of choices without a
    place. router/entropy [L]: mean entropy of the softmax in nats. router/balance_<scope> [L].
    """
    router: RouterStats = sums["router"]
    counts_LE, experts = router.counts_BE, router.counts_BE.shape[-1]
    total_L = jnp.maximum(counts_LE.sum(axis=-1), 1)
    # Known only now where the counts of the whole step were not needed for the gradient.
    exact_L = load_balance_loss(counts_LE, router.prob_sum_BE, router.tokens_B)
    balance = {**sums["balance"], "step_exact": exact_L}
    load_LE = counts_LE * experts / total_L[:, None]
    rank_1E = 2 * jnp.arange(1, experts + 1)[None] - experts - 1
    series = {
        "dropped": router.dropped_B / total_L,
        "entropy": router.entropy_sum_B / jnp.maximum(router.tokens_B, 1),
        "load": load_LE,
        "load_max": load_LE.max(axis=-1),
        "load_min": load_LE.min(axis=-1),
        "load_gini": (jnp.sort(load_LE, axis=-1) * rank_1E).sum(axis=-1) / experts**2,
        **{f"balance_{name}": value_L for name, value_L in balance.items()},
    }
    return {
        "balance_loss": balance[scope].mean(),
        "z_loss": sums["z_loss"].mean(),
        **{f"router/{name}": value for name, value in series.items()},
    }
