"""Selecting: each filter, the funnel, what is written, kills, and bad input in one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from qwen3_jax.cli.main import main as qwen3_jax
from qwen3_jax.curate import select as select_module
from qwen3_jax.curate.filters import FilterConfig, questions, repetition
from qwen3_jax.curate.responses import read_response
from qwen3_jax.curate.select import Funnel, select
from qwen3_jax.data.examples import Encoder
from qwen3_jax.data.source import DocumentSource
from qwen3_jax.serve import shipped_model
from qwen3_jax.tasks import deadline
from qwen3_jax.text.tokenizer import load_tokenizer

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*records: Mapping[str, Any], name: str = "in.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


def answered(thought: str, content: str, **fields: Any) -> dict[str, Any]:
    """A line of infer.py's output."""
    told = {"id": 7, "line": 1, "sample": 0, "record": "0" * 16, "token_ids": [1, 2], "finish_reason": "eos"}
    told |= {"thinking_end": "natural" if thought else "off", "thinking_tokens": 3, "prompt": "What is 2 + 3?"}
    return {**told, "thinking": thought, "content": content, "answer": "5", **fields}


def conversation(question: str, thought: str, content: str, **fields: Any) -> dict[str, Any]:
    turn = {"role": "assistant", "reasoning_content": thought, "content": content}
    return {"messages": [{"role": "user", "content": question}, turn], "answer": "5", **fields}


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_become_training_records(write: Write, tmp_path: Path) -> None:
    """In the order of the queries and samples, whatever order they were finished in."""
    source = write(
        answered("2 plus 3", "5", id="b", line=2, sample=1, labels={"domain": "math"}, settings={"seed": 3}),
        answered("", "6", id="a", line=1, enable_thinking=False),
        answered("2 plus 3", "5", id="b", line=2),
        {"id": "c", "line": 3, "error": "prompt: too long"},
        answered("", "5", id="a", line=1, sample=1, enable_thinking=False, messages=[{"role": "user", "content": "?"}]),
    )
    source.with_name("in.jsonl.run.json").write_text('{"model": "runs/a", "weights": "0123456789abcdef"}')
    out = tmp_path / "out.jsonl"
    funnel = select(source, out)
    assert funnel == Funnel(4, 2, {"incomplete": 0, "min_score": 1}, {"incomplete": 2, "min_score": 2}, 3, unanswered=1)
    found = lines(out)
    assert [(record["id"], record["sample"]) for record in found] == [("a", 1), ("b", 0), ("b", 1)]
    assert found[0]["messages"] == [{"role": "user", "content": "?"}, {"role": "assistant", "content": "5"}]
    assert found[2]["messages"][-1] == {"role": "assistant", "reasoning_content": "2 plus 3", "content": "5"}
    assert found[2]["labels"] == {"domain": "math", "made_by": "a@01234567"}
    made = {"model": "runs/a", "weights": "0123456789abcdef"}
    how = {"settings": {"seed": 3}, "sample": 1}
    assert found[2]["provenance"] == {**made, **how, "verdict": {"score": 1.0, "reason": "right"}}
    assert not {"token_ids", "thinking", "line"} & found[2].keys()
    assert lines(tmp_path / "out.jsonl.rejected.jsonl") == [
        {"id": "a", "sample": 0, "filter": "min_score", "reason": "score 0: '6' is not '5'"}
    ]
    assert (tmp_path / "out.jsonl.png").stat().st_size > 1000
    assert {path.name for path in tmp_path.iterdir()} == {
        *("in.jsonl", "in.jsonl.run.json", "out.jsonl", "out.jsonl.png", "out.jsonl.rejected.jsonl")
    }
    # They are records of a training file.
    encode = Encoder(load_tokenizer(shipped_model()))
    assert all(encode(document).labels["made_by"] == "a@01234567" for document in DocumentSource([str(out)]))


def test_conversations_are_judged_too(write: Write, tmp_path: Path) -> None:
    """Their thought apart, or in the content; ids are the lines where there are none."""
    tagged = {
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\n5"}]
    }
    source = write(conversation("?", "hm", "5"), tagged | {"answer": "5"}, conversation("?", "hm", "4"))
    out = tmp_path / "out.jsonl"
    assert select(source, out).kept == 2
    first, second = lines(out)
    assert first["messages"] == second["messages"] == conversation("?", "hm", "5")["messages"]
    assert (first["id"], second["id"]) == (1, 2)


LONG = "so we add the two of them and then we look at what we have "
FILTERED = [
    # filter, its settings, a response that falls with its reason, and one that does not
    ("unverifiable", {"unverifiable": True}, {"answer": None}, "answer: None; use a text", {}),
    ("max_questions", {"max_questions": 1}, {"prompt": "Why? And how?"}, "2 questions", {"prompt": "Why?"}),
    ("incomplete", {}, {"finish_reason": "length"}, "cut before its end", {"finish_reason": "stop"}),
    ("incomplete", {}, {"thinking_end": "budget"}, "cut before its end", {"thinking_end": "off"}),
    ("mode", {"mode": True}, {"thinking": ""}, "no thought, with enable_thinking True", {}),
    ("mode", {"mode": True}, {"thinking_end": "off"}, "a thought, with enable_thinking False", {}),
    ("min_score", {}, {"content": "6"}, "score 0: '6' is not '5'", {"content": " 5 "}),
    ("max_repetition", {"max_repetition": 0.5}, {"thinking": LONG * 9}, "88% of it repeated", {"thinking": LONG * 2}),
    (
        "min_thinking_words",
        {"min_thinking_words": 3},
        {"thinking": "five then"},
        "a thought of 2 words",
        {"thinking": "2 and 3"},
    ),
    ("min_thinking_words", {"min_thinking_words": 3}, {"thinking": "No idea, I'll guess 5"}, 'says "I\'ll guess"', {}),
    (
        "agreement",
        {"agreement": True},
        {"thinking": "2 plus 3 equals 6"},
        "6 in the thought, 5 in the answer",
        {"thinking": "2 plus 3 equals 5"},
    ),
    (
        "validation",
        {"ngram": 5},
        {"prompt": "Say how many apples a man has who has five."},
        "near {}:1",
        {"prompt": "Say how many pears a man has"},
    ),
]


@pytest.mark.parametrize(("name", "settings", "falls", "reason", "stays"), FILTERED)
def test_each_filter_drops_what_it_says(
    name: str, settings: dict[str, Any], falls: dict[str, Any], reason: str, stays: dict[str, Any], write: Write
) -> None:
    if name == "validation":
        path = write({"question": "how many apples a man has"}, name="validation.jsonl")
        settings, reason = {**settings, "validation": (str(path),)}, reason.format(path)
    both = answered("2 plus 3", "5", line=1) | falls, answered("2 plus 3", "5", line=2) | stays
    source = write(*both)
    out = source.with_name("out.jsonl")
    funnel = select(source, out, filters=FilterConfig(**settings))
    assert [record["messages"][-1]["content"] for record in lines(out)] == ["5"]
    ((fell),) = lines(source.with_name("out.jsonl.rejected.jsonl"))
    assert fell["filter"] == name
    assert fell["reason"].startswith(reason)
    assert {key: value for key, value in funnel.fell.items() if value} == {name: 1}


def test_languages_that_are_mixed_fall(write: Write, tmp_path: Path) -> None:
    pytest.importorskip("py3langid")
    english = "We add both numbers and look at what we have then. "
    german = "Wir zählen die beiden Zahlen zusammen und sehen uns das Ergebnis an."
    source = write(answered(english + german, "5"), answered(english, "5", sample=1))
    assert select(source, tmp_path / "out.jsonl", filters=FilterConfig(max_other_languages=0.2)).kept == 1
    (fell,) = lines(tmp_path / "out.jsonl.rejected.jsonl")
    assert fell["filter"] == "max_other_languages"
    assert fell["reason"].endswith("outside de") or fell["reason"].endswith("outside en")


def test_queries_that_are_solved_without_thinking_fall(write: Write, tmp_path: Path) -> None:
    """A query is the same whatever flag it has."""
    easy = write(
        *(answered("", said, prompt=f"{query} /no_think", sample=i) for query in "ab" for i, said in enumerate("55")),
        *(answered("", said, prompt="c /no_think", sample=i) for i, said in enumerate("56")),
        name="easy.jsonl",
    )
    source = write(*(answered("hm", "5", line=i, prompt=query) for i, query in enumerate("abcd")))
    for rate, kept in ((1.0, ["c", "d"]), (0.5, ["d"])):
        out = tmp_path / f"{rate}.jsonl"
        select(source, out, filters=FilterConfig(easy_answers=str(easy), easy_rate=rate))
        assert [record["messages"][0]["content"] for record in lines(out)] == kept


def test_measures_of_a_response() -> None:
    assert repetition("a b c") == 0.0
    assert repetition("one two three four five six seven eight " * 3) == pytest.approx(1 - 8 / 17)
    for asked, count in (("Add 2 and 3.", 0), ("Really??", 1), ("(a) Why\n(b) How\n(c) When", 3), ("1) x?\n2) y?", 2)):
        response = read_response(json.dumps(conversation(asked, "", "5")).encode(), 1)
        assert response is not None
        assert questions(response) == count


SLOW = """
import time, pathlib
def judge(record, thought, answer):
    with open(record["log"], "a") as file:
        file.write(answer + "\\n")
    time.sleep(0.05)
    return 1.0
"""


def test_a_run_that_was_killed_judges_nothing_again(write: Write, tmp_path: Path) -> None:
    (tmp_path / "slow_judge.py").write_text(SLOW)
    log = tmp_path / "log"
    asked = [answered("hm", f"{i}", line=i, log=str(log)) for i in range(40)]
    script = "import sys; from qwen3_jax.cli.main import main; main(sys.argv[1:])"
    words = ["select", str(write(*asked)), "out.jsonl", "--verifier", "slow_judge:judge"]
    command = [sys.executable, "-c", script, *words]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not log.exists() or log.read_text().count("\n") < 10:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (tmp_path / "out.jsonl").exists()
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert "out.jsonl: 40 records" in done.stdout
    assert len(lines(tmp_path / "out.jsonl")) == 40
    judged = log.read_text().split()
    assert set(judged) == {f"{i}" for i in range(40)}
    assert len(judged) <= 42  # the one that was judged when the kill came, and its line cut off
    assert not (tmp_path / "out.jsonl.verdicts.jsonl").exists()


def test_a_verifier_that_was_mended_judges_anew(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the answers that it had judged before it failed; what had no result then is tried again too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "mended_judge.py"
    source = write(answered("hm", "0"), answered("hm", "1", sample=1))
    words = ["select", str(source), "out.jsonl", "--verifier", "mended_judge:judge"]
    for body, message in (
        ("return 0.0", "none of 2 responses is left"),
        ("return 1.0 / int(answer)", "raised ZeroDivisionError"),
        ("import os; os._exit(0) if answer == '0' else None; return 0.5", "none of 2 responses is left"),
    ):
        module.write_text(f"def judge(record, thought, answer):\n    {body}\n")
        select_module._code_of.cache_clear()  # within one run a verifier stays what it is
        deadline._end()
        with pytest.raises(SystemExit, match="2"):
            qwen3_jax(words)
        assert message in capsys.readouterr().err
    held = (tmp_path / "out.jsonl.verdicts.jsonl").read_text()
    assert held.count("\n") == 3  # two of the first, one of the last: a death is no verdict
    module.write_text("def judge(record, thought, answer):\n    return 1.0\n")
    select_module._code_of.cache_clear()
    deadline._end()
    qwen3_jax(words)
    assert len(lines(tmp_path / "out.jsonl")) == 2


def test_the_command_prints_the_funnel(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(answered("2 plus 3 equals 5", "It is 5."), answered("2 plus 3 equals 6", "It is 5.", sample=1))
    (tmp_path / "f.yaml").write_text("agreement: false\n")
    words = ["select", str(source), str(tmp_path / "out.jsonl"), "--verifier", "number"]
    qwen3_jax([*words, "--filters", str(tmp_path / "f.yaml"), "--agreement", "true"])
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert ["agreement", "1", "1", "1"] in rows
    assert "out.jsonl: 1 records" in " ".join(out.split())


@pytest.mark.parametrize(
    ("record", "words", "message"),
    [
        ({"answer": None}, [], r"in.jsonl:1: answer: None; use a text or a number"),
        ({"content": "6"}, [], r"in.jsonl: none of 1 responses is left, 1 fell at 'min_score'; change that filter"),
        ({"verifier": "maths"}, [], r"in.jsonl:1: verifier: 'maths'; use one of exact"),
        ({"prompt": None}, [], r"in.jsonl:1: messages: missing, and no prompt; use the answers of infer.py"),
        ({"messages": 3}, [], r"in.jsonl:1: messages: 3; use a list"),
        ({}, ["--verifier", "no"], r"verifier: 'no'; use one of exact"),
        ({}, ["--verifier", "no_such:f"], r"in.jsonl:1: verifier: 'no_such:f' cannot be imported [(]ModuleNotFound"),
        ({}, ["--verifier", "no_such.module:f"], r"in.jsonl:1: verifier: 'no_such.module:f' cannot be imported"),
        ({"verifier": 3}, [], r"in.jsonl:1: verifier: 3; use one of exact"),
        ({"labels": "x"}, [], r"in.jsonl:1: labels: 'x'; use an object of texts"),
        ({}, ["--easy_rate", "0"], r"--easy_rate: 0 drops every query"),
        ({}, ["--max_question", "1"], r"--max_question: no such key; did you mean --max_questions\?"),
        ({}, ["--validation", "no.jsonl"], r"eval: 'no.jsonl' matches no file"),
    ],
)
def test_bad_input_is_one_line(
    record: dict[str, Any], words: list[str], message: str, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(answered("2 plus 3", "5") | record)
    out = source.with_name("out.jsonl")
    with pytest.raises(SystemExit, match="2"):
        qwen3_jax(["select", str(source), str(out), *words])
    told = capsys.readouterr().err.splitlines()[-1]
    assert re.match(f"error: .*{message}", told), told
    assert not out.exists()
    assert not list(source.parent.glob("out.jsonl*partial"))
