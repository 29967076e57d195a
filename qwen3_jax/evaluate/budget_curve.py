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


def plot_budget_curve(fixed: Sequence[Point], automatic: Sequence[Point], path: Path, title: str) -> None:
    """Accuracy against the mean thinking tokens used, for fixed and for automatic budgets, as a PNG."""
    with png(path) as axes:
        kinds = (
            (fixed, "o-", "fixed, labelled by the budget B", (-4, 7), "right"),
            (automatic, "s--", "automatic, labelled by the threshold", (4, -14), "left"),
        )
        for points, style, label, offset, side in kinds:
            at = [(point.thinking_tokens, point.accuracy) for point in points]
            (line,) = axes.plot(*zip(*at, strict=True), style, label=label)
            told: list[tuple[float, float]] = []
            for place, point in zip(at, points, strict=True):
                # Of points that lie on one another the first is labelled.
                if all(abs(place[0] - x) > 0.3 or abs(place[1] - y) > 0.03 for x, y in told):
                    color = line.get_color()
                    axes.annotate(point.label, place, offset, textcoords="offset points", ha=side, color=color)
                    told.append(place)
        axes.set(xlabel="thinking tokens used, mean", ylabel="accuracy", title=title, ylim=(-0.05, 1.1))
        axes.margins(x=0.08)
        axes.legend(loc="lower right")
