"""Advantages against their definitions, answer by answer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from qwen3_jax.rl import group_advantages


def test_advantages_are_those_of_their_definitions() -> None:
    rng = np.random.default_rng(1)
    rewards = rng.normal(size=(5, 4))
    for group, row in enumerate(rewards):
        mean = sum(row) / 4
        std = math.sqrt(sum((r - mean) ** 2 for r in row) / 3)
        for answer, reward in enumerate(row):
            others = [r for other, r in enumerate(row) if other != answer]
            expected: dict[Any, float] = {
                "grpo": (reward - mean) / (std + 1e-6),
                "dr_grpo": reward - mean,
                "rloo": reward - sum(others) / 3,
            }
            for kind, value in expected.items():
                assert group_advantages(rewards, kind)[group, answer] == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_a_group_of_equal_rewards_has_no_advantage(kind: Any) -> None:
    """Exactly: the mean of three times 0.1 is not 0.1."""
    assert np.mean([0.1] * 3) != 0.1
    assert (group_advantages([[0.1] * 3, [0.0, 0.0, 1.0]], kind)[0] == 0).all()


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([[1.0]], r"rewards_GN: shape \(1, 1\); use \[groups, answers\] with 2 answers or more"),
        ([[1.0, math.nan]], r"rewards_GN\[0, 1\]: nan; use a finite number"),
    ],
)
def test_rewards_that_give_no_advantage_are_refused(rewards: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards)
