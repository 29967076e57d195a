"""What the routers are asked for in a training step: the four scopes of the balance loss, and the z-loss."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding
from tiny import MOE

from qwen3_jax.model import Qwen3
from qwen3_jax.ops.moe import RouterStats
from qwen3_jax.train.metrics import MetricsLog, heat_map
from qwen3_jax.train.next_token import NextToken
from qwen3_jax.train.router import RouterConfig
from qwen3_jax.train.step import TrainState, make_train_step
from sharding import MeshConfig, make_mesh, named_shardings, partition_spec

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = dataclasses.replace(
    MOE,
    vocab_size=64,
    hidden_size=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=16,
    max_position_embeddings=64,
    num_experts=4,
    moe_intermediate_size=8,
    router_aux_loss_coef=0.5,
)
ROWS, LENGTH, EXPERTS, EMPTY_ROW = 8, 16, CONFIG.num_experts, 3
MODEL = Qwen3(CONFIG, stacked=True, capacity_factor=1.0, group_size=8)
SCOPES = ("sequence", "micro", "step_running", "step_exact")


def make_batch(order: Any = slice(None)) -> dict[str, np.ndarray]:
    """Rows of unequal length, one empty, each with its own part of the vocabulary, so that they route differently."""
    rng = np.random.default_rng(0)
    lengths = np.array([16, 3, 9, 5, 16, 12, 1, 7])
    lengths[EMPTY_ROW] = 0
    segments = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
    tokens = (8 * np.arange(ROWS)[:, None] + rng.integers(0, 8, (ROWS, LENGTH))).astype(np.int32)
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "segment_ids": segments,
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        "loss_weights": segments.astype(np.float32),
    }
    return {name: value[order] for name, value in batch.items()}


BOXED = jax.eval_shape(lambda: MODEL.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))["params"]


@functools.cache
def params() -> Any:
    generator = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(generator.standard_normal(x.shape) / 4, jnp.float32), nn.unbox(BOXED))


@functools.cache
def train_step(accumulation: int, router: RouterConfig, aux_coef: float = CONFIG.router_aux_loss_coef) -> Any:
    """The step with plain gradient descent, so that the update is the gradient."""
    model = dataclasses.replace(MODEL, config=dataclasses.replace(CONFIG, router_aux_loss_coef=aux_coef))
    return jax.jit(make_train_step(NextToken(model, ROWS, LENGTH, router), optax.sgd(1.0), accumulation))


def start(weights: Any) -> TrainState:
    return TrainState(weights, optax.sgd(1.0).init(weights))


def run(step: Any, batch: dict[str, Any]) -> tuple[Any, dict[str, np.ndarray]]:
    """The update and the metrics."""
    state, metrics = jax.device_get(step(start(params()), batch))
    return jax.tree.map(np.subtract, jax.device_get(params()), state.params), metrics


def forward_stats(weights: Any, batch: dict[str, Any]) -> RouterStats:
    out = MODEL.apply({"params": weights}, batch["tokens"], batch["positions"], batch["segment_ids"])
    assert out.router is not None
    return out.router


@functools.cache
def whole_stats() -> RouterStats:
    return jax.device_get(jax.jit(forward_stats)(params(), make_batch()))


@functools.cache
def pull() -> Any:
    """`pull()(weights, cotangent of the statistics)`: the gradient of whatever was computed from the statistics."""
    return jax.jit(lambda weights, grads: jax.vjp(lambda w: forward_stats(w, make_batch()), weights)[1](grads)[0])


def value_and_grad(formula: Any) -> tuple[jax.Array, Any]:
    """Of a formula of the statistics, with respect to the weights."""
    value, grads = jax.jit(jax.value_and_grad(formula))(whole_stats())
    return value, jax.device_get(pull()(params(), grads))


def oracle(stats: RouterStats, accumulation: int) -> dict[str, np.ndarray]:
    """Each scope's loss [L] by its formula, in float64, from what the routers did with each row."""
    counts, probs, tokens = (np.asarray(x, np.float64) for x in (stats.counts, stats.prob_sum, stats.tokens))
    micro = [slice(m, None, accumulation) for m in range(accumulation)]

    def lbl(count_rows: Any, prob_rows: Any) -> np.ndarray:
        f = (
            counts[:, count_rows].sum(axis=1)
            / (CONFIG.num_experts_per_tok * tokens[:, count_rows].sum(axis=1))[:, None]
        )
        p = probs[:, prob_rows].sum(axis=1) / tokens[:, prob_rows].sum(axis=1)[:, None]
        return EXPERTS * (f * p).sum(axis=1)

    rows = [[row] for row in range(ROWS) if tokens[0, row] > 0]
    everything = slice(None)
    so_far = [[row for row in range(ROWS) if row % accumulation <= m] for m in range(accumulation)]
    return {
        "sequence": np.mean([lbl(row, row) for row in rows], axis=0),
        "micro": np.mean([lbl(part, part) for part in micro], axis=0),
        "step_running": np.mean([lbl(seen, part) for seen, part in zip(so_far, micro, strict=True)], axis=0),
        "step_exact": lbl(everything, everything),
    }


@pytest.mark.parametrize("accumulation", [1, 4])
def test_all_scopes_are_logged(accumulation: int) -> None:
    expected = oracle(whole_stats(), accumulation)
    _, metrics = run(train_step(accumulation, RouterConfig()), make_batch())
    for name in SCOPES:
        np.testing.assert_allclose(metrics[f"router/balance_{name}"], expected[name], rtol=2e-6, err_msg=name)
    np.testing.assert_allclose(metrics["balance_loss"], expected["step_exact"].mean(), rtol=2e-6)
    # Those that differ do so by far more than the tolerance.
    values = sorted(expected[name].mean() for name in SCOPES)
    assert (np.diff(values) > 1e-3).sum() == (1 if accumulation == 1 else 3)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_scope_is_what_is_trained_on(scope: str) -> None:
    """The balance loss's part of the update is the gradient of its formula, written out over four micro-batches."""

    def formula(stats: RouterStats) -> jax.Array:
        counts, probs, tokens = jax.lax.stop_gradient(stats.counts), stats.prob_sum, stats.tokens
        micro, values = [slice(m, None, 4) for m in range(4)], []
        if scope == "sequence":
            pairs: list[Any] = [([row], [row]) for row in range(ROWS) if row != EMPTY_ROW]
        elif scope == "step_exact":
            pairs = [(slice(None), slice(None))]
        elif scope == "micro":
            pairs = [(part, part) for part in micro]
        else:
            pairs = [(np.array([row for row in range(ROWS) if row % 4 <= m]), micro[m]) for m in range(4)]
        for seen, part in pairs:
            f = counts[:, seen].sum(axis=1) / counts[:, seen].sum(axis=(1, 2))[:, None]
            p = probs[:, part].sum(axis=1) / tokens[:, part].sum(axis=1)[:, None]
            values.append(EXPERTS * (f * p).sum(axis=1))
        return CONFIG.router_aux_loss_coef * jnp.stack(values).mean()

    update, metrics = run(train_step(4, RouterConfig(balance_scope=scope)), make_batch())
    plain, _ = run(train_step(4, RouterConfig(), aux_coef=0.0), make_batch())
    moved = jax.tree.map(np.subtract, update, plain)
    value, expected = value_and_grad(formula)
    np.testing.assert_allclose(metrics["balance_loss"] * CONFIG.router_aux_loss_coef, value, rtol=2e-6)
    chex.assert_trees_all_close(moved, expected, atol=2e-6)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected)) > 1e-3


@pytest.mark.parametrize(
    ("accumulation", "mesh"),
    [(4, None), (8, None), (1, MeshConfig(data=2, fsdp=4)), (2, MeshConfig(fsdp=2, expert=2, tensor=2))],
    ids=["4 parts", "8 parts", "8 devices", "2 parts on 8 devices"],
)
def test_step_exact_does_not_depend_on_how_the_step_is_computed(accumulation: int, mesh: MeshConfig | None) -> None:
    """Nor on the order of rows: to 1e-6 of the oracle, and of the update of one device and one batch."""
    expected = oracle(whole_stats(), 1)["step_exact"]
    whole, _ = run(train_step(1, RouterConfig()), make_batch())
    step = train_step(accumulation, RouterConfig())
    for order in (slice(None), np.random.default_rng(5).permutation(ROWS)):
        batch = make_batch(order)
        if mesh is None:
            update, metrics = run(step, batch)
        else:
            with jax.set_mesh(made := make_mesh(mesh)):
                sharding = NamedSharding(made, partition_spec(("batch", "length"), made))
                placed = jax.device_put(params(), named_shardings(BOXED, made))
                state, metrics = jax.device_get(step(start(placed), jax.device_put(batch, sharding)))
                update = jax.tree.map(np.subtract, jax.device_get(params()), state.params)
        np.testing.assert_allclose(metrics["router/balance_step_exact"], expected, rtol=1e-6)
        chex.assert_trees_all_close(update, whole, atol=1e-6)


def test_only_step_exact_counts_first() -> None:
    """One product of the routers' a layer more where the counts of the whole step are wanted before any gradient."""
    batch, state = make_batch(), start(params())

    def top_ks(scope: str, aux_coef: float = 0.5) -> int:
        text = train_step(2, RouterConfig(balance_scope=scope), aux_coef).lower(state, batch).as_text()
        return text.count("chlo.top_k")

    counted = top_ks("step_exact")
    assert counted == 2 * top_ks("micro") == 2 * top_ks("step_running") == 2 * top_ks("sequence")
    assert top_ks("step_exact", aux_coef=0.0) == counted // 2


def test_z_loss() -> None:
    """The mean over layers and tokens of the squared logsumexp; its part of the update is its gradient."""

    def formula(stats: RouterStats) -> jax.Array:
        return (stats.z_sum.sum(axis=1) / stats.tokens.sum(axis=1)).mean()

    value, gradient = value_and_grad(formula)
    update, metrics = run(train_step(4, RouterConfig(z_loss_coef=0.3)), make_batch())
    plain, plain_metrics = run(train_step(4, RouterConfig()), make_batch())
    np.testing.assert_allclose([metrics["z_loss"], plain_metrics["z_loss"]], value, rtol=1e-6)
    moved = jax.tree.map(np.subtract, update, plain)
    chex.assert_trees_all_close(moved, jax.tree.map(lambda g: 0.3 * np.asarray(g), gradient), atol=2e-6)
    assert float(np.abs(gradient["layers_0_2"]["mlp"]["router"]).max()) > 1e-2


def test_router_series() -> None:
    stats = whole_stats()
    _, metrics = run(train_step(4, RouterConfig()), make_batch())
    counts = stats.counts.sum(axis=1).astype(np.float64)
    load = counts / counts.mean(axis=1, keepdims=True)
    gini = np.abs(load[:, :, None] - load[:, None, :]).sum(axis=(1, 2)) / (2 * EXPERTS**2)
    expected = {
        "load": load,
        "load_max": load.max(axis=1),
        "load_min": load.min(axis=1),
        "load_gini": gini,
        "dropped": stats.dropped.sum(axis=1) / counts.sum(axis=1),
        "entropy": stats.entropy_sum.sum(axis=1) / stats.tokens.sum(axis=1),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[f"router/{name}"], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert (metrics["router/dropped"] > 0).all()
    assert (gini > 0.01).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"balance_scope": "batch"}, "balance_scope: 'batch'; use one of sequence, micro, step_running, step_exact"),
        ({"z_loss_coef": -1.0}, "z_loss_coef: -1.0; use a number >= 0"),
    ],
)
def test_router_config_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RouterConfig(**fields)


def test_heat_map(tmp_path: Path) -> None:
    """Red where an expert has more than the mean, blue where less, white at the mean; layers from top to bottom."""
    load_LE = np.array([[4.0, 0.0], [1.0, 1.0]])
    picture = heat_map(load_LE, "step 1")
    log = MetricsLog(tmp_path, 0)
    log.picture(1, "heat_maps", picture)
    log.close()
    saved = (matplotlib.image.imread(tmp_path / "heat_maps" / "1.png")[..., :3] * 255).round().astype(np.uint8)
    np.testing.assert_array_equal(picture, saved)
    height, width, _ = picture.shape
    (red, blue), (white, _) = [
        [picture[height * y // 20, width * x // 20].astype(int) for x in (4, 10)] for y in (6, 13)
    ]
    assert red[0] > red[2] + 50
    assert blue[2] > blue[0] + 50
    assert white.min() > 240
