"""Accuracy against the thinking budget (report, Figure 2), on problems with a known answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qwen3_jax.data.arithmetic import Problem
from qwen3_jax.serve import Engine


@dataclasses.dataclass(frozen=True)
class Point:
    """One budget: the share of problems answered rightly, and per problem the tokens sampled while thinking."""

    budget: int
    accuracy: float
    thinking_tokens: float
    cut: float


def budget_curve(
    engine: Engine,
    problems: Sequence[Problem],
    budgets: Sequence[int],
    *,
    seed: int = 0,
    progress: Callable[[int, int, int], None] | None = None,
) -> list[Point]:
    """Every problem under every budget, all in one batch: budgets are data of the compiled program."""
    longest = max(len(problem.steps) for problem in problems)
    # Both modes' markers and newlines, the stop text, and an answer of a few tokens.
    max_new_tokens = longest + len(engine.tokens.stop_ids) + 12
    requests = [
        engine.request(
            {
                "prompt": problem.question,
                "thinking_budget": budget,
                "max_new_tokens": max_new_tokens,
                "seed": seed + i,
            }
        )
        for budget in budgets
        for i, problem in enumerate(problems)
    ]
    results = engine.generate(requests, progress)
    points = []
    for b, budget in enumerate(budgets):
        part = results[b * len(problems) : (b + 1) * len(problems)]
        answers = [engine.response(result)["content"] for result in part]
        right = sum(answer == problem.answer for answer, problem in zip(answers, problems, strict=True))
        points.append(
            Point(
                budget=budget,
                accuracy=right / len(problems),
                thinking_tokens=sum(result.thinking_tokens for result in part) / len(part),
                cut=sum(result.thinking_end == "budget" for result in part) / len(part),
            )
        )
    return points


def plot_budget_curve(points: Sequence[Point], path: Path, title: str) -> None:
    """Accuracy over budget, and the thinking tokens it took, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    budgets = [point.budget for point in points]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(budgets, [point.accuracy for point in points], "o-", color="tab:blue", label="accuracy")
    for point in points:
        offset: Any = (0, -15)
        axes.annotate(
            f"{point.accuracy:.2f}", (point.budget, point.accuracy), offset, textcoords="offset points", ha="center"
        )
    axes.set(xlabel="thinking budget B (tokens)", ylabel="accuracy", title=title, ylim=(0, 1.08), xticks=budgets)
    axes.grid(alpha=0.3)
    tokens = axes.twinx()
    tokens.plot(budgets, [point.thinking_tokens for point in points], "s--", color="tab:gray", label="thinking tokens")
    tokens.set(ylabel="mean thinking tokens", ylim=(0, None))
    lines = [*axes.get_lines(), *tokens.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
