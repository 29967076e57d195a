"""The loop compiled from shapes alone: it is the one that a pool runs, and its step moves rows, never weights."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import numpy as np
import pytest
from decode_model import CONFIG, EOS, GEN, TOKENS, params

from qwen3_jax.decode import Pool, Request
from qwen3_jax.decode.programs import lower_prefill, lower_step, step_shapes
from sharding import MeshConfig, make_mesh

BATCH, SLOTS, COLUMNS = 8, (32, 32), 32
MESHES = {
    "fsdp 4, tensor 2": MeshConfig(fsdp=4, tensor=2),
    "fsdp 2, expert 2, tensor 2": MeshConfig(fsdp=2, expert=2, tensor=2),
    "data 2, fsdp 2, tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
}


@functools.cache
def step(name: str) -> tuple[jax.stages.Lowered, jax.stages.Compiled]:
    room: Any = {"batch": BATCH, "slots": SLOTS, "columns": COLUMNS, "dtype": np.float32}
    mesh = make_mesh(MESHES[name])
    takes = step_shapes(CONFIG, mesh, **room)
    lowered = lower_step(CONFIG, mesh, takes, np.float32)
    return lowered, lowered.compile()


@pytest.mark.parametrize("name", MESHES)
def test_shapes_and_shardings_are_those_of_a_pool(name: str) -> None:
    """Also after the loop, which is left and entered again: nothing moves between two calls."""
    mesh, weights = make_mesh(MESHES[name]), params()
    with jax.set_mesh(mesh):
        pool = Pool(CONFIG, weights, tokens=TOKENS, rows=BATCH, max_new=24, steps=2)
        for i in range(BATCH):
            pool.submit(i, Request((1, i, EOS, GEN), max_new_tokens=24))
        pool.step()
        pool.step()
    takes = step_shapes(CONFIG, mesh, batch=BATCH, slots=SLOTS, columns=COLUMNS, dtype=np.float32)
    ran = (pool._params, pool._state, pool._rows)

    def compare(path: Any, ours: Any, theirs: Any) -> None:
        where = jax.tree_util.keystr(path)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), where
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim), where

    jax.tree_util.tree_map_with_path(compare, (takes.params, takes.state, takes.rows), ran)


@pytest.mark.parametrize("name", ["fsdp 2, expert 2, tensor 2", "data 2, fsdp 2, tensor 2"])
def test_a_step_gathers_no_weight(name: str) -> None:
    """What collectives return is at most the logits of all rows; the smallest matrix is larger. (On fsdp 4 x tensor 2
    four heads do not divide, and XLA gathers what it has of q over fsdp.)"""
    logits = BATCH * CONFIG.vocab_size
    smallest = CONFIG.num_key_value_heads * CONFIG.head_dim * CONFIG.hidden_size
    assert logits < smallest
    sizes = []
    for line in str(step(name)[1].as_text()).splitlines():
        if match := re.search(r" = (.*?) (?:all-gather|all-to-all|all-reduce|collective-permute)(?:-start)?\(", line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            sizes += [int(np.prod([int(n) for n in dims.split(",") if n])) for dims in shapes]
    assert 0 < max(sizes) <= logits


def test_what_the_host_reads_is_small_and_on_every_process() -> None:
    """Beside the state: of each row its counters and the columns that are new, not all that it has written."""
    lowered, compiled = step("fsdp 2, expert 2, tensor 2")
    _, written = lowered.out_info
    shapes = {leaf.shape for leaf in jax.tree.leaves(written)}
    assert shapes == {(BATCH,), (BATCH, COLUMNS)}
    assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(compiled.output_shardings[1]))


def test_a_prefill_compiles_from_shapes() -> None:
    room: Any = {"batch": BATCH, "prompt_slots": 32, "dtype": np.float32}
    lowered = lower_prefill(CONFIG, make_mesh(MESHES["fsdp 4, tensor 2"]), **room)
    prompts = lowered.out_info
    assert (prompts.logits_PV.shape, prompts.cache.keys[0].shape) == ((BATCH, CONFIG.vocab_size), (BATCH, 2, 8, 32))
