"""Learning from text in files: the run that train.py's configuration describes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from qwen3_jax.model import Qwen3
from qwen3_jax.text.tokenizer import fingerprint, load_tokenizer
from qwen3_jax.train.config import TrainConfig
from qwen3_jax.train.distill import Distill
from qwen3_jax.train.feed import Feed, FileFeed
from qwen3_jax.train.frozen import Frozen
from qwen3_jax.train.loop import train
from qwen3_jax.train.next_token import Markers, NextToken
from qwen3_jax.train.objective import batch_structs
from qwen3_jax.train.start import load_weights
from qwen3_jax.train.step import HeldOut
from qwen3_jax.train.stop import StopSignal
from sharding import make_mesh


def make_network(config: TrainConfig) -> Qwen3:
    """The network, computed as `config.compute` says."""
    return Qwen3(config.model, stacked=True, **_compute(config))


def _compute(config: TrainConfig) -> dict[str, Any]:
    return dataclasses.asdict(config.compute) | {"dtype": jnp.dtype(config.compute.dtype)}


def make_objective(config: TrainConfig, markers: Markers | None = None) -> NextToken:
    """The next token, or with `config.teacher` its distribution."""
    student = (make_network(config), config.data.batch_size, config.data.sequence_length, config.router, markers)
    if config.teacher is None:
        return NextToken(*student)
    # Every token of the teacher's counts: no expert of its own drops one.
    whole = {"capacity_factor": None, "expert_dispatch": config.teacher.expert_dispatch, "remat": False, "keep": ()}
    teacher = Qwen3(config.teacher.model, stacked=True, **_compute(config) | whole)
    objective = Distill(config.teacher, Frozen("teacher", teacher), *student)
    objective.may_be_empty = config.rollouts is not None
    return objective


def train_on_files(config: TrainConfig, stop: StopSignal, console: Console) -> str | None:
    """`train` on `config.data`, evaluated on `config.eval_data`.

    Raises:
      ValueError: of `train`; the tokenizer has more tokens than the model; or the teacher has another tokenizer.
    """
    mesh = make_mesh(config.mesh)
    check_vocabulary(config)
    files = FileFeed(config.data, mesh, config.accumulation)
    _announce(files, "data", console)
    objective = make_objective(config, files.markers)
    teacher = teacher_weights(config, objective, mesh, console) if isinstance(objective, Distill) else None

    def with_teacher(feed: FileFeed) -> Feed:
        return objective.teacher.feed(feed, teacher) if isinstance(objective, Distill) else feed

    held_out = None
    if config.eval_data is not None:
        held_out_files = FileFeed(config.eval_data, mesh)
        _announce(held_out_files, "eval_data", console)
        held_out = HeldOut(objective, with_teacher(held_out_files), config.eval_batches)
    return train(config, objective, with_teacher(files), mesh, stop, console, held_out)


def check_vocabulary(config: TrainConfig) -> None:
    """Raises:
    ValueError: a tokenizer has more tokens than the model. JAX would clamp ids beyond the table without a word.
    """
    for name, data in (("data", config.data), ("eval_data", config.eval_data)):
        if data is not None and (count := load_tokenizer(data.tokenizer).num_tokens) > config.model.vocab_size:
            raise ValueError(
                f"model.vocab_size: {config.model.vocab_size}, but {name}.tokenizer {data.tokenizer!r} has {count} "
                f"tokens; use at least {count}"
            )


def teacher_weights(config: TrainConfig, objective: Distill, mesh: Mesh, console: Console) -> Any:
    """The weights of the teacher, in the dtype of the computation."""
    assert config.teacher is not None
    source = config.teacher.init_from
    if fingerprint(source) != fingerprint(config.data.tokenizer):
        raise ValueError(
            f"teacher.init_from: {source!r} has another tokenizer than {config.data.tokenizer!r}; use a teacher with "
            "the student's, whose distributions are of the same tokens"
        )

    def announce(text: str) -> None:
        console.print(f"teacher  {text}", highlight=False, soft_wrap=True)

    params = objective.teacher.params(batch_structs(objective.teacher.arrays, mesh))
    return load_weights("teacher.", source, config.teacher.model, params, mesh, announce)


def _announce(feed: FileFeed, name: str, console: Console) -> None:
    """What was concluded from the first documents."""
    for line in feed.survey.lines:
        console.print(f"{name}.{line}" if line.startswith("sources.") else line, highlight=False, soft_wrap=True)
