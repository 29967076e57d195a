"""`train.py CONFIG [--section.key value ...]`: one run, or the stages of a plan."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from rich.console import Console

from qwen3_jax.cli.arguments import Parser, version
from qwen3_jax.cli.config_file import describe_keys, load_config, load_plan
from qwen3_jax.cli.errors import exits_cleanly
from qwen3_jax.cli.progress import bar, file_progress
from qwen3_jax.curate.stages import SampleConfig, SelectConfig, Stopped, run_fuse, run_select, sample
from qwen3_jax.rl.run import train_on_rollouts
from qwen3_jax.train import StopSignal, TrainConfig, link_stages, run_plan, train_on_files
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
    stages = load_plan(args.config, overrides)
    config = None if stages else load_config(TrainConfig, args.config, overrides)
    start_processes()
    console = Console(quiet=jax.process_index() > 0)
    with StopSignal(lambda text: console.print(text, soft_wrap=True)) as stop:
        if config is None:
            run_plan(link_stages(stages), _run, stop, console)
        else:
            _run(config, stop, console)


def _run(stage: Any, stop: StopSignal, console: Console) -> str | None:
    """One run, or one stage of a plan."""
    if isinstance(stage, TrainConfig):
        learn = train_on_files if stage.rollouts is None else train_on_rollouts
        return learn(stage, stop, console)
    name = Path(stage.output_dir).name
    try:
        _make_data(stage, name, stop, console)
    except Stopped as signal:
        console.print(f"stopped by {signal}; the same command goes on", highlight=False)
        return str(signal)
    except ValueError as error:
        raise ValueError(f"stages.{name}: {error}") from None
    return stop.asked()


def _make_data(stage: Any, name: str, stop: StopSignal, console: Console) -> None:
    def announce(what: Any) -> None:
        console.print(what, highlight=False, soft_wrap=isinstance(what, str))

    if isinstance(stage, SampleConfig):
        with file_progress(console) as report:
            sample(stage, stop.asked, report, announce)
    elif jax.process_index() == 0:
        make = run_select if isinstance(stage, SelectConfig) else run_fuse
        with bar(console, name) as update:
            make(stage, lambda done, total: update(completed=done, total=total, status=""), announce)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"data of {name}")
