"""Rows that are refilled while others run: the same tokens as in one closed batch, on one device and on a mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_model import CONFIG, EOS, GEN, THINK, TOKENS, params
from hypothesis import Phase, given, settings

from qwen3_jax.cache import EMPTY, KVCache
from qwen3_jax.cli.config_file import load_config
from qwen3_jax.decode import Pool, Request, Result, generate
from qwen3_jax.decode.layout import place_weights
from sharding import MeshConfig, make_mesh

LONG = dataclasses.replace(CONFIG, max_position_embeddings=256)
MAX_NEW = 100


@functools.cache
def requests() -> list[Request]:
    """Forty rows that differ in everything; a few have long prompts, a few go on long."""
    rng = np.random.default_rng(3)

    def request(i: int) -> Request:
        prompt = rng.integers(0, 28, rng.integers(40, 70) if i % 13 == 5 else rng.integers(1, 28)).tolist()
        is_open = i % 3 > 0
        budget: Any = [None, 0, 3, 7, "auto", 60][rng.integers(6)]
        return Request(
            (*prompt, EOS, GEN, *[THINK] * is_open),
            thinking_budget=budget,
            auto_threshold=0.2 if budget == "auto" else None,
            grace=int(rng.integers(3)),
            thinking=is_open or bool(rng.integers(2)),
            max_new_tokens=int(rng.integers(70, MAX_NEW)) if i % 7 == 3 else int(rng.integers(12, 33)),
            temperature=float(rng.choice([0.0, 0.8, 1.2])),
            top_p=float(rng.uniform(0.8, 1)),
            presence_penalty=float(rng.choice([0.0, 0.4])),
            seed=int(rng.integers(2**32)),
        )

    return [request(i) for i in range(40)]


@functools.cache
def closed() -> list[Result]:
    """All of them in one batch and one program."""
    return generate(LONG, params(), requests(), tokens=TOKENS)


def pool(rows: int, steps: int = 8, **options: Any) -> Pool:
    return Pool(LONG, params(), **{"tokens": TOKENS, "rows": rows, "max_new": MAX_NEW, "steps": steps, **options})


def decoded(pool: Pool, keys: Sequence[int]) -> dict[Hashable, Result]:
    """Results of these requests by key; each comes once."""
    found = [item for finished in pool.run([(key, requests()[key]) for key in keys]) for item in finished]
    assert sorted(key for key, _ in found) == sorted(keys)
    return dict(found)


def assert_same(got: dict[Hashable, Result]) -> None:
    """All fields as in the closed batch, log-probabilities within 1e-4."""
    for key, result in got.items():
        expected = closed()[key]
        assert dataclasses.replace(result, logprobs=[]) == dataclasses.replace(expected, logprobs=[]), key
        np.testing.assert_allclose(result.logprobs, expected.logprobs, atol=1e-4)


def test_rows_are_of_every_kind() -> None:
    assert {result.thinking_end for result in closed()} == {"natural", "budget", "auto", "off", "none", "eos", "length"}
    lengths = [len(result.token_ids) for result in closed()]
    assert min(lengths) < 8
    assert max(lengths) > 64


def test_edge_60_any_order_any_batch_any_steps() -> None:
    """Batch composition, the order of rows, and how often the loop is left, all at once: no token changes."""

    @settings(max_examples=8, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(st.permutations(range(40)), st.integers(1, 20), st.sampled_from([1, 3, 16]))
    def compare(order: list[int], count: int, steps: int) -> None:
        assert_same(decoded(pool(4, steps), order[:count]))

    compare()


def test_long_prompts_and_long_rows_resize_the_cache_in_flight() -> None:
    """The cache grows and shrinks around rows that go on, its ring wraps, and a long row holds nobody up."""
    programs: list[str] = []
    used = pool(4, announce=lambda what, seconds: programs.append(what))
    assert_same(decoded(used, range(40)))
    resized = [what for what in programs if what.startswith("resizing")]
    assert any("to 64 + " in what or "to 128 + " in what for what in resized)
    assert len(programs) == len(set(programs))
    lengths = [len(result.token_ids) for result in closed()]
    assert (used.load.tokens, used.load.admitted) == (sum(lengths), 40)
    in_batches = sum(
        max(lengths[i : i + 4]) for i in range(0, 40, 4)
    )  # steps of ten batches that wait for their longest
    assert used.load.steps < 0.8 * in_batches
    assert used.load.utilisation == used.load.row_steps / (4 * used.load.steps) > 0.7


def test_a_second_run_of_the_same_shapes_compiles_nothing() -> None:
    decoded(pool(4), range(40))
    decoded(pool(4, announce=lambda what, seconds: pytest.fail(what)), range(40))


def test_watched_rows_are_seen_as_they_grow_and_may_be_ended() -> None:
    seen: dict[Hashable, list[Result]] = {}

    def watch(key: Hashable, so_far: Callable[[], Result]) -> bool:
        seen.setdefault(key, []).append(so_far())
        return key == 3 and len(so_far().token_ids) > 20

    items = [(key, requests()[key]) for key in range(12)]
    found = dict(item for finished in pool(4).run(items, watch) for item in finished)
    for key, growing in seen.items():
        for result in growing:
            assert result.token_ids == closed()[key].token_ids[: len(result.token_ids)]
    assert 20 < len(found[3].token_ids) <= 20 + 8 < len(closed()[3].token_ids)
    assert_same({key: result for key, result in found.items() if key != 3})


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"^max_new_tokens: 200; at most 128 fits this pool$"):
        list(pool(2).run([(0, Request((1, EOS, GEN), max_new_tokens=200))]))
    with pytest.raises(ValueError, match=r"^prompt_ids: 40; ids in 0\.\.39 fit$"):
        list(pool(2).run([(0, Request((40,)))]))
    assert list(pool(2).run([])) == [[]]


# Over a mesh ---------------------------------------------------------------------------------------------------------


CPU8 = load_config(MeshConfig, Path(__file__).parents[2] / "configs" / "mesh" / "cpu8.yaml")
MESHES = {
    "fsdp 2, expert 2, tensor 2": CPU8,
    "fsdp 4, tensor 2": MeshConfig(fsdp=4, tensor=2),
    "data 2, tensor 4": MeshConfig(data=2, fsdp=1, tensor=4),
}


def num_shards(x: jax.Array) -> int:
    return len({str(shard.index) for shard in x.addressable_shards})


@pytest.mark.parametrize("name", MESHES)
def test_edge_63_a_sharded_mesh_gives_the_same_ids(name: str) -> None:
    """Weights, cache and logits split over eight devices, refilled and closed, a batch that divides and one that does
    not. A device of a replica holds a part of each weight that no other one has, and of each row's keys."""
    mesh = make_mesh(MESHES[name])
    data = mesh.shape["data"]
    with jax.set_mesh(mesh):
        used = Pool(LONG, params(), tokens=TOKENS, rows=8, max_new=MAX_NEW, steps=8)
        assert_same(decoded(used, range(16)))
        state = used._state
        assert num_shards(state.counts_BV) == 8
        heads = 2 if mesh.shape["tensor"] == 2 else 1  # four devices do not divide two heads
        assert num_shards(state.cache.keys[0]) == 8 // mesh.shape["tensor"] * heads
        layer = used._params["layer_1"]
        for weight in (used._params["embed_tokens"], *layer["self_attn"].values(), *layer["mlp"].values()):
            whole = weight.ndim == 1 or weight is layer["mlp"].get("router")
            assert num_shards(weight) == (1 if whole else 8 // data)
        assert used._params["embed_tokens"] is place_weights(LONG, used._params)["embed_tokens"]
        assert_same(dict(enumerate(generate(LONG, params(), requests()[:6], tokens=TOKENS))))


# The cache -----------------------------------------------------------------------------------------------------------


def filled(prompt_slots: int, ring_slots: int, next_slot: int) -> KVCache:
    """A cache of two rows whose slot s holds the token of position 10 * row + s, its key and value -position - 1."""
    cache = KVCache.create(CONFIG, 2, prompt_slots, jnp.float32, ring_slots)
    positions = 10 * np.arange(2)[:, None] + np.arange(prompt_slots + ring_slots)
    keys = tuple(jnp.broadcast_to(-1.0 - positions[:, None, None, :], k.shape) for k in cache.keys)
    values = tuple(jnp.broadcast_to(-1.0 - positions[:, None, :, None], v.shape) for v in cache.values)
    return cache.replace(keys=keys, values=values, positions_BS=jnp.int32(positions), next_slot=jnp.int32(next_slot))


@pytest.mark.parametrize(
    ("slots", "row", "next_slot"),
    [
        ((2, 4), [0, 1, 4, 5, 2, 3], 2),  # the ring put in order, oldest first
        ((2, 6), [0, 1, 4, 5, 2, 3, None, None], 6),
        ((3, 6), [0, 1, None, 4, 5, 2, 3, None, None], 7),
        ((1, 2), [0, 2, 3], 1),  # the newest two
        ((4, 1), [0, 1, None, None, 3], 4),
    ],
)
def test_a_resized_cache_keeps_the_first_of_the_prompts_and_the_last_of_the_ring(
    slots: tuple[int, int], row: list[int | None], next_slot: int
) -> None:
    """Slots 0 and 1 are the prompt's, and of the ring's slots 2 to 5 number 4 is the oldest."""
    cache = filled(2, 4, 4).resize(*slots)
    assert (cache.prompt_slots, cache.ring_slots, int(cache.next_slot)) == (*slots, next_slot)
    for i in range(2):
        expected = [EMPTY if at is None else 10 * i + at for at in row]
        assert np.asarray(cache.positions_BS)[i].tolist() == expected
        stored = [0.0 if at == EMPTY else -1.0 - at for at in expected]
        assert np.asarray(cache.keys[0])[i, 1, 3].tolist() == np.asarray(cache.values[0])[i, 1, :, 3].tolist() == stored


def test_the_next_slot_wraps_to_the_rings_first() -> None:
    cache = filled(2, 4, 4)
    assert [int(cache.replace(next_slot=at).slot_after(1)) for at in (2, 4, 5)] == [3, 5, 2]
    assert int(KVCache.create(CONFIG, 1, 6, jnp.float32).slot_after(6)) == 6  # a prompt's own cache: then the ring


def test_admitted_rows_replace_others_whole() -> None:
    """Prompt slots are written, the ring is emptied, and a row for no place goes nowhere."""
    new = filled(2, 0, 2)
    old = filled(3, 2, 4)
    cache = old.admit(new, jnp.array([1, 2]))
    assert np.asarray(cache.positions_BS).tolist() == [[0, 1, 2, 3, 4], [0, 1, EMPTY, EMPTY, EMPTY]]
    np.testing.assert_array_equal(cache.keys[0][1, ..., :2], new.keys[0][0])
    np.testing.assert_array_equal(cache.values[0][1, :, :2], new.values[0][0])
    np.testing.assert_array_equal(cache.keys[0][0], old.keys[0][0])
