"""`train.py CONFIG [--section.key value ...]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from qwen3_jax.cli.config_file import load_config
from qwen3_jax.cli.errors import exits_cleanly
from qwen3_jax.train import TrainConfig, train
from sharding import start_processes


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Trains as a YAML file says; goes on where an earlier run of the same output_dir stopped."""
    parser = argparse.ArgumentParser(prog="train.py", description=main.__doc__)
    parser.add_argument("config", help="a YAML file of configs/, read into qwen3_jax.train.TrainConfig")
    args, overrides = parser.parse_known_args(argv)
    config = load_config(TrainConfig, args.config, overrides)
    start_processes()
    train(config)
