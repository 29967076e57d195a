"""Duplicates and overlaps are found whatever the spacing, reported by place, and dropped when asked to."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

from qwen3_jax.cli.main import main

WORDS = [f"w{i}" for i in range(5000)]


def _text(seed: int, count: int = 300) -> list[str]:
    return random.Random(seed).choices(WORDS, k=count)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`a.jsonl`: five texts; `b.txt`: one again, one nearly again, one with half of it; `eval.jsonl`: a question."""
    question = _text(100, 20)
    texts = [_text(seed) for seed in range(4)]
    texts.append([*_text(4)[:20], *question[3:16], *_text(5)[:20]])
    lines = [json.dumps({"text": " ".join(text)}) for text in texts]
    chat = [{"role": "user", "content": " ".join(_text(50))}, {"role": "assistant", "content": "yes"}]
    lines.append(json.dumps({"messages": chat}))
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    near, half = list(texts[1]), [*texts[2][:30], *_text(6)[:30]]
    near[30] = "changed"
    again = ",\n".join(texts[0]).upper()
    (tmp_path / "b.txt").write_text("\n\n".join([again, " ".join(near), " ".join(half)]))
    (tmp_path / "eval.jsonl").write_text(json.dumps({"question": " ".join(question), "answer": ["4"]}) + "\n")
    return tmp_path


def test_findings_are_reported_and_dropped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(folder / "a.jsonl"), str(folder / "b.txt")]
    main(["data", "check", *files, "--eval", str(folder / "eval.jsonl"), "--json", "--drop", str(folder / "out")])
    captured = capsys.readouterr()
    found = [json.loads(line) for line in captured.out.splitlines()]
    assert found == [
        {"place": f"{folder}/a.jsonl:5", "kind": "overlap", "like": f"{folder}/eval.jsonl:1"},
        {"place": f"{folder}/b.txt:1", "kind": "exact", "like": f"{folder}/a.jsonl:1"},
        {"place": f"{folder}/b.txt:302", "kind": "near", "like": f"{folder}/a.jsonl:2"},
    ]
    assert "6 documents" in captured.err
    kept = (folder / "out" / "a.jsonl").read_text().splitlines()
    original = (folder / "a.jsonl").read_text().splitlines()
    assert kept == [*original[:4], original[5]]
    assert len((folder / "out" / "b.jsonl").read_text().splitlines()) == 1


def test_an_overlap_needs_all_its_words(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text holds 13 words of the question, not 14."""
    main(["data", "check", str(folder / "a.jsonl"), "--eval", str(folder / "eval.jsonl"), "--ngram", "14", "--json"])
    assert capsys.readouterr().out == ""


def test_short_evaluation_documents_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "eval.jsonl").write_text('{"question": "what is 2 + 3"}\n')
    main(["data", "check", str(folder / "a.jsonl"), "--eval", str(folder / "eval.jsonl")])
    assert "1 evaluation documents are shorter than 13 words" in capsys.readouterr().out


def test_without_datasketch_the_line_says_what_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(SystemExit):
        main(["data", "check", str(folder / "a.jsonl")])
    assert "near: 0.8, but datasketch is not installed" in capsys.readouterr().err
    main(["data", "check", str(folder / "a.jsonl"), str(folder / "b.txt"), "--near", "0", "--json"])
    assert [json.loads(line)["kind"] for line in capsys.readouterr().out.splitlines()] == ["exact"]


def test_nothing_is_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "check", str(folder / "a.jsonl"), "--drop", str(folder)])
    assert "a.jsonl' exists" in capsys.readouterr().err


def test_chats_of_an_evaluation_set_are_found_as_they_stand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both sides are read alike: without the roles' names, which no run of words may cross, whatever the shape."""
    words = [" ".join(f"w{i}n{j}" for j in range(7)) for i in range(60)]
    chats = [
        {
            "messages": [
                {"role": "user", "content": words[3 * i]},
                {"role": "assistant", "content": words[3 * i + 1]},
                {"role": "user", "content": words[3 * i + 2]},
            ]
        }
        for i in range(20)
    ]
    pairs = [{"prompt": chat["messages"][0]["content"], "completion": "x"} for chat in chats]
    for name, records in (("train", chats), ("eval", chats[5:10]), ("pairs", pairs[:5])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    command = ["data", "check", str(tmp_path / "train.jsonl"), "--near", "0", "--json", "--ngram"]
    main([*command, "13", "--eval", str(tmp_path / "eval.jsonl")])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(each["kind"], each["place"]) for each in found] == [
        ("overlap", f"{tmp_path}/train.jsonl:{i}") for i in range(6, 11)
    ]
    main([*command, "7", "--eval", str(tmp_path / "pairs.jsonl")])
    assert len(capsys.readouterr().out.splitlines()) == 5
