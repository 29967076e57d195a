"""The next token on files: the run that train.py's configuration describes."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from rich.console import Console

from qwen3_jax.model import Qwen3
from qwen3_jax.train.config import TrainConfig
from qwen3_jax.train.feed import FileFeed
from qwen3_jax.train.loop import train
from qwen3_jax.train.next_token import NextToken
from qwen3_jax.train.step import HeldOut
from qwen3_jax.train.stop import StopSignal
from sharding import make_mesh


def next_token(config: TrainConfig) -> NextToken:
    """The objective, with the network computed as `config.compute` says."""
    compute = dataclasses.asdict(config.compute)
    model = Qwen3(config.model, stacked=True, **compute | {"dtype": jnp.dtype(config.compute.dtype)})
    return NextToken(model, config.data.batch_size, config.data.sequence_length, config.router)


def pretrain(config: TrainConfig, stop: StopSignal, console: Console) -> str | None:
    """`train` on `config.data`, evaluated on `config.eval_data`."""
    mesh = make_mesh(config.mesh)
    objective = next_token(config)
    feed = FileFeed(config.data, mesh, config.accumulation)
    held_out = None
    if config.eval_data is not None:
        held_out = HeldOut(objective, FileFeed(config.eval_data, mesh), config.eval_batches)
    return train(config, objective, feed, mesh, stop, console, held_out)
