"""What a stage of the recipe has taught a miniature: accuracy in both modes, flags, the budget (report, Table 22)."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3_jax.decode import Result
from qwen3_jax.evaluate.budget_curve import Point, budget_curve
from qwen3_jax.plot import png
from qwen3_jax.serve import Engine
from qwen3_jax.tasks.arithmetic import Problem, held_out_chains

BUDGETS = (2, 3, 4, 5, 6, 7, 8, 9, 11)
_MAX_NEW = 48  # a thought of ten steps, its markers and the answer
_FLAGS = {"": True, " /think": True, " /no_think": False}


@dataclasses.dataclass(frozen=True)
class StageScores:
    """Shares from 0 to 1, of held-out chains.

    thinking, non_thinking: answers that are right without a flag, and with the empty thought in the prompt.
    flags, dialogue_flags: answers in the mode that the last flag asks for, in one turn and after two to four; the
      decoder is not told the mode.
    curve: accuracy by budget.
    """

    thinking: float
    non_thinking: float
    flags: float
    dialogue_flags: float
    curve: Sequence[Point]


def score_stage(engine: Engine, count: int = 200, seed: int = 0) -> StageScores:
    """Answers `count` problems in each of the five ways; the same problems for every model."""
    problems, rng = held_out_chains(count, seed), random.Random(seed)
    flags = [rng.choice(list(_FLAGS)) for _ in problems]
    single = [
        ([{"role": "user", "content": problem.question + flag}], _FLAGS[flag])
        for problem, flag in zip(problems, flags, strict=True)
    ]
    return StageScores(
        thinking=_accuracy(engine, problems, seed, {}),
        non_thinking=_accuracy(engine, problems, seed, {"enable_thinking": False}),
        flags=_followed(engine, single, seed),
        dialogue_flags=_followed(engine, [_dialogue(rng, problem, problems) for problem in problems], seed),
        curve=budget_curve(engine, problems, [{"thinking_budget": budget} for budget in BUDGETS], seed=seed),
    )


def _accuracy(engine: Engine, problems: Sequence[Problem], seed: int, fields: Mapping[str, Any]) -> float:
    settings = {"max_new_tokens": _MAX_NEW, **fields}
    results = engine.generate(
        [engine.prompt({"prompt": p.question, "seed": seed + i, **settings}).request for i, p in enumerate(problems)]
    )
    right = (_text(engine, found)["content"] == p.answer for found, p in zip(results, problems, strict=True))
    return sum(right) / len(problems)


def _dialogue(rng: random.Random, last: Problem, problems: Sequence[Problem]) -> tuple[list[dict[str, str]], bool]:
    """Two to four turns with flags at random, the last of them open; and whether it thinks, by the last flag."""
    messages: list[dict[str, str]] = []
    thinks = True
    turns = [*rng.choices(problems, k=rng.randint(1, 3)), last]
    for problem in turns:
        flag = rng.choice(list(_FLAGS))
        thinks = _FLAGS[flag] if flag else thinks
        messages.append({"role": "user", "content": problem.question + flag})
        messages.append({"role": "assistant", "content": problem.answer})
    return messages[:-1], thinks


def _followed(engine: Engine, asked: Sequence[tuple[Sequence[Mapping[str, str]], bool]], seed: int) -> float:
    """The share of the answers in the mode that was asked for."""
    requests = [
        # A flag would make the decoder write the empty thought: the model itself is to do it.
        dataclasses.replace(
            engine.prompt({"messages": messages, "max_new_tokens": _MAX_NEW, "seed": seed + i}).request, thinking=True
        )
        for i, (messages, _) in enumerate(asked)
    ]
    results = engine.generate(requests)
    followed = (_thinks(engine, found) is thinks for found, (_, thinks) in zip(results, asked, strict=True))
    return sum(followed) / len(asked)


def _thinks(engine: Engine, result: Result) -> bool | None:
    """Whether there is a thought; None where the answer has no think block."""
    if result.thinking_end != "natural":
        return None
    return bool(_text(engine, result)["thinking"].strip())


def _text(engine: Engine, result: Result) -> dict[str, Any]:
    return engine.reader.record(result)


def plot_stages(scores: Mapping[str, StageScores], path: Path) -> None:
    """Accuracy against the budget, a line for each stage, as a PNG."""
    with png(path) as axes:
        for name, found in scores.items():
            axes.plot(BUDGETS, [point.accuracy for point in found.curve], "o-", label=name)
        axes.set(xlabel="thinking budget (tokens)", ylabel="accuracy", title="held-out chains", ylim=(-0.05, 1.08))
        axes.legend()
