"""One optimiser step: next-token loss over the global batch, gradient, AdamW.

Shapes: A micro-batches, B rows of one, T tokens, L routed layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from qwen3_jax.model import Qwen3
from qwen3_jax.ops.loss import cross_entropy, load_balance_loss
from qwen3_jax.ops.moe import RouterStats
from sharding import constrain

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    """Weights in float32 and the optimiser's state; the optimiser counts the steps."""

    params: Any
    optimizer: Any


def make_train_step(
    model: Qwen3, optimizer: optax.GradientTransformation, accumulation: int
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """`step(state, batch) -> (state, metrics)`, to be jitted.

    The loss is the mean over all weighted tokens of the batch, whatever the mesh and the accumulation; so is the
    balance of the experts (Qiu et al. 2025). With several micro-batches a forward pass over all of them counts the
    choices first: each micro-batch's gradient then weighs its router probabilities by the counts of the whole batch,
    and the sum of the gradients is that of one large batch, exactly.
    """
    aux_coef = model.config.router_aux_loss_coef

    def forward(params: Any, batch: Batch) -> Any:
        return model.apply({"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"])

    def loss_fn(params: Any, batch: Batch, totals: Batch) -> tuple[jax.Array, Metrics]:
        """This micro-batch's share of the loss of the whole batch."""
        out = forward(params, batch)
        weights_BT = batch["loss_weights"]
        nll_BT = cross_entropy(out.logits, batch["targets"])
        correct_BT = out.logits.argmax(axis=-1) == batch["targets"]
        sums = {
            "loss": (nll_BT * weights_BT).sum() / totals["weights"],
            "accuracy": (correct_BT * weights_BT).sum() / totals["weights"],
        }
        loss = sums["loss"]
        if out.router is not None:
            counts_LE = totals.get("counts_LE", out.router.counts_E)
            tokens_L = totals.get("tokens_L", out.router.tokens)
            sums["balance_loss"] = load_balance_loss(counts_LE, out.router.prob_sum_E, tokens_L)
            loss = loss + aux_coef * sums["balance_loss"]
            sums["router"] = out.router
        return loss, sums

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        totals = {"weights": jnp.maximum(batch["loss_weights"].sum(), 1)}
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        if accumulation == 1:
            (_, sums), grads = gradient(state.params, batch, totals)
        else:
            micro = jax.tree.map(lambda x: _split(x, accumulation), batch)
            if model.config.num_experts:
                routers = jax.lax.map(lambda part: forward(state.params, part).router, micro)
                totals |= {"counts_LE": routers.counts_E.sum(axis=0), "tokens_L": routers.tokens.sum(axis=0)}

            def add(carry: Any, part: Batch) -> tuple[Any, None]:
                (_, sums), grads = gradient(state.params, part, totals)
                return jax.tree.map(jnp.add, carry, (sums, grads)), None

            first = jax.tree.map(lambda x: x[0], micro)
            shapes = jax.eval_shape(lambda: gradient(state.params, first, totals))
            (_, sums), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            (sums, grads), _ = jax.lax.scan(add, (sums, grads), micro)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        router = sums.pop("router", None)
        metrics = {**sums, "grad_norm": optax.tree.norm(grads), **(_router_metrics(router) if router else {})}
        return TrainState(params, optimizer_state), metrics

    return step


def _split(x: jax.Array, parts: int) -> jax.Array:
    """[A * B, T] -> [A, B, T], every part spread over the whole mesh as the batch was."""
    strided = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    return constrain(strided, None, "batch", "length")


def _router_metrics(router: RouterStats) -> Metrics:
    """Per layer: share of choices dropped, mean entropy in nats, heaviest and lightest load (the mean is 1)."""
    load_LE = router.counts_E / jnp.maximum(router.counts_E.mean(axis=-1, keepdims=True), 1e-9)
    series = {
        "dropped": router.dropped / jnp.maximum(router.counts_E.sum(axis=-1), 1),
        "entropy": router.entropy_sum / jnp.maximum(router.tokens, 1),
        "load_max": load_LE.max(axis=-1),
        "load_min": load_LE.min(axis=-1),
    }
    return {f"router/{name}": value_L for name, value_L in series.items()}
