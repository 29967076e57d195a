"""Long runs of infer.py, as processes: killed and resumed, two at once, over a mesh, over several processes."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from processes import Command

from qwen3_jax.tasks.arithmetic import held_out_chains

ROOT = Path(__file__).parents[2]
PROMPTS, SAMPLES, KILLS = 60, 2, 20


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_key(path: Path) -> dict[tuple[Any, Any], dict[str, Any]]:
    """Records by id and sample, none of which is there twice."""
    records = read(path)
    keyed = {(record["id"], record.get("sample")): record for record in records}
    assert len(keyed) == len(records)
    return keyed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`in.jsonl`: problems under many budgets, in two prompt lengths, with a line that cannot be answered."""
    folder = tmp_path_factory.mktemp("runs")
    rng = random.Random(0)
    records: list[dict[str, Any]] = [
        {
            "id": f"q{i}",
            "prompt": ("Once more. " * 5 if i % 9 == 4 else "") + problem.question,
            "thinking_budget": rng.choice([-1, 0, 3, 5, "auto"]),
            "seed": i,
        }
        for i, problem in enumerate(held_out_chains(PROMPTS, 11))
    ]
    records.insert(7, {"id": "bad", "prompt": "x", "top_p": 3})
    (folder / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder


def start(folder: Path, output: str, *argv: str, **env: str) -> Command:
    """infer.py as a process of its own."""
    words = ["--input", str(folder / "in.jsonl"), "--output", str(folder / output)]
    words += ["--max-new-tokens", "64", "--batch-size", "8", *argv]
    return Command("qwen3_jax.cli.infer:main", *words, env={**os.environ, "XLA_FLAGS": "", **env}, cwd=ROOT)


def finish(process: Command) -> dict[str, Any]:
    """The summary that it prints."""
    out, err = process.communicate()
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])  # Gloo prints to stdout before it


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[tuple[Any, Any], dict[str, Any]]:
    """The answers of a run that nothing interrupts."""
    summary = finish(start(folder, "whole.jsonl", "--samples", str(SAMPLES)))
    answers = by_key(folder / "whole.jsonl")
    assert (summary["done"], summary["errors"], len(answers)) == (PROMPTS * SAMPLES, 1, PROMPTS * SAMPLES + 1)
    return answers


def test_killed_twenty_times_it_loses_nothing_and_writes_nothing_twice(
    folder: Path, whole: dict[tuple[Any, Any], dict[str, Any]]
) -> None:
    """Really killed, with SIGKILL, at a random moment after its first answers, and sometimes left with half a line.

    The last of many runs ends by itself, with the answers of the run that was not interrupted.
    """
    rng = random.Random(1)
    output = folder / "killed.jsonl"
    kills, sizes = 0, []
    while kills < KILLS:
        before = output.stat().st_size if output.exists() else 0
        process = start(folder, output.name, "--samples", str(SAMPLES))
        while process.poll() is None and (output.stat().st_size if output.exists() else 0) <= before:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:  # too late: it had ended
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
        sizes.append(output.stat().st_size)
        if kills % 3 == 0:  # as if the kill had come in the middle of a write
            with output.open("r+b") as file:
                file.truncate(sizes[-1] - rng.randint(1, 40))
    assert kills == KILLS, f"only {kills} kills before the end: {sizes}"
    summary = finish(start(folder, output.name, "--samples", str(SAMPLES)))
    assert summary["resumed"] + summary["done"] == PROMPTS * SAMPLES
    assert summary["resumed"] > 0
    assert by_key(output) == whole


def test_a_finished_run_is_left_as_it_is(folder: Path, whole: dict[tuple[Any, Any], dict[str, Any]]) -> None:
    before = (folder / "whole.jsonl").read_bytes()
    summary = finish(start(folder, "whole.jsonl", "--samples", str(SAMPLES)))
    assert (summary["resumed"], summary["done"], summary["compilations"]) == (PROMPTS * SAMPLES, 0, 0)
    assert (folder / "whole.jsonl").read_bytes() == before


def refused(process: Command) -> str:
    _, err = process.communicate()
    assert process.returncode == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    return line


def test_a_file_is_not_continued_under_other_settings(folder: Path, whole: Any) -> None:
    other = start(folder, "whole.jsonl", "--samples", str(SAMPLES), "--temperature", "0.5")
    assert "was begun with temperature None, not 0.5; use the same, or another file" in refused(other)
    answers = folder / "whole.jsonl"
    before = answers.read_text(encoding="utf-8")
    answers.write_text("mine\n" + before, encoding="utf-8")
    damaged = start(folder, answers.name, "--samples", str(SAMPLES))
    assert "exists, and line 1 is not an answer; use another file" in refused(damaged)
    assert answers.read_text(encoding="utf-8") == "mine\n" + before
    answers.write_text(before, encoding="utf-8")


def test_two_processes_cannot_write_one_file(folder: Path) -> None:
    first = start(folder, "shared.jsonl")
    while not (folder / "shared.jsonl").exists():
        time.sleep(0.01)
    second = start(folder, "shared.jsonl")
    assert "is being written by another process; use another file" in refused(second)
    finish(first)


def test_edge_63_over_a_mesh_the_answers_are_the_same(
    folder: Path, whole: dict[tuple[Any, Any], dict[str, Any]]
) -> None:
    mesh = str(ROOT / "configs" / "mesh" / "cpu8.yaml")
    flags = "--xla_force_host_platform_device_count=8"
    finish(start(folder, "mesh.jsonl", "--samples", str(SAMPLES), "--mesh", mesh, XLA_FLAGS=flags))
    assert by_key(folder / "mesh.jsonl") == whole


def test_each_process_answers_its_share_in_a_file_of_its_own(
    folder: Path, whole: dict[tuple[Any, Any], dict[str, Any]], coordinator_address: str
) -> None:
    """Two processes joined by `jax.distributed`."""
    processes = [
        start(
            folder,
            "parts.jsonl",
            *("--samples", str(SAMPLES)),
            JAX_COORDINATOR_ADDRESS=coordinator_address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(i),
        )
        for i in range(2)
    ]
    summaries = [finish(process) for process in processes]
    assert sum(summary["done"] for summary in summaries) == PROMPTS * SAMPLES
    parts = [by_key(folder / f"parts.jsonl-{i:05d}-of-00002") for i in range(2)]
    assert not parts[0].keys() & parts[1].keys()
    assert parts[0] | parts[1] == whole
