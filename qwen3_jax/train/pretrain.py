"""The next token on files: the run that train.py's configuration describes."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from rich.console import Console

from qwen3_jax.model import Qwen3
from qwen3_jax.text.tokenizer import load_tokenizer
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
    """`train` on `config.data`, evaluated on `config.eval_data`.

    Raises:
      ValueError: of `train`; or the tokenizer has more tokens than the model.
    """
    mesh = make_mesh(config.mesh)
    for name, data in (("data", config.data), ("eval_data", config.eval_data)):
        # JAX clamps ids beyond the table without a word.
        if data is not None and (count := load_tokenizer(data.tokenizer).num_tokens) > config.model.vocab_size:
            raise ValueError(
                f"model.vocab_size: {config.model.vocab_size}, but {name}.tokenizer {data.tokenizer!r} has {count} "
                f"tokens; use at least {count}"
            )
    objective = next_token(config)
    feed, held_out = FileFeed(config.data, mesh, config.accumulation), None
    _announce(feed, "data", console)
    if config.eval_data is not None:
        held_out_feed = FileFeed(config.eval_data, mesh)
        _announce(held_out_feed, "eval_data", console)
        held_out = HeldOut(objective, held_out_feed, config.eval_batches)
    return train(config, objective, feed, mesh, stop, console, held_out)


def _announce(feed: FileFeed, name: str, console: Console) -> None:
    """What was concluded from the first documents."""
    for line in feed.survey.lines:
        console.print(f"{name}.{line}" if line.startswith("sources.") else line, highlight=False, soft_wrap=True)
