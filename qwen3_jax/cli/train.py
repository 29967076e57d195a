"""`train.py CONFIG [--section.key value ...]`: one run, or the stages of a plan."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import jax
from rich.console import Console

from qwen3_jax.cli.arguments import Parser, version
from qwen3_jax.cli.config_file import describe_keys, load_config, load_stages
from qwen3_jax.cli.errors import exits_cleanly
from qwen3_jax.train import StopSignal, TrainConfig, link_stages, pretrain, run_plan
from sharding import start_processes


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Trains as a YAML file says, in one run or in the stages of a plan; resumes where an earlier run of the same
    output_dir stopped. `--section.key value` changes a key of the file, `--stage.section.key value` one of a stage."""
    parser = Parser(
        prog="train.py",
        usage="train.py CONFIG [--section.key value ...]",
        description=main.__doc__,
        epilog=describe_keys(TrainConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version())
    parser.add_argument("config", help="a YAML file of configs/, read into qwen3_jax.train.TrainConfig")
    args, overrides = parser.parse_known_args(argv)
    stages = load_stages(TrainConfig, args.config, overrides)
    config = None if stages else load_config(TrainConfig, args.config, overrides)
    start_processes()
    console = Console(quiet=jax.process_index() > 0)
    with StopSignal(lambda text: console.print(text, soft_wrap=True)) as stop:
        if config is None:
            run_plan(link_stages(stages), pretrain, stop, console)
        else:
            pretrain(config, stop, console)
