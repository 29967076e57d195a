"""The model against itself: layouts, rematerialisation, expert modes, padding, segments, the cache."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiny import MOE

from qwen3_jax.cache import EMPTY, KVCache
from qwen3_jax.model import Qwen3, head_weight, stack_layers, unembed, unstack_layers
from qwen3_jax.model.qwen3 import segment_positions

pytestmark = pytest.mark.usefixtures("quick_compile")

# Layer 0 dense, layers 1 and 2 routed: both kinds of layer, and a run longer than one.
CONFIG = dataclasses.replace(
    MOE,
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    head_dim=12,
    intermediate_size=40,
    max_position_embeddings=128,
    num_experts=4,
    mlp_only_layers=(0,),
)
MODEL, PER_LAYER = Qwen3(CONFIG, stacked=True), Qwen3(CONFIG)
BATCH, LENGTH = 2, 16
TOKENS = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (BATCH, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    """Stacked random weights, large enough for logits of order 1; norms about 1 +- 0.2."""
    shapes = nn.unbox(jax.eval_shape(MODEL.init, jax.random.key(0), TOKENS))["params"]
    generator = np.random.default_rng(0)

    def fill(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        noise = generator.standard_normal(shape.shape)
        return jnp.asarray(1 + 0.2 * noise if "norm" in path[-1].key else 0.25 * noise, jnp.float32)

    return jax.tree.map_with_path(fill, shapes)


@functools.cache
def forward(model: Qwen3) -> Any:
    """`forward(model)(params, tokens, positions, segment_ids, cache)`: an Output. Compiled once per model and shape."""
    return jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))


@functools.cache
def value_and_grad(model: Qwen3) -> Any:
    """`value_and_grad(model)(params)`: mean cross-entropy of TOKENS, and its gradient."""

    def loss(params: Any) -> jax.Array:
        log_probs = jax.nn.log_softmax(model.apply({"params": params}, TOKENS).logits[:, :-1])
        return -jnp.take_along_axis(log_probs, TOKENS[:, 1:, None], axis=-1).mean()

    return jax.jit(jax.value_and_grad(loss))


def test_names_and_shapes_of_both_layouts() -> None:
    def init(stacked: bool) -> Any:
        shapes = jax.eval_shape(Qwen3(CONFIG, stacked=stacked).init, jax.random.key(0), TOKENS)
        return nn.unbox(shapes)["params"]

    outside = {"embed_tokens", "norm", "lm_head"}
    stacked, separate = init(True), init(False)
    assert stacked.keys() == outside | {"layers_0_1", "layers_1_3"}
    assert separate.keys() == outside | {f"layer_{i}" for i in range(3)}
    assert stacked["layers_1_3"]["self_attn"]["q_proj"].shape == (2, 4, 12, 32)
    assert separate["layer_1"]["mlp"]["gate_up_proj"].shape == (4, 2, 24, 32)
    assert separate["layer_0"]["mlp"]["gate_proj"].shape == (40, 32)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(lambda p: stack_layers(CONFIG, p), separate), stacked)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(lambda p: unstack_layers(CONFIG, p), stacked), separate
    )


def test_stacking_goes_both_ways(params: Any) -> None:
    separate = unstack_layers(CONFIG, params)
    assert not any(name.startswith("layers_") for name in separate)
    chex.assert_trees_all_equal(stack_layers(CONFIG, separate), params)
    assert stack_layers(CONFIG, params) is params
    assert unstack_layers(CONFIG, separate) is separate


def test_stacked_equals_per_layer(params: Any) -> None:
    """Loss and every gradient; and the layers do differ, so their order counts."""
    loss, grads = value_and_grad(MODEL)(params)
    loss_separate, grads_separate = value_and_grad(Qwen3(CONFIG, stacked=False))(unstack_layers(CONFIG, params))
    chex.assert_trees_all_close(loss, loss_separate, rtol=1e-6)
    chex.assert_trees_all_close(unstack_layers(CONFIG, grads), grads_separate, rtol=1e-4, atol=1e-6)
    separate = unstack_layers(CONFIG, params)
    last = CONFIG.num_hidden_layers - 1
    swapped = {
        **separate,
        f"layer_{last}": separate[f"layer_{last - 1}"],
        f"layer_{last - 1}": separate[f"layer_{last}"],
    }
    assert abs(value_and_grad(MODEL)(stack_layers(CONFIG, swapped))[0] - loss) > 1e-3


def test_remat_changes_nothing(params: Any) -> None:
    plain = value_and_grad(MODEL)(params)
    chex.assert_trees_all_close(
        value_and_grad(Qwen3(CONFIG, stacked=True, remat=True))(params), plain, rtol=1e-4, atol=1e-6
    )
    text = str(
        jax.make_jaxpr(lambda p: Qwen3(CONFIG, stacked=True, remat=True).apply({"params": p}, TOKENS).logits)(params)
    )
    assert "remat" in text or "checkpoint" in text


def test_default_arguments(params: Any) -> None:
    """No segments is one segment; no positions counts from 0; both are what they stand for."""
    plain = forward(MODEL)(params, TOKENS)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), TOKENS.shape)
    one_segment = np.ones_like(TOKENS)
    explicit = forward(MODEL)(params, TOKENS, positions, one_segment)
    chex.assert_trees_all_close(explicit, plain, rtol=1e-5, atol=1e-5)
    stretched = forward(MODEL)(params, TOKENS, positions**2, one_segment)
    assert not np.allclose(stretched.logits, plain.logits, atol=1e-3)


def test_logits_come_from_hidden(params: Any) -> None:
    out = forward(MODEL)(params, TOKENS)
    chex.assert_shape(out.hidden, (BATCH, LENGTH, CONFIG.hidden_size))
    chex.assert_trees_all_close(unembed(out.hidden, head_weight(CONFIG, params)), out.logits, rtol=1e-5, atol=1e-5)
    assert out.cache is None
    tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    assert head_weight(tied, params) is params["embed_tokens"]
    assert head_weight(CONFIG, params) is params["lm_head"]


def test_bfloat16_compute(params: Any) -> None:
    """Activations in bfloat16, logits and router statistics in float32; bfloat16 weights alone ask for the same."""
    out = jax.eval_shape(forward(Qwen3(CONFIG, stacked=True, dtype=jnp.bfloat16)), params, TOKENS)
    chex.assert_type([out.hidden, out.logits], [jnp.bfloat16, jnp.float32])
    chex.assert_type(jax.tree.leaves(out.router), jnp.float32)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert jax.eval_shape(forward(MODEL), rounded, TOKENS).hidden.dtype == jnp.bfloat16


def test_segment_positions() -> None:
    """Left padding, two packed documents with padding behind, one document."""
    segments = jnp.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
    expected = jnp.array([[0, 1, 0, 1, 2, 3], [0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    chex.assert_trees_all_equal(segment_positions(segments), expected)


def test_capacity_that_drops_nothing_equals_exact(params: Any) -> None:
    """Four experts, two per token: a factor of 2 makes room for every token at every expert."""
    exact = forward(MODEL)(params, TOKENS)
    capacity = forward(Qwen3(CONFIG, stacked=True, capacity_factor=2.0))(params, TOKENS)
    chex.assert_trees_all_close(capacity, exact, rtol=1e-4, atol=1e-5)
    assert not capacity.router.dropped.any()
    _, expected = value_and_grad(MODEL)(params)
    _, grads = value_and_grad(Qwen3(CONFIG, stacked=True, capacity_factor=2.0, group_size=4))(params)
    chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=1e-6)


OVERRUN = Qwen3(CONFIG, stacked=True, capacity_factor=0.75, group_size=8)


def test_causal_under_drops(params: Any) -> None:
    """New tokens from place 10 on leave all earlier logits as they were, in groups that overflow before and after."""
    tokens = TOKENS.copy()
    tokens[:, 10:] = (tokens[:, 10:] + 7) % CONFIG.vocab_size
    one_segment = np.ones_like(TOKENS)
    first, second = (forward(OVERRUN)(params, x, None, one_segment) for x in (TOKENS, tokens))
    assert (first.router.dropped > 0).all()
    chex.assert_trees_all_close(first.logits[:, :10], second.logits[:, :10], atol=1e-6)
    assert not np.allclose(first.logits[:, 10:], second.logits[:, 10:], atol=1e-3)


def test_router_statistics(params: Any) -> None:
    """Two routed layers; padding is not counted, and what stands there moves no real logit even under drops."""
    segments, tokens = np.ones_like(TOKENS), TOKENS.copy()
    segments[0, :6], tokens[0, :6] = 0, 3
    out, other = (forward(OVERRUN)(params, x, None, segments) for x in (TOKENS, tokens))
    chex.assert_tree_shape_prefix(out.router, (2,))
    chex.assert_shape(out.router.counts, (2, BATCH, 4))
    real = np.tile([LENGTH - 6, LENGTH], (2, 1))
    np.testing.assert_array_equal(out.router.tokens, real)
    np.testing.assert_array_equal(out.router.counts.sum(axis=-1), 2 * real)
    np.testing.assert_allclose(out.router.prob_sum.sum(axis=-1), real, rtol=1e-5)
    assert (out.router.entropy_sum < real * np.log(4)).all()
    assert (out.router.dropped > 0).all()
    chex.assert_trees_all_close(other.logits[0, 6:], out.logits[0, 6:], atol=1e-6)
    chex.assert_trees_all_close(other.router, out.router, atol=1e-4)


def test_group_size_must_divide(params: Any) -> None:
    model = Qwen3(CONFIG, stacked=True, capacity_factor=1.0, group_size=5)
    with pytest.raises(ValueError, match="group_size: 5 does not divide the sequence length 16; use a divisor"):
        jax.eval_shape(model.apply, {"params": params}, TOKENS)


def test_cache_in_pieces_and_extended(params: Any) -> None:
    """A prompt in two pieces with `extend` between them gives the same logits, keys and places as one forward."""
    separate = unstack_layers(CONFIG, params)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), TOKENS.shape)
    full = forward(MODEL)(params, TOKENS)
    cache = KVCache.create(CONFIG, BATCH, 10, jnp.float32)
    chex.assert_shape(cache.keys, (BATCH, CONFIG.num_key_value_heads, CONFIG.head_dim, 10))
    first = forward(PER_LAYER)(separate, TOKENS[:, :10], positions[:, :10], None, cache)
    grown = first.cache.resize(10, 8)
    second = forward(PER_LAYER)(separate, TOKENS[:, 10:], positions[:, 10:], None, grown)
    logits = jnp.concatenate([first.logits, second.logits], axis=1)
    chex.assert_trees_all_close(logits, full.logits, rtol=1e-4, atol=1e-4)
    expected = np.pad(positions, ((0, 0), (0, 2)), constant_values=EMPTY)
    np.testing.assert_array_equal(second.cache.positions_BS, expected)
    assert int(second.cache.next_slot) == LENGTH
    assert all(not keys[..., LENGTH:].any() for keys in second.cache.keys)


def test_a_row_may_write_nothing(params: Any) -> None:
    """A finished row steps with segment 0: its slot stays empty, and its next real token sees none of it."""
    separate = unstack_layers(CONFIG, params)
    positions = jnp.broadcast_to(jnp.arange(5), (BATCH, 5))
    cache = KVCache.create(CONFIG, BATCH, 8, jnp.float32)
    step = functools.partial(forward(PER_LAYER), separate)
    cache = step(TOKENS[:, :5], positions, None, cache).cache
    at = jnp.full((BATCH, 1), 5)
    direct = step(TOKENS[:, 5:6], at, jnp.ones((BATCH, 1), jnp.int32), cache)
    idle = step(TOKENS[:, 9:10], at, jnp.array([[0], [1]]), cache).cache
    np.testing.assert_array_equal(idle.positions_BS[:, 5], [EMPTY, 5])
    later = step(TOKENS[:, 5:6], at, jnp.ones((BATCH, 1), jnp.int32), idle)
    chex.assert_trees_all_close(later.logits[0], direct.logits[0], rtol=1e-5, atol=1e-5)


def test_cache_refusals(params: Any) -> None:
    cache = KVCache.create(CONFIG, BATCH, LENGTH, jnp.float32)
    with pytest.raises(ValueError, match="positions: None; with a cache, give the position of each token"):
        jax.eval_shape(PER_LAYER.apply, {"params": unstack_layers(CONFIG, params)}, TOKENS, cache=cache)
    with pytest.raises(ValueError, match="stacked: True; with a cache, use False and weights of `unstack_layers`"):
        jax.eval_shape(MODEL.apply, {"params": params}, TOKENS, jnp.zeros_like(TOKENS), cache=cache)


def test_weights_of_the_other_layout_are_refused(params: Any) -> None:
    with pytest.raises(ValueError, match="stacked: False, but the weights are in the other layout; use True"):
        jax.eval_shape(PER_LAYER.apply, {"params": params}, TOKENS)
    with pytest.raises(ValueError, match="stacked: True, but the weights are in the other layout; use False"):
        jax.eval_shape(MODEL.apply, {"params": unstack_layers(CONFIG, params)}, TOKENS)


def test_a_prefill_attends_among_its_own_tokens(params: Any) -> None:
    """As without a cache, also where the cache has more slots than there are tokens; they are as if written later."""
    separate = unstack_layers(CONFIG, params)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), TOKENS.shape)
    for slots in (LENGTH, LENGTH + 4):
        cache = KVCache.create(CONFIG, BATCH, slots, jnp.float32)
        prefilled = PER_LAYER.apply({"params": separate}, TOKENS, positions, None, cache, prefill=True)
        masked = PER_LAYER.apply({"params": separate}, TOKENS, positions, None, cache)
        chex.assert_trees_all_close(prefilled.logits, forward(MODEL)(params, TOKENS).logits, rtol=1e-4, atol=1e-4)
        chex.assert_trees_all_close(prefilled.cache, masked.cache, rtol=1e-5, atol=1e-5)
