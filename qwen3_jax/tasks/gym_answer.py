"""reasoning-gym's score of an answer; called in a process that can be killed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

_TUPLES = ("arc_agi", "rearc")  # their scores compare grids with those of `metadata`, which are lists in JSON


def best_score(
    metadata: Mapping[str, Any], question: str, reference: str | None, answers: Sequence[str]
) -> float | None:
    """The best that it gives one of these readings of an answer, 0 to 1; None where it has no such data set."""
    name = metadata["source_dataset"]
    if name not in DATASETS:
        return None
    entry = {"question": question, "answer": reference, "metadata": _grids(metadata) if name in _TUPLES else metadata}
    score = reasoning_gym.get_score_answer_fn(name)
    return max(float(score(answer, entry)) for answer in answers)


def _grids(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {name: _grids(value) for name, value in data.items()}
    return tuple(map(_grids, data)) if isinstance(data, list) else data
