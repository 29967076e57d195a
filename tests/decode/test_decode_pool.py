"""Rows that are refilled while others run: the same tokens as in one closed batch, on one device and on a mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiles import count_compiles
from decode_model import CONFIG, EOS, GEN, MODEL, THINK, TOKENS, params, stacked_params
from hypothesis import Phase, given, settings

from qwen3_jax.cache import EMPTY, KVCache
from qwen3_jax.cli.config_file import load_config
from qwen3_jax.decode import Event, Pool, Request, Result, generate
from qwen3_jax.decode.weights import _relayout, decoding_weights, weight_shapes
from qwen3_jax.model import unstack_layers
from sharding import MeshConfig, make_mesh, named_shardings

pytestmark = pytest.mark.usefixtures("quick_compile")

# Two sizes of prompts and two of continuations, 32 and 64 slots, so that the cache is resized among four shapes only.
LONG = dataclasses.replace(CONFIG, max_position_embeddings=256)
MAX_PROMPT, MAX_NEW = 62, 60


@functools.cache
def requests() -> list[Request]:
    """Forty rows that differ in everything; a few have long prompts, a few go on long."""
    rng = np.random.default_rng(84)

    def request(i: int) -> Request:
        prompt = rng.integers(0, 28, rng.integers(34, 60) if i % 13 == 5 else rng.integers(1, 28)).tolist()
        is_open = i % 3 > 0
        budget: Any = [None, 0, 3, 7, "auto", 60][rng.integers(6)]
        return Request(
            (*prompt, EOS, GEN, *[THINK] * is_open),
            thinking_budget=budget,
            auto_threshold=0.2 if budget == "auto" else None,
            grace=int(rng.integers(3)),
            thinking=is_open or bool(rng.integers(2)),
            max_new_tokens=int(rng.integers(45, MAX_NEW)) if i % 7 == 3 else int(rng.integers(12, 33)),
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


def drain(pool: Pool) -> list[Event]:
    """Steps until there is nothing to do."""
    events = []
    while new := pool.step():
        events += new
    return events


def finished(events: Iterable[Event]) -> dict[Hashable, Result]:
    """Results by key; each comes once."""
    found = [(event.key, event.result) for event in events if event.result is not None]
    assert len(dict(found)) == len(found)
    return dict(found)


def decoded(pool: Pool, keys: Iterable[int]) -> dict[Hashable, Result]:
    """Results of these requests by key."""
    keys = list(keys)
    for key in keys:
        pool.submit(key, requests()[key])
    found = finished(drain(pool))
    assert found.keys() == set(keys)
    return found


def assert_same(got: dict[Hashable, Result]) -> None:
    """All fields as in the closed batch, log-probabilities within 1e-4."""
    for key, result in got.items():
        expected = closed()[key]
        assert dataclasses.replace(result, logprobs=[]) == dataclasses.replace(expected, logprobs=[]), key
        np.testing.assert_allclose(result.logprobs, expected.logprobs, atol=1e-4)


def test_rows_are_of_every_kind() -> None:
    assert {result.thinking_end for result in closed()} == {
        *("natural", "budget", "room", "auto", "off", "none", "eos", "length")
    }
    lengths = [len(result.token_ids) for result in closed()]
    assert min(lengths) < 8
    assert max(lengths) > 45


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
    assert any("to 64 + " in what for what in resized)
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


def test_events_are_what_is_new_of_each_row() -> None:
    """Put together they are the row's result; so far, it is a beginning of it."""
    used = pool(4)
    for key in range(12):
        used.submit(key, requests()[key])
    ids: dict[Hashable, list[int]] = {}
    while events := used.step():
        assert len({event.key for event in events}) == len(events) <= 4
        for event in events:
            ids.setdefault(event.key, []).extend(event.token_ids)
            assert 0 < len(event.token_ids) <= 1 + 8
            assert len(event.token_ids) == len(event.logprobs) == len(event.forced)
            assert event.so_far().token_ids == ids[event.key] == closed()[event.key].token_ids[: len(ids[event.key])]
            assert (event.result is not None) == (len(ids[event.key]) == len(closed()[event.key].token_ids))
    assert len(ids) == 12
    assert len(used) == 0


def test_a_cancelled_row_leaves_its_place_and_the_others_alone() -> None:
    used = pool(2)
    for key in (3, 5, 6, 7):
        used.submit(key, requests()[key])
    assert used.cancel(6) is None  # it waits
    events = used.step()
    while len(so_far := {event.key: event.so_far() for event in events[-2:]}[3].token_ids) < 20:
        events += used.step()
    result = used.cancel(3)
    assert result is not None
    assert result.token_ids == so_far == closed()[3].token_ids[: len(so_far)]
    assert len(so_far) < len(closed()[3].token_ids)
    assert used.cancel(3) is None
    assert used.cancel("unknown") is None
    found = finished([*events, *drain(used)])
    assert_same(found)
    assert found.keys() == {5, 7}


def test_samples_of_one_prompt_share_one_prefill() -> None:
    """Also where there are more of them than places, and those of two prompts alternate."""
    prompts = [requests()[0], requests()[2]]
    sampled = [dataclasses.replace(r, temperature=1.0, seed=9, sample=i) for i in range(9) for r in prompts]
    expected = generate(LONG, params(), sampled, tokens=TOKENS)
    used = pool(4)
    for key, request in enumerate(sampled):
        used.submit(key, request)
    for key, result in finished(drain(used)).items():
        assert dataclasses.replace(result, logprobs=[]) == dataclasses.replace(expected[key], logprobs=[])
    assert len({tuple(result.token_ids) for result in expected}) > 9
    assert (used.load.admitted, used.load.prefilled) == (18, 2)


def test_fixed_slots_compile_everything_before_the_first_request() -> None:
    closed()
    used = pool(4, max_prompt=MAX_PROMPT)
    used.warm_up()
    with count_compiles() as compiles:
        assert_same(decoded(used, range(40)))
        used.submit(0, requests()[0])
        used.step()
        used.cancel(0)
        assert used.step() == []
    assert compiles() == 0
    with pytest.raises(ValueError, match=r"^prompt_ids: 63 tokens; use at most 62, the max_prompt of this pool$"):
        used.submit(0, Request((1,) * 63, max_new_tokens=9))
    with pytest.raises(ValueError, match=r"^max_prompt: None; give the pool the length of the longest prompt$"):
        pool(4).warm_up()


def test_refusals_reach_the_caller_alone() -> None:
    used = pool(2)
    used.submit(0, requests()[0])
    first = used.step()
    with pytest.raises(ValueError, match=r"^max_new_tokens: 200; use at most 64, the max_new of this pool$"):
        used.submit(1, Request((1, EOS, GEN), max_new_tokens=200))
    with pytest.raises(ValueError, match=r"^prompt_ids: 40; use ids in 0\.\.39$"):
        used.submit(1, Request((40,)))
    with pytest.raises(ValueError, match=r"^key: 0 is in flight; use another one$"):
        used.submit(0, requests()[1])
    assert_same(finished([*first, *drain(used)]))
    assert pool(2).step() == []


# New weights ---------------------------------------------------------------------------------------------------------


def other_params(seed: int) -> Any:
    """A training state's weights: stacked, float32, moved a little away from those of the other tests."""
    leaves, tree = jax.tree.flatten(stacked_params())
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [leaf + 0.02 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


def test_new_weights_compile_nothing_and_stay_on_the_devices() -> None:
    """Ten updates from a training layout over eight devices, each followed by decoding under the new weights."""
    mesh, weights = make_mesh(MeshConfig(fsdp=4, tensor=2)), [other_params(seed) for seed in range(11)]
    with jax.set_mesh(mesh):
        init = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((8, 8), jnp.int32))["params"]
        shardings = named_shardings(init, mesh)
        trained = [jax.device_put(moved, shardings) for moved in weights]
        used = Pool(
            LONG,
            trained[0],
            tokens=TOKENS,
            rows=8,
            max_new=MAX_NEW,
            steps=8,
            max_prompt=len(requests()[2].prompt_ids),
            dtype="bfloat16",
        )
        used.warm_up()
        results = []
        with count_compiles() as compiles:
            for moved in trained[1:]:
                with jax.transfer_guard("disallow"):
                    used.set_weights(moved)
                used.submit(0, requests()[2])
                results += finished(drain(used)).values()
        assert compiles() == 0
        assert len({tuple(result.token_ids) for result in results}) > 3
        saved = unstack_layers(LONG, jax.tree.map(lambda x: x.astype(jnp.bfloat16), trained[-1]))
        expected = jax.tree.map(
            lambda x, to: jax.device_put(x, to.sharding), saved, weight_shapes(LONG, mesh, jnp.bfloat16)
        )

        def same(ours: jax.Array, theirs: jax.Array) -> None:
            assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))

        jax.tree.map(same, used._params, expected)
        used.submit(0, requests()[2])
        again = Pool(
            LONG, expected, tokens=TOKENS, rows=8, max_new=MAX_NEW, steps=8, max_prompt=len(requests()[2].prompt_ids)
        )
        again.submit(0, requests()[2])
        assert finished(drain(used)) == finished(drain(again))


def test_the_program_of_new_weights_holds_no_third_copy() -> None:
    """What it needs beside its arguments and results is less than the smallest of the two layouts."""
    mesh, weights = make_mesh(MeshConfig(fsdp=4, tensor=2)), stacked_params()
    with jax.set_mesh(mesh):
        init = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((8, 8), jnp.int32))["params"]
        trained = jax.device_put(weights, named_shardings(init, mesh))
        memory = _relayout(LONG, jnp.dtype("bfloat16"), mesh).lower(trained).compile().memory_analysis()
    assert memory.temp_size_in_bytes < memory.output_size_in_bytes


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
    not; on the first mesh the cache is resized, on the others its slots are fixed. A device of a replica holds a part
    of each weight that no other one has, and of each row's keys."""
    mesh = make_mesh(MESHES[name])
    data = mesh.shape["data"]
    with jax.set_mesh(mesh):
        used = pool(8, max_prompt=None if mesh.shape["expert"] > 1 else MAX_PROMPT)
        assert_same(decoded(used, range(16)))
        state = used._state
        assert num_shards(state.counts_BV) == 8
        heads = 2 if mesh.shape["tensor"] == 2 else 1  # four devices do not divide two heads
        assert num_shards(state.cache.keys[0]) == 8 // mesh.shape["tensor"] * heads
        layer = used._params["layer_1"]
        for weight in (used._params["embed_tokens"], *layer["self_attn"].values(), *layer["mlp"].values()):
            whole = weight.ndim == 1 or weight is layer["mlp"].get("router")
            assert num_shards(weight) == (1 if whole else 8 // data)
        assert used._params["embed_tokens"] is decoding_weights(LONG, used._params)["embed_tokens"]
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
    cache = old.admit(new, jnp.array([0, 1]), jnp.array([1, 2]))
    assert np.asarray(cache.positions_BS).tolist() == [[0, 1, 2, 3, 4], [0, 1, EMPTY, EMPTY, EMPTY]]
    np.testing.assert_array_equal(cache.keys[0][1, ..., :2], new.keys[0][0])
    np.testing.assert_array_equal(cache.values[0][1, :, :2], new.values[0][0])
    np.testing.assert_array_equal(cache.keys[0][0], old.keys[0][0])
