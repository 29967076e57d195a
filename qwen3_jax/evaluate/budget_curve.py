"""Accuracy against the thinking budget (report, Figure 2), on problems with a known answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3_jax.plot import png
from qwen3_jax.serve import Engine
from qwen3_jax.tasks.arithmetic import Problem


@dataclasses.dataclass(frozen=True)
class Point:
    """The result of one setting of the budget.

    accuracy: share of correct answers. thinking_tokens: mean sampled thinking tokens per problem. cut: share of
    thoughts that the budget ended.
    """

    settings: Mapping[str, Any]
    accuracy: float
    thinking_tokens: float
    cut: float

    @property
    def label(self) -> str:
        """The budget, or the threshold of an automatic budget."""
        budget = self.settings["thinking_budget"]
        return f"{self.settings['auto_threshold']:g}" if budget == "auto" else f"{budget}"


def budget_curve(
    engine: Engine,
    problems: Sequence[Problem],
    settings: Sequence[Mapping[str, Any]],
    *,
    seed: int = 0,
    progress: Callable[[int, int, int], None] | None = None,
) -> list[Point]:
    """Answers every problem under every setting, all in one batch: budgets are data of the compiled program.

    settings: fields of a Request, `thinking_budget` among them.
    """
    longest = max(len(problem.steps) for problem in problems)
    # The thought, the stop text, and 12 tokens for markers, newlines and the answer.
    max_new_tokens = longest + len(engine.tokens.stop_ids) + 12
    requests = [
        engine.prompt(
            {"prompt": problem.question, "max_new_tokens": max_new_tokens, "seed": seed + i, **fields}
        ).request
        for fields in settings
        for i, problem in enumerate(problems)
    ]
    results = engine.generate(requests, progress)
    points = []
    for i, fields in enumerate(settings):
        part = results[i * len(problems) : (i + 1) * len(problems)]
        answers = [engine.reader.record(result)["content"] for result in part]
        correct = sum(answer == problem.answer for answer, problem in zip(answers, problems, strict=True))
        points.append(
            Point(
                settings=fields,
                accuracy=correct / len(problems),
                thinking_tokens=sum(result.thinking_tokens for result in part) / len(part),
                cut=sum(result.thinking_end in ("budget", "room", "auto") for result in part) / len(part),
            )
        )
    return points


def plot_budget_curve(points: Sequence[Point], path: Path, title: str) -> None:
    """Accuracy and mean thinking tokens over the budget, as a PNG."""
    budgets = [point.settings["thinking_budget"] for point in points]
    with png(path) as axes:
        axes.plot(budgets, [point.accuracy for point in points], "o-", color="tab:blue", label="accuracy")
        for budget, point in zip(budgets, points, strict=True):
            at, offset = (budget, point.accuracy), (0, -15)
            axes.annotate(f"{point.accuracy:.2f}", at, offset, textcoords="offset points", ha="center")
        axes.set(xlabel="thinking budget B (tokens)", ylabel="accuracy", title=title, ylim=(0, 1.08), xticks=budgets)
        tokens, counts = axes.twinx(), [point.thinking_tokens for point in points]
        tokens.plot(budgets, counts, "s--", color="tab:gray", label="thinking tokens")
        tokens.set(ylabel="mean thinking tokens", ylim=(0, None))
        lines = [*axes.get_lines(), *tokens.get_lines()]
        axes.legend(lines, [str(line.get_label()) for line in lines], loc="lower right")


def plot_cost(fixed: Sequence[Point], automatic: Sequence[Point], path: Path, title: str) -> None:
    """Accuracy over mean thinking tokens, for fixed and for automatic budgets, as a PNG."""
    with png(path) as axes:
        kinds = (
            (fixed, "o-", "fixed budget B", (0, 8), "right"),
            (automatic, "s--", "auto, threshold", (6, -12), "left"),
        )
        for points, style, label, offset, side in kinds:
            costs = [point.thinking_tokens for point in points]
            (line,) = axes.plot(costs, [point.accuracy for point in points], style, label=label)
            for point in points:
                at, color = (point.thinking_tokens, point.accuracy), line.get_color()
                axes.annotate(point.label, at, offset, textcoords="offset points", ha=side, color=color)
        axes.set(xlabel="mean thinking tokens", ylabel="accuracy", title=title, ylim=(0, 1.08))
        axes.legend(loc="lower right")
