"""`qwen3-jax tiny-data DIR`: the training data of the shipped model."""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen3_jax.config import ModelConfig
from qwen3_jax.tasks.arithmetic import write_dataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `tiny-data`."""
    parser.add_argument("directory", type=Path, help="where tokenizer.model and the JSONL files are written")
    parser.add_argument("--records", type=int, default=150_000, help="training records (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the records (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Writes the data set."""
    write_dataset(args.directory, args.records, args.seed, ModelConfig.preset("qwen3-tiny").vocab_size)
    print(f"wrote {args.records:,} records and a tokenizer to {args.directory}")
