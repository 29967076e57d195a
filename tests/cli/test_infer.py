"""infer.py on the model that ships: one prompt, a file, and bad input. Long runs are in test_infer_runs.py."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen3_jax.cli.infer import main
from qwen3_jax.convert import convert
from qwen3_jax.decode import pool
from qwen3_jax.serve import Engine, shipped_model

FILES = ("--input", "in.jsonl", "--output", "out.jsonl")
CPU8 = str(Path(__file__).parents[2] / "configs" / "mesh" / "cpu8.yaml")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(shipped_model())


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keeps main from writing programs to the user's cache; JAX has read the variable by now."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))


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


def test_a_prompt_announces_what_is_compiled(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cold start would be silent for many seconds; what the process has compiled before is not announced."""
    monkeypatch.setattr(pool, "_compiled", set())
    said = [run(capsys, "--prompt", "What is 2 + 3? /think", "--thinking-budget", "4")[2] for _ in range(2)]
    assert [text.count("compiled prefill 1 x 32 in ") for text in said] == [1, 0]


def test_a_stream_prints_the_same_text(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["What is 2 + 3? /think", "--thinking-budget", "4"], ["What is 2 + 3?", "--no-thinking"]):
        texts = [run(capsys, "--prompt", *argv, *stream)[1] for stream in ([], ["--stream"])]
        assert texts[0] == texts[1]


def test_json_has_the_fields_of_a_record(capsys: pytest.CaptureFixture[str], engine: Engine) -> None:
    _, out, _ = run(capsys, "--prompt", "What is 2 + 3? /think", "--thinking-budget", "4", "--json")
    record = json.loads(out)
    assert record["content"] == "5"
    assert record["thinking"].startswith("2 plus 3")
    counts = (record["thinking_tokens"], record["injected_tokens"], record["answer_tokens"])
    assert counts == (4, len(engine.tokens.stop_ids), 2)
    assert (record["thinking_end"], record["finish_reason"]) == ("budget", "eos")
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
    """Budgets, modes and errors side by side; every good line is answered as if alone."""
    good: list[dict[str, Any]] = [
        {"id": "a", "prompt": "What is 4 + 4? /think", "thinking_budget": 3},
        {
            **{"id": "b", "messages": [{"role": "user", "content": "What is 4 + 4?"}], "enable_thinking": False},
            **dict.fromkeys(("prompt", "tools", "stop", "temperature", "answer")),  # null counts as absent
        },
        {"id": "c", "prompt": "What is 4 plus 4?", "temperature": 0.0, "max_new_tokens": 64, "answer": "8"},
    ]
    bad: list[Any] = [
        {"id": "x", "prompt": "hi", "thinking_budget": 2.5},
        {"id": "y", "prompt": "hi", "budget": 2},
        "{not json",
        {"id": "z", "prompt": "hi " * 600},
        {"id": "a", "prompt": "hi"},
        {"id": [1], "prompt": "hi"},
        '{"prompt": "\\ud800"}',
        '{"prompt": "hi", "answer": NaN}',
        "[" * 100_000,
        {"id": "w", "prompt": "hi", "sample": 2**31},
        {"id": "t", "prompt": "hi", "tools": 5},
    ]
    source = write(tmp_path / "in.jsonl", good[0], bad[0], good[1], bad[1], bad[2], good[2], *bad[3:])
    code, summary, err = run(capsys, "--input", str(source), "--output", str(tmp_path / "out.jsonl"))
    assert code == 0, err
    assert (
        f"{source}:2: thinking_budget: 2.5; use a whole number >= -1 or 'auto'; 11 of 14 lines cannot"
        in err.replace("\n", "")
    )
    out = read(tmp_path / "out.jsonl")
    assert {record["id"]: record["line"] for record in out if "error" not in record} == {"a": 1, "b": 3, "c": 6}
    errors = {record["line"]: record["error"] for record in out if "error" in record}
    assert errors[2] == "thinking_budget: 2.5; use a whole number >= -1 or 'auto'"
    assert errors[4].startswith("budget: unknown field; use one of id, messages, prompt")
    assert errors[5].startswith("not valid JSON")
    assert "tokens; use at most 511, one less than the context" in errors[7]
    assert errors[8] == 'id: "a" stands on line 1 too; use another one'
    assert errors[9] == "id: [1]; use a string or a whole number"
    assert all(errors[line].startswith("not valid JSON (") for line in (10, 11, 12))
    assert errors[13] == "sample: 2147483648; use a whole number in 0..2147483647"
    assert errors[14] == "tools: 5; use a list of JSON objects"
    assert [record["id"] for record in out if record["line"] in (5, 8, 10)] == [None, "a", None]
    answers = {record["id"]: record for record in out if "error" not in record}
    assert answers["c"]["answer"] == answers["c"]["content"] == "8"
    counts = json.loads(summary)
    assert (counts["prompts"], counts["done"], counts["errors"]) == (3, 3, 11)
    assert counts["thinking_ends"] == {"budget": 1, "off": 1, "natural": 1}
    assert counts["tokens"] == sum(len(record["token_ids"]) for record in answers.values())
    for record in good:
        write(tmp_path / "one.jsonl", record)
        (tmp_path / "one.out").unlink(missing_ok=True)
        run(capsys, "--input", str(tmp_path / "one.jsonl"), "--output", str(tmp_path / "one.out"))
        assert read(tmp_path / "one.out") == [{**answers[record["id"]], "line": 1}]


def test_samples_and_logprobs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Several answers to a line are those of its seed's sample numbers; log-probabilities are per token."""
    prompt = "Start with 3 and keep the last digit: +4 *7 +5 *3 +8 _ _ _ _ _ /no_think"
    source = write(tmp_path / "in.jsonl", {"prompt": prompt, "temperature": 3.0, "top_k": 0, "top_p": 1.0})
    output = ("--output", str(tmp_path / "out.jsonl"))
    _, summary, _ = run(capsys, "--input", str(source), *output, "--samples", "6", "--logprobs")
    out = sorted(read(tmp_path / "out.jsonl"), key=lambda record: record["sample"])
    assert [(record["id"], record["sample"]) for record in out] == [(1, sample) for sample in range(6)]
    assert len({record["content"] for record in out}) > 1
    assert json.loads(summary)["samples"] == 6
    for record in out:
        assert len(record["logprobs"]) == len(record["forced"]) == len(record["token_ids"])
        assert max(record["logprobs"]) <= 0
        assert record["forced"] == [1] * 4 + [0] * (len(record["token_ids"]) - 4)
    source = write(tmp_path / "again.jsonl", {**read(source)[0], "sample": 4})
    run(capsys, "--input", str(source), "--output", str(tmp_path / "again.out"))
    assert read(tmp_path / "again.out")[0]["token_ids"] == out[4]["token_ids"]


def test_the_mode_may_be_left_to_the_question(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Off by default; a flag in the text goes before it; the rule that decided is in the answer."""
    records = [
        {"id": i, "prompt": text} for i, text in enumerate(["What is 2 + 3?", "Who was Ada?", "Who was Ada? /think"])
    ]
    source = write(tmp_path / "in.jsonl", *records)
    run(capsys, "--input", str(source), "--output", str(tmp_path / "with.jsonl"), "--mode-by-query")
    run(capsys, "--input", str(source), "--output", str(tmp_path / "without.jsonl"))
    decided, plain = ({r["id"]: r for r in read(tmp_path / name)} for name in ("with.jsonl", "without.jsonl"))
    assert [decided[i].get("mode_rule") for i in range(3)] == ["arithmetic", "look-up", None]
    assert decided[1]["thinking_end"] == "off" != plain[1]["thinking_end"]
    assert "mode_rule" not in plain[0]
    assert {**decided[0], "mode_rule": 0} == {**plain[0], "mode_rule": 0}


@pytest.mark.parametrize("text", ["mine", "mine\n", '{"id": 1, "sample": 0}\n', ""])
def test_a_file_that_no_run_began_is_left_as_it_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str
) -> None:
    """Without a newline at its end too, which an answer that was cut off also lacks; an empty one is taken."""
    source = write(tmp_path / "in.jsonl", {"prompt": "What is 2 + 3?"})
    target = tmp_path / "out.jsonl"
    target.write_text(text)
    code, _, err = run(capsys, "--input", str(source), "--output", str(target))
    assert code == (2 if text else 0)
    if text:
        assert "exists, without the 'out.jsonl.run.json' of a run; use another" in err
        assert target.read_text() == text
    code, _, err = run(capsys, "--input", str(source), "--output", str(tmp_path))
    assert code == 2
    assert "Is a directory; use a file that can be written" in err
    code, _, err = run(capsys, "--input", str(source), "--output", str(source))
    assert (code, read(source)) == (2, [{"prompt": "What is 2 + 3?"}])
    assert "is the input; use another file" in err


def test_a_file_without_a_line_that_can_be_answered_is_an_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Such as an object over several lines."""
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"prompt": "x", "id": 1}, indent=1))
    code, _, err = run(capsys, "--input", str(source), "--output", str(tmp_path / "out.jsonl"))
    assert code == 2
    assert re.search(rf"error: {source}:1: not valid JSON .*; none of the \d+ lines can be answered", err)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_mended_and_a_longer_file_goes_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Lines are known by id and content: the answers that are there stay, the error of the mended line goes."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    argv = ("--input", str(source), "--output", str(target), "--max-new-tokens", "8")
    good, bad, mended, more = (
        {"id": 1, "prompt": "x"},
        {"id": 2, "prompt": 3},
        {"id": 2, "prompt": "y"},
        {"prompt": "z"},
    )
    write(source, good, bad)
    run(capsys, *argv)
    first, error = target.read_bytes().splitlines(keepends=True)
    if b"error" in first:
        first, error = error, first
    assert json.loads(error)["error"].startswith("prompt: 3")
    write(source, good, mended, more)
    code, out, _ = run(capsys, *argv)
    assert (code, json.loads(out)["resumed"], json.loads(out)["done"]) == (0, 1, 2)
    lines = target.read_bytes().splitlines(keepends=True)
    assert lines[0] == first
    assert sorted(json.loads(line)["id"] for line in lines) == [1, 2, 3]
    write(source, {**good, "prompt": "other"}, mended, more)
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert "answers id 1 as it was on line 1, which has changed since; use another id" in " ".join(err.split())
    assert target.read_bytes().splitlines(keepends=True) == lines


def test_a_run_that_trained_is_decoded(capsys: pytest.CaptureFixture[str], tmp_path: Path, engine: Engine) -> None:
    """Orbax weights, here those that `convert` writes, need no conversion back."""
    convert(shipped_model(), tmp_path / "orbax")
    argv = ("--prompt", "What is 2 + 3? /think", "--thinking-budget", "4", "--json")
    capsys.readouterr()
    theirs = run(capsys, *argv, "--model", str(tmp_path / "orbax"))[1]
    assert json.loads(theirs)["token_ids"] == json.loads(run(capsys, *argv)[1])["token_ids"]


def test_a_plan_is_asked_for_one_of_its_stages(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for stage in ("s1", "s2"):
        (tmp_path / stage / "checkpoints").mkdir(parents=True)
    code, _, err = run(capsys, "--prompt", "x", "--model", str(tmp_path))
    assert (code, f"{str(tmp_path)!r} holds the stages of a plan; use one of {tmp_path}/s1, {tmp_path}/s2" in err) == (
        2,
        True,
    )
    code, _, err = run(capsys, "--prompt", "x", "--model", "gs://bucket/run")
    assert (code, "'gs://bucket/run'; use a path on a disk" in err) == (2, True)


def test_thinking_is_turned_off_by_the_name_of_the_field(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("--prompt", "What is 2 + 3?", "--json")
    told = [run(capsys, *argv, *flags)[1] for flags in (("--enable-thinking", "false"), ("--no-thinking",))]
    assert told[0] == told[1]
    assert json.loads(told[0])["thinking_end"] == "off"
    code, _, err = run(capsys, *argv, "--enable-thinking", "no")
    assert (code, "enable_thinking: 'no'; use true or false" in err) == (2, True)


def test_raw_text_is_continued(capsys: pytest.CaptureFixture[str], tmp_path: Path, engine: Engine) -> None:
    text = "<|im_start|>user\nWhat is 2 + 3? /think<|im_end|>\n<|im_start|>assistant\n"
    settings = ("--thinking-budget", "4", "--temperature", "0", "--max-new-tokens", "64", "--json")
    raw = json.loads(run(capsys, "--raw", "--prompt", text, *settings)[1])
    asked = json.loads(run(capsys, "--prompt", "What is 2 + 3? /think", *settings)[1])
    assert raw["token_ids"] == asked["token_ids"]
    code, _, err = run(capsys, "--raw", "--input", "x", "--output", "y")
    assert (code, "--raw: with --input; use the field text" in err) == (2, True)


def test_a_device_is_no_output(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "x"})
    code, out, err = run(capsys, "--input", str(source), "--output", "/dev/null")
    assert (code, out) == (2, "")
    assert "output: '/dev/null' is not a regular file; use a file" in err


def test_a_reader_that_goes_ends_the_command_in_silence() -> None:
    """As `qwen3-jax suggest | head -0` does."""
    command = "from qwen3_jax.cli.main import main; main(['suggest', '--model', 'qwen3-8b', '--tokens', '1T'])"
    with subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert (process.wait(), said) == (128 + signal.SIGPIPE, b"")


def test_strict_stops_before_anything_is_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "What is 1 + 1?"}, {"prompt": "x", "top_p": 7})
    code, _, err = run(capsys, "--input", str(source), "--output", str(tmp_path / "out.jsonl"), "--strict")
    assert code == 2
    assert f"error: {source}:2: top_p: 7; use a number in [0, 1]" in err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", "x", "--thinking-budget", "-2"], "thinking_budget: -2; use a whole number >= -1 or 'auto'"),
        (
            ["--prompt", "x", "--thinking-budget", "four"],
            "thinking_budget: 'four'; use a whole number >= -1 or 'auto'",
        ),
        (["--prompt", "x", "--thinking-budget", "4", "--max-new-tokens", "9"], "max_new_tokens: 9 leaves 9"),
        (["--prompt", "x", "--model", "/nowhere"], "model: '/nowhere' does not exist; use a directory"),
        (["--prompt", "x", "--mesh", "missing.yaml"], "config: 'missing.yaml' does not exist"),
        ([*FILES, "--mesh", CPU8, "--batch-size", "6"], "--batch-size: 6; use a multiple of the mesh's 4 parts"),
        (["--input", "missing.jsonl"], "--output: missing; answers to an --input go to a file"),
        (["--prompt", "x", "--stream", "--json"], "--stream, --json: both; use one of them"),
        (["--prompt", "x", "--auto-cap", "3"], "--auto-cap: 3; use --thinking-budget auto with it"),
        ([*FILES, "--stream"], "--stream: with --input; use --prompt"),
        (["--prompt", "x", "--samples", "2"], "--samples: with --prompt; use --input and --output"),
        (["--prompt", "x", "--logprobs"], "--logprobs: with --prompt; use --input and --output"),
        (["--prompt", "x", "--batch-size", "64"], "--batch-size: with --prompt; use --input and --output"),
        ([*FILES, "--samples", "0"], "--samples: 0; use a number >= 1"),
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
    assert "holds no weights" in err
