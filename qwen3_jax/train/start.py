"""Where a run starts: at its newest whole checkpoint, at other weights, or at random ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from qwen3_jax import hf
from qwen3_jax.checkpoint import CHECKPOINTS, Checkpointer, find_verified, restore_params
from qwen3_jax.config import ModelConfig
from qwen3_jax.train.feed import Feed
from qwen3_jax.train.guard import Guard, GuardedState
from qwen3_jax.train.output import Output
from qwen3_jax.train.program import Program
from qwen3_jax.train.step import TrainState

# What may differ between the weights' own configuration and the run's: it shapes no weight.
FREE = {"rope_theta", "rope_scaling", "max_position_embeddings", "initializer_range", "router_aux_loss_coef"}
FREE |= {"bos_token_id", "eos_token_id", "pad_token_id"}


@dataclasses.dataclass(frozen=True)
class Start:
    """state: to go on from. step: the last one that it has done. run: what the checkpoint's `run` item says."""

    state: GuardedState
    step: int
    run: dict[str, Any]


def start_state(
    program: Program, output: Output, checkpointer: Checkpointer, feed: Feed, announce: Callable[[str], None]
) -> Start:
    """The state to go on from; moves `feed` to where it was.

    Raises:
      ValueError: `init_from` is unfit, no checkpoint of this run is whole, or the disk has no room for one.
    """
    config, abstract = program.config, program.state.train
    output.check_space(abstract)

    step = checkpointer.newest_verified(announce)
    if step is not None:
        *arrays, places, run = checkpointer.restore(step, abstract.params, abstract.optimizer)
        feed.set_state(places)
        guard = jax.device_put(Guard.create(**run["guard"]), program.replicated)
        return Start(GuardedState(TrainState(*arrays), guard), step, run)
    if config.init_from is not None:
        params = _load(epath.Path(config.init_from), config.model, abstract.params, program.mesh, announce)
    else:
        params = program.init(jax.random.key(config.seed))
    train = TrainState(params, program.init_optimizer(params))
    return Start(GuardedState(train, jax.device_put(Guard.create(), program.replicated)), 0, {})


def _load(source: epath.Path, config: ModelConfig, params: Any, mesh: Mesh, announce: Callable[[str], None]) -> Any:
    """The weights of a Hugging Face checkpoint, or of a run's newest whole one."""
    held = ModelConfig.from_hf(source)
    for field in dataclasses.fields(config):
        theirs, ours = getattr(held, field.name), getattr(config, field.name)
        if field.name not in FREE and theirs != ours:
            raise ValueError(f"init_from: {str(source)!r} has {field.name} {theirs!r}; model.{field.name}: {ours!r}")
    if not (source / CHECKPOINTS).is_dir():
        return hf.load_checkpoint(source, dtype="float32", mesh=mesh, stacked=True)[1]
    found = find_verified(source / CHECKPOINTS, announce)
    if found is None:
        raise ValueError(f"init_from: {str(source)!r} holds no checkpoint; a run that has saved one fits")
    announce(f"weights of {found}")
    return restore_params(found, params)
