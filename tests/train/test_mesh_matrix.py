"""The same numbers on every mesh: logits, and three steps of training, on parts of eight devices against one.

What may differ is the order in which sums are taken: losses agree to 1e-5 of their value, weights to 1e-5. Which tokens
are dropped must not differ at all.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from qwen3_jax.model import Qwen3
from qwen3_jax.optim import OptimizerConfig, make_optimizer, optimizer_shardings
from qwen3_jax.train.next_token import NextToken
from qwen3_jax.train.step import TrainState, make_train_step
from sharding import MeshConfig, make_mesh, named_shardings, partition_spec

pytestmark = pytest.mark.usefixtures("quick_compile")

STEPS, ROWS, LENGTH = 3, 16, 32
DENSE = dataclasses.replace(
    tiny.DENSE,
    vocab_size=64,
    hidden_size=32,
    head_dim=8,
    intermediate_size=48,
    max_position_embeddings=64,
    initializer_range=0.1,
)
MOE = dataclasses.replace(
    DENSE, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, router_aux_loss_coef=0.02
)
MODELS = {
    "dense": Qwen3(DENSE, stacked=True, remat=True),
    "experts, nothing dropped": Qwen3(MOE, stacked=True, capacity_factor=4.0, group_size=8),
    "experts, with drops": Qwen3(MOE, stacked=True, capacity_factor=1.0, group_size=8),
}
MESHES = {
    "one device": MeshConfig(fsdp=1),
    "fsdp 2": MeshConfig(fsdp=2),
    "expert 4": MeshConfig(fsdp=1, expert=4),
    "tensor 2": MeshConfig(fsdp=1, tensor=2),
    "context 2": MeshConfig(fsdp=1, context=2),
    "fsdp 2, expert 2, tensor 2": MeshConfig(fsdp=2, expert=2, tensor=2),
    "data 2, expert 2, context 2": MeshConfig(data=2, fsdp=1, expert=2, context=2),
}
# Adam divides by the gradient's own size, so that rounding in a gradient near zero moves its weight: a step by up to
# learning_rate * rounding / eps, here 1e-3 * 1e-8 / 1e-5 = 1e-6.
ADAM = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, weight_decay=0.1, eps=1e-5)
OPTIMIZER = make_optimizer(ADAM, STEPS)


@functools.cache
def batches(packed: bool) -> list[dict[str, np.ndarray]]:
    """One a step. Packed rows hold two documents and padding, and weigh unevenly in the loss."""
    rng = np.random.default_rng(packed)
    lengths = [13, 15, 4] if packed else [LENGTH]
    segments = np.repeat([[1, 2, 0] if packed else [1]], ROWS, axis=0).repeat(lengths, axis=1)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].repeat(ROWS, axis=0)
    odds = np.linspace(0.1, 0.9, ROWS)[:, None] if packed else 1.0
    return [
        {
            "tokens": rng.integers(0, DENSE.vocab_size, (ROWS, LENGTH)).astype(np.int32),
            "targets": rng.integers(0, DENSE.vocab_size, (ROWS, LENGTH)).astype(np.int32),
            "segment_ids": segments.astype(np.int32),
            "positions": positions.astype(np.int32),
            "loss_weights": ((rng.random((ROWS, LENGTH)) < odds) * (segments > 0)).astype(np.float32),
        }
        for _ in range(STEPS)
    ]


@functools.cache
def initial(model: str) -> tuple[Any, Any]:
    """`(weights with their logical axes, abstract; weights on the host)`."""
    init = functools.partial(MODELS[model].init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    return jax.eval_shape(init)["params"], jax.device_get(nn.unbox(jax.jit(init)()["params"]))


@functools.cache
def run(model: str, mesh_name: str, accumulation: int) -> dict[str, Any]:
    """Logits of a batch, and of both kinds of batches the metrics of three steps and the weights after them."""
    size = math.prod(MESHES[mesh_name].axes.values())
    mesh = make_mesh(MESHES[mesh_name], jax.devices()[:size])
    boxed, host = initial(model)
    shardings = named_shardings(boxed, mesh)
    replicated = jax.NamedSharding(mesh, partition_spec((), mesh))
    state_shardings = TrainState(shardings, optimizer_shardings(OPTIMIZER, host, shardings, replicated))
    rows = jax.NamedSharding(mesh, partition_spec(("batch", "length"), mesh))
    step_fn = jax.jit(
        make_train_step(NextToken(MODELS[model], ROWS, LENGTH), OPTIMIZER, accumulation),
        out_shardings=(state_shardings, replicated),
    )
    out: dict[str, Any] = {}
    with jax.set_mesh(mesh):
        params = jax.device_put(host, shardings)
        for packed in (False, True):
            state = TrainState(params, jax.device_put(OPTIMIZER.init(host), state_shardings.optimizer))
            series = []
            for batch in jax.device_put(batches(packed), rows):
                state, metrics = step_fn(state, batch)
                series.append(metrics)
            out[f"packed {packed}"] = jax.device_get((series, state.params))
        if accumulation == 1:
            batch = jax.device_put(batches(True)[0], rows)
            arrays = (batch[name] for name in ("tokens", "positions", "segment_ids"))
            logits = jax.jit(lambda params, *arrays: MODELS[model].apply({"params": params}, *arrays).logits)
            out["logits"] = jax.device_get(logits(params, *arrays))
    return out


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("mesh_name", MESHES)
@pytest.mark.parametrize("model", MODELS)
def test_the_mesh_changes_nothing(model: str, mesh_name: str, accumulation: int) -> None:
    whole, split = run(model, "one device", 1), run(model, mesh_name, accumulation)
    for kind in ("packed False", "packed True"):
        (series, params), (split_series, split_params) = whole[kind], split[kind]
        for one, many in zip(series, split_series, strict=True):
            for name in ("loss", "accuracy", "grad_norm", *(["balance_loss"] if "experts" in model else [])):
                np.testing.assert_allclose(many[name], one[name], rtol=1e-5, err_msg=name)
            if "experts" in model:
                np.testing.assert_array_equal(many["router/dropped"], one["router/dropped"])
        chex.assert_trees_all_close(split_params, params, atol=1e-5, rtol=0)
    if accumulation == 1:
        valid = batches(True)[0]["segment_ids"] > 0
        chex.assert_trees_all_close(split["logits"][valid], whole["logits"][valid], atol=1e-5, rtol=1e-5)


def test_the_matrix_drops_where_it_says_so() -> None:
    for model, dropped in (("experts, nothing dropped", False), ("experts, with drops", True)):
        for kind in ("packed False", "packed True"):
            assert all(
                (metrics["router/dropped"] > 0).all() == dropped for metrics in run(model, "one device", 1)[kind][0]
            )
