"""What an answer is worth: the verdict on it, further verdicts by their weights, and what its length costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qwen3_jax.rl.judges import Verdicts
from qwen3_jax.rl.pack import Rollout
from qwen3_jax.tasks.judge import Verdict
from qwen3_jax.train.config import RolloutConfig

ANSWER, OVERLONG = "answer", "overlong"


def records_of(config: RolloutConfig, record: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What `judge` takes for each part of the reward: the verifier that the prompt's line names, and those of
    `rewards`."""
    records: dict[str, Mapping[str, Any]] = {ANSWER: {"verifier": config.verifier, **record}}
    return records | {name: {**record, "verifier": name} for name in config.rewards}


def with_reward(config: RolloutConfig, rollout: Rollout, verdicts: Verdicts) -> Rollout:
    """The answer with its reward: the sum of its parts, each by its weight.

    Overlong: with L for `max_new_tokens`, the last b of them cost min(-(length - (L - b)) / b, 0) of the penalty
    (Yu et al. 2025, equation 13), in tokens.
    """
    weights = {ANSWER: 1.0, **config.rewards}
    if buffer := config.overlong_tokens:
        over = len(rollout.result.token_ids) - (rollout.request.max_new_tokens - buffer)
        verdicts = {**verdicts, OVERLONG: Verdict(min(-over / buffer, 0.0), f"{max(over, 0)} of the last {buffer}")}
        weights[OVERLONG] = config.overlong_penalty
    reward = sum(weights[name] * verdict.score for name, verdict in verdicts.items())
    return dataclasses.replace(rollout, verdicts=verdicts, reward=reward)
