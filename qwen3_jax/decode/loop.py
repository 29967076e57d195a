"""The decoder: prefill of the prompts, then one `jax.lax.while_loop`. Its carry holds everything that a row needs.

Shapes: B rows, P prompts, T prompt slots, M columns of the buffers, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from qwen3_jax.decode.budget import BudgetState, Limits, Markers, advance, allowed_tokens
from qwen3_jax.decode.sampling import Sampling, choose

# (tokens_BT, positions_BT, segment_ids_BT, cache) -> (logits_BV after each row's last token, cache). Segment 0 is
# padding.
Forward = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


@struct.dataclass
class Rows:
    """The settings of each row. All of them are data: no value causes a recompilation.

    limits: budget, length and forced text. sampling: settings and seed.
    prompt_len_B: number of tokens of the prompt; new token k (from 0) has position prompt_len + k.
    """

    limits: Limits
    sampling: Sampling
    prompt_len_B: jax.Array


@struct.dataclass
class DecodeState:
    """The carry of the loop. Leaving the loop and entering it again with this state changes no token.

    budget: phase, thinking count and the other counters of each row.
    last_B: the token each row wrote last, the input of the next forward pass.
    column: the column of the three buffers below that the next token of every row is written to. A pool sets it to 0
      whenever it enters the loop, so that the buffers hold only the new tokens.
    tokens_BM: tokens written. logprobs_BM: their log-probabilities under the unmodified logits.
    forced_BM: which of them were forced. A finished row leaves zeros.
    counts_BV: how often each row sampled each token, for the penalties.
    cache: keys and values of all tokens but the last.
    """

    budget: BudgetState
    last_B: jax.Array
    column: jax.Array
    tokens_BM: jax.Array
    logprobs_BM: jax.Array
    forced_BM: jax.Array
    counts_BV: jax.Array
    cache: Any


@struct.dataclass
class Prompts:
    """The result of the prefill of P prompts.

    logits_PV: after each prompt. last_P: its last token. cache: keys and values of the prompts alone.
    """

    logits_PV: jax.Array
    last_P: jax.Array
    cache: Any


def last_place(segment_ids_BT: jax.Array) -> jax.Array:
    """[B] index of each row's last token; T - 1 for a row without tokens."""
    return segment_ids_BT.shape[1] - 1 - jnp.argmax(segment_ids_BT[:, ::-1] > 0, axis=1)


def read_prompts(forward: Forward, prompt_PT: jax.Array, there_PT: jax.Array, cache: Any) -> Prompts:
    """Prefill: runs the prompts through the network.

    Args:
      there_PT: bool, false at padding, on either side.
      cache: empty, with T slots.
    """
    positions_PT = jnp.maximum(jnp.cumsum(there_PT, axis=1, dtype=jnp.int32) - 1, 0)
    logits_PV, cache = forward(prompt_PT, positions_PT, there_PT.astype(jnp.int32), cache)
    last_P = jnp.take_along_axis(prompt_PT, last_place(there_PT)[:, None], axis=1)[:, 0]
    return Prompts(logits_PV, last_P, cache)


def begin(prompts: Prompts, rows: Rows, budget: BudgetState, markers: Markers, columns: int) -> DecodeState:
    """Writes the first token of each row; row i continues prompt i.

    Args:
      columns: M.
    """
    batch = len(prompts.last_P)
    state = DecodeState(
        budget=budget,
        last_B=prompts.last_P,
        column=jnp.zeros((), jnp.int32),
        tokens_BM=jnp.zeros((batch, columns), jnp.int32),
        logprobs_BM=jnp.zeros((batch, columns), jnp.float32),
        forced_BM=jnp.zeros((batch, columns), bool),
        counts_BV=jnp.zeros(prompts.logits_PV.shape, jnp.int32),
        cache=prompts.cache,
    )
    return write_token(state, prompts.logits_PV, rows, markers)


def write_token(state: DecodeState, logits_BV: jax.Array, rows: Rows, markers: Markers) -> DecodeState:
    """Chooses each row's next token, lets the budget overrule it, and writes it."""
    budget = state.budget
    allowed_BV = allowed_tokens(budget, rows.limits, markers, logits_BV.shape[-1])
    position_B = rows.prompt_len_B + budget.written_B
    sampled_B = choose(logits_BV, allowed_BV, state.counts_BV, rows.sampling, position_B)
    # Forcing comes after everything that shapes the distribution, so log-probabilities are taken before all of it.
    total_B = jax.nn.logsumexp(logits_BV, axis=-1)
    # A sum, not an index: an index over logits that are sharded along V would all-gather them.
    is_end_1V = jnp.arange(logits_BV.shape[-1])[None] == markers.end_think
    end_prob_B = jnp.exp(jnp.where(is_end_1V, logits_BV, 0).sum(axis=-1) - total_B)
    new_budget, token_B, forced_B = advance(budget, sampled_B, state.last_B, end_prob_B, rows.limits, markers)
    logprob_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0] - total_B

    counted_B = (budget.active_B & ~forced_B).astype(jnp.int32)

    def write(buffer_BM: jax.Array, value_B: jax.Array) -> jax.Array:
        value_B1 = jnp.where(budget.active_B, value_B, 0).astype(buffer_BM.dtype)[:, None]
        return jax.lax.dynamic_update_slice_in_dim(buffer_BM, value_B1, state.column, axis=1)

    return dataclasses.replace(
        state,
        budget=new_budget,
        last_B=jnp.where(budget.active_B, token_B, state.last_B),
        column=state.column + 1,
        tokens_BM=write(state.tokens_BM, token_B),
        logprobs_BM=write(state.logprobs_BM, logprob_B),
        forced_BM=write(state.forced_BM, forced_B),
        counts_BV=state.counts_BV.at[jnp.arange(token_B.shape[0]), token_B].add(counted_B),
    )


def decode(forward: Forward, state: DecodeState, rows: Rows, markers: Markers, max_steps: jax.Array) -> DecodeState:
    """Runs the loop until every row is done, for at most `max_steps` tokens per row."""

    def unfinished(carry: tuple[jax.Array, DecodeState]) -> jax.Array:
        step, state = carry
        return (step < max_steps) & state.budget.active_B.any()

    def step(carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
        step, state = carry
        position_B = rows.prompt_len_B + state.budget.written_B - 1
        there_B = state.budget.active_B.astype(jnp.int32)
        logits_BV, cache = forward(state.last_B[:, None], position_B[:, None], there_B[:, None], state.cache)
        return step + 1, write_token(dataclasses.replace(state, cache=cache), logits_BV, rows, markers)

    return jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), state))[1]
