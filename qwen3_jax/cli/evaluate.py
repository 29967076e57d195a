"""`qwen3-jax evaluate stages RUN...`: what each stage of the recipe has taught a miniature."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from qwen3_jax.cli.arguments import run_on_disk
from qwen3_jax.evaluate.stages import BUDGETS, plot_stages, score_stage
from qwen3_jax.serve import Engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the commands under `evaluate`."""
    commands = parser.add_subparsers(dest="evaluation", required=True)
    text = "accuracy in both modes, flags and the budget curve of miniatures, on held-out problems of tiny-data"
    stages = commands.add_parser("stages", help=text, description=text)
    stages.add_argument("runs", nargs="+", type=run_on_disk, metavar="RUN", help="runs or checkpoints, one a stage")
    stages.add_argument("--problems", type=int, default=200, help="of each kind (default: %(default)s)")
    stages.add_argument("--seed", type=int, default=0, help="of problems and samples (default: %(default)s)")
    stages.add_argument("--json", action="store_true", help="a line of JSON for each run")
    stages.add_argument("--plot", type=Path, help="PNG of the budget curves")


def run(args: argparse.Namespace) -> None:
    """Prints a row for each run."""
    scores = {}
    for path in args.runs:
        scores[f"{path.name}"] = found = score_stage(Engine.load(path), args.problems, args.seed)
        if args.json:
            curve = {str(point.settings["thinking_budget"]): point.accuracy for point in found.curve}
            print(json.dumps({"run": str(path), **{**vars(found), "curve": curve}}), flush=True)
    if not args.json:
        names = ("thinking", "non-thinking", "flags", "in dialogues", *(f"B={budget}" for budget in BUDGETS))
        table = Table("", *(Column(name, justify="right") for name in names), box=None)
        for name, found in scores.items():
            shares = (found.thinking, found.non_thinking, found.flags, found.dialogue_flags)
            table.add_row(name, *(f"{share:.3f}" for share in (*shares, *(point.accuracy for point in found.curve))))
        Console(highlight=False, width=max(Console().width, 120)).print(table)
    if args.plot is not None:
        plot_stages(scores, args.plot)
