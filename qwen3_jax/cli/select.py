"""`qwen3-jax select IN OUT`: answers judged and filtered into training records."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from qwen3_jax.cli.config_file import decode_config, load_config
from qwen3_jax.cli.progress import bar
from qwen3_jax.curate.filters import FilterConfig
from qwen3_jax.curate.select import select
from qwen3_jax.tasks.judge import VERIFIERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `select`."""
    parser.add_argument(
        "input",
        type=Path,
        help="answers of infer.py, or conversations that end with the answer; with `answer`, the reference",
    )
    parser.add_argument("output", type=Path, help="JSONL of training records; beside it the rejected, and a plot")
    parser.add_argument(
        "--verifier",
        default="exact",
        help=f"of records that name none: {', '.join(VERIFIERS)}, or module:function (default: %(default)s)",
    )
    parser.add_argument("--filters", type=Path, help="YAML of what is dropped; --KEY VALUE changes a key of it")
    parser.set_defaults(takes_overrides=True)


def run(args: argparse.Namespace) -> None:
    """Selects, and prints the funnel."""
    if args.filters is None:
        filters = decode_config(FilterConfig, {}, args.overrides, "filters")
    else:
        filters = load_config(FilterConfig, args.filters, args.overrides)
    notes = Console(stderr=True, highlight=False)
    with bar(notes, "judged") as update:
        funnel = select(
            args.input,
            args.output,
            args.verifier,
            filters,
            lambda done, total: update(completed=done, total=total, status=""),
            lambda text: notes.print(text, style="dim", markup=False, soft_wrap=True),
        )
    console = Console(highlight=False)
    console.print(funnel.table())
    if funnel.unanswered:
        console.print(f"{funnel.unanswered:,} lines are errors, which have no answer")
    console.print(f"{args.output}: {funnel.kept:,} records", markup=False, soft_wrap=True)
