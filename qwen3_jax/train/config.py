"""A training run, as read from a YAML file."""

from __future__ import annotations

import dataclasses
from typing import Literal

from qwen3_jax.config import ModelConfig
from qwen3_jax.data import DataConfig
from qwen3_jax.optim import OptimizerConfig, make_schedule
from qwen3_jax.train.step import RouterConfig
from sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the network is computed; see `qwen3_jax.model.Qwen3`. Master weights are float32 whatever `dtype` is."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    capacity_factor: float | None = 1.25
    group_size: int = 256
    expert_dispatch: Literal["einsum", "ragged"] = "einsum"
    remat: bool = True


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run.

    output_dir: checkpoints, metrics and event files go here; a run that finds its checkpoints there goes on.
    steps: optimiser steps. accumulation: micro-batches a step's batch is cut into.
    init_from: Hugging Face checkpoint directory to start from; None starts from random weights.
    checkpoint_every: steps between checkpoints; the last step is always saved. keep: how many stay.
    log_every: steps between lines of metrics.
    """

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    output_dir: str
    steps: int
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)
    accumulation: int = 1
    seed: int = 0
    init_from: str | None = None
    checkpoint_every: int = 1000
    keep: int = 3
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "accumulation", "checkpoint_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)!r}; a number >= 1 fits")
        if self.data.batch_size % self.accumulation:
            raise ValueError(
                f"accumulation: {self.accumulation} does not divide data.batch_size ({self.data.batch_size}); "
                "a divisor fits"
            )
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"data.sequence_length: {self.data.sequence_length}; at most model.max_position_embeddings "
                f"({self.model.max_position_embeddings}) fits"
            )
        make_schedule(self.optimizer, self.steps)
