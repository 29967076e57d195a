"""`qwen3-jax fuse CONFIG OUT`: records of both modes fused into the training data of thinking mode fusion."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from qwen3_jax.cli.config_file import load_config
from qwen3_jax.cli.progress import bar
from qwen3_jax.curate.fuse import FuseConfig, fuse, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `fuse`."""
    parser.add_argument("config", type=Path, help="YAML like configs/post/fuse.yaml; --KEY VALUE changes a key")
    parser.add_argument("output", type=Path, help="JSONL of training records")
    parser.set_defaults(takes_overrides=True)


def run(args: argparse.Namespace) -> None:
    """Fuses, and prints what was built."""
    config = load_config(FuseConfig, args.config, args.overrides)
    with bar(Console(stderr=True), "built") as update:
        counts = fuse(config, args.output, lambda done, total: update(completed=done, total=total, status=""))
    Console(highlight=False).print(table(counts))
