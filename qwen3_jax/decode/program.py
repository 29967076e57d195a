"""The programs that a decoding run compiles, made from shapes alone: a laptop can compile them for a pod.

Shapes: B rows, P prompt slots, R ring slots, M most tokens written.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen3_jax.config import ModelConfig
from qwen3_jax.decode.batch import lower_resume
from qwen3_jax.decode.budget import Markers, ThinkingTokens
from qwen3_jax.decode.layout import row_axes, shapes, state_axes, weight_shapes
from qwen3_jax.decode.loop import DecodeState, Rows
from qwen3_jax.decode.pack import Packed, pack, pack_markers
from qwen3_jax.decode.pool import empty_state, run_prefill, template
from qwen3_jax.model import Qwen3
from qwen3_jax.request import Request

# No value matters to a shape, and all texts are as long as these once they are padded.
_TOKENS = ThinkingTokens(think=0, end_think=1, eos=(2,), stop_ids=(1,), empty_block=(0, 1))


class StepShapes(NamedTuple):
    """What one call of the loop takes, as shapes and shardings."""

    params: Any
    state: DecodeState
    rows: Rows
    markers: Markers
    max_steps: Any


def step_shapes(
    config: ModelConfig, mesh: Mesh, *, batch: int, slots: tuple[int, int], max_new: int, dtype: Any = jnp.bfloat16
) -> StepShapes:
    """Those of `batch` rows with `slots` (P, R) of the cache and room for `max_new` tokens."""
    params = weight_shapes(config, mesh, dtype)
    model = Qwen3(config, dtype=dtype)
    with jax.set_mesh(mesh):
        state, rows = empty_state.eval_shape(
            params, *template(config, _TOKENS), model=model, rows=batch, slots=slots, max_new=max_new
        )
    return StepShapes(
        params,
        shapes(state, state_axes(state), mesh),
        shapes(rows, row_axes(rows), mesh),
        *_replicated((pack_markers(_TOKENS, config.vocab_size), np.int32(0)), mesh),
    )


def lower_step(config: ModelConfig, mesh: Mesh, takes: StepShapes, dtype: Any = jnp.bfloat16) -> jax.stages.Lowered:
    """The loop for the mesh's devices, to be compiled."""
    with jax.set_mesh(mesh):
        return lower_resume(*takes, model=Qwen3(config, dtype=dtype))


def lower_prefill(
    config: ModelConfig, mesh: Mesh, *, batch: int, prompt_slots: int, max_new: int, dtype: Any = jnp.bfloat16
) -> jax.stages.Lowered:
    """One prefill of `batch` prompts."""
    request = Request((0,), max_new_tokens=1)
    packed: Packed = pack([request] * batch, [1] * batch, config, _TOKENS, prompt_slots=prompt_slots)
    takes = _replicated((packed, pack_markers(_TOKENS, config.vocab_size)), mesh)
    params = weight_shapes(config, mesh, dtype)
    with jax.set_mesh(mesh):
        return run_prefill.lower(params, *takes, model=Qwen3(config, dtype=dtype), max_new=max_new)


def _replicated(tree: Any, mesh: Mesh) -> Any:
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=everywhere), tree)
