"""Stages of training, one after the other, as one run that can be interrupted anywhere (report, section 3.2).

A stage begins with the weights that the last one ended with, at its own place in its own data, and with a fresh
optimiser: the two moments of AdamW remember some 1 / (1 - b2) = 20 steps, fewer than a stage's warm-up, and their
averages are of gradients of another mixture or length. Its learning rate continues where the last one's ended if its
`initial_ratio` says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import orbax.checkpoint as ocp
from etils import epath
from rich.console import Console

from qwen3_jax.checkpoint import CHECKPOINTS
from qwen3_jax.train.config import TrainConfig
from qwen3_jax.train.run_directory import check_writable
from qwen3_jax.train.start import different_weights
from qwen3_jax.train.stop import StopSignal


def link_stages(stages: Mapping[str, TrainConfig]) -> dict[str, TrainConfig]:
    """The stages as runs: each in a directory of its name in the plan's `output_dir`, from the weights of the last.

    The plan's own `init_from` is where the first one starts.

    Raises:
      ValueError: naming stage and key, for stages that are not of one network, directory and start.
    """
    linked: dict[str, TrainConfig] = {}
    first = next(iter(stages.values()))
    weights = first.init_from
    for name, config in stages.items():
        for key in ("output_dir", "init_from"):
            if getattr(config, key) != getattr(first, key):
                raise ValueError(f"stages.{name}.{key}: {getattr(config, key)!r}; use the plan's, set outside stages")
        for field, value, first_value in different_weights(config.model, first.model):
            raise ValueError(f"stages.{name}.model.{field}: {value!r}; use that of the first stage, {first_value!r}")
        directory = str(epath.Path(config.output_dir) / name)
        linked[name] = dataclasses.replace(config, output_dir=directory, init_from=weights)
        weights = directory
    return linked


Run = Callable[[TrainConfig, StopSignal, Console], str | None]


def run_plan(stages: Mapping[str, TrainConfig], run: Run, stop: StopSignal, console: Console) -> None:
    """Trains the stages in their order, each to its last step; resumes where an earlier call was interrupted.

    Args:
      stages: as `link_stages` makes them. run: trains one of them, such as `pretrain`; see `train`.

    Raises: what `run` does.
    """
    names = list(stages)
    check_writable(stages[names[0]].output_dir)
    # A stage starts when the one before has ended: resume in the last one that has a checkpoint.
    first = max((number for number, name in enumerate(names) if _has_checkpoint(stages[name])), default=0)
    for number, name in enumerate(names[first:], start=first + 1):
        console.print(f"stage    {name}, {number} of {len(names)}: {', '.join(names)}", highlight=False)
        if run(stages[name], stop, console) is not None:
            return


def _has_checkpoint(config: TrainConfig) -> bool:
    directory = epath.Path(config.output_dir) / CHECKPOINTS
    return directory.exists() and bool(ocp.utils.checkpoint_steps(directory))
