"""train.py on rollouts of the model that ships: what a step logs, budgets, kills, and prompts that do not fit."""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import Command
from program_cache import QUICK_COMPILE

from qwen3_jax.cli.train import main as train
from qwen3_jax.serve import Engine, shipped_model
from qwen3_jax.tasks.arithmetic import post_training_records, solve

RECIPE = Path(__file__).parents[2] / "configs" / "post" / "rl_toy.yaml"
SAMPLES, ANSWERS = 4, 16
# eps as in test_mesh_matrix.py: Adam would enlarge the rounding of gradients near zero.
SMALL = f"""--init_from {shipped_model()} --data.sources.queries.paths queries.jsonl --data.sequence_length 96
    --data.batch_size {ANSWERS} --accumulation 2 --rollouts.samples {SAMPLES} --rollouts.max_new_tokens 48
    --rollouts.rows 8 --optimizer.warmup_steps 0 --optimizer.eps 1e-5 --steps 6 --checkpoint_every 2""".split()


def prepare(directory: Path) -> Path:
    queries = post_training_records(40, seed=5)["queries"]
    (directory / "queries.jsonl").write_text("".join(json.dumps(record) + "\n" for record in queries))
    return directory


def series(run: Path) -> list[dict[str, Any]]:
    """The metrics, without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("tokens_per_second", "mfu", "time/")
    return [{key: value for key, value in line.items() if not key.startswith(clock)} for line in lines]


def rollouts(run: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"rollouts-{step:06d}.jsonl").read_text().splitlines()]


def start(directory: Path, *overrides: str, flags: str = "", **variables: str) -> Command:
    words = (str(RECIPE), *SMALL, *overrides)
    env = {**os.environ, "XLA_FLAGS": flags, **variables}
    return Command("qwen3_jax.cli.train:main", *words, env=env, cwd=directory)


def finish(*processes: Command) -> list[str]:
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return [out for out, _ in said]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two budgets and refills, from its start to its end."""
    directory = prepare(tmp_path_factory.mktemp("whole"))
    finish(start(directory, *BUDGETS))
    return directory / "runs" / "toy" / "rl"


BUDGETS = ("--rollouts.budgets", "[3, -1]", "--rollouts.refills", "1")


def test_what_a_step_logs_is_what_its_rollouts_are(whole: Path) -> None:
    """The sampler's log-probabilities are the trainer's, and the first ratio is exactly 1."""
    found = series(whole)
    queries = [json.loads(line) for line in (whole.parents[2] / "queries.jsonl").read_text().splitlines()]
    assert len(found) == 6
    for line in found:
        answers = rollouts(whole, line["step"])
        assert len(answers) == SAMPLES * line["rollout/prompts"]
        assert sum(answer["is_learnt"] for answer in answers) == ANSWERS
        assert line["reward"] == pytest.approx(np.mean([answer["reward"] for answer in answers]))
        assert line["rollout/new_tokens"] == pytest.approx(np.mean([len(answer["token_ids"]) for answer in answers]))
        assert line["policy/ratio"] == 1.0
        assert line["policy/sampler_gap"] < 1e-5
        assert line["policy/largest_sampler_gap"] < 1e-4
        assert line["policy/sampler_ratio"] < 1 + 1e-5
        for answer in answers:
            right = solve(queries[answer["document"]]["prompt"]).answer
            assert answer["reward"] == float(answer["content"].strip() == right), answer
    assert found[0]["reward"] > 0.5
    assert max(line["rollout/prompts"] for line in found) > ANSWERS // SAMPLES  # some groups were refilled


def test_a_group_has_one_prompt_and_one_budget(whole: Path) -> None:
    budgets = Counter()
    for step in range(1, 7):
        answers = rollouts(whole, step)
        for first in range(0, len(answers), SAMPLES):
            group = answers[first : first + SAMPLES]
            assert [answer["sample"] for answer in group] == list(range(SAMPLES))
            assert len({(answer["document"], str(answer["settings"])) for answer in group}) == 1
            budget = group[0]["settings"]["thinking_budget"]
            budgets[budget] += 1
            assert sum(answer["advantage"] for answer in group) == pytest.approx(0, abs=1e-6)
            if budget == 3:
                assert all(answer["thinking_tokens"] <= 3 for answer in group)
    assert set(budgets) == {3, -1}
    cut = [answer for step in range(1, 7) for answer in rollouts(whole, step) if answer["thinking_end"] == "budget"]
    assert cut
    assert all(sum(answer["forced"]) == answer["injected_tokens"] > 0 for answer in cut)


def test_a_run_that_was_killed_has_the_same_series_and_rollouts(whole: Path, tmp_path: Path) -> None:
    """SIGKILL after its third rollout, then in a rollout or an update."""
    run = prepare(tmp_path) / "runs" / "toy" / "rl"
    for number, wait in ((3, 0.0), (5, 0.2)):
        process = start(tmp_path, *BUDGETS)
        while not (run / f"rollouts-{number:06d}.jsonl").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        time.sleep(wait)
        process.kill()
        process.communicate()
    finish(start(tmp_path, *BUDGETS))
    assert series(run) == series(whole)
    assert Engine.load(str(run)).weights_digest == Engine.load(str(whole)).weights_digest
    for step in range(1, 7):
        assert rollouts(run, step) == rollouts(whole, step)


def test_a_teacher_scores_the_students_own_answers(tmp_path: Path) -> None:
    """On-policy distillation: where the teacher is the student, nothing is learnt at first; no answer is judged, and so
    none is replaced."""
    teacher = ("--teacher.init_from", str(shipped_model()), "--rollouts.samples", "1", "--rollouts.refills", "1")
    finish(start(prepare(tmp_path), *teacher, "--steps", "2", flags=QUICK_COMPILE))
    run = tmp_path / "runs" / "toy" / "rl"
    first, second = series(run)
    assert abs(first["loss"]) < 1e-6
    assert first["rollout/prompts"] == second["rollout/prompts"] == ANSWERS
    assert "reward" not in first
    answers = rollouts(run, 1)
    assert len({answer["document"] for answer in answers}) == ANSWERS
    assert not any("verdicts" in answer for answer in answers)


def assert_same(run: Path, whole: Path) -> None:
    """The same answers to the last token, and the same numbers but for the order in which sums are taken."""
    for step in range(1, 7):
        for one, other in zip(rollouts(run, step), rollouts(whole, step), strict=True):
            assert one["token_ids"] == other["token_ids"]
            np.testing.assert_allclose(one["logprobs"], other["logprobs"], rtol=1e-5, atol=1e-5)
    for one, other in zip(series(run), series(whole), strict=True):
        for name in ("loss", "reward", "policy/entropy", "policy/old_kl", "grad_norm"):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-5)


def test_a_mesh_of_eight_has_the_same_answers_and_numbers(whole: Path, tmp_path: Path) -> None:
    mesh = ("--mesh.fsdp", "2", "--mesh.expert", "2", "--mesh.tensor", "2")
    flags = f"{QUICK_COMPILE} --xla_force_host_platform_device_count=8"
    finish(start(prepare(tmp_path), *BUDGETS, *mesh, flags=flags))
    assert_same(tmp_path / "runs" / "toy" / "rl", whole)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_have_the_same_answers_and_numbers(
    count: int, whole: Path, tmp_path: Path, coordinator_address: str
) -> None:
    """Each judges its share; process 0 alone writes."""
    prepare(tmp_path)
    meeting = {"JAX_COORDINATOR_ADDRESS": coordinator_address, "JAX_NUM_PROCESSES": str(count)}
    members = range(count)
    finish(*(start(tmp_path, *BUDGETS, flags=QUICK_COMPILE, **meeting, JAX_PROCESS_ID=str(i)) for i in members))
    assert_same(tmp_path / "runs" / "toy" / "rl", whole)


@pytest.mark.parametrize(
    ("record", "words", "message"),
    [
        ({"answer": None}, [], r"queries.jsonl:1: prompt: missing|queries.jsonl:1: answer: None"),
        ({}, ["--rollouts.verifier", "maths"], "queries.jsonl:1: verifier: 'maths'; use one of exact"),
        ({"temperature": 0.5}, [], r"queries.jsonl:1: temperature: 0.5; leave it out, rollouts use 1.0"),
        ({"stop": "x"}, [], r"queries.jsonl:1: stop: .*; leave it out"),
        ({"prompt": "word " * 90}, [], r"queries.jsonl:1: prompt: \d+ tokens; use at most 48"),
        ({"max_new_tokens": 50}, [], r"queries.jsonl:1: max_new_tokens: 50; use at most rollouts.max_new_tokens"),
        (
            {},
            ["--rollouts.max_new_tokens", "24", "--rollouts.budgets", "[3]"],
            "rollouts.budgets: 3: max_new_tokens: 24",
        ),
        ({}, ["--rollouts.samples", "1"], "rollouts.samples: 1; use 2 or more"),
        (
            {},
            ["--rollouts.samples", "3"],
            "data.batch_size: 16, the answers of a step; use a multiple",
        ),
        ({}, ["--rollouts.max_new_tokens", "96"], "rollouts.max_new_tokens: 96 leaves no room for a prompt"),
        (
            {},
            ["--compute.capacity_factor", "1.25"],
            "compute.capacity_factor: 1.25 drops tokens that decoding does not",
        ),
        ({}, ["--rollouts.settings.top_k", "5"], "settings.top_k: 5; leave it out"),
        ({}, ["--rollouts.policy.kind", "ppo"], "policy.kind"),
        ({}, ["--rollouts.updates", "3"], "use a multiple of rollouts.samples"),
        (
            {},
            ["--rollouts.updates", "4", "--accumulation", "8"],
            "accumulation: 8 does not divide the rows of an update",
        ),
        ({}, ["--rollouts.overlong_tokens", "60"], r"overlong_tokens: 60; use at most max_new_tokens \(48\)"),
    ],
)
def test_what_does_not_fit_is_one_line(
    record: dict[str, Any],
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = {"prompt": "What is 2 + 3?", "answer": "5", "verifier": "exact"} | record
    if "--rollouts.verifier" in words:
        del asked["verifier"]
    (tmp_path / "queries.jsonl").write_text(json.dumps(asked) + "\n")
    with pytest.raises(SystemExit, match="2"):
        train([str(RECIPE), *SMALL, *words])
    told = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, told), told
