"""Each op against PyTorch in float32, within 1e-5.

Shapes: B batch, T tokens, D hidden_size, N query heads, K key-value heads, H head_dim, R = H / 2.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import relative_error, to_params, torch, torch_config, torch_model
from tiny import DENSE, MOE
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, Qwen3RotaryEmbedding, apply_rotary_pos_emb

from qwen3_jax.config import ModelConfig, RopeScaling
from qwen3_jax.model.layers import Attention, Context, Mlp, MoeMlp
from qwen3_jax.ops.attention import attention, causal_attention
from qwen3_jax.ops.norm import rms_norm
from qwen3_jax.ops.rope import apply_rope, rope_tables

TOLERANCE = 1e-5


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def reference_layer(config: ModelConfig) -> tuple[Any, dict[str, Any]]:
    """The first decoder layer in PyTorch, and its weights as params."""
    model = torch_model(config)
    return model.model.layers[0], to_params(config, dict(model.named_parameters()))["layer_0"]


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])
def test_rms_norm(size: float, check_error: Any) -> None:
    """Small inputs make epsilon matter: at 1e-4 it is a hundred times the mean square."""
    x, scale = size * normal(2, 5, 40), 1 + 0.2 * normal(40, seed=1)
    norm = Qwen3RMSNorm(40, eps=1e-6)
    norm.weight.data = torch.tensor(scale)
    expected = norm(torch.tensor(x)).detach().numpy()
    check_error(f"op: rms_norm, inputs of {size:g}", relative_error(rms_norm(x, scale, 1e-6), expected), TOLERANCE)
    assert relative_error(rms_norm(x, 1.001 * scale, 1e-6), expected) > TOLERANCE


ROPE = {
    "plain": dataclasses.replace(DENSE, head_dim=128, rope_theta=1e6, max_position_embeddings=131_072),
    "plain, theta 1e4": dataclasses.replace(DENSE, head_dim=16, rope_theta=1e4),
    "YaRN 4": dataclasses.replace(
        DENSE, head_dim=128, rope_theta=1e6, max_position_embeddings=131_072, rope_scaling=RopeScaling(4.0, 32_768)
    ),
    "YaRN 4, own betas": dataclasses.replace(
        DENSE,
        head_dim=64,
        rope_theta=5e6,
        max_position_embeddings=131_072,
        rope_scaling=RopeScaling(4.0, 32_768, attention_factor=1.1, beta_fast=16.0, beta_slow=2.0),
    ),
}


@pytest.mark.parametrize("name", ROPE)
def test_rope_tables(name: str, check_error: Any) -> None:
    """Up to position 131,072.

    The two libraries' `pow` may differ by one or two units in the last place of a float32 frequency (2^-23 of it),
    and the angle is position times frequency: at 131,072 that is up to 0.02 radians, in either library. So the
    tolerance is 1e-5 plus 3 * 2^-23 of each angle.
    """
    config = ROPE[name]
    positions = np.concatenate([np.arange(64), 2 ** np.arange(7, 18) - 1, np.arange(131_008, 131_072)])[None]
    rotary = Qwen3RotaryEmbedding(torch_config(config))
    half = config.head_dim // 2
    expected = [table[..., :half].numpy() for table in rotary(torch.zeros(1), torch.tensor(positions))]
    tables = rope_tables(config, jnp.asarray(positions))
    angles = positions[..., None] * rotary.inv_freq.numpy()
    error = max(
        float((np.abs(np.asarray(actual) - wanted) * TOLERANCE / (TOLERANCE + 3 * 2.0**-23 * angles)).max())
        for actual, wanted in zip(tables, expected, strict=True)
    )
    check_error(f"op: rope tables, {name}, to 131,072 (scaled)", error, TOLERANCE)
    early = max(relative_error(a[:, :32], e[:, :32]) for a, e in zip(tables, expected, strict=True))
    check_error(f"op: rope tables, {name}, to 31", early, TOLERANCE)
    other = rope_tables(dataclasses.replace(config, rope_theta=1.001 * config.rope_theta), jnp.asarray(positions))
    assert relative_error(other[0][:, :32], expected[0][:, :32]) > TOLERANCE


def test_rope_tables_are_as_near_to_the_truth_as_the_reference() -> None:
    """Against float64, our worst angle is no worse than PyTorch's by more than a unit of the frequency's last place."""
    config, position = ROPE["plain"], 131_071
    truth = np.cos(position * config.rope_theta ** -(np.arange(0, 128, 2) / 128))
    cos, _ = rope_tables(config, jnp.full((1, 1), position))
    reference, _ = Qwen3RotaryEmbedding(torch_config(config))(torch.zeros(1), torch.full((1, 1), position))
    ours, theirs = (np.abs(np.asarray(table)[0, 0, :64] - truth).max() for table in (cos, reference))
    assert ours <= theirs + position * 2.0**-23


def test_apply_rope(check_error: Any) -> None:
    config = ROPE["YaRN 4"]
    x_BTNH, positions = normal(2, 7, 3, 128), np.arange(100, 114).reshape(2, 7)
    rotary = Qwen3RotaryEmbedding(torch_config(config))
    cos, sin = rotary(torch.zeros(1), torch.tensor(positions))
    expected, _ = apply_rotary_pos_emb(torch.tensor(x_BTNH), torch.tensor(x_BTNH), cos, sin, unsqueeze_dim=2)
    half_tables = [jnp.asarray(table[..., :64].numpy()) for table in (cos, sin)]
    check_error("op: apply_rope", relative_error(apply_rope(x_BTNH, *half_tables), expected), TOLERANCE)
    assert relative_error(apply_rope(1.001 * x_BTNH, *half_tables), expected) > TOLERANCE


@pytest.mark.parametrize("length", [9, 300])  # one block of queries, and three of which the last is shorter
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 2), (4, 1)])
def test_attention(heads: int, kv_heads: int, length: int, check_error: Any) -> None:
    """Against `scaled_dot_product_attention`, all queries together and the last alone, as decoding has it; the same
    for the wrong grouping (heads interleaved) must fail."""
    q, k, v = (normal(2, length, n, 16, seed=i) for i, n in enumerate((heads, kv_heads, kv_heads)))
    segments = jnp.ones((2, length), jnp.int32)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(torch.tensor(x).transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    k_BKHS, v_BKSH = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    name = f"op: attention, {heads}/{kv_heads} heads, {length} tokens"
    check_error(name, relative_error(causal_attention(q, k, v, segments), expected), TOLERANCE)
    last = attention(q[:, -1:], k_BKHS, v_BKSH, jnp.ones((2, 1, length), bool))
    check_error(f"{name}, the last alone", relative_error(last, expected[:, -1:]), TOLERANCE)
    if 1 < kv_heads < heads:
        order = np.arange(heads).reshape(-1, kv_heads).T.ravel()
        assert relative_error(causal_attention(q[:, :, order], k, v, segments), expected) > TOLERANCE


def test_attention_module(check_error: Any) -> None:
    """Projections, norms of q and k, rotation, attention and output projection together."""
    layer, params = reference_layer(DENSE)
    x_BTD, positions = normal(2, 9, 40), np.broadcast_to(np.arange(9), (2, 9))
    tables = Qwen3RotaryEmbedding(torch_config(DENSE))(torch.zeros(1), torch.tensor(positions))
    hidden = torch.full((9, 9), -1e30).triu(1)[None, None]
    expected, _ = layer.self_attn(torch.tensor(x_BTD), position_embeddings=tables, attention_mask=hidden)
    segments = jnp.ones((2, 9), jnp.int32)
    context = Context(*rope_tables(DENSE, jnp.asarray(positions)), segments)
    module = jax.jit(lambda weights: Attention(DENSE).apply({"params": weights}, x_BTD, context, None)[0])
    error = relative_error(module(params["self_attn"]), expected.detach())
    check_error("op: attention module", error, TOLERANCE)
    assert_every_leaf_matters(module, params["self_attn"], expected.detach())


def test_swiglu(check_error: Any) -> None:
    layer, params = reference_layer(DENSE)
    x_BTD = normal(2, 9, 40)
    expected = layer.mlp(torch.tensor(x_BTD)).detach()
    module = jax.jit(lambda weights: Mlp(DENSE).apply({"params": weights}, x_BTD))
    check_error("op: SwiGLU MLP", relative_error(module(params["mlp"]), expected), TOLERANCE)
    assert_every_leaf_matters(module, params["mlp"], expected)


@pytest.mark.parametrize("capacity_factor", [None, 4.0], ids=["exact", "capacity"])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_router_and_experts(norm_topk_prob: bool, capacity_factor: float | None, check_error: Any) -> None:
    """8 experts, 2 per token; a capacity of 8 / 2 mean loads drops nothing."""
    config = dataclasses.replace(MOE, norm_topk_prob=norm_topk_prob)
    layer, params = reference_layer(config)
    x_BTD = normal(2, 16, 40)
    expected = layer.mlp(torch.tensor(x_BTD)).detach()
    valid_BT = jnp.ones((2, 16), bool)
    moe = MoeMlp(config, capacity_factor, group_size=8)
    module = jax.jit(lambda weights: moe.apply({"params": weights}, x_BTD, valid_BT)[0])
    mode = "exact" if capacity_factor is None else "capacity"
    name = f"op: router and experts, {mode}, {'' if norm_topk_prob else 'not '}renormalised"
    check_error(name, relative_error(module(params["mlp"]), expected), TOLERANCE)
    assert_every_leaf_matters(module, params["mlp"], expected)


def assert_every_leaf_matters(module: Any, params: dict[str, jax.Array], expected: Any) -> None:
    """Noise of 0.01 on any one weight breaks the tolerance."""
    for name, weight in params.items():
        noisy = weight + 0.01 * normal(*weight.shape)
        assert relative_error(module({**params, name: noisy}), expected) > TOLERANCE, name
