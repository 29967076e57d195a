"""`qwen3-jax problems NAME OUT`: problems of reasoning-gym, for infer.py."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qwen3_jax.curate.files import complete, put
from qwen3_jax.tasks import gym


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `problems`."""
    parser.add_argument("name", help="a data set of reasoning-gym, as chain_sum")
    parser.add_argument("output", type=Path, help="JSONL, an --input of infer.py")
    parser.add_argument("--count", type=int, default=1000, help="of problems (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the problems (default: %(default)s)")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON of the data set's settings")


def run(args: argparse.Namespace) -> None:
    """Writes the problems."""
    with complete(args.output) as file:
        for record in gym.problems(args.name, args.count, args.seed, args.settings):
            put(file, record)
    print(f"wrote {args.count:,} problems to {args.output}")
