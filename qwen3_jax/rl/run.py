"""A run that learns from its own answers."""

from __future__ import annotations

from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from qwen3_jax.rl.objective import PolicyGradient
from qwen3_jax.rl.rollouts import RolloutFeed
from qwen3_jax.train.config import TrainConfig
from qwen3_jax.train.distill import Distill
from qwen3_jax.train.frozen import Frozen
from qwen3_jax.train.loop import train
from qwen3_jax.train.objective import batch_structs
from qwen3_jax.train.start import load_weights
from qwen3_jax.train.stop import StopSignal
from qwen3_jax.train.supervised import check_vocabulary, make_network, make_objective, teacher_weights
from sharding import make_mesh


def train_on_rollouts(config: TrainConfig, stop: StopSignal, console: Console) -> str | None:
    """`train` on answers to the prompts of `config.data`: by their rewards, or with a teacher by its distribution.

    Raises:
      ValueError: of `train`; the tokenizer has more tokens than the model; a file of prompts cannot be used, or a
        teacher has another tokenizer.
    """
    mesh = make_mesh(config.mesh)
    check_vocabulary(config)
    objective: PolicyGradient | Distill
    if config.teacher is None:
        objective = policy_objective(config)
        frozen, weights = objective.reference, _reference_weights(config, objective.reference, mesh, console)
    else:
        made = make_objective(config)
        assert isinstance(made, Distill)
        objective = made
        frozen, weights = objective.teacher, teacher_weights(config, objective, mesh, console)
    others = {} if frozen is None else frozen.arrays
    own = {name: array for name, array in objective.arrays.items() if name not in others}
    rollouts = RolloutFeed(config, mesh, own)
    if rollouts.conclusion:
        console.print(rollouts.conclusion, highlight=False, soft_wrap=True)
    feed = rollouts if frozen is None else frozen.feed(rollouts, weights)
    return train(config, objective, feed, mesh, stop, console)


def policy_objective(config: TrainConfig) -> PolicyGradient:
    """The objective of `config.rollouts`; the reference is computed as the policy is."""
    assert config.rollouts is not None
    policy, network = config.rollouts.policy, make_network(config)
    rows = (config.data.batch_size, config.data.sequence_length)
    reference = Frozen("reference", network) if policy.kl_coef else None
    return PolicyGradient(policy, config.rollouts.updates, reference, network, *rows, config.router)


def _reference_weights(config: TrainConfig, reference: Frozen | None, mesh: Mesh, console: Console) -> Any:
    if reference is None:
        return None
    assert config.init_from is not None

    def announce(text: str) -> None:
        console.print(f"reference {text}", highlight=False, soft_wrap=True)

    params = reference.params(batch_structs(reference.arrays, mesh))
    return load_weights("", config.init_from, config.model, params, mesh, announce)
