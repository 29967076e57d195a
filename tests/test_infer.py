"""infer.py on the model that ships: one prompt, files, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen3_jax.cli.infer import main
from qwen3_jax.serve import Engine, shipped_model


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(shipped_model())


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = 0
    try:
        main(argv)
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_the_reviews_example(capsys: pytest.CaptureFixture[str]) -> None:
    """`What is 2 + 3? /think` with B = 4: four thinking tokens, the stop text, the answer."""
    code, out, _ = run(capsys, "--prompt", "What is 2 + 3? /think", "--thinking-budget", "4")
    assert code == 0
    assert out.startswith("<think>\n2 plus 3\n\nConsidering the limited time by the user")
    assert out.endswith("</think>\n\n5\n")


def test_json_has_the_fields_of_a_record(capsys: pytest.CaptureFixture[str], engine: Engine) -> None:
    _, out, _ = run(capsys, "--prompt", "What is 2 + 3? /think", "--thinking-budget", "4", "--json")
    record = json.loads(out)
    assert record["content"] == "5"
    assert record["thinking"].startswith("2 plus 3")
    counts = (record["thinking_tokens"], record["injected_tokens"], record["answer_tokens"])
    assert counts == (4, len(engine.tokens.stop_ids), 2)
    assert (record["thinking_end"], record["finish_reason"]) == ("budget", "stop")
    assert len(record["token_ids"]) == sum(counts) + 1  # and <think>


@pytest.mark.parametrize(
    ("argv", "in_ids"),
    [
        (["What is 2 + 3? /no_think", "--thinking-budget", "4"], True),
        (["What is 2 + 3?", "--thinking-budget", "0"], True),
        (["What is 2 + 3? /think", "--no-thinking"], False),
    ],
)
def test_edge_26_27_28_non_thinking(
    capsys: pytest.CaptureFixture[str], engine: Engine, argv: list[str], in_ids: bool
) -> None:
    """The empty block is in the ids for a flag or B = 0, in the prompt for --no-thinking; never in the content."""
    _, out, _ = run(capsys, "--prompt", *argv, "--json")
    record = json.loads(out)
    assert (record["thinking"], record["content"], record["thinking_end"]) == ("", "5", "off")
    block = list(engine.tokens.empty_block)
    assert (record["token_ids"][: len(block)] == block) == in_ids


def test_no_think_with_a_space_is_a_spelling_of_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    """The mode is followed; what the model makes of a spelling that it was not trained on is its own affair."""
    _, out, _ = run(capsys, "--prompt", "What is 2 + 3? /no think", "--thinking-budget", "4", "--json")
    record = json.loads(out)
    assert (record["thinking"], record["thinking_tokens"], record["thinking_end"]) == ("", 0, "off")


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_of_mixed_rows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Budgets, modes and errors side by side; every good line is answered as if alone, in the order of the input."""
    good: list[dict[str, Any]] = [
        {"id": "a", "prompt": "What is 4 + 4? /think", "thinking_budget": 3},
        {"id": "b", "messages": [{"role": "user", "content": "What is 4 + 4?"}], "enable_thinking": False},
        {"id": "c", "prompt": "What is 4 plus 4?", "temperature": 0.0, "max_new_tokens": 64},
    ]
    bad: list[Any] = [
        {"id": "x", "prompt": "hi", "thinking_budget": 2.5},
        {"id": "y", "prompt": "hi", "budget": 2},
        "{not json",
        {"id": "z", "prompt": "hi " * 600},
    ]
    source = write(tmp_path / "in.jsonl", good[0], bad[0], good[1], bad[1], bad[2], good[2], bad[3])
    code, _, err = run(capsys, "--input", str(source), "--output", str(tmp_path / "out.jsonl"), "--batch-size", "2")
    assert code == 0, err
    out = read(tmp_path / "out.jsonl")
    assert [record["id"] for record in out] == ["a", "x", "b", "y", 5, "c", "z"]
    errors = [record["error"] for record in out if "error" in record]
    assert errors[0] == "thinking_budget: 2.5; a whole number >= -1 fits"
    assert errors[1].startswith("budget: unknown field; one of id, messages, prompt")
    assert errors[2].startswith("not valid JSON")
    assert "tokens; at most 511 fit the context of 512" in errors[3]
    summary = json.loads(err.strip().splitlines()[-1])
    assert (summary["lines"], summary["errors"]) == (7, 4)
    for record in good:
        write(tmp_path / "one.jsonl", record)
        run(capsys, "--input", str(tmp_path / "one.jsonl"), "--output", str(tmp_path / "one.out"))
        assert read(tmp_path / "one.out") == [answer for answer in out if answer["id"] == record["id"]]


def test_strict_stops_before_anything_is_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "What is 1 + 1?"}, {"prompt": "x", "top_p": 7})
    code, _, err = run(capsys, "--input", str(source), "--output", str(tmp_path / "out.jsonl"), "--strict")
    assert code == 2
    assert f"error: {source}:2: top_p: 7; a number in [0, 1] fits" in err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", "x", "--thinking-budget", "-2"], "thinking_budget: -2; a whole number >= -1 fits"),
        (["--prompt", "x", "--thinking-budget", "four"], "thinking_budget: 'four'; a whole number >= -1 fits"),
        (["--prompt", "x", "--thinking-budget", "4", "--max-new-tokens", "9"], "max_new_tokens: 9 leaves 9"),
        (["--prompt", "x", "--model", "/nowhere"], "tokenizer: '/nowhere' has none"),
        (["--input", "missing.jsonl"], "--input, --output: one without the other"),
        (["--input", "missing.jsonl", "--output", "out.jsonl"], "input: 'missing.jsonl' does not exist"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]


def test_a_model_without_weights_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / name).write_bytes((shipped_model() / name).read_bytes())
    code, _, err = run(capsys, "--prompt", "x", "--model", str(tmp_path))
    assert code == 2
    assert "holds no *.safetensors" in err
