"""How much better an answer is than the others to the same prompt.

Shapes: G groups (prompts), N answers of a group.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

AdvantageKind = Literal["grpo", "dr_grpo", "rloo"]


def group_advantages(rewards_GN: Any, kind: AdvantageKind = "grpo") -> np.ndarray:
    """Advantages by the group's own mean, float64 [G, N], on the host: rewards come from there.

    grpo: (R - mean) / (std + 1e-6), std with N - 1 in its denominator (Shao et al. 2024, arXiv 2402.03300).
    dr_grpo: R - mean, so that a group's weight does not grow as its answers agree (Liu et al. 2025, arXiv 2503.20783).
    rloo: R minus the mean of the others (Ahmadian et al. 2024, arXiv 2402.14740).

    A group of equal rewards has advantages of exactly 0.

    Raises:
      ValueError: groups of one, a reward that is not finite, or another kind.
    """
    rewards_GN = np.asarray(rewards_GN, np.float64)
    if rewards_GN.ndim != 2 or rewards_GN.shape[1] < 2:
        raise ValueError(f"rewards_GN: shape {rewards_GN.shape}; use [groups, answers] with 2 answers or more")
    if (bad := np.argwhere(~np.isfinite(rewards_GN))).size:
        group, answer = bad[0]
        raise ValueError(f"rewards_GN[{group}, {answer}]: {rewards_GN[group, answer]}; use a finite number")
    # The mean of equal numbers is not always that number.
    is_equal_G1 = np.ptp(rewards_GN, axis=1, keepdims=True) == 0
    centred_GN = np.where(is_equal_G1, 0.0, rewards_GN - rewards_GN.mean(axis=1, keepdims=True))
    if kind == "grpo":
        return centred_GN / (rewards_GN.std(axis=1, ddof=1, keepdims=True) + 1e-6)
    if kind == "dr_grpo":
        return centred_GN
    if kind == "rloo":
        count = rewards_GN.shape[1]
        return centred_GN * (count / (count - 1))
    raise ValueError(f"kind: {kind!r}; use one of {', '.join(get_args(AdvantageKind))}")
