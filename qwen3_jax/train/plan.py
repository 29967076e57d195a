"""Stages, one after the other, as one run that can be interrupted anywhere (report, sections 3.2 and 4).

A stage trains, or makes data that a later one trains on. One that trains begins with the weights that the last one
ended with, at its own place in its own data, and with a fresh optimiser: the two moments of AdamW remember some 1 / (1
- b2) = 20 steps, fewer than a stage's warm-up, and their averages are of gradients of another mixture or length. Its
learning rate continues where the last one's ended if its `initial_ratio` says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import orbax.checkpoint as ocp
from etils import epath
from rich.console import Console

from qwen3_jax.checkpoint import CHECKPOINTS
from qwen3_jax.train.config import TrainConfig
from qwen3_jax.train.run_directory import check_writable
from qwen3_jax.train.start import different_weights
from qwen3_jax.train.stop import StopSignal


class Stage(Protocol):
    """A dataclass; it leaves all that it makes in `output_dir`."""

    @property
    def output_dir(self) -> str: ...


def link_stages(stages: Mapping[str, Stage]) -> dict[str, Stage]:
    """The stages as runs: each in a directory of its name in the plan's `output_dir`, and those of training from the
    weights of the last one that trains.

    The plan's own `init_from` is where the first one starts.

    Raises:
      ValueError: naming stage and key, for stages that are not of one network, directory and start; or none trains.
    """
    linked: dict[str, Stage] = dict(stages)
    trains = {name: config for name, config in stages.items() if isinstance(config, TrainConfig)}
    if not trains:
        raise ValueError(f"stages: {', '.join(stages)}; use at least one that trains")
    first = next(iter(trains.values()))
    weights = first.init_from
    for name, config in trains.items():
        for key in ("output_dir", "init_from"):
            if getattr(config, key) != getattr(first, key):
                raise ValueError(f"stages.{name}.{key}: {getattr(config, key)!r}; use the plan's, set outside stages")
        for field, value, first_value in different_weights(config.model, first.model):
            raise ValueError(f"stages.{name}.model.{field}: {value!r}; use that of the first stage, {first_value!r}")
        directory = str(epath.Path(config.output_dir) / name)
        linked[name] = dataclasses.replace(config, output_dir=directory, init_from=weights)
        weights = directory
    return linked


Run = Callable[[Any, StopSignal, Console], str | None]


def run_plan(stages: Mapping[str, Stage], run: Run, stop: StopSignal, console: Console) -> None:
    """Runs the stages in their order, each to its end; resumes where an earlier call was interrupted.

    Args:
      stages: as `link_stages` makes them. run: runs one of them, and returns the name of the signal that stopped it.

    Raises: what `run` does.
    """
    names = list(stages)
    check_writable(stages[names[0]].output_dir)
    # A stage starts when the one before has ended: resume in the last one that has left something.
    first = max((number for number, name in enumerate(names) if _has_begun(stages[name])), default=0)
    for number, name in enumerate(names[first:], start=first + 1):
        console.print(f"stage    {name}, {number} of {len(names)}: {', '.join(names)}", highlight=False)
        if run(stages[name], stop, console) is not None:
            return


def _has_begun(stage: Stage) -> bool:
    directory = epath.Path(stage.output_dir)
    if not isinstance(stage, TrainConfig):
        return directory.exists()
    return (directory / CHECKPOINTS).exists() and bool(ocp.utils.checkpoint_steps(directory / CHECKPOINTS))
