"""The thinking budget as a state machine over a batch of rows (report, section 4.3).

The rules, one row at a time. N counts the tokens sampled strictly between `<think>` and `</think>`.

- START lasts for one token: `<think>` opens THINK; anything else is the first token of ANSWER, and such a row is never
  cut.
- THINK ends naturally with a sampled `</think>`. Once N has reached the budget, the next step is still sampled: if it
  is `</think>` the end is natural, otherwise it is discarded and STOP begins in its place.
- With `grace` g that happens after the first token ending in a newline among those from B + 1 to B + g, and after
  token B + g at the latest.
- A cut waits for at most 3 more tokens until the last UTF-8 character of the thought is complete.
- A finite budget also ends when the stop text and `answer_reserve` tokens would no longer fit into the row's length. A
  character that could not be completed in the remaining room is then not begun.
- A row with an automatic budget ends its thought as soon as the model gives `</think>` at least the probability
  `ready`: STOP begins at the `</think>` of its text.
- An end-of-sequence token sampled in THINK is discarded and STOP begins in its place, so that there is an answer;
  a row with `eos_stops` ends there instead.
- From `<tool_call>` to `</tool_call>` inside THINK the budget is suspended: nothing is counted, cut or read as a
  marker, and an end-of-sequence token ends the row. No forced token ever lands inside a tool call.
- STOP emits the row's forced text, token by token, then ANSWER begins.
- In ANSWER `<think>` cannot be sampled, a stray `</think>` changes nothing, and an end-of-sequence token ends the row.
- A row ends by length wherever it is when its last token is written.

A non-thinking row (budget 0, or a mode flag) starts in STOP with the empty block as its forced text.

What `advance` does with one row, by its phase and what it sampled. The first line that applies decides:

| phase         | sampled, or state            | next phase | writes, and how the thought ended              |
|---------------|------------------------------|------------|------------------------------------------------|
| START         | `<think>`                    | THINK      | the token                                      |
| START         | end of sequence              | DONE       | the token; "none"                              |
| START         | any other                    | ANSWER     | the token; "none"                              |
| THINK         | `</think>`                   | ANSWER     | the token; "natural"                           |
| THINK         | the budget is spent          | STOP       | the first forced token; "budget"               |
| THINK         | the room is spent            | STOP       | the first forced token; "room"                 |
| THINK         | p(`</think>`) >= ready       | STOP       | the forced `</think>`; "auto"                  |
| THINK         | end of sequence, `eos_stops` | DONE       | the token; "eos"                               |
| THINK         | end of sequence              | STOP       | the first forced token; "eos"                  |
| THINK         | `<tool_call>`                | THINK      | the token; a tool call begins                  |
| THINK         | any other                    | THINK      | the token; N + 1                               |
| THINK, a tool | end of sequence              | DONE       | the token; "eos"                               |
| THINK, a tool | any other                    | THINK      | the token; the call ends with `</tool_call>`   |
| STOP          | any                          | STOP       | the next forced token; ANSWER after the last   |
| ANSWER        | end of sequence              | DONE       | the token                                      |
| ANSWER        | any other                    | ANSWER     | the token                                      |

In every case a row whose last token was written is DONE; if it would still be in THINK, its end is "length".

There are no beams (every sample is a row with counters of its own), no draft tokens that could run past a boundary,
and no grammar that would have to wait for the thought's end.

Shapes: B rows, F longest forced text, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from qwen3_jax.decode.opening import (
    ANSWER,
    AUTO,
    BUDGET,
    DONE,
    EOS,
    LENGTH,
    MAX_WAIT,
    NATURAL,
    NONE,
    ROOM,
    START,
    STOP,
    THINK,
    UNLIMITED,
)


class Markers(NamedTuple):
    """ThinkingTokens as arrays, so that another tokenizer or stop text never recompiles; -1 is no id."""

    think: jax.Array
    end_think: jax.Array
    eos_V: jax.Array
    tool_call: jax.Array
    end_tool_call: jax.Array
    num_tokens: jax.Array
    newlines_V: jax.Array
    unfinished_V: jax.Array


@struct.dataclass
class Limits:
    """The limits of each row; constant during decoding.

    budget_B: most thinking tokens, UNLIMITED for no budget.
    grace_B: tokens beyond the budget that may go by until a line ends.
    ready_B: probability of `</think>` at which the thought ends; above 1 for never.
    max_new_B: most tokens written, forced ones included.
    reserve_B: tokens kept free for the answer when a finite budget is cut by length.
    eos_stops_B: an end-of-sequence token while thinking ends the row instead of closing the thought.
    empty_ok_B: whether the answer may begin with an end-of-sequence token, and so be empty.
    forced_BF, forced_len_B: the text that STOP emits. close_at_B: place of its `</think>`.
    """

    budget_B: jax.Array
    grace_B: jax.Array
    ready_B: jax.Array
    max_new_B: jax.Array
    reserve_B: jax.Array
    eos_stops_B: jax.Array
    empty_ok_B: jax.Array
    forced_BF: jax.Array
    forced_len_B: jax.Array
    close_at_B: jax.Array


@struct.dataclass
class BudgetState:
    """Where each row is.

    phase_B: START, THINK, STOP, ANSWER or DONE.
    thinking_B: N, thinking tokens so far (those already in the prompt's open thought included).
    unfinished_B: bytes that the thought's last character still lacks.
    forced_at_B: place in the forced text of the next token STOP emits.
    in_tool_B: between `<tool_call>` and `</tool_call>` of a thought.
    written_B: tokens written so far.
    injected_B: forced tokens among them. answer_B: tokens of the answer among them.
    thinking_end_B: code into THINKING_ENDS.
    stopped_B: ended by an end-of-sequence token rather than by length.
    """

    phase_B: jax.Array
    thinking_B: jax.Array
    unfinished_B: jax.Array
    forced_at_B: jax.Array
    in_tool_B: jax.Array
    written_B: jax.Array
    injected_B: jax.Array
    answer_B: jax.Array
    thinking_end_B: jax.Array
    stopped_B: jax.Array

    @property
    def active_B(self) -> jax.Array:
        """Rows that are not done."""
        return self.phase_B != DONE


def allowed_tokens(state: BudgetState, limits: Limits, markers: Markers, vocab_size: int) -> jax.Array:
    """[B, V] bool, what each row may sample next."""
    ids_1V = jnp.arange(vocab_size)[None]
    answering_B = state.phase_B == ANSWER
    keep_B = ~limits.empty_ok_B & (answering_B | (state.phase_B == START)) & (state.answer_B == 0)
    return (
        (ids_1V < markers.num_tokens)
        & ~(answering_B[:, None] & (ids_1V == markers.think))
        & ~(keep_B[:, None] & markers.eos_V[None])
    )


def advance(
    state: BudgetState,
    sampled_B: jax.Array,
    last_B: jax.Array,
    end_prob_B: jax.Array,
    limits: Limits,
    markers: Markers,
) -> tuple[BudgetState, jax.Array, jax.Array]:
    """One step of the rules at the top of this file.

    Args:
      sampled_B: the sampled token of each row, which it writes unless one is forced.
      last_B: the token before it. end_prob_B: the probability that the model gives `</think>` now.

    Returns:
      (state, tokens_B, forced_B): the tokens to write, and which of them are forced; undefined for DONE rows.
    """
    active = state.active_B
    is_eos = markers.eos_V[sampled_B]
    starting, answering = state.phase_B == START, state.phase_B == ANSWER
    thinking = state.phase_B == THINK
    free = thinking & ~state.in_tool_B  # thinking, and not inside a tool call

    opens = starting & (sampled_B == markers.think)
    closes = free & (sampled_B == markers.end_think)
    complete = state.unfinished_B == 0  # the thought does not end inside a UTF-8 character
    unfinished = markers.unfinished_V[sampled_B].astype(jnp.int32)
    unfinished = jnp.where(unfinished >= 0, unfinished, jnp.maximum(state.unfinished_B + unfinished, 0))
    over = state.thinking_B - limits.grace_B  # N - grace, so that no budget overflows
    spent = (over >= limits.budget_B) | ((state.thinking_B > limits.budget_B) & markers.newlines_V[last_B])
    spent &= complete | (over - MAX_WAIT >= limits.budget_B)
    room = limits.max_new_B - limits.reserve_B - limits.forced_len_B - state.written_B
    no_room = (limits.budget_B < UNLIMITED) & ((room <= 0) | (complete & (unfinished >= room)))
    cut = free & ~closes & (spent | no_room)
    ready = free & ~closes & ~cut & complete & (end_prob_B >= limits.ready_B)
    eos_in_thought = thinking & is_eos & ~cut & ~ready
    eos_closes = eos_in_thought & free & ~limits.eos_stops_B

    begins = cut | ready | eos_closes
    forced = begins | (state.phase_B == STOP)
    at = jnp.where(ready, limits.close_at_B, state.forced_at_B)  # forced_at is 0 until STOP begins, which it does once
    text = jnp.take_along_axis(limits.forced_BF, at[:, None], axis=1, mode="clip")[:, 0]
    token_B = jnp.where(forced, text, sampled_B)
    forced_at = at + forced
    text_over = forced & (forced_at >= limits.forced_len_B)

    enters_tool = free & ~begins & (sampled_B == markers.tool_call)
    leaves_tool = thinking & state.in_tool_B & (sampled_B == markers.end_tool_call)
    counted = free & ~closes & ~begins & ~enters_tool & ~is_eos

    thinking_end = jnp.select(
        [closes, cut & spent, cut, ready, eos_in_thought, starting & ~opens],
        [jnp.full_like(state.phase_B, code) for code in (NATURAL, BUDGET, ROOM, AUTO, EOS, NONE)],
        state.thinking_end_B,
    )
    stopped = (eos_in_thought & ~eos_closes) | ((starting | answering) & is_eos)
    phase = jnp.select(
        [stopped, opens, forced & ~text_over, closes | text_over | starting],
        [jnp.full_like(state.phase_B, code) for code in (DONE, THINK, STOP, ANSWER)],
        state.phase_B,
    )
    written = state.written_B + active
    full = active & (written >= limits.max_new_B)
    thinking_end = jnp.where(full & (phase == THINK), LENGTH, thinking_end)
    new = BudgetState(
        phase_B=jnp.where(full, DONE, phase),
        thinking_B=state.thinking_B + counted,
        unfinished_B=jnp.where(thinking & ~begins, unfinished, 0),
        forced_at_B=forced_at,
        in_tool_B=(state.in_tool_B | enters_tool) & ~leaves_tool,
        written_B=written,
        injected_B=state.injected_B + forced,
        answer_B=state.answer_B + ((starting & ~opens) | answering),
        thinking_end_B=thinking_end,
        stopped_B=state.stopped_B | stopped,
    )
    return new, token_B, forced
