"""Routing, dispatch with capacity, and the load-balancing loss, by literal matrices and plain numpy."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import MOE

from qwen3_jax.model.layers import MoeMlp
from qwen3_jax.ops import moe
from qwen3_jax.ops.loss import load_balance_loss
from qwen3_jax.ops.moe import dispatch_mask, expert_capacity, moe_few
from sharding import MeshConfig, make_mesh

EXPERTS, TOP_K, WIDTH, HIDDEN = 4, 2, 8, 6

# One program each for a shape, where one for each of their operations would take longer.
moe_capacity = jax.jit(moe.moe_capacity, static_argnames=("capacity", "group_size"))
moe_exact = jax.jit(moe.moe_exact)
route = jax.jit(moe.route, static_argnums=(1, 2))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def expert_weights() -> tuple[jax.Array, ...]:
    """Gate and up, and down."""
    return jnp.asarray(normal(EXPERTS, 2, HIDDEN, WIDTH, seed=1)), jnp.asarray(normal(EXPERTS, WIDTH, HIDDEN, seed=3))


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_route(norm_topk_prob: bool) -> None:
    """Softmax over all four experts, then the two largest; the third token is padding."""
    probs = np.array([[[0.1, 0.2, 0.3, 0.4], [0.5, 0.05, 0.25, 0.2], [0.7, 0.1, 0.1, 0.1]]], np.float32)
    valid = jnp.array([[True, True, False]])
    gates, chosen, stats = route(jnp.log(probs) + 3.0, TOP_K, norm_topk_prob, valid)
    expected = np.array([[[0, 0, 0.3, 0.4], [0.5, 0, 0.25, 0], [0, 0, 0, 0]]], np.float32)
    if norm_topk_prob:
        expected /= np.array([0.7, 0.75, 1])[:, None].astype(np.float32)
    chex.assert_trees_all_close(gates, expected, atol=1e-6)
    chex.assert_trees_all_equal(chosen, expected > 0)
    chex.assert_trees_all_close(stats.counts, np.array([[1.0, 0, 2, 1]], np.float32))
    chex.assert_trees_all_close(stats.prob_sum, np.array([[0.6, 0.25, 0.55, 0.6]], np.float32), atol=1e-6)
    assert stats.tokens.tolist() == [2]
    assert stats.dropped.tolist() == [0]
    chex.assert_trees_all_close(stats.z_sum, np.array([2 * 3.0**2], np.float32), rtol=1e-5)
    entropy = -(probs[:, :2] * np.log(probs[:, :2])).sum()
    assert float(stats.entropy_sum[0]) == pytest.approx(entropy, abs=1e-5)


def test_dispatch_mask_by_eye() -> None:
    """Six tokens in one group, three experts with two places each. Expert 0 is asked for four times: tokens 0 and 2
    come first, 3 and 5 are dropped."""
    chosen = jnp.array([[1, 1, 0], [0, 1, 1], [1, 0, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]], bool)[None]
    expected = np.array(
        [
            # expert 0   expert 1   expert 2
            [[1, 0], [1, 0], [0, 0]],
            [[0, 0], [0, 1], [1, 0]],
            [[0, 1], [0, 0], [0, 1]],
            [[0, 0], [0, 0], [0, 0]],  # dropped by expert 0
            [[0, 0], [0, 0], [0, 0]],  # padding
            [[0, 0], [0, 0], [0, 0]],  # dropped by experts 0 and 1
        ],
        bool,
    )
    chex.assert_trees_all_equal(dispatch_mask(chosen, 2)[0], expected)


def test_places_are_per_group() -> None:
    """The same six tokens in two groups of three: each group has its own two places, so only token 5 loses none."""
    chosen = jnp.array([[1, 1, 0], [0, 1, 1], [1, 0, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]], bool).reshape(2, 3, 3)
    expected = np.array(
        [
            [[[1, 0], [1, 0], [0, 0]], [[0, 0], [0, 1], [1, 0]], [[0, 1], [0, 0], [0, 1]]],
            [[[1, 0], [0, 0], [0, 0]], [[0, 0], [0, 0], [0, 0]], [[0, 1], [1, 0], [0, 0]]],
        ],
        bool,
    )
    chex.assert_trees_all_equal(dispatch_mask(chosen, 2), expected)


@pytest.mark.parametrize(
    ("group_size", "factor", "places"),
    [(256, 1.0, 16), (256, 1.25, 20), (256, 1.01, 17), (8, 1.0, 1), (1, 1.0, 1), (8, 100.0, 8)],
)
def test_expert_capacity(group_size: int, factor: float, places: int) -> None:
    """128 experts, 8 per token: ceil(S / 16 * factor), never more than the group has tokens."""
    assert expert_capacity(group_size, 128, 8, factor) == places


def routed(length: int, valid: np.ndarray | None = None, seed: int = 0) -> tuple[jax.Array, ...]:
    """Two rows of tokens, their gates and choices, skewed so that expert 0 is overrun."""
    logits = normal(2, length, EXPERTS, seed=seed) + np.array([2.0, 0.5, 0, 0], np.float32)
    valid = np.ones((2, length), bool) if valid is None else valid
    gates, chosen, _ = route(jnp.asarray(logits), TOP_K, True, jnp.asarray(valid))
    return jnp.asarray(normal(2, length, WIDTH, seed=seed + 1)), gates, chosen


def plain_moe(x: np.ndarray, gates: np.ndarray, chosen: np.ndarray, capacity: int, group_size: int) -> tuple:
    """The same mathematics in loops: `(output, dropped)`."""
    gate_up, down = (np.asarray(w, np.float64) for w in expert_weights())
    gate, up = gate_up[:, 0], gate_up[:, 1]
    out, dropped = np.zeros(x.shape), 0
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            if t % group_size == 0:
                taken = np.zeros(EXPERTS, int)
            for e in range(EXPERTS):
                if not chosen[b, t, e]:
                    continue
                if taken[e] == capacity:
                    dropped += 1
                    continue
                taken[e] += 1
                a = gate[e] @ x[b, t]
                out[b, t] += gates[b, t, e] * (down[e] @ (a / (1 + np.exp(-a)) * (up[e] @ x[b, t])))
    return out, dropped


@pytest.mark.parametrize(("capacity", "group_size"), [(2, 4), (3, 8), (8, 8), (5, 16)])
def test_capacity_mode_against_loops(capacity: int, group_size: int) -> None:
    x, gates, chosen = routed(16)
    out, dropped = moe_capacity(x, gates, chosen, expert_weights(), capacity=capacity, group_size=group_size)
    expected, expected_dropped = plain_moe(*map(np.asarray, (x, gates, chosen)), capacity, group_size)
    assert float(dropped.sum()) == expected_dropped
    assert (expected_dropped == 0) == (capacity == group_size)
    chex.assert_trees_all_close(out, expected.astype(np.float32), rtol=1e-5, atol=1e-5)


def test_exact_mode_against_loops() -> None:
    x, gates, chosen = routed(16)
    expected, _ = plain_moe(*map(np.asarray, (x, gates, chosen)), capacity=16, group_size=16)
    chex.assert_trees_all_close(
        moe_exact(x, gates, expert_weights()), expected.astype(np.float32), rtol=1e-5, atol=1e-5
    )


def test_gradients_agree_when_nothing_is_dropped() -> None:
    """With respect to tokens, gates and every expert's weights."""
    x, gates, chosen = routed(8)
    wanted = jnp.asarray(normal(*x.shape, seed=9))

    def capacity(x: jax.Array, gates: jax.Array, experts: tuple) -> jax.Array:
        return (moe_capacity(x, gates, chosen, experts, capacity=8, group_size=8)[0] * wanted).sum()

    def exact(x: jax.Array, gates: jax.Array, experts: tuple) -> jax.Array:
        return (moe_exact(x, gates, experts) * wanted).sum()

    # Gates of experts that were not chosen are constants of the model; only the exact mode would see a change.
    grads = [jax.jit(jax.grad(f, argnums=(0, 1, 2)))(x, gates, expert_weights()) for f in (capacity, exact)]
    grads = [(gx, jnp.where(chosen, gg, 0), ge) for gx, gg, ge in grads]
    chex.assert_trees_all_close(*grads, rtol=1e-5, atol=1e-5)


def test_capacity_mode_is_causal() -> None:
    """Whether a token is dropped depends on earlier tokens only: new tokens (other routes included) from place 9 on
    leave the outputs before it as they were, bit for bit, though experts are overrun on both sides."""
    x, gates, chosen = routed(16)
    other_x, other_gates, other_chosen = routed(16, seed=50)
    now = jnp.arange(16)[None, :, None] < 9
    outs = []
    for later in ((x, gates, chosen), (other_x, other_gates, other_chosen)):
        mixed = [jnp.where(now, a, b) for a, b in zip((x, gates, chosen), later, strict=True)]
        out, dropped = moe_capacity(*mixed, expert_weights(), capacity=5, group_size=16)
        assert (dropped > 0).all()
        outs.append(out)
    chex.assert_trees_all_equal(outs[0][:, :9], outs[1][:, :9])
    assert not np.allclose(outs[0][:, 9:], outs[1][:, 9:])


def test_padding_takes_no_place() -> None:
    """Padding before the tokens changes neither which of them are dropped nor their outputs."""
    x, gates, chosen = routed(12)
    pad = [(0, 0), (4, 0), (0, 0)]
    valid = np.arange(16)[None] >= 4
    # What stands at the padding would all go to expert 0 if it were routed.
    logits = jnp.pad(jnp.log(jnp.maximum(gates, 1e-6)), pad, constant_values=0).at[:, :4, 0].set(50.0)
    padded_gates, padded_chosen, stats = route(logits, TOP_K, True, jnp.asarray(np.broadcast_to(valid, (2, 16))))
    chex.assert_trees_all_equal(padded_chosen[:, 4:], chosen)
    assert not padded_chosen[:, :4].any()
    assert stats.tokens.tolist() == [12, 12]
    assert stats.counts.sum(axis=1).tolist() == [24, 24]
    weights = expert_weights()
    out, dropped = moe_capacity(x, gates, chosen, weights, capacity=5, group_size=12)
    padded_x = jnp.pad(x, pad, constant_values=7.0)
    padded_out, padded_dropped = moe_capacity(padded_x, padded_gates, padded_chosen, weights, capacity=5, group_size=16)
    assert dropped.tolist() == padded_dropped.tolist()
    assert (dropped > 0).all()
    chex.assert_trees_all_close(padded_out[:, 4:], out, rtol=1e-5, atol=1e-5)
    assert not padded_out[:, :4].any()


FEW_EXPERTS, FEW_TOP_K, FEW_HIDDEN = 16, 3, 12


def few_weights(dtype: jnp.dtype = jnp.float32) -> tuple[jax.Array, ...]:
    """As `expert_weights`, for the few tokens of a decoding step."""
    gate_up = normal(FEW_EXPERTS, 2, FEW_HIDDEN, WIDTH, seed=1)
    return jnp.asarray(gate_up, dtype), jnp.asarray(normal(FEW_EXPERTS, WIDTH, FEW_HIDDEN, seed=3), dtype)


def few_routed(rows: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """One token per row, and gates: row 1 is inactive, row 2 has equal logits, row 3 goes where row 0 goes."""
    logits = normal(rows, 1, FEW_EXPERTS, seed=seed)
    logits[2:3] = 0.5
    logits[3:4] = logits[0]
    valid = jnp.arange(rows)[:, None] != 1
    gates, _, _ = route(jnp.asarray(logits), FEW_TOP_K, True, valid)
    return jnp.asarray(normal(rows, 1, WIDTH, seed=seed + 1)), gates


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16])
def test_few_tokens_equal_the_exact_mode(rows: int) -> None:
    for seed in range(4):
        x, gates = few_routed(rows, seed)
        out = jax.jit(moe_few)(x, gates, few_weights())
        chex.assert_trees_all_close(out, moe_exact(x, gates, few_weights()), rtol=1e-5, atol=1e-5)
        assert not out[1:2].any()


def poisoned(used: jax.Array, weights: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The weights with NaN in all experts but the used ones."""
    return tuple(jnp.where(jnp.expand_dims(used, range(1, w.ndim)), w, jnp.nan) for w in weights)


@pytest.mark.parametrize("rows", [1, 4])
def test_few_tokens_read_their_own_experts_only(rows: int) -> None:
    """Unused experts, those of an inactive row among them, hold NaN: whatever multiplies them by a gate of 0 gives
    NaN, as the exact mode does."""
    x, gates = few_routed(rows)
    used = gates.any(axis=(0, 1))
    assert FEW_TOP_K <= used.sum() < FEW_EXPERTS
    weights = poisoned(used, few_weights())
    assert not jnp.isfinite(moe_exact(x, gates, weights)).any()
    expected = moe_exact(x, gates, few_weights())
    chex.assert_trees_all_close(jax.jit(moe_few)(x, gates, weights), expected, rtol=1e-5, atol=1e-5)


def test_few_tokens_with_no_active_row() -> None:
    x, gates = few_routed(2)
    out = jax.jit(moe_few)(x[1:], gates[1:], poisoned(jnp.zeros(FEW_EXPERTS, bool), few_weights()))
    assert (out == 0).all()


def test_few_tokens_on_a_mesh() -> None:
    """Experts over four devices, their columns over two, rows over two: each device reads its own used experts."""
    x, gates = few_routed(4)
    expected = moe_exact(x, gates, few_weights())
    weights = poisoned(gates.any(axis=(0, 1)), few_weights())
    for config in (MeshConfig(data=1, fsdp=1, expert=4, tensor=2), MeshConfig(data=2, fsdp=1, expert=2, tensor=2)):
        with jax.set_mesh(make_mesh(config)):
            compiled = jax.jit(moe_few).lower(x, gates, weights).compile()
            chex.assert_trees_all_close(jax.device_get(compiled(x, gates, weights)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [{}, {"expert": 4, "tensor": 2}, {"data": 2, "expert": 2, "tensor": 2}], ids=str)
def test_sorted_tokens_equal_the_exact_mode(sizes: dict[str, int]) -> None:
    """As decoding does a prompt, values and derivatives; row 1 is inactive, and every expert is used by some row."""
    logits = normal(4, 16, FEW_EXPERTS)
    gates, chosen, _ = route(jnp.asarray(logits), FEW_TOP_K, True, jnp.arange(4)[:, None] != jnp.ones((1, 16), int))
    x, weights = jnp.asarray(normal(4, 16, WIDTH, seed=1)), few_weights()
    assert chosen.any(axis=(0, 1)).all()

    def loss(moe: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda *args: jnp.square(moe(*args)).sum()

    def ours(x: jax.Array, gates: jax.Array, weights: tuple[jax.Array, ...]) -> jax.Array:
        return moe.moe_sorted(x, gates, chosen, weights, top_k=FEW_TOP_K)

    expected = moe_exact(x, gates, weights), jax.grad(loss(moe_exact), argnums=(0, 2))(x, gates, weights)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=1, **sizes))) if sizes else contextlib.nullcontext():
        out = jax.jit(ours)(x, gates, weights), jax.jit(jax.grad(loss(ours), argnums=(0, 2)))(x, gates, weights)
    assert not out[0][1:2].any()
    for found, fits in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        chex.assert_trees_all_close(np.asarray(found), np.asarray(fits), atol=1e-5 * float(jnp.abs(fits).max()), rtol=0)


def test_few_tokens_have_the_derivatives_of_the_exact_mode() -> None:
    x, gates = few_routed(4)

    def loss(moe: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda *args: jnp.square(moe(*args)).sum()

    grads = [jax.jit(jax.grad(loss(moe), argnums=(0, 1, 2)))(x, gates, few_weights()) for moe in (moe_few, moe_exact)]
    chex.assert_trees_all_close(*grads, rtol=1e-5, atol=1e-5)


def test_few_tokens_convert_no_whole_table() -> None:
    """A backend that multiplies bfloat16 in float32 would like to convert the tables once, outside the loop over
    experts: that reads all of them."""
    x, gates = few_routed(1)
    weights = few_weights(jnp.bfloat16)
    compiled = jax.jit(moe_few).lower(x.astype(jnp.bfloat16), gates, weights).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < weights[0].size * 4
    chex.assert_trees_all_close(
        compiled(x.astype(jnp.bfloat16), gates, weights).astype(jnp.float32),
        moe_exact(x, gates, few_weights()),
        rtol=0.1,
        atol=0.1,
    )


def test_layer_reads_all_experts_only_where_tokens_could_use_them() -> None:
    """16 experts, 3 per token: five tokens make 15 choices, six make 18."""
    config = dataclasses.replace(
        MOE,
        hidden_size=WIDTH,
        num_experts=FEW_EXPERTS,
        num_experts_per_tok=FEW_TOP_K,
        moe_intermediate_size=FEW_HIDDEN,
    )
    layer = MoeMlp(config, capacity_factor=None, group_size=1)
    names = ("gate_up_proj", "down_proj")
    params = {"router": jnp.asarray(normal(FEW_EXPERTS, WIDTH, seed=4)), **dict(zip(names, few_weights(), strict=True))}
    for rows, finite in ((5, True), (6, False)):
        x = jnp.tile(jnp.asarray(normal(1, 1, WIDTH)), (rows, 1, 1))
        apply = jax.jit(lambda weights, x=x, rows=rows: layer.apply({"params": weights}, x, jnp.ones((rows, 1), bool)))
        used = apply(params)[1].counts.sum(axis=0) > 0
        weights = dict(zip(names, poisoned(used, few_weights()), strict=True))
        out, _ = apply({**params, **weights})
        assert bool(jnp.isfinite(out).all()) == finite


def plain_balance_loss(counts: np.ndarray, prob_sum: np.ndarray, tokens: np.ndarray) -> float:
    """E * sum_i f_i p_i per layer, then the mean over layers."""
    losses = []
    for layer in range(len(counts)):
        share = counts[layer] / counts[layer].sum()
        losses.append(counts.shape[1] * (share * prob_sum[layer] / tokens[layer]).sum())
    return float(np.mean(losses))


def balance_inputs(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums as a batch of 40 tokens over 3 layers would give them."""
    generator = np.random.default_rng(seed)
    probs = generator.dirichlet(np.full(EXPERTS, 0.5), size=(3, 40)).astype(np.float32)
    counts = (np.argsort(np.argsort(-probs, axis=-1), axis=-1) < TOP_K).sum(axis=1).astype(np.float32)
    return counts, probs.sum(axis=1), np.full(3, 40, np.float32)


def test_balance_loss_formula() -> None:
    counts, prob_sum, tokens = balance_inputs()
    loss = float(load_balance_loss(counts, prob_sum, tokens).mean())
    assert loss == pytest.approx(plain_balance_loss(counts, prob_sum, tokens), rel=1e-6)
    assert loss > 1.01


def test_balance_loss_is_one_when_balanced_and_e_when_collapsed() -> None:
    tokens = jnp.full(2, 40.0)
    even = jnp.full((2, EXPERTS), 20.0)
    np.testing.assert_allclose(load_balance_loss(even, even / 2, tokens), 1.0, rtol=1e-6)
    one = jnp.zeros((2, EXPERTS)).at[:, 1].set(40.0)
    np.testing.assert_allclose(load_balance_loss(one, one, tokens), EXPERTS, rtol=1e-6)
    assert not load_balance_loss(0 * one, 0 * one, 0 * tokens).any(), "an empty batch is no NaN"


def test_balance_loss_gradient_flows_through_the_probabilities_only() -> None:
    """d/d prob_sum = E f_i / (T L); nothing from the counts."""
    counts, prob_sum, tokens = balance_inputs()
    mean = jax.grad(lambda *sums: load_balance_loss(*sums).mean(), argnums=(0, 1))
    by_counts, by_probs = mean(*map(jnp.asarray, (counts, prob_sum, tokens)))
    assert not by_counts.any()
    expected = EXPERTS * counts / counts.sum(axis=1, keepdims=True) / 40 / 3
    chex.assert_trees_all_close(by_probs, expected, rtol=1e-5)


def test_global_batch_differs_from_the_mean_of_micro_batches() -> None:
    """Counts over the whole step with the probabilities of one micro-batch at a time: the mean is the loss of the
    whole batch, exactly, because the loss is linear in them. The mean of separate losses is something else."""
    a, b = balance_inputs(1), balance_inputs(2)
    whole = [x + y for x, y in zip(a, b, strict=True)]
    together = float(load_balance_loss(*whole).mean())
    with_global_counts = np.mean([float(load_balance_loss(whole[0], part[1], part[2]).mean()) for part in (a, b)])
    apart = np.mean([float(load_balance_loss(*part).mean()) for part in (a, b)])
    assert with_global_counts == pytest.approx(together, rel=1e-6)
    assert abs(apart - together) > 1e-3


def test_route_gradient_reaches_the_router_through_prob_sum() -> None:
    """The loss of `route`'s own statistics, differentiated through the logits, equals the closed form."""
    logits = jnp.asarray(normal(2, 6, EXPERTS))
    valid = jnp.ones((2, 6), bool).at[1, 4:].set(False)

    def loss(logits: jax.Array) -> jax.Array:
        stats = route(logits, TOP_K, True, valid)[2]
        return load_balance_loss(stats.counts.sum(axis=0), stats.prob_sum.sum(axis=0), stats.tokens.sum())

    grad = np.asarray(jax.jit(jax.grad(loss))(logits))
    probs = np.asarray(jax.nn.softmax(logits))
    counts = np.asarray(route(logits, TOP_K, True, valid)[2].counts.sum(axis=0))
    share = counts / counts.sum()
    expected = EXPERTS / 10 * probs * (share - (probs * share).sum(axis=-1, keepdims=True))
    expected = np.where(np.asarray(valid)[..., None], expected, 0)
    chex.assert_trees_all_close(grad, expected.astype(np.float32), atol=1e-6)
    assert np.abs(grad).max() > 1e-3


@pytest.mark.parametrize("sizes", [(128, 0, 200, 56), (0, 130, 0, 100)])
def test_the_kernel_of_grouped_products(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A TPU's, interpreted, and its gradients, against a product with each table by itself; an expert without rows has
    a gradient of zeros, and rows beyond all experts' (the last 154 of the second case) count for nothing."""
    monkeypatch.setattr(moe, "gmm", functools.partial(moe.gmm, interpret=True))
    monkeypatch.setattr(moe, "tgmm", functools.partial(moe.tgmm, interpret=True))
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, tpu, default: tpu(*args))
    rng = np.random.default_rng(0)
    x_RD, table_EFD, grad_RF = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((384, 8), (4, 6, 8), (384, 6)))
    used_R1 = np.arange(384)[:, None] < sum(sizes)
    bounds = np.cumsum([0, *sizes])

    def kernel(x_RD: jax.Array, table_EFD: jax.Array) -> jax.Array:
        return jnp.where(used_R1, moe.grouped_product(x_RD, table_EFD, jnp.asarray(sizes)), 0)

    def plain(x_RD: jax.Array, table_EFD: jax.Array) -> jax.Array:
        parts = [x_RD[bounds[e] : bounds[e + 1]] @ table_EFD[e].T for e in range(4)]
        return jnp.concatenate([*parts, jnp.zeros((384 - sum(sizes), 6))])

    def value_and_grads(function: Callable[..., jax.Array]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        value, pull = jax.vjp(function, x_RD, table_EFD)
        return value, pull(grad_RF)

    (ours, (grad_x, grad_table)), (theirs, their_grads) = (
        jax.jit(functools.partial(value_and_grads, function))() for function in (kernel, plain)
    )
    chex.assert_trees_all_close(ours, theirs, atol=1e-5)
    chex.assert_trees_all_close((jnp.where(used_R1, grad_x, 0), grad_table), their_grads, atol=1e-5)
