"""The optimiser's schedules and what is decayed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qwen3_jax.optim import OptimizerConfig, make_optimizer, make_schedule, optimizer_shardings
from sharding import MeshConfig, make_mesh


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


def test_norm_scales_are_not_decayed() -> None:
    """With a zero gradient AdamW moves only what it decays."""
    params = {"layers_0_2": {"mlp": {"up_proj": jnp.ones((2, 3, 4))}, "input_layernorm": jnp.ones((2, 4))}}
    params |= {"norm": jnp.ones(4), "embed_tokens": jnp.ones((5, 4))}
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, weight_decay=0.5)
    optimizer = make_optimizer(config, steps=10)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    moved = jax.tree.map(lambda u: bool((u != 0).all()), updates)
    assert moved == {
        "layers_0_2": {"mlp": {"up_proj": True}, "input_layernorm": False},
        "norm": False,
        "embed_tokens": True,
    }


def test_moments_lie_as_their_weights_do() -> None:
    mesh = make_mesh(MeshConfig(fsdp=8))
    params = {
        "embed_tokens": jax.ShapeDtypeStruct((16, 8), jnp.float32),
        "norm": jax.ShapeDtypeStruct((8,), jnp.float32),
    }
    split, whole = NamedSharding(mesh, PartitionSpec(None, "fsdp")), NamedSharding(mesh, PartitionSpec())
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0, warmup_steps=0), steps=10)
    shardings = optimizer_shardings(optimizer, params, {"embed_tokens": split, "norm": whole}, whole)
    found = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(shardings)]
    moments = [leaf for path, leaf in found if "embed_tokens" in path]
    assert moments == [split, split]
    assert all(leaf == whole for path, leaf in found if "embed_tokens" not in path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "wsd"}, "decay_steps: 0"),
        ({"warmup_steps": -1}, "warmup_steps: -1"),
    ],
)
def test_bad_settings_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**{"learning_rate": 1.0, "warmup_steps": 0, **fields})


def test_steps_that_hold_no_schedule_are_refused() -> None:
    with pytest.raises(ValueError, match="steps: 5 do not hold warmup_steps"):
        make_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10), steps=5)
