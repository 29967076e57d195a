"""Log-probabilities of given tokens, for a teacher, an importance ratio or a likelihood benchmark.

Shapes: B rows, T tokens of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from qwen3_jax.config import ModelConfig
from qwen3_jax.decode.schedule import bucket, max_prefill_rows
from qwen3_jax.model import Qwen3, head_weight, is_stacked
from qwen3_jax.ops.loss import token_logprobs
from sharding import constrain, num_parts


def score(config: ModelConfig, params: Any, ids: Sequence[Sequence[int]], *, dtype: Any = None) -> list[np.ndarray]:
    """Log-probability of each token but the first, given those before it, in nats.

    Rows of about the same length run together, padded to powers of two, so that programs are few. This is the forward
    pass of training, sharded by `sharding.AXIS_RULES`; no token loses an expert. Over several processes all of them
    make the same call.

    Args:
      params: weights of `Qwen3(config)`, stacked or per layer.
      ids: token ids, one row each.
      dtype: of activations; None takes the embedding table's.

    Returns:
      For each row a float32 array with one entry less than it has ids.

    Raises:
      ValueError: `ids[i]: value; what to use instead`.
    """
    for i, row in enumerate(ids):
        if not 0 < len(row) <= config.max_position_embeddings:
            raise ValueError(f"ids[{i}]: {len(row)} tokens; use 1 to {config.max_position_embeddings}")
        if not 0 <= min(row) <= max(row) < config.vocab_size:
            raise ValueError(f"ids[{i}]: {min(row)}..{max(row)}; use ids in 0..{config.vocab_size - 1}")
    params = nn.unbox(params)
    model = Qwen3(config, dtype=dtype, stacked=is_stacked(config, params), expert_dispatch="ragged")
    parts, scores = num_parts("batch"), [np.zeros(0, np.float32)] * len(ids)
    by_slots: dict[int, list[int]] = {}
    for i, row in enumerate(ids):
        by_slots.setdefault(bucket(len(row)), []).append(i)
    for slots, members in sorted(by_slots.items()):
        most = max_prefill_rows(slots, parts)
        for start in range(0, len(members), most):
            chosen = members[start : start + most]
            size = min(parts * bucket(-(-len(chosen) // parts), least=1), most)
            tokens_BT: Any = np.zeros((size, slots), np.int32)
            segments_BT: Any = np.zeros((size, slots), np.int32)
            for b, i in enumerate(chosen):
                tokens_BT[b, : len(ids[i])] = ids[i]
                segments_BT[b, : len(ids[i])] = 1
            logprobs_BT = jax.device_get(_score(params, tokens_BT, segments_BT, model=model))
            for b, i in enumerate(chosen):
                scores[i] = logprobs_BT[b, : len(ids[i]) - 1]
    return scores


@functools.partial(jax.jit, static_argnames="model")
def _score(params: Any, tokens_BT: jax.Array, segments_BT: jax.Array, *, model: Qwen3) -> jax.Array:
    """[B, T], entry t of token t + 1; replicated, so that every process reads all of it."""
    tokens_BT, segments_BT = (constrain(x, "batch", "length") for x in (tokens_BT, segments_BT))
    out: Any = model.apply({"params": params}, tokens_BT, None, segments_BT)
    targets_BT = jax.numpy.roll(tokens_BT, -1, axis=1)
    logprobs_BT = token_logprobs(out.hidden, head_weight(model.config, params), targets_BT).logprob
    return constrain(logprobs_BT, None, None)
