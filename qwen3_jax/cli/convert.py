"""`qwen3-jax convert SOURCE TARGET`: a checkpoint from Hugging Face's layout to Orbax, or back."""

from __future__ import annotations

import argparse

from qwen3_jax.cli.arguments import on_disk, one_run
from qwen3_jax.convert import convert


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `qwen3-jax convert`."""
    parser.add_argument(
        "source",
        type=one_run,
        help="directory with config.json and *.safetensors, a directory that this command wrote, or a training run's "
        "output_dir",
    )
    parser.add_argument("target", type=on_disk, help="directory to create")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: that of the source")


def run(args: argparse.Namespace) -> None:
    """Runs `qwen3-jax convert`."""
    convert(args.source, args.target, args.dtype)
