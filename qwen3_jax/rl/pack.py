"""Answers as the packed rows of a training batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from qwen3_jax.data import DataConfig
from qwen3_jax.data.packing import OpenRows, to_arrays
from qwen3_jax.decode import Request, Result
from qwen3_jax.rl.advantages import AdvantageKind, group_advantages
from qwen3_jax.rl.prompts import Asked
from qwen3_jax.tasks.judge import Verdict


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One answer. number: of the answer in its step.

    verdicts: by the part of the reward; none where the answer is not judged. is_masked: it is left out of the loss.
    tokens_N: prompt and answer. loss_mask_N: 1 where the model chose the token; 0 in the prompt, and where the token
    was forced.
    """

    number: int
    asked: Asked
    request: Request
    result: Result
    verdicts: Mapping[str, Verdict]
    reward: float = 0.0
    is_masked: bool = False
    advantage: float = 0.0

    def __len__(self) -> int:
        return len(self.request.prompt_ids) + len(self.result.token_ids)

    @property
    def tokens_N(self) -> np.ndarray:
        return np.array([*self.request.prompt_ids, *self.result.token_ids], np.int32)

    @property
    def loss_mask_N(self) -> np.ndarray:
        answer = [not (forced or self.is_masked) for forced in self.result.forced]
        return np.array([0] * len(self.request.prompt_ids) + answer, np.uint8)


def with_advantages(groups: Sequence[Sequence[Rollout]], kind: AdvantageKind) -> list[list[Rollout]]:
    """Each answer with its advantage over the others of its group."""
    values_GN = group_advantages([[rollout.reward for rollout in group] for group in groups], kind)
    return [
        [dataclasses.replace(rollout, advantage=float(value)) for rollout, value in zip(group, values_N, strict=True)]
        for group, values_N in zip(groups, values_GN, strict=True)
    ]


def is_settled(group: Sequence[Rollout]) -> bool:
    """Whether all rewards are equal: nothing is learnt from such a group."""
    return len({rollout.reward for rollout in group}) == 1


def packed(rollouts: Sequence[Rollout], length: int) -> list[list[Rollout]]:
    """Rows of at most `length` tokens: the longest first, each to the fullest row that it fits into."""
    rows = OpenRows[Rollout](length, most=len(rollouts))
    for rollout in sorted(rollouts, key=lambda rollout: (-len(rollout), rollout.number)):
        rows.add(rollout)
    return [row.items for row in rows.rows]


def to_batch(
    groups: Sequence[Sequence[Rollout]], data: DataConfig, updates: int, accumulation: int, pad_id: int
) -> dict[str, np.ndarray]:
    """The arrays of a step: those of `to_arrays`, and at each target its answer's `advantages` and its own
    `sampler_logprobs`.

    Each of `updates` has as many whole groups, in their order. Its rows that are not needed are padding, in its last
    micro-batches.
    """
    arrays = []
    for part in np.array_split(np.arange(len(groups)), updates):
        rows: list[Sequence[Rollout]] = [*packed([x for i in part for x in groups[i]], data.sequence_length)]
        rows += [()] * (data.batch_size // updates - len(rows))
        arrays += [_row(row, data.sequence_length, pad_id) for row in rows]
    # Of a batch in n micro-batches, every n-th row is in the same one.
    placed = np.arange(data.batch_size).reshape(updates * accumulation, -1).T.ravel()
    return {name: np.stack([arrays[i][name] for i in placed]) for name in arrays[0]}


def _row(row: Sequence[Rollout], length: int, pad_id: int) -> dict[str, np.ndarray]:
    arrays = to_arrays(row, length, pad_id)
    arrays |= {name: np.zeros(length, np.float32) for name in ("advantages", "sampler_logprobs")}
    start = 0
    for rollout in row:
        stop, answer = start + len(rollout), start + len(rollout.request.prompt_ids)
        # Position t is about token t + 1.
        arrays["sampler_logprobs"][answer - 1 : stop - 1] = rollout.result.logprobs
        arrays["advantages"][start : stop - 1] = rollout.advantage
        start = stop
    return arrays
