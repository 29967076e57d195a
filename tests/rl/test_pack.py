"""Answers as packed rows: what stands at which target, and which rows are whose."""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen3_jax.data import DataConfig, SourceConfig
from qwen3_jax.decode import Request, Result
from qwen3_jax.rl.pack import Rollout, is_settled, packed, to_batch, with_advantages
from qwen3_jax.tasks.judge import Verdict

DATA = DataConfig((SourceConfig("a", ("a.jsonl",)),), "t", sequence_length=12, batch_size=6)


def rollout(number: int, prompt: int, answer: int, score: float = 0.0, **fields: Any) -> Rollout:
    """Prompt ids 10, 11, ... and answer ids 50, 51, ...; the second token of the answer was forced."""
    result = Result(
        token_ids=[50 + i for i in range(answer)],
        thinking_tokens=0,
        injected_tokens=1,
        answer_tokens=answer,
        thinking_end="budget",
        finish_reason="eos",
        logprobs=[-0.1 * (i + 1) for i in range(answer)],
        forced=[i == 1 for i in range(answer)],
    )
    asked: Any = None
    request = Request([10 + i for i in range(prompt)])
    return Rollout(number, asked, request, result, {"answer": Verdict(score, "")}, score, **fields)


def test_each_target_has_what_belongs_to_it() -> None:
    """Position t is about token t + 1; a forced token and the prompt weigh nothing, and neither does padding."""
    row = [rollout(0, 3, 3, advantage=2.0), rollout(1, 2, 2, advantage=-1.0)]
    batch = to_batch([row], DATA, updates=1, accumulation=1, pad_id=0)
    first = {name: x[0] for name, x in batch.items()}
    assert first["tokens"].tolist() == [10, 11, 12, 50, 51, 52, 10, 11, 50, 51, 0, 0]
    assert first["targets"].tolist() == [11, 12, 50, 51, 52, 0, 11, 50, 51, 0, 0, 0]
    assert first["segment_ids"].tolist() == [1] * 6 + [2] * 4 + [0] * 2
    assert first["loss_weights"].tolist() == [0, 0, 1, 0, 1, 0, 0, 1, 0, 0, 0, 0]
    np.testing.assert_allclose(first["sampler_logprobs"], [0, 0, -0.1, -0.2, -0.3, 0, 0, -0.1, -0.2, 0, 0, 0])
    weighted = first["advantages"] * first["loss_weights"]
    assert weighted.tolist() == [0, 0, 2, 0, 2, 0, 0, -1, 0, 0, 0, 0]
    for name in ("loss_weights", "segment_ids", "advantages"):
        assert not batch[name][1:].any()


def test_rows_are_filled_and_the_first_micro_batches_too() -> None:
    lengths = [(4, 8), (2, 3), (3, 4), (2, 5), (2, 2), (4, 4)]
    rollouts = [rollout(number, *length) for number, length in enumerate(lengths)]
    rows = packed(rollouts, 12)
    assert sorted(r.number for row in rows for r in row) == list(range(6))
    assert all(sum(map(len, row)) <= 12 for row in rows)
    assert [[r.number for r in row] for row in rows] == [[0], [5, 4], [2, 1], [3]]
    batch = to_batch([rollouts[:3], rollouts[3:]], DATA, updates=1, accumulation=3, pad_id=0)
    # Micro-batch m has rows m, m + 3 of the batch: two of the four rows are in the first, two in the second.
    filled = (batch["segment_ids"] > 0).any(axis=1)
    assert [filled[m::3].tolist() for m in range(3)] == [[True, True], [True, True], [False, False]]
    assert (batch["segment_ids"][0] == 1).sum() == 12


def test_each_update_has_whole_groups() -> None:
    groups = [[rollout(2 * i, 2, 2 + i), rollout(2 * i + 1, 2, 2)] for i in range(3)]
    batch = to_batch(groups, DATA, updates=3, accumulation=2, pad_id=0)
    # Update u has micro-batches 2u and 2u + 1, of one row each: the second of each is padding.
    assert [(batch["segment_ids"][row] > 0).sum() for row in range(6)] == [8, 0, 9, 0, 10, 0]


def test_a_cut_answer_may_be_left_out_of_the_loss() -> None:
    batch = to_batch([[rollout(0, 3, 3), rollout(1, 2, 2, is_masked=True)]], DATA, updates=1, accumulation=1, pad_id=0)
    assert batch["loss_weights"][0].tolist() == [0, 0, 1, 0, 1, 0] + [0] * 6


def test_advantages_are_by_group() -> None:
    groups = [[rollout(0, 2, 2, 1.0), rollout(1, 2, 2, 0.0)], [rollout(2, 2, 2, 1.0), rollout(3, 2, 2, 1.0)]]
    assert [is_settled(group) for group in groups] == [False, True]
    found = with_advantages(groups, "dr_grpo")
    assert [[r.advantage for r in group] for group in found] == [[0.5, -0.5], [0.0, 0.0]]
