"""The objective on packed rows: its gradient by the definition, on a mesh, and micro-batches that are padding."""

from __future__ import annotations

import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny
from flax import linen as nn

from qwen3_jax.model import Qwen3
from qwen3_jax.ops.policy import Policy, policy_loss
from qwen3_jax.rl.objective import PolicyGradient
from qwen3_jax.train.frozen import Frozen
from qwen3_jax.train.objective import batch_structs
from qwen3_jax.train.step import TrainState, make_train_step
from sharding import MeshConfig, make_mesh, named_shardings

ROWS, LENGTH = 8, 16
MODEL = Qwen3(tiny.MOE, stacked=True, dtype=jnp.dtype("float32"), expert_dispatch="ragged")
POLICY = Policy("gspo", 0.1, 0.1, aggregation="seq-mean", tis_cap=2.0)


@functools.cache
def params() -> Any:
    return nn.unbox(jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])


def rows(filled: int) -> dict[str, np.ndarray]:
    """Two sequences a row; the rows from `filled` on are padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 96, (ROWS, LENGTH)).astype(np.int32)
    segments = np.repeat([[1, 2, 0]], ROWS, axis=0).repeat([7, 7, 2], axis=1).astype(np.int32)
    segments[filled:] = 0
    positions = np.concatenate([np.arange(n) for n in (7, 7, 2)])[None].repeat(ROWS, axis=0).astype(np.int32)
    mask = (rng.random((ROWS, LENGTH)) < 0.6) * (segments > 0)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "segment_ids": segments,
        "positions": positions,
        "loss_weights": mask.astype(np.float32),
        "advantages": rng.normal(size=(ROWS, LENGTH)).astype(np.float32),
        "sampler_logprobs": rng.uniform(-6, -4, (ROWS, LENGTH)).astype(np.float32),
    }


def step(batch: dict[str, np.ndarray], mesh: MeshConfig, accumulation: int) -> tuple[Any, Any]:
    """`(metrics, change of the weights in a step of SGD)`."""
    made = PolicyGradient(POLICY, 1, None, MODEL, ROWS, LENGTH)
    found = make_mesh(mesh, jax.devices()[: math.prod(mesh.axes.values())])
    boxed = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    structs = batch_structs(made.arrays, found, accumulation)
    with jax.set_mesh(found):
        weights = jax.device_put(params(), named_shardings(boxed, found))
        arrays = {name: jax.device_put(x, structs[name].sharding) for name, x in batch.items()}
        optimizer = optax.sgd(1.0)
        run = jax.jit(make_train_step(made, optimizer, accumulation))
        state, metrics = run(TrainState(weights, optimizer.init(weights)), arrays)
        return jax.device_get((metrics, jax.tree.map(jnp.subtract, state.params, weights)))


def test_the_step_is_the_mean_over_all_sequences_whatever_the_mesh_and_the_padding() -> None:
    """Half of the rows are padding: whole micro-batches, which are passed over."""
    batch = rows(filled=4)
    # Of rows 0 to 7, micro-batch m of four has m and m + 4: so that two of them are padding alone.
    placed = {name: x[[0, 1, 4, 5, 2, 3, 6, 7]] for name, x in batch.items()}
    one, change = step(batch, MeshConfig(fsdp=1), 1)
    assert one["policy/ratio"] == 1.0
    assert 0.5 < one["policy/entropy"] < math.log(96)
    # At a ratio of 1 the loss of a sequence is the mean of its tokens' - advantage, times what the sampler's is worth.
    inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
    logits = np.asarray(jax.jit(MODEL.apply)({"params": params()}, *inputs).logits, np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(logprobs, batch["targets"][..., None], axis=-1)[..., 0]
    worth = np.minimum(np.exp(chosen - batch["sampler_logprobs"]), 2.0)
    losses = [
        (-batch["advantages"] * worth)[row][at].mean()
        for row in range(4)
        for segment in (1, 2)
        if (at := (batch["segment_ids"][row] == segment) & (batch["loss_weights"][row] > 0)).any()
    ]
    np.testing.assert_allclose(one["loss"], np.mean(losses), rtol=1e-5)
    gaps = np.abs(chosen - batch["sampler_logprobs"])[batch["loss_weights"] > 0]
    np.testing.assert_allclose(one["policy/sampler_gap"], gaps.mean(), rtol=1e-5)
    np.testing.assert_allclose(one["policy/largest_sampler_gap"], gaps.max(), rtol=1e-5)
    metrics, same = step(placed, MeshConfig(fsdp=2, expert=1, tensor=2), 4)
    for name in ("loss", "policy/sampler_gap", "policy/largest_sampler_gap", "policy/entropy", "grad_norm"):
        np.testing.assert_allclose(metrics[name], one[name], rtol=1e-5)
    chex.assert_trees_all_close(same, change, atol=1e-5, rtol=0)


def test_later_updates_are_compared_with_the_policy_that_sampled() -> None:
    """Two updates of a step are two steps of `policy_loss`: old log-probabilities are those before the first, and the
    reference's are another model's."""
    model = Qwen3(tiny.DENSE, stacked=True, dtype=jnp.dtype("float32"))
    init = jax.jit(lambda key: nn.unbox(model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]))
    weights, reference = init(jax.random.key(0)), init(jax.random.key(1))
    settings: Any = {"kind": "grpo", "clip_low": 0.01, "clip_high": 0.02, "kl_coef": 0.5}
    batch = rows(filled=6)
    frozen = Frozen("reference", model)
    made = PolicyGradient(Policy(**settings), 2, frozen, model, ROWS, LENGTH)
    optimizer = optax.sgd(1.0)
    run = jax.jit(make_train_step(made, optimizer, accumulation=2))
    state, metrics = run(TrainState(weights, optimizer.init(weights)), batch | frozen.flat(reference))

    @jax.jit
    def logprobs(params: Any, part: dict[str, np.ndarray]) -> jax.Array:
        inputs = (part["tokens"], part["positions"], part["segment_ids"])
        logits: Any = model.apply({"params": params}, *inputs).logits
        return jnp.take_along_axis(jax.nn.log_softmax(logits), part["targets"][..., None], axis=-1)[..., 0]

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def by_definition(params: Any, part: dict[str, np.ndarray], old: jax.Array, ref: jax.Array) -> Any:
        others = {"ref_logprobs_BT": ref, "segment_ids_BT": part["segment_ids"], **settings}
        return policy_loss(logprobs(params, part), old, part["advantages"], part["loss_weights"], **others)

    params, losses = weights, []
    for update in range(2):
        # Of rows 0 to 7, micro-batch m of four has m and m + 4; an update has two of them.
        part = {name: x[[2 * update, 2 * update + 4, 2 * update + 1, 2 * update + 5]] for name, x in batch.items()}
        (loss, seen), grads = by_definition(params, part, logprobs(weights, part), logprobs(reference, part))
        params, losses = jax.tree.map(jnp.subtract, params, grads), [*losses, loss]
    assert seen["clipped_low"] + seen["clipped_high"] > 0.1  # the last update; the first changed the policy
    chex.assert_trees_all_close(state.params, params, atol=1e-5, rtol=0)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
