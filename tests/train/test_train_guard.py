"""Steps that would spoil the weights: not taken, counted, and without a trace in what comes after."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from tiny import DENSE

from qwen3_jax.model import Qwen3
from qwen3_jax.train.next_token import NextToken
from qwen3_jax.train.step import Guard, GuardedState, TrainState, make_train_step, skip_bad_steps

CONFIG = dataclasses.replace(
    DENSE,
    vocab_size=64,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=32,
    max_position_embeddings=16,
    tie_word_embeddings=True,
)
ROWS, LENGTH = 4, 8
# weight of the tokens in the loss of each batch: NaN and infinity spoil loss and gradient
GOOD, NAN, INFINITE = 1.0, float("nan"), float("inf")


def batch(seed: int, weight: float = GOOD, scale: int = 1) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    tokens = np.full((ROWS, LENGTH), 7) if scale == 1 else rng.integers(0, 64, (ROWS, LENGTH))
    return {
        "tokens": jnp.asarray(tokens, jnp.int32),
        "targets": jnp.asarray(tokens, jnp.int32),
        "segment_ids": jnp.ones((ROWS, LENGTH), jnp.int32),
        "positions": jnp.tile(jnp.arange(LENGTH), (ROWS, 1)),
        "loss_weights": jnp.full((ROWS, LENGTH), weight, jnp.float32),
    }


@functools.cache
def guarded(spike_factor: float | None) -> tuple[Callable[[Any, Any], Any], Callable[[], GuardedState]]:
    """The compiled step, which is given its state to keep, and what makes a first one."""
    model, optimizer = Qwen3(CONFIG, stacked=True), optax.adamw(0.01)
    step = skip_bad_steps(make_train_step(NextToken(model, ROWS, LENGTH), optimizer), spike_factor)

    def first() -> GuardedState:
        params = nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))["params"]
        return GuardedState(TrainState(params, optimizer.init(params)), Guard.create())

    return jax.jit(step, donate_argnums=0), first


def run(batches: list[dict[str, jax.Array]], spike_factor: float | None = None) -> tuple[GuardedState, list[Any]]:
    step, first = guarded(spike_factor)
    state, metrics = first(), []
    for one in batches:
        state, values = step(state, one)
        metrics.append(values)
    return state, metrics


@pytest.mark.parametrize("weight", [NAN, INFINITE])
def test_a_bad_step_leaves_no_trace(weight: float) -> None:
    """Weights, moments and the count of steps are, to the bit, those of a run that never saw the bad batches."""
    state, metrics = run([batch(0), batch(1, weight), batch(2, weight), batch(3), batch(4, weight), batch(5)])
    without, _ = run([batch(0), batch(3), batch(5)])
    jax.tree.map(np.testing.assert_array_equal, state.train, without.train)
    assert [int(values["skipped"]) for values in metrics] == [0, 1, 1, 0, 1, 0]
    assert [int(values["skipped_in_row"]) for values in metrics] == [0, 1, 2, 0, 1, 0]
    assert [int(values["skipped_total"]) for values in metrics] == [0, 1, 2, 2, 3, 3]
    assert state.guard.usual_loss == without.guard.usual_loss


def test_a_spike_is_skipped_only_where_asked() -> None:
    """After forty steps on one token its loss is small; other tokens cost many times that."""
    batches = [batch(step) for step in range(40)] + [batch(40, scale=2), batch(41)]
    _, plain = run(batches)
    assert sum(int(values["skipped"]) for values in plain) == 0
    assert float(plain[40]["loss"]) > 3 * float(plain[39]["loss"])
    state, metrics = run(batches, spike_factor=1.5)
    assert [step for step, values in enumerate(metrics) if int(values["skipped"])] == [40]
    without, _ = run(batches[:40] + batches[41:], spike_factor=1.5)
    jax.tree.map(np.testing.assert_array_equal, state.train, without.train)


def test_a_step_touches_no_host() -> None:
    """Its state and batch are on the devices, and what it gives stays there."""
    step, first = guarded(None)
    state, _ = step(first(), batch(0))
    batches = [batch(1), batch(2)]
    with jax.transfer_guard("disallow"):
        for one in batches:
            state, _ = step(state, one)
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            step(state, {name: np.asarray(value) for name, value in batches[0].items()})


def test_the_guard_goes_on_from_what_the_record_says() -> None:
    state, _ = run([batch(0), batch(1, NAN)])
    counters = {name: value.item() for name, value in jax.device_get(vars(state.guard)).items()}
    assert counters["skipped"] == counters["in_row"] == 1
    again = Guard.create(**counters)
    jax.tree.map(np.testing.assert_array_equal, again, state.guard)
    assert jax.tree.map(lambda x: x.dtype, again) == jax.tree.map(lambda x: x.dtype, state.guard)
