"""The model that ships, held to the numbers on its card."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from qwen3_jax.cli.demo import BUDGETS, NUM_PROBLEMS, PROBLEM_SEED
from qwen3_jax.config import ModelConfig
from qwen3_jax.decode import Request
from qwen3_jax.evaluate.budget_curve import budget_curve
from qwen3_jax.serve import Engine, shipped_model
from qwen3_jax.tasks.arithmetic import Problem, cup_chain, digit_chain, held_out_chains, training_records


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(shipped_model())


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return held_out_chains(NUM_PROBLEMS, PROBLEM_SEED)


def test_it_is_what_the_preset_says_and_small(engine: Engine) -> None:
    preset = ModelConfig.preset("qwen3-tiny")
    assert engine.config == preset
    assert preset.num_params <= 3_000_000
    assert preset.num_experts > preset.num_experts_per_tok > 1
    assert sum(path.stat().st_size for path in Path(shipped_model()).iterdir()) <= 8_000_000


def test_accuracy_rises_with_every_budget_of_the_demo(engine: Engine, problems: list[Problem]) -> None:
    points = budget_curve(engine, problems, [{"thinking_budget": budget} for budget in BUDGETS])
    accuracies = [point.accuracy for point in points]
    assert all(a < b for a, b in itertools.pairwise(accuracies)), accuracies
    assert all(point.thinking_tokens <= budget for point, budget in zip(points, BUDGETS, strict=True))


def test_thinking_solves_held_out_problems_and_non_thinking_does_not(engine: Engine, problems: list[Problem]) -> None:
    """200 problems: 95 % against what is within reach of a guess."""
    requests = [
        engine.prompt({"prompt": problem.question + flag, "max_new_tokens": 64, "seed": i}).request
        for flag in (" /think", " /no_think")
        for i, problem in enumerate(problems)
    ]
    answers = [engine.reader.record(result)["content"] for result in engine.generate(requests)]
    right = [answer == problem.answer for answer, problem in zip(answers, problems * 2, strict=True)]
    thinking, direct = sum(right[:NUM_PROBLEMS]) / NUM_PROBLEMS, sum(right[NUM_PROBLEMS:]) / NUM_PROBLEMS
    assert thinking >= 0.95
    assert direct <= thinking - 0.2


def test_the_model_itself_follows_the_flags(engine: Engine, problems: list[Problem]) -> None:
    """Nothing is forced here: the prompt says /no_think, the decoder is not told."""
    texts = [problem.question + flag for flag in ("", " /think", " /no_think") for problem in problems]
    requests = [
        Request(
            engine.prompt({"prompt": text}).request.prompt_ids, max_new_tokens=64, temperature=0.6, top_p=0.95, seed=i
        )
        for i, text in enumerate(texts)
    ]
    records = [engine.reader.record(result) for result in engine.generate(requests)]
    followed = [
        bool(record["thinking"]) == ("/no_think" not in text) for record, text in zip(records, texts, strict=True)
    ]
    assert sum(followed) / len(followed) >= 0.99


def test_problems_mean_what_they_say() -> None:
    """The running values again, by another route: the operations read off the question's text."""
    rng = random.Random(5)
    for _ in range(50):
        problem = digit_chain(rng, 6)
        head, _, tail = problem.question.partition(":")
        value, values = int(head.split()[2]), []
        for operation in tail.replace(" _", "").split():
            value = eval(f"({value}{operation}) % 10")
            values.append(f" {value}")
        assert (tuple(values), str(value)) == (problem.steps, problem.answer)
        problem = cup_chain(rng, 6)
        head, _, tail = problem.question.partition(":")
        cups = [str(i) for i in range(1, 6)]
        ball = head.split()[5]
        for swap in tail.replace(" _", "").split():
            a, b = (int(cup) - 1 for cup in swap.split("-"))
            cups[a], cups[b] = cups[b], cups[a]
        assert str(cups.index(ball) + 1) == problem.answer == problem.steps[-1].strip()


def test_held_out_problems_are_not_trained_on(problems: list[Problem]) -> None:
    questions = {problem.question for problem in problems}
    trained = {record["messages"][0]["content"] for record in training_records(20_000, seed=0)}
    assert not {text.removesuffix(" /think").removesuffix(" /no_think") for text in trained} & questions
