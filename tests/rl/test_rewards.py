"""What an answer is worth, and verdicts that a hanging or a failing verifier gives."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen3_jax.data.source import DocumentSource
from qwen3_jax.decode import Request, Result
from qwen3_jax.rl.judges import Judges
from qwen3_jax.rl.pack import Rollout
from qwen3_jax.rl.rewards import records_of, with_reward
from qwen3_jax.tasks.judge import Verdict
from qwen3_jax.train.config import RolloutConfig

CONFIG = RolloutConfig(max_new_tokens=20, rewards={"mode": 0.5, "length": -2.0})
ASKED: Any = None


def rollout(tokens: int, room: int = 20) -> Rollout:
    zeros: Any = [0] * tokens
    result = Result(zeros, 0, 0, tokens, "off", "eos", zeros, zeros)
    return Rollout(0, ASKED, Request([1], max_new_tokens=room), result, {})


def test_each_part_is_judged_by_its_verifier_and_weighed() -> None:
    record = {"answer": "5", "enable_thinking": True}
    assert records_of(CONFIG, record) == {
        "answer": {"verifier": "exact", **record},
        "mode": record | {"verifier": "mode"},
        "length": record | {"verifier": "length"},
    }
    assert records_of(CONFIG, {"verifier": "number"})["answer"]["verifier"] == "number"
    verdicts = {"answer": Verdict(1.0, "right"), "mode": Verdict(1.0, ""), "length": Verdict(0.25, "")}
    assert with_reward(CONFIG, rollout(3), verdicts).reward == 1.0 + 0.5 - 0.5


@pytest.mark.parametrize(
    ("tokens", "room", "penalty"), [(0, 20, 0), (16, 20, 0), (17, 20, -0.75), (20, 20, -3.0), (10, 10, -3.0)]
)
def test_the_last_tokens_of_the_room_cost_more_and_more(tokens: int, room: int, penalty: float) -> None:
    """By 4 tokens and a penalty of 3."""
    config = dataclasses.replace(CONFIG, rewards={}, overlong_tokens=4, overlong_penalty=3.0)
    found = with_reward(config, rollout(tokens, room), {"answer": Verdict(1.0, "")})
    assert found.reward == 1.0 + penalty
    assert list(found.verdicts) == ["answer", "overlong"]


def test_an_answer_that_makes_a_verifier_hang_or_die_costs_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(
        "import os, time\n"
        "def judge(record, thought, answer):\n"
        "    if answer == 'hang': time.sleep(60)\n"
        "    if answer == 'die': os._exit(1)\n"
        "    return float(answer == record['answer'])\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys.modules["qwen3_jax.tasks.judge"], "_OWN_SECONDS", 2.0)
    (tmp_path / "queries.jsonl").write_text("{}\n")
    document = DocumentSource((str(tmp_path / "queries.jsonl"),), "paths")[0]
    judges, record = Judges(2), {"answer": "5", "verifier": "own:judge"}
    for number, answer in enumerate(("5", "hang", "6", "die", "5")):
        judges.submit(number, document, {"answer": record}, "", answer)
    found = judges.collect()
    assert [found[number]["answer"].score for number in range(5)] == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert found[1]["answer"].reason.startswith("no result in 2 s")
    assert found[3]["answer"].reason.startswith("its process died")
    judges.submit(0, document, {"answer": {"verifier": "number"}}, "", "5")
    with pytest.raises(ValueError, match=r"queries.jsonl:1: answer: None; use a text or a number"):
        judges.collect()
