"""What a stage of the recipe has taught a miniature: accuracy in both modes, flags, the budget (report, Table 22)."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Mapping, Sequence
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
    asked: list[_Asked] = [
        *(({"prompt": problem.question}, None) for problem in problems),
        *(({"prompt": problem.question, "enable_thinking": False}, None) for problem in problems),
        *(({"prompt": problem.question + flag}, _FLAGS[flag]) for problem, flag in zip(problems, flags, strict=True)),
        *(_dialogue(rng, problem, problems) for problem in problems),
    ]
    results = _answers(engine, asked, seed, count)
    right = [engine.reader.record(found)["content"] for found in results[: 2 * count]]
    followed = [_thinks(engine, found) is mode for found, (_, mode) in zip(results, asked, strict=True)]
    return StageScores(
        thinking=_share(right[i] == problem.answer for i, problem in enumerate(problems)),
        non_thinking=_share(right[count + i] == problem.answer for i, problem in enumerate(problems)),
        flags=_share(followed[2 * count : 3 * count]),
        dialogue_flags=_share(followed[3 * count :]),
        curve=budget_curve(engine, problems, [{"thinking_budget": budget} for budget in BUDGETS], seed=seed),
    )


_Asked = tuple[Mapping[str, Any], bool | None]  # a record, and whether its flags ask for thinking


def _answers(engine: Engine, asked: Sequence[_Asked], seed: int, count: int) -> list[Result]:
    """All in one program."""
    requests = []
    for number, (fields, mode) in enumerate(asked):
        request = engine.prompt({**fields, "max_new_tokens": _MAX_NEW, "seed": seed + number % count}).request
        # A flag would make the decoder write the empty thought: the model itself is to do it.
        requests.append(request if mode is None else dataclasses.replace(request, thinking=True))
    return engine.generate(requests)


def _share(held: Iterable[bool]) -> float:
    values = list(held)
    return sum(values) / len(values)


def _dialogue(rng: random.Random, last: Problem, problems: Sequence[Problem]) -> _Asked:
    """Two to four turns with flags at random, the last of them open; and whether it thinks, by the last flag."""
    messages: list[dict[str, str]] = []
    thinks = True
    turns = [*rng.choices(problems, k=rng.randint(1, 3)), last]
    for problem in turns:
        flag = rng.choice(list(_FLAGS))
        thinks = _FLAGS[flag] if flag else thinks
        messages.append({"role": "user", "content": problem.question + flag})
        messages.append({"role": "assistant", "content": problem.answer})
    return {"messages": messages[:-1]}, thinks


def _thinks(engine: Engine, result: Result) -> bool | None:
    """Whether there is a thought; None where the answer has no think block."""
    if result.thinking_end != "natural":
        return None
    return bool(engine.reader.record(result)["thinking"].strip())


def plot_stages(scores: Mapping[str, StageScores], path: Path) -> None:
    """Accuracy against the budget, a line for each stage, as a PNG."""
    with png(path) as axes:
        for name, found in scores.items():
            axes.plot(BUDGETS, [point.accuracy for point in found.curve], "o-", label=name)
        axes.set(xlabel="thinking budget (tokens)", ylabel="accuracy", title="held-out chains", ylim=(-0.05, 1.08))
        axes.legend()
