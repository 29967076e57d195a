"""AdamW and Muon, their schedules, and how their state is sharded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from sharding import split_over_replicas

# The axes that make each weight the matrix it multiplies by, counted from the end: what is before them (layers,
# experts, gate and up) are matrices of their own. The heads of a projection are rows (or, of o_proj, columns) of one
# matrix, as in Jordan's and Liu's code; no matrix is cut into heads.
_ROWS_AND_COLUMNS = MuonDimensionNumbers(output_axis=-2, reduction_axis=-1)
_HEADS_OUT = MuonDimensionNumbers(output_axis=(-3, -2), reduction_axis=-1)
_HEADS_IN = MuonDimensionNumbers(output_axis=-3, reduction_axis=(-2, -1))
_MATRICES = {
    "q_proj": _HEADS_OUT,  # [N, H, D]
    "k_proj": _HEADS_OUT,  # [K, H, D]
    "v_proj": _HEADS_OUT,  # [K, H, D]
    "o_proj": _HEADS_IN,  # [D, N, H]
    "gate_proj": _ROWS_AND_COLUMNS,  # [F, D]
    "up_proj": _ROWS_AND_COLUMNS,  # [F, D]
    "gate_up_proj": _ROWS_AND_COLUMNS,  # [2, F, D]
    "down_proj": _ROWS_AND_COLUMNS,  # [D, F]
}
_MUON_MOMENTUM = 0.95  # Jordan et al. 2024, Liu et al. 2025
_MUON_RMS = 0.2  # of an update; about that of AdamW's (Liu et al. 2025, section 2.2)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """What is done with a gradient, and how fast.

    name: "adamw" (Loshchilov and Hutter 2019), or "muon" (Jordan et al. 2024) for the matrices of the layers and AdamW
      for what is none or is used otherwise: embeddings, head, norm scales, router. Muon's updates are scaled to
      AdamW's size (Liu et al. 2025), so that one learning rate and one weight decay serve both.
    learning_rate: the rate that `initial_ratio` and `final_ratio` are shares of.
    warmup_steps: the rate rises from 0 in a line over these.
    schedule: what follows the warm-up. "cosine" falls over all further steps; "wsd" stays, then falls in a line over
      the last `decay_steps`, the cooldown of Hägele et al. 2024. (MiniCPM, which named the schedule, falls
      exponentially, by halves; 10% of the steps are enough for either.)
    initial_ratio: the rate at the end of the warm-up; below 1 where a stage continues another's schedule.
    final_ratio: the last rate; `initial_ratio` itself keeps the rate constant.
    b1, b2, eps: of AdamW. weight_decay: per step, times the rate; norm scales are not decayed, embeddings are.
    clip_norm: the gradient's norm over all weights is cut to this.
    """

    learning_rate: float
    warmup_steps: int
    name: Literal["adamw", "muon"] = "adamw"
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay_steps: int = 0
    initial_ratio: float = 1.0
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
            raise ValueError(f"warmup_steps: {self.warmup_steps}; use a number >= 0")
        if not 0 < self.initial_ratio <= 1:
            raise ValueError(f"initial_ratio: {self.initial_ratio}; use a number above 0 and up to 1")
        if not 0 <= self.final_ratio <= self.initial_ratio:
            raise ValueError(
                f"final_ratio: {self.final_ratio}; use a number from 0 to initial_ratio ({self.initial_ratio})"
            )


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by optimiser step, over `steps` steps."""
    first, last = config.learning_rate * config.initial_ratio, config.learning_rate * config.final_ratio
    tail = steps - config.warmup_steps if config.schedule == "cosine" else config.decay_steps
    stable = steps - config.warmup_steps - tail
    if tail < 1 or stable < 0:
        raise ValueError(
            f"steps: {steps} do not hold warmup_steps ({config.warmup_steps}) and the decay after them; use at least "
            f"{config.warmup_steps + max(config.decay_steps, 1)}, or fewer warmup_steps"
        )
    parts = [optax.linear_schedule(0.0, first, config.warmup_steps)]
    if config.schedule == "cosine":
        parts.append(optax.cosine_decay_schedule(first, tail, alpha=config.final_ratio / config.initial_ratio))
        return optax.join_schedules(parts, [config.warmup_steps])
    parts += [optax.constant_schedule(first), optax.linear_schedule(first, last, tail)]
    return optax.join_schedules(parts, [config.warmup_steps, config.warmup_steps + stable])


def step_law(weights: float, tokens: float) -> tuple[float, float]:
    """`(peak learning rate, batch in tokens)` by Step Law (Li et al. 2025, arXiv 2503.04715).

    The law is of AdamW with 2,000 steps of warm-up and a cosine down to a rate of 1e-5.

    Args:
      weights: of the network without embedding table and head; of a mixture of experts all of them, active or not.
      tokens: that the run trains on, of all steps together.
    """
    return 1.79 * weights**-0.713 * tokens**0.307, 0.58 * tokens**0.571


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping, a direction by AdamW or Muon, weight decay, and the schedule's rate."""
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    if config.name == "adamw":
        direction = adam
    else:
        muon = optax.chain(
            scale_by_muon(beta=_MUON_MOMENTUM, weight_dimension_numbers=_by_name(_MATRICES.__getitem__)),
            optax.stateless(_match_adam),
        )
        labels = _by_name(lambda name: "muon" if name in _MATRICES else "adam")
        direction = optax.partition({"muon": muon, "adam": adam}, labels)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        direction,
        optax.add_decayed_weights(config.weight_decay, mask=_by_name(lambda name: "norm" not in name)),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    )


def optimizer_shardings(optimizer: optax.GradientTransformation, params: Any, shardings: Any, scalar: Any) -> Any:
    """Shardings of the optimiser's state: moments are sharded as their weights, and over `data` too where weights are
    replicated (ZeRO-1); all else as `scalar`.

    Args:
      params: the weights, or their shapes. shardings: theirs.
    """

    def split(leaf: Any, sharding: Any) -> Any:
        return leaf if isinstance(leaf, optax.MaskedNode) else split_over_replicas(sharding, leaf.shape)

    return optax.tree_map_params(
        optimizer,
        split,
        jax.eval_shape(optimizer.init, params),
        shardings,
        transform_non_params=lambda _: scalar,
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )


def _by_name(value: Callable[[str], Any]) -> Callable[[Any], Any]:
    """A function from a tree of weights to `value` of each one's name."""
    return lambda params: jax.tree_util.tree_map_with_path(lambda path, _: value(path[-1].key), params)


def _match_adam(updates: Any, params: Any) -> Any:
    """Orthogonal matrices [out, in] to the root mean square of AdamW's updates: times 0.2 sqrt(max(out, in))."""
    del params

    def scale(path: Any, update: jax.Array) -> jax.Array:
        sizes = [
            math.prod(update.shape[axis] for axis in (axes if isinstance(axes, tuple) else (axes,)))
            for axes in _MATRICES[path[-1].key]
        ]
        return update * (_MUON_RMS * math.sqrt(max(sizes)))

    return jax.tree_util.tree_map_with_path(scale, updates)
