"""Verifiers: what is right, what is wrong and why, and what costs one row although it hangs."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from qwen3_jax.tasks import Verdict, deadline, judge
from qwen3_jax.tasks import judge as judge_function


def score(verifier: str, answer: Any, said: str, thought: str = "", **fields: Any) -> float:
    return judge({"verifier": verifier, "answer": answer, **fields}, thought, said).score


@pytest.mark.parametrize(
    ("verifier", "reference", "right", "wrong"),
    [
        ("exact", "5", ["5", " 5\n"], ["5.", "6", ""]),
        ("exact", "a b", ["a\n b"], ["ab"]),
        (
            "choice",
            "B",
            ["B", "(B).", "The answer is (B).", "Answer: B", r"so \boxed{B}", "A is wrong\nB) because", "**B**"],
            ["A", "The answer is A, not B", "A cat sat on B", "", "Because"],
        ),
        (
            "number",
            "42",
            [
                "42",
                "The answer is 41. No: the answer is 42.",
                r"\boxed{42}",
                "84/2",
                "42.0",
                "x = 41 + 1 = 42",
                "4.2e1",
            ],
            ["41", "", "forty-two", "421", "1/0", "-42", r"42, no, \boxed{41}"],
        ),
        ("number", 0.5, ["1/2", r"$\frac{1}{2}$", "50%", r"50\%", ".5"], ["5", "0.50001"]),
        ("number", "1,234,567", ["1234567", "It is 1,234,567 in all"], ["1,234"]),
        ("number", "-3", ["x = -3", "\u22123"], ["10 - 3 is 7", "3"]),
        ("regex", r"(ab)+", ["abab", " ab\n"], ["abba", "xab"]),
        ("json", {"a": [1, 2]}, ['{"a": [1, 2]}', 'Here:\n```json\n{"a": [1, 2]}\n```'], ['{"a": [2, 1]}', "{'a': 1}"]),
        ("json", None, ["[]", "3"], ["", "NaN is none {"]),
    ],
)
def test_answers_right_and_wrong(verifier: str, reference: Any, right: list[str], wrong: list[str]) -> None:
    assert [(said, score(verifier, reference, said)) for said in right] == [(said, 1.0) for said in right]
    assert [(said, score(verifier, reference, said)) for said in wrong] == [(said, 0.0) for said in wrong]


def test_a_wrong_answer_says_why() -> None:
    assert judge({"answer": "5"}, "", "6") == Verdict(0.0, "'6' is not '5'")
    assert judge({"answer": "B", "verifier": "choice"}, "", "who knows") == Verdict(0.0, "no letter found")
    assert judge({"answer": "5", "verifier": "number"}, "", "who knows") == Verdict(0.0, "no number found")


def test_mode_and_length_judge_the_form() -> None:
    for wanted, thought, is_right in ((True, "hm", 1.0), (True, "\n\n", 0.0), (False, "", 1.0), (False, "hm", 0.0)):
        assert judge({"verifier": "mode", "enable_thinking": wanted}, thought, "x").score == is_right
    for said, is_right in (("a", 0.0), ("a b", 1.0), ("a b c", 1.0), ("a b c d", 0.0)):
        assert judge({"verifier": "length", "min_words": 2, "max_words": 3}, "", said).score == is_right
    assert score("number", 3, "3.001", tolerance=0.01) == 1.0
    assert score("number", 3, "3.1", tolerance=0.01) == 0.0


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        (r"\frac{1}{2}", ["The answer is $0.5$", r"\boxed{\frac{2}{4}}", "1/2"], ["$0.51$", "who knows", ""]),
        ("x^2+2x+1", [r"$(x+1)^2$"], [r"$(x-1)^2$"]),
    ],
)
def test_mathematics_is_compared_by_value(reference: str, right: list[str], wrong: list[str]) -> None:
    pytest.importorskip("math_verify")
    assert [score("math", reference, said) for said in right] == [1.0] * len(right)
    assert [score("math", reference, said) for said in wrong] == [0.0] * len(wrong)


def test_what_hangs_costs_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also called from a thread, where no alarm can be set. The next row is judged as before."""
    monkeypatch.setattr(sys.modules[judge_function.__module__], "_SECONDS", 0.5)
    found: list[Verdict] = []

    def work() -> None:
        found.append(judge({"verifier": "regex", "answer": "(a+)+b"}, "", "a" * 60))
        found.append(judge({"verifier": "regex", "answer": "a+b"}, "", "aab"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [Verdict(0.0, "no result in 0.5 s"), Verdict(1.0, "right")]


def test_a_process_that_dies_costs_one_call() -> None:
    with pytest.raises(ValueError, match=r"^its process died$"):
        deadline.call("os", "_exit", 3, seconds=5)
    with pytest.raises(ValueError, match=r"^ZeroDivisionError: "):
        deadline.call("operator", "truediv", 1, 0, seconds=5)
    with pytest.raises(ValueError, match=r"^ModuleNotFoundError: "):
        deadline.call("no_such_module", "f", seconds=5)
    assert deadline.call("operator", "add", 1, 2, seconds=5) == 3


def test_the_process_ends_with_ours(tmp_path: Path) -> None:
    """A script without a main guard: it is not run a second time."""
    script = "from qwen3_jax.tasks import deadline\nprint(deadline.call('os', 'getpid', seconds=9), flush=True)"
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, check=True)
    (line,) = done.stdout.split()
    for _ in range(100):
        if not Path(f"/proc/{line}").exists():
            break
        time.sleep(0.05)
    assert not Path(f"/proc/{line}").exists()


def half(record: Mapping[str, Any], thought: str, answer: str) -> tuple[float, str]:
    return 0.5, f"{record['answer']} {thought} {answer}"


def test_a_function_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = f"{__name__}:half"
    assert judge({"verifier": mine, "answer": "a"}, "b", "c") == Verdict(0.5, "a b c")
    for value, verdict in ((True, Verdict(1.0, "")), (0.25, Verdict(0.25, "")), (-2, Verdict(-2.0, ""))):
        monkeypatch.setattr(sys.modules[__name__], "half", lambda *_, value=value: value)
        assert judge({"verifier": mine}, "", "") == verdict
    for value in (None, "1", float("nan"), (1, 2, 3)):
        monkeypatch.setattr(sys.modules[__name__], "half", lambda *_, value=value: value)
        with pytest.raises(ValueError, match=r"^verifier: '.*:half' gave .*; use a finite number"):
            judge({"verifier": mine}, "", "")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "answer: None; use a text or a number"),
        ({"answer": ""}, "answer: ''; use a text or a number"),
        ({"answer": True}, "answer: True; use a text"),
        ({"answer": "x", "verifier": "maths"}, "verifier: 'maths'; use one of exact, choice, number, math"),
        ({"answer": "x", "verifier": 3}, "verifier: 3; use one of"),
        ({"answer": "x", "verifier": "no_such:f"}, "verifier: 'no_such:f' cannot be imported"),
        ({"answer": "x", "verifier": "math:pi"}, "verifier: 'math:pi' is no function"),
        ({"answer": "x", "verifier": "number"}, "answer: 'x'; use a number"),
        ({"answer": "1", "verifier": "number", "tolerance": -1}, "tolerance: -1; use a number >= 0"),
        ({"answer": "BC", "verifier": "choice"}, "answer: 'BC'; use a letter"),
        ({"answer": "(", "verifier": "regex"}, r"answer: '\(' is no pattern"),
        ({"answer": "{", "verifier": "json"}, "answer: '{'; use JSON"),
        ({"verifier": "mode"}, "enable_thinking: None; use true or false"),
        ({"verifier": "length"}, "min_words, max_words: 0, inf; use whole numbers"),
        ({"verifier": "length", "min_words": "2"}, "min_words, max_words: '2', inf; use whole numbers"),
    ],
)
def test_a_record_that_cannot_be_judged_is_refused(record: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        judge(record, "a thought", "1")
