"""What a run computes on a batch, for any objective: a step (micro-batches, gradient, update), the guard around it that
takes no step which would spoil the weights, and the loss on held-out data.

Shapes: A micro-batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from qwen3_jax.train.feed import Feed
from qwen3_jax.train.objective import Batch, Metrics, Objective, Sums, add_sums
from sharding import constrain

_MEMORY = 0.98  # of the usual loss: it forgets half in 34 steps


@struct.dataclass
class TrainState:
    """Weights in float32 and the optimiser's state; the optimiser counts the steps."""

    params: Any
    optimizer: Any


@struct.dataclass
class Guard:
    """What the steps before say about a step.

    skipped: steps not taken, int32. in_row: those of them since the last step taken, int32.
    usual_loss: moving average over the steps taken, float32; 0 before the first.
    """

    skipped: Any
    in_row: Any
    usual_loss: Any

    @classmethod
    def create(cls, skipped: int = 0, in_row: int = 0, usual_loss: float = 0.0) -> Guard:
        """For a new run, or with the numbers of one that resumes."""
        return cls(jnp.int32(skipped), jnp.int32(in_row), jnp.float32(usual_loss))


@struct.dataclass
class GuardedState:
    """What a run carries from step to step."""

    train: TrainState
    guard: Guard


def make_train_step(
    objective: Objective, optimizer: optax.GradientTransformation, accumulation: int = 1, shardings: Any = None
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """`step(state, batch) -> (state, metrics)`, to be jitted; the objective's metrics and `grad_norm`.

    Args:
      accumulation: micro-batches of an update, one after the other; they change the memory of a step, not its result.
      shardings: of the weights. Gradients keep them until the optimiser takes its parts: XLA:TPU would otherwise
        reduce-scatter gradients over `data` in each layer, and wait for it there.
    """
    gradient = jax.value_and_grad(objective.loss, has_aux=True)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        micro, shared = micro_batches(objective, batch, objective.updates * accumulation)
        micro |= objective.before(state.params, micro | shared)
        if objective.updates == 1:
            return update(state, micro, shared)
        parts = {name: x.reshape(objective.updates, accumulation, *x.shape[1:]) for name, x in micro.items()}
        state, metrics = jax.lax.scan(lambda state, part: update(state, part, shared), state, parts)
        return state, jax.tree.map(lambda x: x.mean(axis=0), metrics)

    def update(state: TrainState, micro: Batch, shared: Batch) -> tuple[TrainState, Metrics]:
        params = state.params
        totals = objective.totals(params, micro | shared)
        first = jax.tree.map(lambda x: x[0], micro) | shared
        if accumulation == 1:
            (_, sums), grads = gradient(params, first, totals, None)
        else:

            def add(carry: tuple[Sums, Any], part: Batch) -> tuple[Sums, Any]:
                (_, sums), grads = gradient(params, part | shared, totals, carry[0])
                return add_sums(carry[0], sums), jax.tree.map(jnp.add, carry[1], grads)

            (_, sums), grads = jax.eval_shape(gradient, params, first, totals, None)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (sums, grads))
            if objective.may_be_empty:
                sums, grads = over_filled(add, zeros, micro)
            else:
                (sums, grads), _ = jax.lax.scan(lambda carry, part: (add(carry, part), None), zeros, micro)
        if shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, shardings)
        changes, optimizer_state = optimizer.update(grads, state.optimizer, params)
        metrics = objective.metrics(sums, totals) | {"grad_norm": optax.tree.norm(grads)}
        return TrainState(optax.apply_updates(params, changes), optimizer_state), metrics

    return step


def over_filled(function: Callable[[Any, Batch], Any], found: Any, micro: Batch) -> Any:
    """`function(found, part)` over the micro-batches, one after the other, up to the last that is not padding alone."""
    # Not `lax.cond` in each turn: XLA:CPU mixes up the collectives of its branches with others, over four processes.
    is_filled_A = (micro["segment_ids"] > 0).any(axis=(1, 2))
    number = jnp.max(jnp.where(is_filled_A, jnp.arange(1, len(is_filled_A) + 1), 0))
    return jax.lax.fori_loop(
        0, number, lambda i, found: function(found, {name: x[i] for name, x in micro.items()}), found
    )


def skip_bad_steps(
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]], spike_factor: float | None = None
) -> Callable[[GuardedState, Batch], tuple[GuardedState, Metrics]]:
    """`step`, without effect on weights and optimiser where its loss or gradient is not finite.

    The metrics gain `skipped` (0 or 1), `skipped_in_row` and `skipped_total`.

    Args:
      spike_factor: skip also where the loss exceeds that many times the usual one (as Chowdhery et al. 2022, section
        5.1, skipped the batches around a spike, by hand); None: only what is not finite.
    """

    def guarded(state: GuardedState, batch: Batch) -> tuple[GuardedState, Metrics]:
        guard = state.guard
        after, metrics = step(state.train, batch)
        loss = metrics["loss"].astype(jnp.float32)
        bad = ~(jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"]))
        if spike_factor is not None:
            bad |= (guard.usual_loss > 0) & (loss > spike_factor * guard.usual_loss)
        train = jax.tree.map(lambda old, new: jnp.where(bad, old, new), state.train, after)
        usual = jnp.where(guard.usual_loss > 0, _MEMORY * guard.usual_loss + (1 - _MEMORY) * loss, loss)
        guard = Guard(
            skipped=guard.skipped + bad,
            in_row=jnp.where(bad, guard.in_row + 1, 0),
            usual_loss=jnp.where(bad, guard.usual_loss, usual),
        )
        series = {"skipped": bad.astype(jnp.int32), "skipped_in_row": guard.in_row, "skipped_total": guard.skipped}
        return GuardedState(train, guard), {**metrics, **series}

    return guarded


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
        def losses_of(parts: list[tuple[Sums, Sums]]) -> Metrics:
            metrics = objective.metrics(*(functools.reduce(add_sums, kind) for kind in zip(*parts, strict=True)))
            return {name: value for name, value in metrics.items() if name.startswith("loss")}

        self._sums_of, self._losses_of = sums_of, losses_of

    def losses(self, params: Any) -> dict[str, float]:
        """The objective's loss and its parts, as if all batches were one: `eval_loss`, and `eval_` before each part."""
        self._feed.set_state(self._first)
        parts = [self._sums_of(params, self._feed.next(params)) for _ in range(self._batches)]
        return {f"eval_{name}": float(value) for name, value in self._losses_of(parts).items()}
