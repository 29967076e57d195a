"""A training run, as read from a YAML file."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from qwen3_jax.config import ModelConfig
from qwen3_jax.data import DataConfig
from qwen3_jax.model.layers import Activation, ExpertDispatch
from qwen3_jax.ops.policy import Policy
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


# Sampling of rollouts: log-probabilities are those of the whole distribution, and so must the choice of a token be.
UNFILTERED = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
UNFILTERED |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """The run learns from its own answers: to be better than its other answers to the same prompt, or with a `teacher`
    to have the teacher's distribution at each of its own tokens.

    The documents of `data.sources` are prompts, lines as infer.py takes them, with what their verifiers read. A step
    answers `data.batch_size` / `samples` of them; a prompt and its answer take at most `data.sequence_length` tokens.

    max_new_tokens: of an answer.
    samples: answers to each prompt, a group. advantage: how a group is compared, see `qwen3_jax.rl.group_advantages`.
    refills: how often, in a step, further prompts take the place of groups whose rewards are all equal (dynamic
      sampling, Yu et al. 2025, DAPO, arXiv 2503.14476).
    updates: of the weights in a step, each from as many of its groups. The optimiser's schedule counts them.
    verifier: of lines that name none, see `qwen3_jax.tasks.judge`. judges: threads that judge while others decode.
    rewards: weights of further verifiers, whose scores are added to that one's, as {mode: 0.5}.
    overlong_tokens, overlong_penalty: an answer is worth less by up to the penalty as it uses the last of its
      `max_new_tokens` tokens (DAPO's soft punishment). 0: all lengths are worth the same.
    mask_truncated: leave an answer that `max_new_tokens` cut out of the loss.
    budgets: thinking budgets, one drawn for each group; a number stands twice to be drawn twice as often; -1 is
      unlimited, "auto" as in infer.py; none: what the line or `settings` say.
    settings: of lines that do not have them, see infer.py --help; sampling stays at temperature 1 without filters.
    rows: places that decode together. dtype: of the weights that decode.
    log: share of the groups whose answers are written to `rollouts-STEP.jsonl`.
    policy: the loss; with a `kl_coef`, the reference is the model that `init_from` names.
    """

    max_new_tokens: int
    samples: int = 8
    advantage: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    refills: int = 0
    updates: int = 1
    verifier: str = "exact"
    judges: int = 4
    rewards: dict[str, float] = dataclasses.field(default_factory=dict)
    overlong_tokens: int = 0
    overlong_penalty: float = 1.0
    mask_truncated: bool = False
    budgets: tuple[int | Literal["auto"], ...] = ()
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: int = 256
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    log: float = 1.0
    policy: Policy = dataclasses.field(default_factory=Policy)

    def __post_init__(self) -> None:
        least_of = {"max_new_tokens": 1, "samples": 1, "refills": 0, "updates": 1, "judges": 1, "rows": 1}
        for name, least in (least_of | {"overlong_tokens": 0, "overlong_penalty": 0}).items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name}: {value!r}; use a number >= {least}")
        if self.overlong_tokens > self.max_new_tokens:
            raise ValueError(
                f"overlong_tokens: {self.overlong_tokens}; use at most max_new_tokens ({self.max_new_tokens})"
            )
        if not 0 <= self.log <= 1:
            raise ValueError(f"log: {self.log!r}; use a number in [0, 1]")
        for name, weight in self.rewards.items():
            if not math.isfinite(weight):
                raise ValueError(f"rewards.{name}: {weight!r}; use a finite number")
        for name in ("max_new_tokens", *UNFILTERED):
            if name in self.settings:
                raise ValueError(f"settings.{name}: {self.settings[name]!r}; leave it out")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run.

    output_dir: checkpoints, metrics and event files go here, a directory that all processes see, or gs://; a run that
      finds its checkpoints there resumes.
    steps: optimiser steps. accumulation: micro-batches of a step.
    init_from: the directory, on a disk, of a Hugging Face checkpoint; or another run's output_dir, whose newest
      verified checkpoint gives the weights; the optimiser and the data start anew. None: random weights.
    teacher: distil it instead of learning the text's own tokens.
    rollouts: learn from the run's own answers to prompts.
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
    rollouts: RolloutConfig | None = None
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
        if self.rollouts is not None:
            self._check_rollouts(self.rollouts)
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
        make_schedule(self.optimizer, self.steps * (self.rollouts.updates if self.rollouts else 1))

    def _check_rollouts(self, rollouts: RolloutConfig) -> None:
        data, updates = self.data, rollouts.updates
        if data.batch_size % (rollouts.samples * updates):
            of = f"rollouts.samples ({rollouts.samples})" + (f" x rollouts.updates ({updates})" if updates > 1 else "")
            raise ValueError(f"data.batch_size: {data.batch_size}, the answers of a step; use a multiple of {of}")
        if data.batch_size // updates % self.accumulation:
            raise ValueError(
                f"accumulation: {self.accumulation} does not divide the rows of an update, data.batch_size / "
                f"rollouts.updates ({data.batch_size // updates}); use a divisor"
            )
        if self.teacher is None and rollouts.samples == 1:
            raise ValueError(
                "rollouts.samples: 1; use 2 or more, since an answer is compared with others to its prompt"
            )
        if self.teacher is not None and updates > 1:
            raise ValueError(f"rollouts.updates: {updates}; use 1 with a teacher")
        if rollouts.max_new_tokens >= data.sequence_length:
            raise ValueError(
                f"rollouts.max_new_tokens: {rollouts.max_new_tokens} leaves no room for a prompt; use fewer than "
                f"data.sequence_length ({data.sequence_length})"
            )
        compute = self.compute
        drops = compute.expert_dispatch == "einsum" and compute.capacity_factor is not None
        if self.model.num_experts and drops:
            raise ValueError(
                f"compute.capacity_factor: {compute.capacity_factor} drops tokens that decoding does not; use null, or "
                "expert_dispatch ragged"
            )
        if rollouts.policy.kl_coef and self.init_from is None:
            raise ValueError(
                f"rollouts.policy.kl_coef: {rollouts.policy.kl_coef} but no init_from, the reference; name it, or use 0"
            )
        for source in data.sources:
            if source.tokens or source.label_weights:
                raise ValueError(
                    f"data.sources.{source.name}: tokens or label_weights; leave them out, as for all prompts"
                )
