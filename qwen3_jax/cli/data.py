"""`qwen3-jax data report RUN`: what a run has consumed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qwen3_jax.data.catalogue import Consumption, consumption
from qwen3_jax.evaluate.data_report import plot_consumption


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the commands under `data`."""
    commands = parser.add_subparsers(dest="data_command", required=True)
    text = "what a run has consumed, by source, licence, language and label"
    report = commands.add_parser("report", help=text, description=text)
    report.add_argument("run", type=Path, help="output_dir of a training run that has saved a checkpoint")
    report.add_argument("--json", action="store_true", help="print JSON instead of a table")
    report.add_argument("--plot", type=Path, help="PNG of the shares (default: RUN/data.png)")
    report.set_defaults(run_data=_report)


def run(args: argparse.Namespace) -> None:
    """Runs the command under `data`."""
    args.run_data(args)


def _report(args: argparse.Namespace) -> None:
    console = Console(highlight=False)
    consumed = consumption(args.run)
    plot = args.plot or args.run / "data.png"
    plot_consumption(consumed, plot)
    if args.json:
        print(json.dumps(consumed.to_json(), indent=2, ensure_ascii=False))
        return
    console.print(f"consumed up to step {consumed.step:,}")
    console.print(_table(consumed))
    console.print(f"plot: {plot}", markup=False, soft_wrap=True)


def _table(consumed: Consumption) -> Table:
    table = Table(box=None)
    for title, side in (("", "left"), ("", "left"), ("tokens", "right"), ("share", "right")):
        table.add_column(title, justify=side)  # type: ignore[arg-type]
    for title in ("in the loss", "documents", "epochs"):
        table.add_column(title, justify="right")
    for kind, values in consumed.shares.items():
        total = sum(counts.tokens for counts in values.values())
        for place, (value, counts) in enumerate(sorted(values.items(), key=lambda item: -item[1].tokens)):
            table.add_row(
                "" if place else kind,
                value,
                f"{counts.tokens:,}",
                f"{counts.tokens / max(total, 1):.1%}",
                f"{counts.loss_tokens:,}",
                f"{counts.documents:,}",
                f"{consumed.epochs[value]:.2f}" if kind == "source" else "",
            )
    return table
