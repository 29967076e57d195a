"""One closed batch in one XLA program: prefill and the loop under one jit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from qwen3_jax.config import ModelConfig
from qwen3_jax.decode.opening import UNLIMITED, check_request
from qwen3_jax.decode.pack import pack, pack_markers
from qwen3_jax.decode.programs import resume, start
from qwen3_jax.decode.schedule import Row, round_up
from qwen3_jax.decode.weights import decoding_weights
from qwen3_jax.model import Qwen3
from qwen3_jax.request import Request, Result
from qwen3_jax.text.thinking import ThinkingTokens

_STEPS_PER_REPORT = 16


def generate(
    config: ModelConfig,
    params: Any,
    requests: Sequence[Request],
    *,
    tokens: ThinkingTokens,
    dtype: Any = None,
    progress: Callable[[int, int, int], None] | None = None,
) -> list[Result]:
    """Continues every prompt in one batch and one compiled program (report, section 4.3; rules in `budget`).

    Args:
      params: weights of `Qwen3(config)`, stacked or per layer.
      tokens: the ids that the rules speak of.
      dtype: of weights, activations and cache; None takes the embedding table's.
      progress: called every few steps with (rows done, rows, tokens written); the loop is left and entered again for
        it, which changes no token.

    Raises:
      ValueError: `requests[i].field: value; what to use instead`.
    """
    if not requests:
        return []
    limits = []
    for i, request in enumerate(requests):
        try:
            limits.append(check_request(request, config, tokens))
        except ValueError as error:
            raise ValueError(f"requests[{i}].{error}") from None
    params = decoding_weights(config, params, dtype)
    model = Qwen3(config, dtype=params["embed_tokens"].dtype)
    length = round_up(max(len(request.prompt_ids) for request in requests))
    packed = pack(requests, limits, config, tokens, prompt_slots=length)
    markers = pack_markers(tokens, config.vocab_size)
    steps = np.int32(UNLIMITED if progress is None else _STEPS_PER_REPORT)
    state, written = start(params, packed, markers, steps, model=model, columns=round_up(max(limits)))
    while progress is not None:
        active, counts = jax.device_get((written.budget.active_B, written.budget.written_B))
        progress(int((~active).sum()), len(requests), int(counts.sum()))
        if not active.any():
            break
        state, written = resume(params, state, packed.rows, markers, steps, model=model)
    return results(written)


def results(written: Any) -> list[Result]:
    """The result of each row, from a `Written` (or a `DecodeState`) that holds all its tokens."""
    written = jax.device_get(written)
    found = []
    for index in range(len(written.tokens_BM)):
        row = Row(index, Request((0,)), 0)
        row.append(written, index)
        found.append(row.result())
    return found
