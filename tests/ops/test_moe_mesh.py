"""The routed layer on eight devices: the numbers of one, the same drops, and no more traffic than its design has."""

from __future__ import annotations

import dataclasses
import math
from itertools import chain
from typing import Any

import chex
import jax
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding

from qwen3_jax.aot.hlo import read_program
from qwen3_jax.config import ModelConfig
from qwen3_jax.model.layers import MoeMlp
from sharding import DECODE_RULES, MeshConfig, axis_rules, make_mesh, named_shardings, partition_spec

CONFIG = ModelConfig(
    vocab_size=8,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=8,
    max_position_embeddings=8,
    rope_theta=10_000.0,
    num_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=12,
)
ROWS, LENGTH, GROUP = 8, 32, 8
DROPPING = MoeMlp(CONFIG, capacity_factor=0.8, group_size=GROUP)
DROPLESS = MoeMlp(CONFIG, capacity_factor=8 / 3, group_size=GROUP)
RAGGED = MoeMlp(CONFIG, capacity_factor=None, group_size=GROUP, expert_dispatch="ragged")
EXACT = MoeMlp(CONFIG, capacity_factor=None, group_size=GROUP)
MODES = {"drops": DROPPING, "no drops": DROPLESS, "ragged": RAGGED}
MESHES = {
    "fsdp 8": MeshConfig(fsdp=8),
    "fsdp 2, expert 2, tensor 2": MeshConfig(fsdp=2, expert=2, tensor=2),
    "data 2, expert 4": MeshConfig(data=2, fsdp=1, expert=4),
    "context 2, expert 2, fsdp 2": MeshConfig(fsdp=2, expert=2, context=2),
}


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X = normal(ROWS, LENGTH, CONFIG.hidden_size, seed=0)
WANTED = normal(ROWS, LENGTH, CONFIG.hidden_size, seed=1)
VALID = np.arange(LENGTH) < np.array([LENGTH, 20, 32, 3, 31, 32, 0, 17])[:, None]
BOXED = jax.eval_shape(DROPPING.init, jax.random.key(0), X, VALID)["params"]
PARAMS = {name: normal(*w.shape, seed=2 + i) / 4 for i, (name, w) in enumerate(sorted(nn.unbox(BOXED).items()))}


def losses(model: MoeMlp) -> Any:
    """`(params, x, valid) -> (loss, (output, statistics)), (gradients)`, with every gradient that training takes."""

    def loss(params: Any, x: jax.Array, valid: jax.Array) -> tuple[jax.Array, Any]:
        out, stats = model.apply({"params": params}, x, valid)
        balance = (stats.prob_sum * normal(ROWS, CONFIG.num_experts, seed=9)).sum()
        return (out * WANTED).sum() + balance + 0.1 * stats.z_sum.sum(), (out, stats)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def on_mesh(model: MoeMlp, mesh: Any) -> tuple[Any, str]:
    """What `losses` gives there, and the compiled program."""
    with jax.set_mesh(mesh):
        placed = jax.device_put(PARAMS, named_shardings(BOXED, mesh))
        tokens = [jax.device_put(x, NamedSharding(mesh, partition_spec(("batch", "length"), mesh))) for x in (X, VALID)]
        compiled = losses(model).lower(placed, *tokens).compile()
        return jax.device_get(compiled(placed, *tokens)), compiled.as_text()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_equal_one(name: str, mode: str) -> None:
    expected = jax.device_get(losses(MODES[mode])(PARAMS, X, VALID))
    actual, _ = on_mesh(MODES[mode], make_mesh(MESHES[name]))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)
    stats, stats_8 = expected[0][1][1], actual[0][1][1]
    # Which tokens: a dropped pair more or less would move an output by far more than the tolerance.
    np.testing.assert_array_equal(stats_8.dropped, stats.dropped)
    np.testing.assert_array_equal(stats_8.counts, stats.counts)
    assert (stats.dropped[:2] > 0).all() == (mode == "drops")


@pytest.mark.parametrize("mode", ["no drops", "ragged"])
def test_modes_equal_the_exact_one(mode: str) -> None:
    """Values and gradients, where nothing is dropped; one row is padding throughout."""
    ours, exact = (jax.device_get(losses(model)(PARAMS, X, VALID)) for model in (MODES[mode], EXACT))
    chex.assert_trees_all_close(ours, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("skew", [0.0, 30.0])
def test_ragged_is_dropless_under_any_skew(skew: float) -> None:
    """With a strong skew all tokens ask for the same three experts, two of which one device of four holds."""
    router = PARAMS["router"].copy()
    x = np.concatenate([X[..., :-1], np.ones_like(X[..., :1])], axis=-1)
    router[:, -1] = skew * np.array([0, 1, 0, 0, 1, 1, 0, 0])
    params = {**PARAMS, "router": router}
    exact, stats = EXACT.apply({"params": params}, x, VALID)
    assert ((stats.counts.sum(axis=0) > 0).sum() == 3) == (skew > 0)
    with jax.set_mesh(make_mesh(MESHES["data 2, expert 4"])):
        out, _ = jax.jit(lambda *args: RAGGED.apply({"params": params}, *args))(x, VALID)
    chex.assert_trees_all_close(jax.device_get(out), jax.device_get(exact), rtol=1e-5, atol=1e-5)


def collectives(text: str, kind: str) -> list[list[tuple[int, int]]]:
    """Each collective of this kind in a compiled program; of each of its results (XLA combines what it can): numbers
    per device, and devices in a group (0: the text lists none, all devices are one group)."""
    return [
        [(math.prod(array.dims), len(i.replica_group())) for array in i.arrays]
        for computation in read_program(text).computations.values()
        for i in computation.values()
        if i.op.removesuffix("-start") == kind
    ]


@pytest.mark.parametrize("name", MESHES)
def test_traffic(name: str) -> None:
    """Tokens go to the experts and back, forward and backward, their gates with them: six all-to-alls. Nothing is
    gathered but weights, gate and up as one, over "fsdp" alone, and their gradients come back by as many
    reduce-scatters. One sum of activations over "tensor" in each direction is of D numbers a token, not of the K D that
    experts see."""
    mesh = make_mesh(MESHES[name])
    sizes = dict(mesh.shape)
    _, text = on_mesh(DROPPING, mesh)
    sent = sorted(sum(n for n, _ in results) for results in collectives(text, "all-to-all"))
    assert len(sent) == (6 if sizes["expert"] > 1 else 0)
    assert sent[2:] == [n * CONFIG.hidden_size for n in sent[:2] * 2], "per place one gate, and D numbers of a token"
    fsdp = sizes["fsdp"]
    own = sizes["expert"] * sizes["tensor"]
    gathered = [PARAMS["router"].size, PARAMS["gate_up_proj"].size // own, PARAMS["down_proj"].size // own]
    assert sorted(chain(*collectives(text, "all-gather"))) == sorted((n, fsdp) for n in gathered if fsdp > 1)
    assert sorted(chain(*collectives(text, "reduce-scatter"))) == sorted(
        (n // fsdp, fsdp) for n in gathered if fsdp > 1
    )
    assert collectives(text, "collective-permute") == []
    summed = [n for n, _ in chain(*collectives(text, "all-reduce"))]
    if sizes["tensor"] > 1:
        activations = ROWS * LENGTH // (mesh.size // sizes["tensor"]) * CONFIG.hidden_size
        assert sorted(summed)[-2:] == [activations, activations], "the output, and the tokens' gradient"
        assert sorted(summed)[-3] < activations
    else:
        assert max(summed) <= max(gathered) // fsdp, "gradients of weights, already scattered"


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("name", MESHES)
def test_decoding_moves_tokens_and_no_weights(name: str, rows: int) -> None:
    """One and two rows choose fewer experts than there are, eight may use them all. The tables lie split over all
    devices but those of "data", and what is gathered is less than a share of one of them."""
    mesh, x, valid = make_mesh(MESHES[name]), X[:rows, :1], np.ones((rows, 1), bool)
    expected, _ = EXACT.apply({"params": PARAMS}, x, valid)
    with jax.set_mesh(mesh), axis_rules(DECODE_RULES):
        placed = jax.device_put(PARAMS, named_shardings(BOXED, mesh))
        program = jax.jit(lambda *args: EXACT.apply({"params": args[0]}, *args[1:])[0])
        compiled = program.lower(placed, x, valid).compile()
        out = compiled(placed, x, valid)
    chex.assert_trees_all_close(jax.device_get(out), jax.device_get(expected), rtol=1e-5, atol=1e-5)
    share = placed["down_proj"].addressable_shards[0].data.size
    assert share * mesh.size == PARAMS["down_proj"].size * mesh.shape["data"]
    kinds = ("all-gather", "all-to-all", "collective-permute", "all-reduce")
    moved = [n for kind in kinds for n, _ in chain(*collectives(compiled.as_text(), kind))]
    assert max(moved, default=0) <= rows * CONFIG.hidden_size < share


def test_groups_must_fit_the_parts_of_a_row() -> None:
    """A group that two devices would share is refused: neither of them could tell whom to drop."""
    with (
        jax.set_mesh(make_mesh(MESHES["context 2, expert 2, fsdp 2"])),
        pytest.raises(ValueError, match="group_size: 32 does not divide the sequence length 32 in 4 chunks"),
    ):
        dataclasses.replace(DROPPING, group_size=32).apply({"params": PARAMS}, X, VALID)
