"""pass@k against brute force, and the scoring of a file of answers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from qwen3_jax.cli.main import main
from qwen3_jax.evaluate.pass_at_k import pass_at_k, score_file


def answer(prompt: str | int, sample: int, right: bool) -> dict[str, Any]:
    return {"id": prompt, "sample": sample, "content": "4" if right else "5", "answer": " 4\n"}


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("n", range(1, 8))
def test_estimator_is_the_share_of_all_subsets_that_hold_a_right_sample(n: int) -> None:
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), rel=1e-15)


def test_estimator_is_stable() -> None:
    """Products of binomials in floating point overflow at this n, and 1 minus a product loses the last of these."""
    assert pass_at_k(100_000, 1, 1) == 1e-5
    assert pass_at_k(100_000, 50_000, 1) == 0.5
    assert pass_at_k(2_000, 1_000, 1_000) == 1.0
    assert pass_at_k(10**18, 1, 1) == 1e-18


@pytest.mark.parametrize(
    ("numbers", "error"),
    [
        ((4, 5, 1), "c: 5; use a number in 0..4"),
        ((4, -1, 1), "c: -1"),
        ((4, 2, 0), "k: 0; use a number in 1..4"),
        ((4, 2, 5), "k: 5"),
    ],
)
def test_estimator_refuses_what_cannot_be(numbers: tuple[int, int, int], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        pass_at_k(*numbers)


def test_a_file_is_scored_by_prompt(tmp_path: Path) -> None:
    """Two prompts, one with 1 of 4 samples right and one with 3 of 5, whose lines come in any order."""
    first = [answer("a", i, i == 2) for i in range(4)]
    second = [answer(7, i, i < 3) for i in range(5)]
    path = write(tmp_path / "out.jsonl", [*second[3:], *first, *second[:3]])
    path.write_text(path.read_text() + "\n", encoding="utf-8")  # a blank line is none
    score = score_file(path)
    assert (score.prompts, score.refused, score.samples) == (2, 0, (4, 5))
    assert score.pass_at == pytest.approx({1: (1 / 4 + 3 / 5) / 2, 2: (1 / 2 + 9 / 10) / 2, 4: 1.0})
    assert score.accuracy == score.pass_at[1]


def test_an_id_as_text_is_another_prompt_than_the_number(tmp_path: Path) -> None:
    assert score_file(write(tmp_path / "out.jsonl", [answer("7", 0, True), answer(7, 0, False)])).prompts == 2


def test_a_refused_prompt_counts_as_wrong_at_every_k(tmp_path: Path) -> None:
    records = [answer("a", 0, True), answer("a", 1, True), {"id": "b", "line": 2, "error": "prompt: 1; use a string"}]
    score = score_file(write(tmp_path / "out.jsonl", records))
    assert (score.prompts, score.refused, score.samples) == (2, 1, (2, 2))
    assert score.pass_at == {1: 0.5, 2: 0.5}


@pytest.mark.parametrize(("least", "ks"), [(1, [1]), (2, [1, 2]), (3, [1, 2]), (4, [1, 2, 4]), (9, [1, 2, 4, 8])])
def test_k_doubles_up_to_the_least_number_of_samples(tmp_path: Path, least: int, ks: list[int]) -> None:
    records = [answer(0, i, True) for i in range(least)] + [answer(1, i, True) for i in range(20)]
    assert list(score_file(write(tmp_path / "out.jsonl", records)).pass_at) == ks


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{", r"out\.jsonl:2: not valid JSON"),
        ("[1]", r"out\.jsonl:2: '\[1\]': not a JSON object"),
        ({"sample": 0, "answer": "4"}, r"out\.jsonl:2: id: missing; use a string or a whole number"),
        ({**answer("a", 0, True), "id": None}, "2: id: None; use a string or a whole number"),
        ({**answer("a", 0, True), "sample": "0"}, "2: sample: '0'; use a whole number"),
        ({**answer("a", 0, True), "sample": True}, "2: sample: True; use a whole number"),
        ({**answer("a", 0, True), "content": None}, "2: content: None; use a string"),
        ({**answer("a", 0, True), "answer": 4}, "2: answer: 4; use a string"),
        (answer("x", 0, False), "2: sample: 0 of id 'x' again; use another number"),
    ],
)
def test_bad_lines_are_refused_by_place_and_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: Any, error: str
) -> None:
    text = line if isinstance(line, str) else json.dumps(line)
    path = write(tmp_path / "out.jsonl", [answer("x", 0, True)])
    path.write_text(path.read_text(encoding="utf-8") + text + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=error) as caught:
        score_file(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(SystemExit, match="2"):
        main(["pass-at-k", str(path)])
    assert capsys.readouterr().err.count("\n") == 1


def test_lines_without_the_right_answer_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of an input in which some lines have one."""
    unanswered = {key: value for key, value in answer("b", 0, True).items() if key != "answer"}
    path = write(
        tmp_path / "out.jsonl", [answer("a", 0, True), unanswered, {**unanswered, "answer": None, "sample": 1}]
    )
    score = score_file(path)
    assert (score.prompts, score.unanswered, score.accuracy) == (1, 2, 1.0)
    main(["pass-at-k", str(path)])
    assert "2 lines without the right answer (`answer`) passed over" in capsys.readouterr().out


def test_bytes_that_are_no_text_are_refused_by_place(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(ValueError, match=r"out\.jsonl:1: not valid JSON"):
        score_file(tmp_path / "out.jsonl")


def test_files_without_answers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file; use a JSONL file of answers"):
        score_file(tmp_path / "out.jsonl")
    for records in ([], [{"id": 1, "line": 1, "error": "x"}]):
        with pytest.raises(ValueError, match=r"nothing to score, \d errors and 0 lines without an `answer`"):
            score_file(write(tmp_path / "out.jsonl", records))


def test_the_command_prints_a_table_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "out.jsonl", [answer("a", i, i == 0) for i in range(4)])
    main(["pass-at-k", str(path), "--plot", str(tmp_path / "new" / "plot.png")])
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert "1 prompts (0 refused), 4 samples each, mean accuracy 0.250".split() in words
    assert words[2:5] == [["1", "0.250"], ["2", "0.500"], ["4", "1.000"]]
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")
