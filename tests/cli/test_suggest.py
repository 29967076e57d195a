"""`qwen3-jax suggest`: the law against the best of its authors' runs, and what the command prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen3_jax.cli.main import main
from qwen3_jax.optim import step_law

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("weights", "tokens", "rate", "rows"),
    [
        (214.7e6, 4.0e9, 2.76e-3, 128),
        (268.3e6, 25.0e9, 3.91e-3, 352),
        (429.3e6, 22.7e9, 1.95e-3, 192),
        (536.9e6, 50.0e9, 2.76e-3, 352),
        (1073.7e6, 56.9e9, 1.38e-3, 256),
    ],
)
def test_the_law_is_near_the_best_published_runs(weights: float, tokens: float, rate: float, rows: int) -> None:
    """Rates and batches (rows of 2,048) of the runs of least loss. Their grid has steps of 1.4 to 2, and the law
    smooths over its noise; with weights and tokens swapped, or a batch in rows, it would be off by more than 10."""
    found_rate, batch_tokens = step_law(weights, tokens)
    assert 0.5 < found_rate / rate < 2
    assert 0.5 < batch_tokens / (rows * 2048) < 2


def test_the_model_is_counted_without_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    """By name and by file, tied and not; of experts all are counted (published: 6.95B, 0.44B, 29.9B non-embedding)."""
    moe = str(ROOT / "configs" / "model" / "qwen3-30b-a3b.yaml")
    for model, billions in (("qwen3-8b", 6.95), ("qwen3-0.6b", 0.44), (moe, 29.9)):
        main(["suggest", "--model", model, "--tokens", "100B", "--json"])
        assert json.loads(capsys.readouterr().out)["params"] == pytest.approx(billions * 1e9, rel=2e-3)


def test_rows_and_steps_make_up_the_batch_and_the_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    main(["suggest", "--params", "0.5B", "--tokens", "50e9", "--sequence-length", "2048", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["params"], found["tokens"], found["outside"]) == (0.5e9, 50e9, [])
    assert abs(found["batch_size"] * 2048 - found["batch_tokens"]) <= 1024
    assert 0 <= found["steps"] * found["batch_size"] * 2048 - 50e9 < found["batch_size"] * 2048


def test_it_says_where_the_law_is_stretched(capsys: pytest.CaptureFixture[str]) -> None:
    main(["suggest", "--params", "107M", "--tokens", "30T"])
    out = " ".join(capsys.readouterr().out.split())
    assert "weights 2.0 times below that and tokens 300.0 times above that." in out
    main(["suggest", "--params", "1B", "--tokens", "100B"])
    assert "this run is inside that range" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--params", "many", "--tokens", "1B"], "--params: 'many'; use a number above 0"),
        (["--params", "1B", "--tokens", "-1"], "--tokens: '-1'; use a number above 0"),
        (["--params", "1B", "--tokens", "infB"], "--tokens: 'infB'; use a number above 0"),
        (["--params", "1B", "--tokens", "1B", "--sequence-length", "0"], "--sequence-length: 0; use a number >= 1"),
        (["--model", "qwen3-7b", "--tokens", "1B"], "model preset: 'qwen3-7b' is unknown"),
    ],
)
def test_bad_input_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["suggest", *argv])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
