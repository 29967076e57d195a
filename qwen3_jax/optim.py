"""AdamW, its schedules, and what of it is sharded how."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019) with linear warm-up and a cosine or warm-up-stable-decay schedule.

    learning_rate: the peak. final_ratio: the last rate as a share of it.
    decay_steps: length of the final decay of "wsd"; "cosine" decays over all steps after the warm-up.
    clip_norm: the gradient's norm over all weights is cut to this.
    """

    learning_rate: float
    warmup_steps: int
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay_steps: int = 0
    final_ratio: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.schedule == "wsd" and self.decay_steps < 1:
            raise ValueError(f"decay_steps: {self.decay_steps}; 'wsd' needs a number >= 1")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps: {self.warmup_steps}; a number >= 0 fits")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by optimiser step, over `steps` steps."""
    peak, last = config.learning_rate, config.learning_rate * config.final_ratio
    tail = steps - config.warmup_steps if config.schedule == "cosine" else config.decay_steps
    stable = steps - config.warmup_steps - tail
    if tail < 1 or stable < 0:
        raise ValueError(
            f"steps: {steps} do not hold warmup_steps ({config.warmup_steps}) and a decay ({config.decay_steps}); "
            "more steps fit"
        )
    parts = [optax.linear_schedule(0.0, peak, config.warmup_steps)]
    if config.schedule == "cosine":
        parts.append(optax.cosine_decay_schedule(peak, tail, alpha=config.final_ratio))
        return optax.join_schedules(parts, [config.warmup_steps])
    parts += [optax.constant_schedule(peak), optax.linear_schedule(peak, last, tail)]
    return optax.join_schedules(parts, [config.warmup_steps, config.warmup_steps + stable])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping, then AdamW; norm scales are not decayed."""

    def decayed(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in path[-1].key, params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )


def optimizer_shardings(optimizer: optax.GradientTransformation, params: Any, shardings: Any, scalar: Any) -> Any:
    """Shardings of the optimiser's state: each moment lies as its weight does, all else as `scalar`.

    Args:
      params: the weights, abstract ones do. shardings: theirs.
    """
    state = jax.eval_shape(optimizer.init, params)
    return optax.tree_map_params(
        optimizer, lambda _, sharding: sharding, state, shardings, transform_non_params=lambda _: scalar
    )
