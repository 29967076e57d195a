"""Steps that would spoil the weights are not taken, and too many of them in a row end the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.experimental import multihost_utils

from qwen3_jax.train.objective import Batch, Metrics
from qwen3_jax.train.run_directory import RunDirectory
from qwen3_jax.train.step import TrainState

_MEMORY = 0.98  # of the usual loss: it forgets half in 34 steps


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


def end_of_patience(
    step: int, metrics: dict[str, Any], batch: Batch, max_bad_steps: int, directory: RunDirectory
) -> str | None:
    """Why a run ends with this step, None if it continues; the batch of the step that ends it is saved.

    All processes call it alike.
    """
    row = int(metrics["skipped_in_row"])
    if not metrics["skipped"] or row < max_bad_steps:
        return None
    name = f"bad_step_{step}.npz"
    rows = multihost_utils.process_allgather(batch, tiled=True)
    if jax.process_index() == 0:
        np.savez(directory.files / name, **rows)
    return (
        f"step {step}: loss is {metrics['loss']}, gradient norm {metrics['grad_norm']}: {row} bad steps in a row; its "
        f"batch is in {directory.directory / name}"
    )
