"""What a stage has taught, measured on the model that ships, which knows both modes and their flags."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen3_jax.cli.main import main as qwen3_jax
from qwen3_jax.evaluate.stages import BUDGETS
from qwen3_jax.serve import shipped_model


def test_the_shipped_model_thinks_and_follows_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Held-out chains with a thought are right, without one they are not; of dialogues it has seen none."""
    plot = tmp_path / "stages.png"
    qwen3_jax(["evaluate", "stages", str(shipped_model()), "--problems", "20", "--json", "--plot", str(plot)])
    found = json.loads(capsys.readouterr().out)
    assert found["thinking"] >= 0.95
    assert found["non_thinking"] < 0.6
    assert found["flags"] >= 0.95
    assert 0.3 < found["dialogue_flags"] < 1.0
    assert list(found["curve"]) == [str(budget) for budget in BUDGETS]
    assert found["curve"]["2"] < found["curve"]["11"]
    assert plot.stat().st_size > 1000
