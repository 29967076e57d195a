"""One batch in one XLA program: prefill and the loop under one jit."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from qwen3_jax.cache import KVCache
from qwen3_jax.config import ModelConfig
from qwen3_jax.decode import budget as bud
from qwen3_jax.decode.budget import Markers, ThinkingTokens
from qwen3_jax.decode.layout import lay_out, place_weights, state_axes
from qwen3_jax.decode.loop import DecodeState, Rows, decode, prefill
from qwen3_jax.decode.network import network
from qwen3_jax.decode.pack import Packed, check_request, pack, pack_markers, results, round_up
from qwen3_jax.model import Qwen3
from qwen3_jax.ops import cpu
from qwen3_jax.request import Request, Result
from sharding import DECODE_RULES, axis_rules

_STEPS_PER_REPORT = 16
# XLA's TPU compiler would fetch some layers' caches into vector memory to write new slots there, and put all of it
# back: to fetch counts as worth it only where nearly all that moves is read.
_TPU_OPTIONS = {"xla_tpu_msa_inefficient_use_to_copy_ratio": "0.75"}


def generate(
    config: ModelConfig,
    params: Any,
    requests: Sequence[Request],
    *,
    tokens: ThinkingTokens,
    dtype: Any = None,
    progress: Callable[[int, int, int], None] | None = None,
) -> list[Result]:
    """Continues every prompt, all rows in one batch and one compiled program (report, section 4.3; rules in `budget`).

    Args:
      params: weights of `Qwen3(config)`, stacked or per layer.
      tokens: the ids that the rules speak of.
      dtype: of activations and cache; None takes the embedding table's.
      progress: called every few steps with (rows done, rows, tokens written); the loop is left and entered again for
        it, which changes no token.

    Raises:
      ValueError: `requests[i].field: value; what would fit`.
    """
    if not requests:
        return []
    limits = []
    for i, request in enumerate(requests):
        try:
            limits.append(check_request(request, config, tokens))
        except ValueError as error:
            raise ValueError(f"requests[{i}].{error}") from None
    params = place_weights(config, params)
    model = Qwen3(config, dtype=dtype)
    length = round_up(max(len(request.prompt_ids) for request in requests))
    packed = pack(requests, limits, config, tokens, prompt_slots=length)
    markers = pack_markers(tokens, config.vocab_size)
    unlimited = np.int32(bud.UNLIMITED)
    steps = unlimited if progress is None else np.int32(_STEPS_PER_REPORT)
    state = start(params, packed, markers, steps, model=model, max_new=round_up(max(limits)))
    while progress is not None:
        active, written = jax.device_get((state.budget.active_B, state.budget.written_B))
        progress(int((~active).sum()), len(requests), int(written.sum()))
        if not active.any():
            break
        state = resume(params, state, packed.rows, markers, steps, model=model)
    return results(state)


@axis_rules(DECODE_RULES)
def prefill_rows(params: Any, packed: Packed, markers: Markers, *, model: Qwen3, max_new: int) -> DecodeState:
    """Each row's first token, and a cache of the prompts alone."""
    batch, length = packed.prompt_BP.shape
    dtype = cpu.cache_dtype(model.dtype or params["embed_tokens"].dtype)
    cache = KVCache.create(model.config, batch, length, dtype)
    forward = network(model, params)
    state = prefill(
        forward, packed.prompt_BP, packed.there_BP, packed.rows, packed.budget, markers, cache, max_new=max_new
    )
    return lay_out(state, state_axes(state))


@functools.partial(jax.jit, static_argnames=("model", "max_new"))
@axis_rules(DECODE_RULES)
def start(
    params: Any, packed: Packed, markers: Markers, max_steps: jax.Array, *, model: Qwen3, max_new: int
) -> DecodeState:
    """Prefill and the loop, one program."""
    state = prefill_rows(params, packed, markers, model=model, max_new=max_new)
    # The prompt attends over its own slots only; the room for new tokens is added after it.
    state = dataclasses.replace(state, cache=state.cache.resize(packed.prompt_BP.shape[1], max_new))
    return _decode(params, state, packed.rows, markers, max_steps, model)


@axis_rules(DECODE_RULES)
def _resume(
    params: Any, state: DecodeState, rows: Rows, markers: Markers, max_steps: jax.Array, *, model: Qwen3
) -> DecodeState:
    return _decode(params, state, rows, markers, max_steps, model)


@functools.cache
def _resume_on(platform: str) -> Any:
    options = _TPU_OPTIONS if platform == "tpu" else None
    return jax.jit(_resume, static_argnames=("model",), donate_argnames=("state",), compiler_options=options)


def resume(params: Any, state: Any, rows: Any, markers: Markers, max_steps: Any, *, model: Qwen3) -> DecodeState:
    """The loop entered again, one program; it takes over the state's memory."""
    left: DecodeState = _resume_on(cpu.platform())(params, state, rows, markers, max_steps, model=model)
    return left


def lower_resume(
    params: Any, state: Any, rows: Any, markers: Any, max_steps: Any, *, model: Qwen3
) -> jax.stages.Lowered:
    """The program of `resume` from shapes and shardings, for the mesh in context."""
    lowered: jax.stages.Lowered = _resume_on(cpu.platform()).lower(params, state, rows, markers, max_steps, model=model)
    return lowered


def _decode(
    params: Any, state: DecodeState, rows: Rows, markers: Markers, max_steps: jax.Array, model: Qwen3
) -> DecodeState:
    state = decode(network(model, params), lay_out(state, state_axes(state)), rows, markers, max_steps)
    return lay_out(state, state_axes(state))
