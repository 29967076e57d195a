"""`qwen3-jax pass-at-k FILE`: the probability that k samples include a correct answer."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qwen3_jax.evaluate.pass_at_k import plot_pass_at_k, score_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `pass-at-k`."""
    parser.add_argument("file", type=Path, help="output of infer.py for an --input whose lines have an `answer`")
    parser.add_argument("--plot", type=Path, help="PNG of pass@k over k")


def run(args: argparse.Namespace) -> None:
    """Prints the table."""
    console = Console(highlight=False)
    score = score_file(args.file)
    fewest, most = score.samples
    samples = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    console.print(
        f"{score.prompts} prompts ({score.refused} refused), {samples} samples each, mean accuracy {score.accuracy:.3f}"
    )
    if score.unanswered:
        console.print(f"{score.unanswered} lines without the right answer (`answer`) passed over")
    table = Table("k", "pass@k", box=None)
    for k, value in score.pass_at.items():
        table.add_row(f"{k}", f"{value:.3f}")
    console.print(table)
    if args.plot is not None:
        plot_pass_at_k(score, args.plot, f"{args.file.name}, {score.prompts} prompts")
        console.print(f"plot: {args.plot}", markup=False)
