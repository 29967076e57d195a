"""A training run, as read from a YAML file."""

from __future__ import annotations

import dataclasses
from typing import Literal

from qwen3_jax.config import ModelConfig
from qwen3_jax.data import DataConfig
from qwen3_jax.model.layers import Activation, ExpertDispatch
from qwen3_jax.optim import OptimizerConfig, make_schedule
from qwen3_jax.train.router import RouterConfig
from sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the network is computed; see `qwen3_jax.model.Qwen3`. Master weights are float32 whatever `dtype` is."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    capacity_factor: float | None = 1.25
    group_size: int = 256
    expert_dispatch: ExpertDispatch = "einsum"
    remat: bool = True
    keep: tuple[Activation, ...] = ()


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """The model that a run is distilled from; see `qwen3_jax.ops.loss.token_divergences`.

    init_from: its directory, of the kinds that a run's `init_from` may be.
    model: its shape; default: that of init_from.
    beta: 0 is KL(teacher || student), 1 is KL(student || teacher), between them a mixture. temperature: of both.
    expert_dispatch: how its experts are computed; none drops a token.
    """

    model: ModelConfig
    init_from: str
    beta: float = 0.0
    temperature: float = 1.0
    expert_dispatch: ExpertDispatch = "ragged"

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta: {self.beta!r}; use a number from 0 to 1")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature: {self.temperature!r}; use a number above 0")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run.

    output_dir: checkpoints, metrics and event files go here, a directory that all processes see, or gs://; a run that
      finds its checkpoints there resumes.
    steps: optimiser steps. accumulation: micro-batches of a step.
    init_from: the directory, on a disk, of a Hugging Face checkpoint; or another run's output_dir, whose newest
      verified checkpoint gives the weights; the optimiser and the data start anew. None: random weights.
    teacher: distil it instead of learning the text's own tokens.
    checkpoint_every: steps between checkpoints; the last step is always saved. keep: how many of the newest stay.
    keep_every: checkpoints at multiples of this step stay for good.
    log_every: steps between lines of metrics. heat_map_every: steps between pictures of the experts' load.
    max_bad_steps: a step whose loss or gradient is not finite is skipped; this many in a row end the run.
    spike_factor: a step whose loss is this many times the usual one is skipped too.
    eval_data: held-out data; every `eval_every` steps the mean loss over its first `eval_batches` batches is logged.
    profile: first and last step of a profiler trace, written to output_dir/profile.
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
    teacher: TeacherConfig | None = None
    checkpoint_every: int = 1000
    keep: int = 3
    keep_every: int | None = None
    log_every: int = 10
    heat_map_every: int = 500
    max_bad_steps: int = 5
    spike_factor: float | None = None
    eval_data: DataConfig | None = None
    eval_every: int = 500
    eval_batches: int = 8
    profile: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        positive = "steps accumulation checkpoint_every keep keep_every log_every heat_map_every max_bad_steps"
        for name in (*positive.split(), "eval_every", "eval_batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value!r}; use a number >= 1")
        if self.spike_factor is not None and self.spike_factor <= 1:
            raise ValueError(f"spike_factor: {self.spike_factor!r}; use a number > 1")
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            raise ValueError(f"profile: {self.profile!r}; use a first and a last step, from 1")
        if self.data.batch_size % self.accumulation:
            raise ValueError(
                f"accumulation: {self.accumulation} does not divide data.batch_size ({self.data.batch_size}); "
                "use a divisor"
            )
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"data.sequence_length: {self.data.sequence_length}; use at most model.max_position_embeddings "
                f"({self.model.max_position_embeddings})"
            )
        if self.teacher is not None and self.teacher.model.vocab_size != self.model.vocab_size:
            raise ValueError(
                f"teacher.model.vocab_size: {self.teacher.model.vocab_size}; use a teacher with the student's "
                f"vocabulary ({self.model.vocab_size})"
            )
        make_schedule(self.optimizer, self.steps)
