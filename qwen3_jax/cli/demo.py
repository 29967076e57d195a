"""`qwen3-jax demo`: a worked example, the modes, and accuracy against fixed and automatic budgets, on the shipped
model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qwen3_jax.cli.progress import decoding_progress
from qwen3_jax.evaluate.budget_curve import Point, budget_curve, plot_budget_curve
from qwen3_jax.serve import Engine, shipped_model
from qwen3_jax.tasks.arithmetic import held_out_chains

# Without 1: the newline after <think> would use up a budget of 1.
BUDGETS = (0, 2, 3, 4, 5, 6, 7, 8, 9, 11)
# From a probability at which the model all but excludes </think>, to the default.
THRESHOLDS = (3e-7, 1e-6, 2e-6, 4e-6, 1e-5, 0.25)
NUM_PROBLEMS = 200
PROBLEM_SEED = 2025


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `demo`."""
    parser.add_argument("--model", type=Path, default=shipped_model(), help="directory; default: the shipped model")
    parser.add_argument("--plot", type=Path, default=Path("runs/demo/budget.png"), help="default: %(default)s")


def run(args: argparse.Namespace) -> None:
    """Prints the four parts."""
    console = Console(highlight=False)
    engine = Engine.load(args.model)
    examples = (
        ("What is 2 + 3? /think", {"thinking_budget": 4}, "(a) the thought is cut after B = 4 tokens"),
        ("What is 2 + 3? /no_think", {"thinking_budget": 4}, "(b) /no_think: an empty thought, B is ignored"),
        ("What is 2 + 3?", {"thinking_budget": 0}, "(b) B = 0: the same"),
    )
    requests = [engine.prompt({"prompt": prompt, **fields}).request for prompt, fields, _ in examples]
    results = engine.generate(requests)
    for (prompt, fields, title), result in zip(examples, results, strict=True):
        console.rule(title, align="left")
        console.print(f"User: {prompt}   (B = {fields['thinking_budget']})", style="bold", markup=False)
        console.print(engine.text(result), markup=False)
        console.print(
            f"[{result.thinking_tokens} thinking tokens, {result.injected_tokens} injected, thinking ended: "
            f"{result.thinking_end}]",
            style="dim",
            markup=False,
        )
    console.rule(
        f"(c) {NUM_PROBLEMS} held-out problems of 1 to 10 steps, {len(BUDGETS)} budgets, one batch", align="left"
    )
    problems = held_out_chains(NUM_PROBLEMS, PROBLEM_SEED)
    settings: list[dict[str, Any]] = [{"thinking_budget": budget} for budget in BUDGETS]
    settings += [{"thinking_budget": "auto", "auto_threshold": threshold} for threshold in THRESHOLDS]
    with decoding_progress(console) as report:
        points = budget_curve(engine, problems, settings, progress=report)
    fixed, automatic = points[: len(BUDGETS)], points[len(BUDGETS) :]
    console.print(_table("budget B", fixed))
    console.rule("(d) automatic budgets: the thought ends at this probability of </think>", align="left")
    console.print(_table("threshold", automatic))
    title = f"More thinking, more right: {NUM_PROBLEMS} held-out problems, {args.model.name}"
    plot_budget_curve(fixed, automatic, args.plot, title)
    console.print(f"plot: {args.plot}")


def _table(title: str, points: Sequence[Point]) -> Table:
    table = Table(title, "accuracy", "mean thinking tokens", "thoughts cut", box=None)
    for point in points:
        table.add_row(point.label, f"{point.accuracy:.3f}", f"{point.thinking_tokens:.2f}", f"{point.cut:.0%}")
    return table
