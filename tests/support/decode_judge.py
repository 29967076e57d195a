"""What a request is to the plain-Python rules, and what a result is to them."""

from __future__ import annotations

import decode_reference as ref
import jax
import jax.numpy as jnp
import numpy as np

from qwen3_jax.decode import Request, Result
from qwen3_jax.decode.sampling import Sampling, choose


@jax.jit
def _choose_one(masked_V: jax.Array, sampling: Sampling, position: jax.Array) -> jax.Array:
    counts_BV = jnp.zeros((1, *masked_V.shape))
    return choose(masked_V[None], jnp.isfinite(masked_V)[None], counts_BV, sampling, position[None])[0]


def reference_row(request: Request) -> ref.Row:
    """The request as the rules take it."""
    automatic = request.thinking_budget == "auto"
    return ref.Row(
        prompt=tuple(request.prompt_ids),
        budget=request.auto_cap if automatic else request.thinking_budget,
        ready=(0.25 if request.auto_threshold is None else request.auto_threshold) if automatic else None,
        grace=request.grace,
        count_think_marker=request.count_think_marker,
        thinking=request.thinking,
        max_new_tokens=request.max_new_tokens,
        answer_reserve=request.answer_reserve,
        eos_stops=request.eos_while_thinking == "stop",
        allow_empty_answer=request.allow_empty_answer,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
    )


def chooser(request: Request) -> ref.Choose:
    """How the request chooses a token from masked logits."""
    if request.temperature == 0:
        return ref.greedy
    sampling = Sampling(
        temperature_B=np.float32([request.temperature]),
        top_p_B=np.float32([request.top_p]),
        top_k_B=np.int32([request.top_k]),
        min_p_B=np.float32([request.min_p]),
        presence_B=np.float32([0]),  # the reference subtracts penalties itself
        frequency_B=np.float32([0]),
        seed_B=np.uint32([request.seed]),
        sample_B=np.int32([request.sample]),
    )
    return lambda masked, position: int(_choose_one(np.float32(masked), sampling, np.int32(position)))


def outcome(result: Result) -> ref.Outcome:
    """The result as the rules give it."""
    return ref.Outcome(
        result.token_ids,
        result.forced,
        result.thinking_tokens,
        result.injected_tokens,
        result.answer_tokens,
        result.thinking_end,
        result.finish_reason,
    )
