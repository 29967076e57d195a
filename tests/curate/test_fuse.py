"""The fusion builder: what is built in which shares, where flags stand, and that ids are those of the template."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qwen3_jax.cli.main import main as qwen3_jax
from qwen3_jax.curate.fuse import FuseConfig, fuse
from qwen3_jax.data.examples import Encoder
from qwen3_jax.data.source import DocumentSource
from qwen3_jax.serve import shipped_model
from qwen3_jax.text import chat
from qwen3_jax.text.tokenizer import load_tokenizer


def files(directory: Path, thinking: int = 60, others: int = 60, **more: Any) -> dict[str, tuple[str, ...]]:
    """Questions q0, q1, ...: the first of both files are the same."""
    found = {}
    for name, count, thought in (("thinking", thinking, "one two three"), ("non_thinking", others, "")):
        path = directory / f"{name}.jsonl"
        turns = ({"role": "assistant", "reasoning_content": thought, "content": f"a{i}"} for i in range(count))
        records = [
            {
                "messages": [{"role": "user", "content": f"q{i}"}, turn],
                "provenance": {"n": i},
                "labels": {"d": "m"},
                **more,
            }
            for i, turn in enumerate(turns)
        ]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        found[name] = (str(path),)
    return found


def built(config: FuseConfig, path: Path) -> tuple[list[dict[str, Any]], Counter[str]]:
    counts = fuse(config, path)
    return [json.loads(line) for line in path.read_text().splitlines()], counts


def last_mode(record: dict[str, Any]) -> bool:
    """By the flags, as a model reads them: thinking is the default."""
    flag = chat.flag_mode(record["messages"][:-1])
    return True if flag is None else flag


def test_every_record_thinks_as_its_last_flag_says(tmp_path: Path) -> None:
    config = FuseConfig(**files(tmp_path), records=600, seed=3, dialogues=0.4)
    records, counts = built(config, tmp_path / "out.jsonl")
    assert len(records) == counts["records"] == 600
    for record in records:
        last = record["messages"][-1]
        assert last_mode(record) == bool(last["reasoning_content"]) == (record["labels"]["mode"] == "thinking")
        assert record["labels"]["d"] == "m"
        # In a dialogue each turn is in the mode that the flags up to it say.
        for end, message in enumerate(record["messages"]):
            if message["role"] == "assistant":
                flag = chat.flag_mode(record["messages"][:end])
                assert bool(message["reasoning_content"]) == (True if flag is None else flag)
    turns = [sum(message["role"] == "assistant" for message in record["messages"]) for record in records]
    dialogues = [record for record, number in zip(records, turns, strict=True) if number > 1]
    assert set(turns) == {1, 2, 3, 4}
    assert len(dialogues) == counts["dialogue"] == pytest.approx(240, abs=40)
    assert counts["dialogue, several flags"] > 100
    assert all(len(record["provenance"]) > 1 for record in dialogues)
    modes = [{bool(m["reasoning_content"]) for m in r["messages"] if m["role"] == "assistant"} for r in dialogues]
    assert sum(len(found) == 2 for found in modes) > 100  # the mode changes within


def test_flags_stand_where_the_shares_say(tmp_path: Path) -> None:
    config = FuseConfig(
        **files(tmp_path), records=1000, dialogues=0.0, unflagged=0.3, in_system=0.25, thinking_share=0.6
    )
    records, counts = built(config, tmp_path / "out.jsonl")
    thinking = counts["thinking"]
    assert thinking == pytest.approx(600, abs=50)
    assert counts["thinking, without a flag"] / thinking == pytest.approx(0.3, abs=0.06)
    flagged = [record for record in records if chat.flag_mode(record["messages"]) is not None]
    in_system = [record for record in flagged if record["messages"][0]["role"] == "system"]
    assert len(in_system) / len(flagged) == pytest.approx(0.25, abs=0.05)
    assert {record["messages"][0]["content"] for record in in_system} == {"/think", "/no_think"}
    assert counts["non-thinking"] == sum(record["labels"]["mode"] == "non-thinking" for record in records)
    assert "non-thinking, without a flag" not in counts


def test_no_record_is_used_twice_where_no_number_is_given(tmp_path: Path) -> None:
    records, _ = built(FuseConfig(**files(tmp_path, 30, 90), dialogues=0.0, thinking_share=0.5), tmp_path / "out.jsonl")
    assert len(records) == 60
    asked = Counter((record["labels"]["mode"], record["messages"][-1]["content"]) for record in records)
    assert max(asked.values()) <= 2  # the modes are drawn: one may be short by a few


def test_the_same_query_in_both_modes(tmp_path: Path) -> None:
    config = FuseConfig(**files(tmp_path, 40, 20), records=300, dialogues=0.0, both=1.0, thinking_share=1.0)
    records, counts = built(config, tmp_path / "out.jsonl")
    pairs = [
        (first, second) for first, second in itertools.pairwise(records) if second["labels"]["mode"] == "non-thinking"
    ]
    assert len(pairs) == counts["query in both modes"] > 50
    for first, second in pairs:
        assert first["labels"]["mode"] == "thinking"
        assert first["messages"][-1]["content"] == second["messages"][-1]["content"]


def test_cut_thoughts_end_with_the_stop_text_which_is_not_in_the_loss(tmp_path: Path) -> None:
    config = FuseConfig(**files(tmp_path), records=200, dialogues=0.0, cut=0.5, thinking_share=1.0)
    path = tmp_path / "out.jsonl"
    records, counts = built(config, path)
    cut = [record for record in records if "no_loss" in record]
    assert len(cut) == counts["thinking, thought cut"] == pytest.approx(100, abs=25)
    starts = {record["messages"][-1]["reasoning_content"].partition("\n")[0] for record in cut}
    assert starts == {"one", "one two"}
    tokenizer = load_tokenizer(shipped_model())
    encode = Encoder(tokenizer)
    for record, document in zip(records, DocumentSource([str(path)]), strict=True):
        (example,) = encode(document).examples
        text = tokenizer.decode(example.tokens_N[example.loss_mask_N == 1])
        thought, answer = record["messages"][-1]["reasoning_content"], record["messages"][-1]["content"]
        if "no_loss" in record:
            thought = thought.partition("\n")[0]
            assert text == f"<think>\n{thought}{answer}<|im_end|>"
        else:
            assert text == f"<think>\n{thought}\n</think>\n\n{answer}<|im_end|>"
    assert "thinking, thought cut" not in built(FuseConfig(**files(tmp_path), records=200), path)[1]


def test_the_same_settings_build_the_same_file(tmp_path: Path) -> None:
    given = files(tmp_path)
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        fuse(FuseConfig(**given, records=100, seed=seed), tmp_path / name)
        texts.append((tmp_path / name).read_bytes())
    assert texts[0] == texts[1] != texts[2]


def test_records_with_flags_or_tools_of_their_own_stay_as_they_are(tmp_path: Path) -> None:
    given = files(tmp_path)
    own = [
        {"role": "system", "content": "Be brief. /no_think"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "reasoning_content": "", "content": "a"},
    ]
    Path(given["non_thinking"][0]).write_text(json.dumps({"messages": own}) + "\n")
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    record = {"messages": [{"role": "user", "content": "q"}, own[2] | {"reasoning_content": "hm"}], "tools": tools}
    Path(given["thinking"][0]).write_text(json.dumps(record) + "\n")
    records, counts = built(FuseConfig(**given, records=50, dialogues=1.0), tmp_path / "out.jsonl")
    assert counts["dialogue"] == 0
    assert counts["non-thinking, with a flag of its own"] == counts["non-thinking"] > 10
    for record in records:
        assert ("tools" in record) == (record["labels"]["mode"] == "thinking")


def test_an_input_is_not_written_over(tmp_path: Path) -> None:
    given = files(tmp_path)
    path = Path(given["thinking"][0])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"^output: '.*' is an input; use another file"):
        fuse(FuseConfig(**given), path)
    with pytest.raises(ValueError, match=r"^output: '.*' is an input; use another file"):  # by a pattern
        fuse(FuseConfig(**given | {"thinking": (str(path.with_name(f"{path.stem[:3]}*")),)}), path)
    assert path.read_bytes() == before


def test_the_command_prints_what_was_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {name: list(paths) for name, paths in files(tmp_path).items()}
    (tmp_path / "fuse.yaml").write_text(json.dumps({**given, "dialogues": 0.0}))
    qwen3_jax(["fuse", str(tmp_path / "fuse.yaml"), str(tmp_path / "out.jsonl"), "--records", "40", "--unflagged", "1"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["records", "40", "100.0%"] in rows
    assert any(row[:-2] == ["thinking,", "without", "a", "flag"] for row in rows)


@pytest.mark.parametrize(
    ("fields", "record", "message"),
    [
        ({"unflagged": 2.0}, None, "unflagged: 2.0; use a share from 0 to 1"),
        ({"rounds": (1, 2)}, None, r"rounds: \[1, 2\]; use \[min, max\]"),
        ({"records": 0}, None, "records: 0; use a number >= 1"),
        ({"thinking": ("no.jsonl",)}, None, "thinking: 'no.jsonl' matches no file"),
        ({}, {"prompt": "q", "completion": "a"}, ".*thinking.jsonl:1: thinking: reasoning_content: ''; use a record"),
        ({}, {"text": "a"}, ".*thinking.jsonl:1: thinking: messages: "),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, fields: dict[str, Any], record: Any, message: str) -> None:
    given: dict[str, Any] = {**files(tmp_path), **fields}
    if record is not None:
        Path(given["thinking"][0]).write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=f"^{message}"):
        fuse(FuseConfig(**given), tmp_path / "out.jsonl")
    assert not list(tmp_path.glob("out.jsonl*"))
