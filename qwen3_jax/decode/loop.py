"""The decoder: prefill, then one `jax.lax.while_loop` that carries everything a row needs.

Shapes: B rows, P prompt slots, M most tokens written, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from qwen3_jax.decode.budget import ANSWER, BudgetState, Limits, Markers, advance
from qwen3_jax.decode.sampling import Sampling, choose

# (tokens_BT, positions_BT, segment_ids_BT, cache) -> (logits_BV of the last place, cache). Segment 0 is not there.
Forward = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


@struct.dataclass
class Rows:
    """What each row was asked for. All of it is data: no value of it ever recompiles.

    limits: budget, length and forced text. sampling: settings and seed.
    prompt_len_B: tokens of the prompt; the token written k-th stands at position prompt_len + k.
    markers: the ids that the rules speak of, shared by all rows.
    """

    limits: Limits
    sampling: Sampling
    prompt_len_B: jax.Array
    markers: Markers


@struct.dataclass
class DecodeState:
    """Everything the loop carries. Leaving the loop and entering it again with this state changes nothing.

    budget: phase, thinking count and the other counters of each row.
    last_B: the token each row wrote last, the input of the next forward pass.
    tokens_BM: tokens written. logprobs_BM: their log-probabilities under the unmodified logits.
    forced_BM: which of them were forced.
    cache: keys and values of all tokens but the last.
    """

    budget: BudgetState
    last_B: jax.Array
    tokens_BM: jax.Array
    logprobs_BM: jax.Array
    forced_BM: jax.Array
    cache: Any


def prefill(
    forward: Forward, prompt_BP: jax.Array, rows: Rows, budget: BudgetState, cache: Any, max_new: int
) -> DecodeState:
    """Runs the left-padded prompts and writes each row's first token. `cache` is empty, with at least P slots."""
    batch, length = prompt_BP.shape
    positions_BP = jnp.arange(length) - (length - rows.prompt_len_B[:, None])
    logits_BV, cache = forward(prompt_BP, jnp.maximum(positions_BP, 0), (positions_BP >= 0).astype(jnp.int32), cache)
    state = DecodeState(
        budget=budget,
        last_B=prompt_BP[:, -1],
        tokens_BM=jnp.zeros((batch, max_new), jnp.int32),
        logprobs_BM=jnp.zeros((batch, max_new), jnp.float32),
        forced_BM=jnp.zeros((batch, max_new), bool),
        cache=cache,
    )
    return write_token(state, logits_BV, rows)


def write_token(state: DecodeState, logits_BV: jax.Array, rows: Rows) -> DecodeState:
    """Chooses each row's next token, lets the budget overrule it, and writes it."""
    budget, markers = state.budget, rows.markers
    ids_V = jnp.arange(logits_BV.shape[-1])
    answering_B = budget.phase_B == ANSWER
    allowed_BV = (ids_V < markers.num_tokens) & ~(answering_B[:, None] & (ids_V == markers.think))
    sampled_B = choose(logits_BV, allowed_BV, rows.sampling, rows.prompt_len_B + budget.written_B)
    new_budget, token_B, forced_B = advance(budget, sampled_B, rows.limits, markers)
    # Forcing comes after everything that shapes the distribution, so log-probabilities are taken before all of it.
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    logprob_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)

    at_B = jnp.where(budget.active_B, budget.written_B, state.tokens_BM.shape[1])  # a finished row writes nowhere

    def write(buffer_BM: jax.Array, value_B: jax.Array) -> jax.Array:
        return buffer_BM.at[jnp.arange(at_B.shape[0]), at_B].set(value_B, mode="drop")

    return dataclasses.replace(
        state,
        budget=new_budget,
        last_B=jnp.where(budget.active_B, token_B, state.last_B),
        tokens_BM=write(state.tokens_BM, token_B),
        logprobs_BM=write(state.logprobs_BM, logprob_B),
        forced_BM=write(state.forced_BM, forced_B),
    )


def decode(forward: Forward, state: DecodeState, rows: Rows, max_steps: jax.Array) -> DecodeState:
    """Goes on until every row is done, or for `max_steps` tokens a row."""

    def unfinished(carry: tuple[jax.Array, DecodeState]) -> jax.Array:
        step, state = carry
        return (step < max_steps) & state.budget.active_B.any()

    def step(carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
        step, state = carry
        position_B = rows.prompt_len_B + state.budget.written_B - 1
        there_B = state.budget.active_B.astype(jnp.int32)
        logits_BV, cache = forward(state.last_B[:, None], position_B[:, None], there_B[:, None], state.cache)
        return step + 1, write_token(dataclasses.replace(state, cache=cache), logits_BV, rows)

    return jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), state))[1]
