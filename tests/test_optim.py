"""The optimisers against plain loops in float64, their schedules, what is decayed, and where their state lies."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from qwen3_jax.config import ModelConfig
from qwen3_jax.model import Qwen3
from qwen3_jax.optim import OptimizerConfig, make_optimizer, make_schedule, optimizer_shardings
from sharding import MeshConfig, make_mesh, named_shardings

pytestmark = pytest.mark.usefixtures("quick_compile")

# Where Muon sees matrices: name -> (shape, that shape as [matrices, out, in]).
MATRICES = {
    "q_proj": ((2, 4, 8, 16), (2, 32, 16)),
    "k_proj": ((2, 2, 8, 16), (2, 16, 16)),
    "v_proj": ((2, 8, 16), (1, 16, 16)),
    "o_proj": ((2, 16, 4, 8), (2, 16, 32)),
    "gate_proj": ((2, 24, 16), (2, 24, 16)),
    "gate_up_proj": ((2, 3, 2, 24, 16), (12, 24, 16)),
    "up_proj": ((24, 16), (1, 24, 16)),
    "down_proj": ((2, 3, 16, 24), (6, 16, 24)),
}


def test_cosine_warms_up_and_ends_at_the_final_ratio() -> None:
    schedule = make_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_ratio=0.1), steps=110)
    assert float(schedule(0)) == 0.0
    assert float(schedule(5)) == pytest.approx(0.5)
    assert float(schedule(10)) == pytest.approx(1.0)
    assert float(schedule(60)) == pytest.approx(0.55)
    assert float(schedule(110)) == pytest.approx(0.1)


def test_wsd_stays_at_the_peak_and_then_falls_in_a_line() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, schedule="wsd", decay_steps=20, final_ratio=0.0)
    schedule = make_schedule(config, steps=100)
    values = [float(schedule(step)) for step in (5, 10, 50, 80, 90, 100)]
    assert values == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.5, 0.0])


def test_a_later_stage_goes_on_at_the_rate_where_the_last_one_ended() -> None:
    """Warm-up to a share of the rate, and a decay from there; equal shares keep it constant."""
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=10, initial_ratio=0.5, final_ratio=0.1)
    values = [float(make_schedule(config, steps=110)(step)) for step in (0, 5, 10, 60, 110)]
    assert values == pytest.approx([0.0, 0.5, 1.0, 0.6, 0.2])
    config = OptimizerConfig(2.0, 0, schedule="wsd", decay_steps=10, initial_ratio=0.5, final_ratio=0.25)
    values = [float(make_schedule(config, steps=30)(step)) for step in (0, 20, 25, 30)]
    assert values == pytest.approx([1.0, 1.0, 0.75, 0.5])
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=0, initial_ratio=0.1, final_ratio=0.1)
    values = [float(make_schedule(config, steps=9)(step)) for step in range(10)]
    assert values == pytest.approx([0.2] * 10)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_norm_scales_are_not_decayed(name: str) -> None:
    """With a zero gradient an optimiser moves only what it decays."""
    params = {"layers_0_2": {"mlp": {"up_proj": jnp.ones((2, 3, 4))}, "input_layernorm": jnp.ones((2, 4))}}
    params["layers_0_2"]["self_attn"] = {"q_norm": jnp.ones((2, 2))}
    params |= {"norm": jnp.ones(4), "embed_tokens": jnp.ones((5, 4))}
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, weight_decay=0.5, name=name)
    optimizer = make_optimizer(config, steps=10)
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    moved = jax.tree.map(lambda u: bool((u != 0).all()), updates)
    assert moved == {
        "layers_0_2": {"mlp": {"up_proj": True}, "input_layernorm": False, "self_attn": {"q_norm": False}},
        "norm": False,
        "embed_tokens": True,
    }


def orthogonalised(matrix: np.ndarray) -> np.ndarray:
    """Five Newton-Schulz steps (Jordan et al. 2024), in float64."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def test_muon_is_the_same_as_a_loop_over_matrices() -> None:
    """Three steps of Nesterov momentum, each matrix orthogonalised by itself and scaled to 0.2 sqrt(max(out, in)).

    Newton-Schulz multiplies a small singular value by up to 3.4445 ** 5 = 485, and with it float32's rounding of the
    gradient (6e-8): an error of 3e-5 of a singular value, which is about 1, is to be expected.
    """
    rng = np.random.default_rng(0)
    params = {name: jnp.array(rng.normal(size=shape), jnp.float32) for name, (shape, _) in MATRICES.items()}
    optimizer = make_optimizer(
        OptimizerConfig(1.0, 0, name="muon", final_ratio=1.0, weight_decay=0.1, clip_norm=1e9), 9
    )
    state, update = jax.jit(optimizer.init)(params), jax.jit(optimizer.update)
    momentum = {name: np.zeros(shape) for name, (shape, _) in MATRICES.items()}
    for step in range(1, 4):
        grads = {name: rng.normal(size=shape).astype(np.float32) for name, (shape, _) in MATRICES.items()}
        updates, state = update(grads, state, params)
        for name, (shape, (matrices, rows, columns)) in MATRICES.items():
            momentum[name] = 0.95 * momentum[name] + 0.05 * grads[name]
            ahead = 0.95 * momentum[name] / (1 - 0.95 ** (step + 1)) + 0.05 * grads[name] / (1 - 0.95**step)
            parts = [orthogonalised(part) for part in ahead.reshape(matrices, rows, columns)]
            scaled = 0.2 * np.sqrt(max(rows, columns)) * np.stack(parts).reshape(shape)
            expected = -(scaled + 0.1 * np.asarray(params[name], np.float64))
            np.testing.assert_allclose(updates[name], expected, atol=3e-5, err_msg=name)
        params = optax.apply_updates(params, updates)


def test_muon_leaves_what_is_no_matrix_to_adamw() -> None:
    rng = np.random.default_rng(0)
    shapes = {"embed_tokens": (8, 4), "lm_head": (8, 4), "router": (2, 4, 4), "q_norm": (4,), "norm": (4,)}
    params = {name: jnp.array(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    grads = jax.tree.map(lambda x: x**2, params)
    updates = {}
    for name in ("adamw", "muon"):
        optimizer = make_optimizer(OptimizerConfig(1e-2, 0, name=name), 9)
        updates[name], _ = optimizer.update(grads, optimizer.init(params), params)
    chex.assert_trees_all_equal(updates["adamw"], updates["muon"])


def test_the_gradient_is_cut_to_the_norm_over_all_weights() -> None:
    """Seen in the first moment, which after one step is (1 - b1) times the gradient."""
    params = {"embed_tokens": jnp.ones((3, 4)), "norm": jnp.ones(4)}
    grads = {"embed_tokens": jnp.full((3, 4), 3.0), "norm": jnp.full(4, 3.0)}
    for clip, expected in ((6.0, 1.5), (100.0, 3.0)):  # the norm is 12
        optimizer = make_optimizer(OptimizerConfig(1.0, 0, clip_norm=clip), 9)
        _, state = optimizer.update(grads, optimizer.init(params), params)
        for moment in jax.tree.leaves(optax.tree.get(state, "mu")):
            np.testing.assert_allclose(moment, 0.1 * expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_on_eight_devices_the_state_is_split_and_the_numbers_stay(name: str, tmp_path: Path) -> None:
    """On a mesh of data, fsdp and tensor, each moment is split as its weight is and over the weight's two copies too,
    stays there through a step, comes back from a checkpoint, and the step is that of one device."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    model = Qwen3(ModelConfig.preset("qwen3-tiny"), stacked=True)
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    shardings, scalar = named_shardings(boxed, mesh), NamedSharding(mesh, PartitionSpec())
    rng = np.random.default_rng(0)
    alone = jax.tree.map(lambda x: jnp.array(rng.normal(size=x.shape), jnp.float32), nn.unbox(boxed))
    params = jax.device_put(alone, shardings)
    optimizer = make_optimizer(OptimizerConfig(0.1, 0, name=name), 9)
    state_shardings = optimizer_shardings(optimizer, params, shardings, scalar)
    of_path = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    moments = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state_shardings):
        weight = next((x for name, x in of_path.items() if jax.tree_util.keystr(path).endswith(name)), None)
        if weight is None:
            assert leaf == scalar
            continue
        whole, held = (math.prod(x.shard_shape(weight.shape)) for x in (weight.sharding, leaf))
        assert whole == 2 * held
        moments += 1
    matrices = sum("_proj" in path for path in of_path)
    assert moments == 2 * len(of_path) - (matrices if name == "muon" else 0)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        return optimizer.update(jax.tree.map(lambda x: jnp.sin(3 * x), params), state, params)

    state = jax.jit(optimizer.init, out_shardings=state_shardings)(params)
    updates, state = jax.jit(step, out_shardings=(shardings, state_shardings))(params, state)
    jax.tree.map(lambda x, sharding: chex.assert_equal(x.sharding, sharding), state, state_shardings)
    expected, expected_state = step(alone, jax.jit(optimizer.init)(alone))
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(state, expected_state, rtol=1e-5, atol=1e-5)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
    chex.assert_trees_all_equal(restored, state)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "wsd"}, "decay_steps: 0"),
        ({"warmup_steps": -1}, "warmup_steps: -1"),
        ({"initial_ratio": 0.0}, "initial_ratio: 0.0"),
        ({"initial_ratio": 0.1, "final_ratio": 0.2}, r"final_ratio: 0.2; use a number from 0 to initial_ratio \(0.1\)"),
    ],
)
def test_bad_settings_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**{"learning_rate": 1.0, "warmup_steps": 0, **fields})


def test_steps_that_hold_no_schedule_are_refused() -> None:
    with pytest.raises(ValueError, match="steps: 5 do not hold warmup_steps"):
        make_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10), steps=5)
