"""Verifiers: what is right, what is wrong and why, and what costs one row although it hangs."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from qwen3_jax.tasks import Verdict, deadline, judge
from qwen3_jax.tasks import judge as judge_function
from qwen3_jax.tasks.arithmetic import held_out_chains, solve
from qwen3_jax.tasks.gym import problems
from qwen3_jax.tasks.judge import contradicts
from qwen3_jax.tasks.language import language_shares


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
            [
                *("B", "(B).", "The answer is (B).", "Answer: B", r"so \boxed{B}", "A is wrong\nB) because", "**B**"),
                *("The answer is:\nB", "The answer is option B.", "Option B", "I choose B", "b", "answer is B since"),
            ],
            [
                *("A", "The answer is A, not B", "A cat sat on B", "", "Because", "The answer is not B"),
                *("The answer is: A cat, i.e. B", "not option B", "\n" * 60000),
            ],
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
                "The answer is 42 since 40+1.",
                "The answer is 40 + 2 = 42, of course.",
                "The final answer is:\n\n**42**",
                "The answer is 42, not 41.",
            ],
            [
                *("41", "", "forty-two", "421", "1/0", "-42", r"42, no, \boxed{41}", "The answer is 41, not 42"),
                "The answer is not 42",
                *("5" * 5000, "\\boxed{" * 20000, "4" + "2" * 4000),
            ],
        ),
        ("number", 0.5, ["1/2", r"$\frac{1}{2}$", "50%", r"50\%", ".5"], ["5", "0.50001"]),
        ("number", "1,234,567", ["1234567", "It is 1,234,567 in all"], ["1,234"]),
        ("number", "-3", ["x = -3", "\u22123"], ["10 - 3 is 7", "3"]),
        ("regex", r"(ab)+", ["abab", " ab\n"], ["abba", "xab"]),
        ("json", {"a": [1, 2]}, ['{"a": [1, 2]}', 'Here:\n```json\n{"a": [1, 2]}\n```'], ['{"a": [2, 1]}', "{'a': 1}"]),
        ("json", None, ["[]", "3"], ["", "NaN is none {", "NaN", "```" + "\n" * 100_000]),
        ("json", "1", ["1", "1.0"], ["true", "[1]"]),
        ("json", {"a": [True]}, ['{"a": [true]}'], ['{"a": [1]}', "[" * 5000 + "]" * 5000]),
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
        ("x^2+2x+1", [r"$(x+1)^2$", "(x+1)^2", "1 + 2x + x^2"], [r"$(x-1)^2$", "(x-1)^2"]),
        ("3:2", ["3:2"], ["2:3"]),
    ],
)
def test_mathematics_is_compared_by_value(reference: str, right: list[str], wrong: list[str]) -> None:
    pytest.importorskip("math_verify")
    assert [score("math", reference, said) for said in right] == [1.0] * len(right)
    assert [score("math", reference, said) for said in wrong] == [0.0] * len(wrong)


def test_a_thought_and_an_answer_that_cannot_be_compared_do_not_contradict() -> None:
    """Two lines behind "answer is", or no expression: never an error, which would end a file for one row."""
    pytest.importorskip("math_verify")
    asked = {"verifier": "math", "answer": "5"}
    assert contradicts(asked, "The answer is 5\nI am sure.", "The answer is $5$\nGood luck!") == ""
    assert contradicts(asked, "The answer is 5", "") == ""
    assert contradicts(asked, "The answer is 6", "The answer is 5").startswith("the thought's '$6$' is not")


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
    with pytest.raises(TimeoutError, match=r"^its process died$"):
        deadline.call("os", "_exit", 3, seconds=5)
    with pytest.raises(ValueError, match=r"^raised ZeroDivisionError: "):
        deadline.call("operator", "truediv", 1, 0, seconds=5)
    with pytest.raises(ValueError, match=r"^cannot be imported [(]ModuleNotFoundError: "):
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


OWN = """
import os, time

def half(record, thought, answer):
    return 0.5, f"{record['answer']} {thought} {answer}"

def give(record, thought, answer):
    return record["gives"]

def dies(record, thought, answer):
    os._exit(1)

def hangs(record, thought, answer):
    time.sleep(60)

def writes_and_hangs(record, thought, answer):
    os.write(1, b"x")
    time.sleep(60)

def runs_others(record, thought, answer):
    os.system("echo hi; cat")
    return 0.75

def raises(record, thought, answer):
    return 1 / 0

number = 3
"""


def test_a_function_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: one that dies or hangs costs its row; one that raises is a fault to be mended."""
    (tmp_path / "own_verifier.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys.modules[judge_function.__module__], "_OWN_SECONDS", 0.5)
    assert judge({"verifier": "own_verifier:half", "answer": "a"}, "b", "c") == Verdict(0.5, "a b c")
    for value, verdict in ((True, Verdict(1.0, "")), (0.25, Verdict(0.25, "")), (-2, Verdict(-2.0, ""))):
        assert judge({"verifier": "own_verifier:give", "gives": value}, "", "") == verdict
    for value in (None, "1", float("nan"), (1, 2, 3), [0.5, 1.0], 10**400):
        with pytest.raises(ValueError, match=r"^verifier: '.*:give' gave .*; use a finite number"):
            judge({"verifier": "own_verifier:give", "gives": value}, "", "")
    assert judge({"verifier": "own_verifier:dies"}, "", "") == Verdict(0.0, "its process died")
    for name in ("hangs", "writes_and_hangs"):
        assert judge({"verifier": f"own_verifier:{name}"}, "", "") == Verdict(0.0, "no result in 0.5 s")
    for name, fault in (
        ("own_verifier:raises", "raised ZeroDivisionError: division by zero"),
        ("own_verifier:missing", "is no function of own_verifier"),
        ("own_verifier:number", "is no function of own_verifier"),
        ("no_such:f", "cannot be imported [(]ModuleNotFoundError: "),
    ):
        with pytest.raises(ValueError, match=f"^verifier: '{name}' {fault}"):
            judge({"verifier": name}, "", "")
    # What a function writes and reads is not what the process says and hears.
    assert judge({"verifier": "own_verifier:runs_others"}, "", "") == Verdict(0.75, "")
    assert judge({"verifier": "own_verifier:half", "answer": "a"}, "b\n", " c") == Verdict(0.5, "a b c")
    with pytest.raises(ValueError, match=r"^record: cannot be given to 'own_verifier:half'"):
        judge({"verifier": "own_verifier:half", "answer": {1, 2}}, "", "")


def hostile_answers(count: int) -> list[str]:
    """Answers that no parser expects: pieces of LaTeX in any order, deep nesting, huge powers, odd characters."""
    rng = random.Random(0)
    pieces = [
        *r"\frac { } \sqrt ^ _ $ \boxed ( ) \left \right 9 x \infty \sum , ; = < \{ \} % \ ".split(),
        "\0",
        "\u202e",
    ]
    made = ["".join(rng.choices(pieces, k=rng.randrange(1, 30))) for _ in range(count - 5)]
    slow = [r"$9^{9^{9^{9}}}$", r"$\sqrt{" * 300 + "2" + "}" * 300 + "$", "$" + "(" * 2000 + "1" + ")" * 2000 + "$"]
    return [*made, *slow, r"$10^{10^{10}}!$", "\\boxed{" * 500]


def test_hostile_answers_cost_one_row_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 of them, with a right one after each fiftieth, which is still judged right."""
    pytest.importorskip("math_verify")
    monkeypatch.setattr(sys.modules[judge_function.__module__], "_SECONDS", 1.5)
    late = 0
    for number, said in enumerate(hostile_answers(1000)):
        verdict = judge({"verifier": "math", "answer": "1/2"}, "", said)
        assert verdict.score == 0.0, said
        late += verdict.reason.startswith("no result in")
        if number % 50 == 0:
            assert score("math", "1/2", "$0.5$") == 1.0
    assert late >= 1  # some of them do hang math-verify


def test_a_problem_of_ours_is_solved() -> None:
    question = "Start with 4 and keep the last digit: +2 *9 +7 _ _ _ _ _ _ _"
    asked = {"verifier": "arithmetic", "messages": [{"role": "user", "content": f"{question} /think"}]}
    assert judge(asked, "", " 1\n") == Verdict(1.0, "right")
    assert judge(asked, "", "2").score == 0.0
    assert judge({"verifier": "arithmetic", "prompt": "How much is 2 plus 3?"}, "", "5").score == 1.0
    assert judge({"verifier": "arithmetic", "answer": "7"}, "", "7").score == 1.0
    for problem in held_out_chains(40, seed=3):
        assert solve(problem.question) == problem


def test_the_language_of_an_answer() -> None:
    pytest.importorskip("py3langid")
    english = "The answer is seven because we add both numbers. Then we are done with it."
    german = "Die Antwort ist sieben, weil wir die beiden Zahlen addieren."
    assert score("language", None, english, language="en") == 1.0
    assert score("language", None, german, language="en") == 0.0
    assert score("language", None, "42", language="en") == 0.0  # of no language
    with pytest.raises(ValueError, match=r"^language: 'xx'; use the code of a language that py3langid tells"):
        score("language", None, english, language="xx")
    code = "```\nfor i in range(3): print(i)\n```"
    assert list(language_shares(f"{english} {code} $x$")) == ["en"]
    mixed = language_shares(f"{english} {german} \u7136\u540e\u6211\u4eec\u628a\u4e24\u4e2a\u6570\u76f8\u52a0\u3002")
    assert set(mixed) == {"en", "de", "zh"}
    assert sum(mixed.values()) == pytest.approx(1)


def test_problems_of_reasoning_gym() -> None:
    pytest.importorskip("reasoning_gym")
    first, second = problems("chain_sum", 2, seed=1, settings={"max_terms": 3})
    assert first["id"] == "chain_sum-1-0"
    assert first["prompt"] != second["prompt"]
    assert list(problems("chain_sum", 2, seed=1, settings={"max_terms": 3})) == [first, second]
    plain = json.loads(json.dumps(first))  # as it is in a file
    assert judge(plain, "", f"So the answer is {first['answer']}") == Verdict(1.0, "chain_sum")
    assert judge(plain, "", "no idea").score < 0.1
    with pytest.raises(ValueError, match=r"^metadata.source_dataset: 'nope'; use a data set of reasoning-gym"):
        judge({**plain, "metadata": {"source_dataset": "nope"}}, "", "5")
    for name in ("rotate_matrix", "arc_agi"):  # an answer of several lines; a score that compares tuples
        (asked,) = (json.loads(json.dumps(problem)) for problem in problems(name, 1))
        assert judge(asked, "", f"The answer is:\n{asked['answer']}") == Verdict(1.0, name)
    for name, settings, message in (
        ("chain_sums", {}, "problems: 'chain_sums'; use one of .*chain_sum"),
        ("chain_sum", {"terms": 3}, "problems: chain_sum refuses its settings"),
        ("chain_sum", {"max_terms": 0}, "problems: chain_sum refuses its settings"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            list(problems(name, 1, settings=settings))


CODE = "```python\ndef double(n):\n    return {}\n```\nIt adds."


def test_code_runs_where_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"verifier": "code", "tests": "assert double(3) == 6\nassert double(0) == 0"}
    with pytest.raises(ValueError, match=r"^verifier: 'code' runs what a model wrote; set QWEN3_JAX_RUN_CODE=1"):
        judge(asked, "", CODE.format("n + n"))
    monkeypatch.setenv("QWEN3_JAX_RUN_CODE", "1")
    monkeypatch.setattr(sys.modules[judge_function.__module__], "_CODE_SECONDS", 1.0)
    assert judge(asked, "", CODE.format("n + n")) == Verdict(1.0, "passed")
    assert judge(asked, "", "def double(n): return 2 * n") == Verdict(1.0, "passed")
    for body, reason in (
        ("n + 1", "AssertionError"),
        ("m", "NameError: name 'm' is not defined"),
        ("__import__('sys').exit(0)", "ended before its tests"),  # a program that ends itself has passed nothing
        ("__import__('os')._exit(0)", "ended before its tests"),
        ("print('x' * 64) or 0", "AssertionError"),
        ("[0] * 10**10", "MemoryError"),
        ("double(n)", "RecursionError: maximum recursion depth exceeded"),
        ("(lambda: [None for _ in iter(int, 1)])()", "no result in 1 s"),
        ("__import__('numpy')", "ModuleNotFoundError: No module named 'numpy'"),
        ("__import__('subprocess').Popen(['sleep', '60']) and __import__('os')._exit(0)", "ended before its tests"),
        ("open('big', 'wb').write(bytes(2**26))", "OSError: [Errno 27] File too large"),
        # A process that holds on to what it was given, in a session of its own.
        ("__import__('subprocess').Popen(['sleep', '60'], start_new_session=True) and m", "NameError"),
    ):
        verdict = judge(asked, "", CODE.format(body))
        assert (verdict.score, verdict.reason[: len(reason)]) == (0.0, reason), body


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "answer: None; use a text or a number"),
        ({"answer": ""}, "answer: ''; use a text or a number"),
        ({"answer": True}, "answer: True; use a text"),
        ({"answer": "x", "verifier": "maths"}, "verifier: 'maths'; use one of exact, choice, number, math"),
        ({"answer": "x", "verifier": 3}, "verifier: 3; use one of"),
        ({"answer": "x", "verifier": "no_such:"}, "verifier: 'no_such:'; use one of"),
        ({"verifier": "language", "language": "English"}, "language: 'English'; use its code"),
        ({"verifier": "arithmetic"}, "prompt: missing; use the question"),
        ({"verifier": "arithmetic", "prompt": "Why?"}, "'Why[?]' is no problem of qwen3-jax tiny-data"),
        ({"verifier": "reasoning-gym", "prompt": "1+1"}, "metadata: None; use that of reasoning-gym's problem"),
        ({"verifier": "code"}, "tests: None; use Python that raises"),
        ({"answer": "x", "verifier": "number"}, "answer: 'x'; use a number"),
        ({"answer": "1", "verifier": "number", "tolerance": -1}, "tolerance: -1; use a number >= 0"),
        ({"answer": "BC", "verifier": "choice"}, "answer: 'BC'; use a letter"),
        ({"answer": "(", "verifier": "regex"}, r"answer: '\(' is no pattern"),
        ({"answer": "{", "verifier": "json"}, "answer: '{'; use JSON"),
        ({"verifier": "mode"}, "enable_thinking: None; use true or false"),
        ({"verifier": "length"}, "min_words, max_words: None, None; use whole numbers"),
        ({"verifier": "length", "min_words": "2"}, "min_words, max_words: '2', None; use whole numbers"),
        ({"verifier": "length", "min_words": 3, "max_words": 2}, "min_words, max_words: 3, 2; use whole numbers"),
        ({"verifier": "arithmetic", "messages": ["x", {"role": "user"}]}, "prompt: missing; use the question"),
        ({"verifier": "arithmetic", "prompt": "What is 2 + 3? And 4?"}, "'What is 2 [+] 3[?] And 4[?]' is no problem"),
    ],
)
def test_a_record_that_cannot_be_judged_is_refused(record: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        judge(record, "a thought", "1")
