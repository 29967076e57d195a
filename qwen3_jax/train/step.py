"""One optimiser step for any objective: micro-batches, gradient, update.

Shapes: A micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from qwen3_jax.train.objective import Batch, Metrics, Objective
from sharding import constrain


@struct.dataclass
class TrainState:
    """Weights in float32 and the optimiser's state; the optimiser counts the steps."""

    params: Any
    optimizer: Any


def make_train_step(
    objective: Objective, optimizer: optax.GradientTransformation, accumulation: int = 1, shardings: Any = None
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """`step(state, batch) -> (state, metrics)`, to be jitted; the objective's metrics and `grad_norm`.

    Args:
      accumulation: micro-batches, one after the other; they change the memory of a step, not its result.
      shardings: of the weights. Gradients keep them until the optimiser takes its parts: XLA:TPU would otherwise
        reduce-scatter gradients over `data` in each layer, and wait for it there.
    """
    gradient = jax.value_and_grad(objective.loss, has_aux=True)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        params = state.params
        micro, shared = micro_batches(objective, batch, accumulation)
        totals = objective.totals(params, micro | shared)
        first = jax.tree.map(lambda x: x[0], micro) | shared
        if accumulation == 1:
            (_, sums), grads = gradient(params, first, totals, None)
        else:

            def add(carry: Any, part: Batch) -> tuple[Any, None]:
                (_, sums), grads = gradient(params, part | shared, totals, carry[0])
                return jax.tree.map(jnp.add, carry, (sums, grads)), None

            (_, sums), grads = jax.eval_shape(gradient, params, first, totals, None)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (sums, grads))
            (sums, grads), _ = jax.lax.scan(add, zeros, micro)
        if shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, shardings)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, params)
        metrics = objective.metrics(sums, totals) | {"grad_norm": optax.tree.norm(grads)}
        return TrainState(optax.apply_updates(params, updates), optimizer_state), metrics

    return step


def micro_batches(objective: Objective, batch: Batch, number: int) -> tuple[Batch, Batch]:
    """`(arrays [A, B, ...], arrays that every micro-batch gets)`; each micro-batch spans the whole mesh, as the batch
    does: of rows 0 1 2 3 on two devices [0 1 | 2 3] the first of two micro-batches is [0 | 2]."""
    micro, shared = {}, {}
    for name, x in batch.items():
        axes = objective.arrays[name].axes
        if axes[0] != "batch":
            shared[name] = x
        elif number == 1:
            micro[name] = x[None]
        else:
            strided = x.reshape(x.shape[0] // number, number, *x.shape[1:]).swapaxes(0, 1)
            micro[name] = constrain(strided, None, *axes)
    return micro, shared
