"""Where a run starts: at its newest verified checkpoint, at other weights, or at random ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from rich.console import Console

from qwen3_jax import hf
from qwen3_jax.checkpoint import CHECKPOINTS, Checkpointer, find_verified, restore_params
from qwen3_jax.config import ModelConfig
from qwen3_jax.train.feed import Feed
from qwen3_jax.train.guard import Guard, GuardedState
from qwen3_jax.train.ledger import Ledger
from qwen3_jax.train.program import TrainProgram
from qwen3_jax.train.record import changes
from qwen3_jax.train.run_directory import RunDirectory
from qwen3_jax.train.step import TrainState

# Fields of a model that shape no weight: the configuration of the weights and that of the run may differ in them.
NO_WEIGHT_SHAPE = {"rope_theta", "rope_scaling", "max_position_embeddings", "initializer_range", "router_aux_loss_coef"}
NO_WEIGHT_SHAPE |= {"bos_token_id", "eos_token_id", "pad_token_id"}


def start_state(
    program: TrainProgram,
    feed: Feed,
    directory: RunDirectory,
    checkpointer: Checkpointer,
    ledger: Ledger,
    console: Console,
) -> tuple[GuardedState, int]:
    """`(state to go on from, the last step that it has done)`; moves `feed` and `ledger` to where they were then.

    Raises:
      ValueError: `init_from` is unfit, no checkpoint of this run is verified, or the disk has no room for one.
    """

    def announce(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    config, abstract = program.config, program.state.train
    directory.check_space(abstract)
    with ledger.phase("checkpoint"):
        step = checkpointer.newest_verified(announce)
        if step is not None:
            *arrays, places, run = checkpointer.restore(step, abstract.params, abstract.optimizer)
            feed.set_state(places)
            ledger.resume(run["ledger"])
            for line in changes(run, config):
                announce(f"changed  {line}")
            guard = jax.device_put(Guard.create(**run["guard"]), program.replicated)
            return GuardedState(TrainState(*arrays), guard), step
    with ledger.phase("compile"):
        if config.init_from is not None:
            params = _load(epath.Path(config.init_from), config.model, abstract.params, program.mesh, announce)
        else:
            params = program.init(jax.random.key(config.seed))
        train = TrainState(params, program.init_optimizer(params))
        return GuardedState(train, jax.device_put(Guard.create(), program.replicated)), 0


def _load(source: epath.Path, config: ModelConfig, params: Any, mesh: Mesh, announce: Callable[[str], None]) -> Any:
    """The weights of a Hugging Face checkpoint, or of a run's newest verified one."""
    held = ModelConfig.from_hf(source)
    for field in dataclasses.fields(config):
        theirs, ours = getattr(held, field.name), getattr(config, field.name)
        if field.name not in NO_WEIGHT_SHAPE and theirs != ours:
            raise ValueError(f"init_from: {str(source)!r} has {field.name} {theirs!r}; model.{field.name}: {ours!r}")
    if not (source / CHECKPOINTS).is_dir():
        return hf.load_checkpoint(source, dtype="float32", mesh=mesh, stacked=True)[1]
    found = find_verified(source / CHECKPOINTS, announce)
    if found is None:
        raise ValueError(f"init_from: {str(source)!r} holds no checkpoint; a run that has saved one fits")
    announce(f"weights of {found}")
    return restore_params(found, params)
