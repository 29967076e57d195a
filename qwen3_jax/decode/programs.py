"""Every program that decoding compiles. The arguments are arrays, or shapes with shardings: with shapes, a laptop
compiles for a pod.

Shapes: B rows, P prompts, T prompt slots, M columns of the buffers, A rows admitted together, D hidden_size,
V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen3_jax.cache import KVCache
from qwen3_jax.config import ModelConfig
from qwen3_jax.decode.budget import BudgetState, Markers
from qwen3_jax.decode.loop import DecodeState, Forward, Prompts, Rows, begin, decode, last_place, read_prompts
from qwen3_jax.decode.opening import DONE
from qwen3_jax.decode.pack import Packed, pack_markers, pack_prompts, pack_rows
from qwen3_jax.decode.weights import weight_shapes
from qwen3_jax.model import Qwen3, head_weight, unembed
from qwen3_jax.ops import cpu
from qwen3_jax.request import Request
from qwen3_jax.text.thinking import ThinkingTokens
from sharding import DECODE_RULES, axis_rules, constrain, partition_spec

# XLA's TPU compiler would fetch some layers' caches into vector memory to write new slots there, and write all of it
# back. This makes it fetch only where nearly all that it moves is read.
_TPU_OPTIONS = {"xla_tpu_msa_inefficient_use_to_copy_ratio": "0.75"}
# Any ids will do: only shapes are used, and `pack_rows` pads the texts to one length.
_TOKENS = ThinkingTokens(think=0, end_think=1, eos=(2,), stop_ids=(1,), empty_block=(0, 1))

Tree = TypeVar("Tree")


class Written(NamedTuple):
    """What a program wrote, replicated over the mesh: every process reads it and makes the same decisions.

    budget: the rows' counters at its end. The others are as in `DecodeState`.
    """

    budget: BudgetState
    tokens_BM: Any
    logprobs_BM: Any
    forced_BM: Any


def network(model: Qwen3, params: Any, *, prefill: bool = False) -> Forward:
    """The network as a function for the loop, which computes the logits of each row's last token only.

    Args:
      prefill: the cache is empty, and the tokens attend among themselves.
    """

    def forward(
        tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        weights, tokens_BT = jax.lax.platform_dependent((params, tokens_BT), cpu=cpu.keep_in_loop, default=lambda x: x)
        out: Any = model.apply({"params": weights}, tokens_BT, positions_BT, segment_ids_BT, cache, prefill=prefill)
        last_B = last_place(segment_ids_BT)[:, None, None]
        hidden_B1D = jnp.take_along_axis(out.hidden, last_B, axis=1)
        logits_BV = unembed(hidden_B1D, head_weight(model.config, weights))[:, 0]
        # Whole rows on each device: choosing a token makes tens of passes over the vocabulary.
        return constrain(logits_BV, "sample_batch", None), out.cache

    return forward


# Programs ------------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="model")
@axis_rules(DECODE_RULES)
def prefill(params: Any, prompt_PT: jax.Array, there_PT: jax.Array, *, model: Qwen3) -> Prompts:
    """Reads prompts, each once however many rows will continue it."""
    return _lay_out_prompts(_prefill(params, prompt_PT, there_PT, model))


@functools.partial(jax.jit, static_argnames=("model", "columns"))
@axis_rules(DECODE_RULES)
def start(
    params: Any, packed: Packed, markers: Markers, max_steps: jax.Array, *, model: Qwen3, columns: int
) -> tuple[DecodeState, Written]:
    """Prefill and the loop as one program."""
    prompts = _prefill(params, packed.prompt_BP, packed.there_BP, model)
    # The prompts attend among their own slots only; the room for new tokens is added after that.
    prompts = dataclasses.replace(prompts, cache=prompts.cache.resize(packed.prompt_BP.shape[1], columns))
    state = begin(prompts, packed.rows, packed.budget, markers, columns)
    return _decode(params, state, packed.rows, markers, max_steps, model)


@axis_rules(DECODE_RULES)
def _resume(
    params: Any, state: DecodeState, rows: Rows, markers: Markers, max_steps: jax.Array, *, model: Qwen3
) -> tuple[DecodeState, Written]:
    return _decode(params, state, rows, markers, max_steps, model)


@functools.cache
def _resume_on(platform: str) -> Any:
    options = _TPU_OPTIONS if platform == "tpu" else None
    return jax.jit(_resume, static_argnames=("model",), donate_argnames=("state",), compiler_options=options)


def resume(
    params: Any, state: Any, rows: Any, markers: Markers, max_steps: Any, *, model: Qwen3
) -> tuple[DecodeState, Written]:
    """Goes on with the loop, as one program. `state` is donated."""
    left: tuple[DecodeState, Written] = _resume_on(cpu.platform())(params, state, rows, markers, max_steps, model=model)
    return left


@functools.partial(jax.jit, static_argnames=("model", "rows", "slots", "columns"))
@axis_rules(DECODE_RULES)
def empty_state(
    settings: Rows, budget: BudgetState, *, model: Qwen3, rows: int, slots: tuple[int, int], columns: int
) -> tuple[DecodeState, Rows]:
    """A state of `rows` finished rows.

    Args:
      settings, budget: of one row, for their shapes.
      slots: prompt slots and ring slots of the cache.
    """
    settings, budget = jax.tree.map(lambda x: jnp.repeat(x, rows, axis=0), (settings, budget))
    state = DecodeState(
        budget=dataclasses.replace(budget, phase_B=jnp.full(rows, DONE, jnp.int32)),
        last_B=jnp.zeros(rows, jnp.int32),
        column=jnp.zeros((), jnp.int32),
        tokens_BM=jnp.zeros((rows, columns), jnp.int32),
        logprobs_BM=jnp.zeros((rows, columns), jnp.float32),
        forced_BM=jnp.zeros((rows, columns), bool),
        counts_BV=jnp.zeros((rows, model.config.vocab_size), jnp.int32),
        cache=KVCache.create(model.config, rows, slots[0], cpu.cache_dtype(model.dtype), slots[1]),
    )
    return _lay_out(state, state_axes(state)), _lay_out(settings, row_axes(settings))


@functools.partial(jax.jit, donate_argnames=("state", "rows"))
@axis_rules(DECODE_RULES)
def admit(
    state: DecodeState,
    rows: Rows,
    prompts: Prompts,
    source_A: jax.Array,
    new_rows: Rows,
    new_budget: BudgetState,
    markers: Markers,
    places_A: jax.Array,
) -> tuple[DecodeState, Rows, Written]:
    """Writes the first token of new rows and puts the rows in their places.

    Args:
      source_A: index of the prompt that each new row continues.
      places_A: index of each new row's place; a row with an index beyond the last place is dropped.
    """
    read = dataclasses.replace(prompts, logits_PV=prompts.logits_PV[source_A], last_P=prompts.last_P[source_A])
    new = begin(read, new_rows, new_budget, markers, 1)

    def put(old: Any, new: Any) -> Any:
        return jax.tree.map(lambda x, y: x.at[places_A].set(y, mode="drop"), old, new)

    state = dataclasses.replace(
        state,
        budget=put(state.budget, new.budget),
        last_B=put(state.last_B, new.last_B),
        counts_BV=put(state.counts_BV, new.counts_BV),
        cache=state.cache.admit(prompts.cache, source_A, places_A),
    )
    return _lay_out(state, state_axes(state)), _lay_out(put(rows, new_rows), row_axes(rows)), _written(new)


@functools.partial(jax.jit, static_argnames="slots")
@axis_rules(DECODE_RULES)
def resize(cache: KVCache, *, slots: tuple[int, int]) -> KVCache:
    """The cache with other numbers of prompt slots and ring slots."""
    resized = cache.resize(*slots)
    return _lay_out(resized, resized.axes)


@jax.jit
def replicate(tree: Any) -> Any:
    """Host arrays on every device of the current mesh, so that no later call transfers them again."""
    return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), tree)


@functools.partial(jax.jit, donate_argnames="budget")
def end(budget: BudgetState, ended_B: jax.Array) -> BudgetState:
    """Ends the rows of `ended_B`, wherever they are."""
    return dataclasses.replace(budget, phase_B=jnp.where(ended_B, DONE, budget.phase_B))


def _prefill(params: Any, prompt_PT: jax.Array, there_PT: jax.Array, model: Qwen3) -> Prompts:
    batch, slots = prompt_PT.shape
    cache = KVCache.create(model.config, batch, slots, cpu.cache_dtype(model.dtype))
    return read_prompts(network(model, params, prefill=True), prompt_PT, there_PT, cache)


def _decode(
    params: Any, state: DecodeState, rows: Rows, markers: Markers, max_steps: jax.Array, model: Qwen3
) -> tuple[DecodeState, Written]:
    state = decode(network(model, params), _lay_out(state, state_axes(state)), rows, markers, max_steps)
    return _lay_out(state, state_axes(state)), _written(state)


def _written(state: DecodeState) -> Written:
    written = Written(state.budget, state.tokens_BM, state.logprobs_BM, state.forced_BM)
    return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), written)


# Layouts -------------------------------------------------------------------------------------------------------------


def row_axes(tree: Tree) -> Tree:
    """Logical axes of arrays [B, ...], which are sharded by rows as sampling is."""
    return jax.tree.map(lambda x: ("sample_batch", *[None] * (x.ndim - 1)), tree)


def state_axes(state: DecodeState) -> DecodeState:
    """The state with a tuple of logical axes in place of each array."""
    fields: dict[str, Any] = {name: row_axes(value) for name, value in vars(state).items() if name != "cache"}
    return dataclasses.replace(state, **fields | {"cache": state.cache.axes, "column": ()})


def _lay_out(tree: Tree, axes: Tree) -> Tree:
    """Constrains arrays to these logical axes, inside a program."""
    return jax.tree.map(lambda x, names: constrain(x, *names), tree, axes)


def _lay_out_prompts(prompts: Prompts) -> Prompts:
    return dataclasses.replace(prompts, cache=_lay_out(prompts.cache, prompts.cache.axes))


# From shapes alone ---------------------------------------------------------------------------------------------------


class StepShapes(NamedTuple):
    """The arguments of `resume`, as shapes with shardings."""

    params: Any
    state: DecodeState
    rows: Rows
    markers: Markers
    max_steps: Any


def template(config: ModelConfig, tokens: ThinkingTokens) -> tuple[Rows, BudgetState]:
    """Settings and state of one row; only their shapes matter."""
    return pack_rows([Request((0,), max_new_tokens=1)], [1], config, tokens)


def step_shapes(
    config: ModelConfig, mesh: Mesh, *, batch: int, slots: tuple[int, int], columns: int, dtype: Any = jnp.bfloat16
) -> StepShapes:
    """The arguments of `resume` for `batch` rows; `slots`: prompt slots and ring slots of the cache."""
    with jax.set_mesh(mesh):
        state, rows = empty_state.eval_shape(
            *template(config, _TOKENS), model=Qwen3(config, dtype=dtype), rows=batch, slots=slots, columns=columns
        )
    return StepShapes(
        weight_shapes(config, mesh, dtype),
        _shapes(state, state_axes(state), mesh),
        _shapes(rows, row_axes(rows), mesh),
        *_replicated((pack_markers(_TOKENS, config.vocab_size), np.int32(0)), mesh),
    )


def lower_step(config: ModelConfig, mesh: Mesh, takes: StepShapes, dtype: Any = jnp.bfloat16) -> jax.stages.Lowered:
    """`resume`, lowered for the devices of the mesh."""
    with jax.set_mesh(mesh):
        lowered: jax.stages.Lowered = _resume_on(cpu.platform()).lower(*takes, model=Qwen3(config, dtype=dtype))
        return lowered


def lower_prefill(
    config: ModelConfig, mesh: Mesh, *, batch: int, prompt_slots: int, dtype: Any = jnp.bfloat16
) -> jax.stages.Lowered:
    """`prefill` of `batch` prompts, lowered for the devices of the mesh."""
    takes = weight_shapes(config, mesh, dtype), *_replicated(pack_prompts([(0,)] * batch, prompt_slots), mesh)
    with jax.set_mesh(mesh):
        return prefill.lower(*takes, model=Qwen3(config, dtype=dtype))


@axis_rules(DECODE_RULES)
def _shapes(tree: Tree, axes: Tree, mesh: Mesh) -> Tree:
    """Shapes and shardings of what `_lay_out` lays out."""

    def struct(x: Any, names: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, partition_spec(names, mesh, x.shape))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(struct, tree, axes)


def _replicated(tree: Any, mesh: Mesh) -> Any:
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=everywhere), tree)
