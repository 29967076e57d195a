"""One decoder layer: attention and a dense or routed MLP, each behind a pre-norm (report, section 2).

Weights keep Hugging Face's names and its [out, in] order, heads split off the out axis; loading a checkpoint is
renaming, reshaping and stacking, never transposing.

Shapes: B batch, T tokens, D hidden_size, N query heads, K key-value heads, H head_dim, R = H / 2, F MLP width,
E experts, S cache slots.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from qwen3_jax.cache import write_slots
from qwen3_jax.config import ModelConfig
from qwen3_jax.ops.arrays import linear
from qwen3_jax.ops.attention import attention, attention_before_write, causal_attention
from qwen3_jax.ops.moe import (
    EXPERT_AXES,
    ROUTER_AXES,
    Dispatch,
    RouterStats,
    expert_capacity,
    moe_capacity,
    moe_exact,
    moe_few,
    moe_layer,
    moe_ragged,
    moe_sorted,
    route,
    router_logits,
)
from qwen3_jax.ops.norm import rms_norm
from qwen3_jax.ops.rope import apply_rope
from qwen3_jax.ops.zigzag import num_chunks
from sharding import constrain, num_parts, split_axes

ExpertDispatch = Literal["einsum", "ragged"]
# Activations that can be kept for the backward pass, so that it does not recompute them.
Activation = Literal["qkv", "attention", "mlp", "dispatch"]


@struct.dataclass
class Context:
    """What all layers of one forward pass share.

    cos_BTR, sin_BTR: rotary tables. segment_ids_BT: 0 at padding.
    slot: first cache slot to write, None without a cache. mask_BTS: where in the cache each query may look; None where
      the tokens attend among themselves.
    write_late: with a mask, layers return new keys and values instead of a cache with them in it.
    """

    cos_BTR: jax.Array
    sin_BTR: jax.Array
    segment_ids_BT: jax.Array
    slot: jax.Array | None = None
    mask_BTS: jax.Array | None = None
    write_late: bool = struct.field(pytree_node=False, default=False)


def declare(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], init: Any) -> jax.Array:
    """Declares one float32 weight with its logical axes."""
    weight: Any = module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
    return weight


class Attention(nn.Module):
    """Grouped-query attention with RMSNorm on each head of q and k, and rotary positions."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: Context, cached: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        cfg = self.config
        d, n, k, h = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        init = nn.initializers.normal(cfg.initializer_range)
        wq_NHD = declare(self, "q_proj", (n, h, d), ("heads", "head_dim", "embed"), init)
        wk_KHD = declare(self, "k_proj", (k, h, d), ("kv_heads", "head_dim", "embed"), init)
        wv_KHD = declare(self, "v_proj", (k, h, d), ("kv_heads", "head_dim", "embed"), init)
        wo_DNH = declare(self, "o_proj", (d, n, h), ("embed", "heads", "head_dim"), init)
        q_norm_H = declare(self, "q_norm", (h,), ("norm",), nn.initializers.ones)
        k_norm_H = declare(self, "k_norm", (h,), ("norm",), nn.initializers.ones)

        q_BTNH, k_BTKH, v_BTKH = (checkpoint_name(linear(x_BTD, weight), "qkv") for weight in (wq_NHD, wk_KHD, wv_KHD))
        # Two constraints: first the sharding of the weights, then that of attention. With the second alone, XLA would
        # all-gather the weights.
        q_BTNH = constrain(q_BTNH, "batch", "length", "heads", None)
        k_BTKH, v_BTKH = (constrain(x, "batch", "length", "kv_heads", None) for x in (k_BTKH, v_BTKH))
        q_BTNH = constrain(q_BTNH, "attention_batch", "length", "act_heads", None)
        k_BTKH, v_BTKH = (constrain(x, "attention_batch", "length", "act_kv_heads", None) for x in (k_BTKH, v_BTKH))
        q_BTNH = apply_rope(rms_norm(q_BTNH, q_norm_H, cfg.rms_norm_eps), context.cos_BTR, context.sin_BTR)
        k_BTKH = apply_rope(rms_norm(k_BTKH, k_norm_H, cfg.rms_norm_eps), context.cos_BTR, context.sin_BTR)
        slot, mask_BTS = context.slot, context.mask_BTS
        if cached is not None and slot is not None and mask_BTS is not None and context.write_late:
            out_BTNH = attention_before_write(q_BTNH, k_BTKH, v_BTKH, cached, mask_BTS, slot)
            cached = (k_BTKH, v_BTKH)
        else:
            if cached is not None and slot is not None:
                cached = write_slots(cached, k_BTKH, v_BTKH, slot)
            if cached is not None and mask_BTS is not None:
                out_BTNH = attention(q_BTNH, *cached, mask_BTS)
            else:
                out_BTNH = causal_attention(q_BTNH, k_BTKH, v_BTKH, context.segment_ids_BT)
        out_BTNH = constrain(out_BTNH, "attention_batch", "length", "act_heads", None)
        out_BTNH = constrain(out_BTNH, "batch", "length", "heads", None)
        out_BTD = checkpoint_name(linear(out_BTNH, wo_DNH, inputs=2), "attention")
        return constrain(out_BTD, "batch", "length", "act_embed"), cached


class Mlp(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        cfg = self.config
        d, f = cfg.hidden_size, cfg.intermediate_size
        init = nn.initializers.normal(cfg.initializer_range)
        gate_FD = declare(self, "gate_proj", (f, d), ("mlp", "embed"), init)
        up_FD = declare(self, "up_proj", (f, d), ("mlp", "embed"), init)
        down_DF = declare(self, "down_proj", (d, f), ("embed", "mlp"), init)
        gate_BTF, up_BTF = (checkpoint_name(linear(x_BTD, weight_FD), "mlp") for weight_FD in (gate_FD, up_FD))
        hidden_BTF = jax.nn.silu(gate_BTF) * up_BTF
        return linear(constrain(hidden_BTF, "batch", "length", "act_mlp"), down_DF)


class MoeMlp(nn.Module):
    """Routed SwiGLU experts, see `Qwen3` for the attributes."""

    config: ModelConfig
    capacity_factor: float | None
    group_size: int
    expert_dispatch: ExpertDispatch = "einsum"

    @nn.compact
    def __call__(self, x_BTD: jax.Array, valid_BT: jax.Array) -> tuple[jax.Array, RouterStats]:
        cfg, dtype = self.config, x_BTD.dtype
        d, f, e = cfg.hidden_size, cfg.moe_intermediate_size, cfg.num_experts
        init = nn.initializers.normal(cfg.initializer_range)
        router_ED = declare(self, "router", (e, d), ROUTER_AXES, init)
        gate_up_E2FD = declare(self, "gate_up_proj", (e, 2, f, d), EXPERT_AXES[0], init)
        down_EDF = declare(self, "down_proj", (e, d, f), EXPERT_AXES[1], init)
        experts = gate_up_E2FD.astype(dtype), down_EDF.astype(dtype)

        batch, length, _ = x_BTD.shape
        if self.expert_dispatch == "ragged":
            dispatch: Dispatch = functools.partial(moe_ragged, top_k=cfg.num_experts_per_tok)
        elif self.capacity_factor is not None:
            group_size, chunks = min(self.group_size, length), num_chunks()
            if length % (group_size * chunks):
                raise ValueError(
                    f"group_size: {group_size} does not divide the sequence length {length}"
                    f"{f' in {chunks} chunks' if chunks > 1 else ''}; use a divisor"
                )
            capacity = expert_capacity(group_size, e, cfg.num_experts_per_tok, self.capacity_factor)
            dispatch = functools.partial(moe_capacity, capacity=capacity, group_size=group_size)
        else:
            logits_BTE = router_logits(x_BTD, router_ED)
            gates_BTE, chosen_BTE, stats = route(logits_BTE, cfg.num_experts_per_tok, cfg.norm_topk_prob, valid_BT)
            gates_BTE, chosen_BTE = (constrain(x, "batch", "length", None) for x in (gates_BTE, chosen_BTE))
            if not set(split_axes("routed_group")).isdisjoint(split_axes("expert")):
                return moe_exact(x_BTD, gates_BTE, experts), stats
            choices = batch * length // num_parts("routed_group", batch) * cfg.num_experts_per_tok
            if choices <= e:
                return moe_few(x_BTD, gates_BTE, experts), stats
            on_tpu = functools.partial(moe_sorted, top_k=cfg.num_experts_per_tok)
            args = (x_BTD, gates_BTE, chosen_BTE, experts)
            out_BTD = jax.lax.platform_dependent(
                *args, tpu=on_tpu, default=lambda x, gates, _, experts: moe_exact(x, gates, experts)
            )
            return out_BTD, stats
        return moe_layer(
            x_BTD,
            valid_BT,
            router_ED,
            experts,
            top_k=cfg.num_experts_per_tok,
            norm_topk_prob=cfg.norm_topk_prob,
            dispatch=dispatch,
        )


class Layer(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`; returns the router's statistics, None for a dense layer."""

    config: ModelConfig
    moe: bool
    capacity_factor: float | None
    group_size: int
    expert_dispatch: ExpertDispatch

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: Context, cached: tuple[jax.Array, jax.Array] | None = None
    ) -> tuple[jax.Array, tuple[RouterStats | None, tuple[jax.Array, jax.Array] | None]]:
        cfg = self.config
        ones = nn.initializers.ones
        scale_D = declare(self, "input_layernorm", (cfg.hidden_size,), ("norm",), ones)
        normed_BTD = rms_norm(x_BTD, scale_D, cfg.rms_norm_eps)
        attended_BTD, cached = Attention(cfg, name="self_attn")(normed_BTD, context, cached)
        x_BTD = x_BTD + attended_BTD
        scale_D = declare(self, "post_attention_layernorm", (cfg.hidden_size,), ("norm",), ones)
        normed_BTD = constrain(rms_norm(x_BTD, scale_D, cfg.rms_norm_eps), "batch", "length", "act_embed")
        stats = None
        if self.moe:
            moe = MoeMlp(cfg, self.capacity_factor, self.group_size, self.expert_dispatch, name="mlp")
            out_BTD, stats = moe(normed_BTD, context.segment_ids_BT > 0)
        else:
            out_BTD = Mlp(cfg, name="mlp")(normed_BTD)
        return constrain(x_BTD + out_BTD, "batch", "length", "act_embed"), (stats, cached)
