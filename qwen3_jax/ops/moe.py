"""Mixture of experts: router, dense einsum dispatch with capacity, exact mode (report, section 2).

Departures from GShard (Lepikhin et al. 2020), whose dispatch this is:
1. An expert's places go to tokens in their order, not to all first choices before all second ones: whether a token is
   dropped then depends on earlier tokens only, as everything else in a causal model does.
2. Gate weights are not renormalised after a drop: the dropped expert's share is missing, the others' are unchanged.

Shapes: B batch, T tokens, G groups, S tokens of a group, E experts, K experts per token, C places of an expert for one
group, D hidden_size, F moe_intermediate_size.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sharding import AXIS_RULES, constrain, partition_spec


@struct.dataclass
class RouterStats:
    """What one router did with one batch, as sums, so that batches add up exactly. Padding is left out.

    counts_E: (token, choice) pairs sent to each expert, before any drop.
    prob_sum_E: softmax probabilities summed over tokens; the balance loss has its gradient from here.
    dropped: pairs that found no place.
    entropy_sum: entropy of the softmax in nats, summed over tokens.
    tokens: tokens routed.
    """

    counts_E: jax.Array
    prob_sum_E: jax.Array
    dropped: jax.Array
    entropy_sum: jax.Array
    tokens: jax.Array


def route(
    logits_BTE: jax.Array, top_k: int, norm_topk_prob: bool, valid_BT: jax.Array
) -> tuple[jax.Array, jax.Array, RouterStats]:
    """Softmax over all experts, then the top k of them.

    Returns:
      gates_BTE: weight of each expert in float32, 0 where it was not chosen.
      chosen_BTE: bool, at most K true per token, none for padding (`valid_BT` false).
      stats: with `dropped` 0.
    """
    probs_BTE = jax.nn.softmax(logits_BTE.astype(jnp.float32), axis=-1)
    weights_BTK, experts_BTK = jax.lax.top_k(probs_BTE, top_k)
    if norm_topk_prob:
        weights_BTK /= weights_BTK.sum(axis=-1, keepdims=True)
    one_hot_BTKE = jax.nn.one_hot(experts_BTK, logits_BTE.shape[-1]) * valid_BT[..., None, None]
    gates_BTE = jnp.einsum("BTK,BTKE->BTE", weights_BTK, one_hot_BTKE)
    chosen_BTE = one_hot_BTKE.sum(axis=2) > 0
    log_probs_BTE = jax.nn.log_softmax(logits_BTE.astype(jnp.float32), axis=-1)
    entropy_BT = -(probs_BTE * log_probs_BTE).sum(axis=-1)
    stats = RouterStats(
        counts_E=chosen_BTE.sum(axis=(0, 1), dtype=jnp.float32),
        prob_sum_E=jnp.einsum("BTE,BT->E", probs_BTE, valid_BT.astype(jnp.float32)),
        dropped=jnp.zeros((), jnp.float32),
        entropy_sum=jax.lax.stop_gradient(jnp.where(valid_BT, entropy_BT, 0).sum()),
        tokens=valid_BT.sum(dtype=jnp.float32),
    )
    return gates_BTE, chosen_BTE, stats


def expert_capacity(group_size: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
    """Places per expert and group: ceil(S * K / E * capacity_factor), at most S."""
    return min(group_size, math.ceil(group_size * top_k / num_experts * capacity_factor))


def dispatch_mask(chosen_GSE: jax.Array, capacity: int) -> jax.Array:
    """[G, S, E, C] bool: token s of group g sits at place c of expert e. Tokens beyond the capacity are dropped."""
    place_GSE = jnp.cumsum(chosen_GSE, axis=1, dtype=jnp.int32) - 1
    return (place_GSE[..., None] == jnp.arange(capacity)) & chosen_GSE[..., None]


def expert_swiglu(x_EGCD: jax.Array, gate_EFD: jax.Array, up_EFD: jax.Array, down_EDF: jax.Array) -> jax.Array:
    """Each expert's SwiGLU on its own tokens; [E, G, C, D]."""
    gate = jnp.einsum("EGCD,EFD->EGCF", x_EGCD, gate_EFD)
    up = jnp.einsum("EGCD,EFD->EGCF", x_EGCD, up_EFD)
    hidden = constrain(jax.nn.silu(gate) * up, "expert", "routed_group", "capacity", "act_mlp")
    return jnp.einsum("EGCF,EDF->EGCD", hidden, down_EDF)


def moe_capacity(
    x_BTD: jax.Array,
    gates_BTE: jax.Array,
    chosen_BTE: jax.Array,
    experts: tuple[jax.Array, jax.Array, jax.Array],
    *,
    capacity: int,
    group_size: int,
) -> tuple[jax.Array, jax.Array]:
    """Dense einsum dispatch: `([B, T, D], number of dropped pairs)`. `group_size` must divide T."""
    batch, length, width = x_BTD.shape
    num_experts = gates_BTE.shape[-1]
    groups = batch * (length // group_size)
    x_GSD = constrain(x_BTD.reshape(groups, group_size, width), "group", None, "act_embed")
    gates_GSE = gates_BTE.reshape(groups, group_size, num_experts)
    chosen_GSE = chosen_BTE.reshape(groups, group_size, num_experts)
    dispatch_GSEC = dispatch_mask(chosen_GSE, capacity)
    dropped = chosen_GSE.sum(dtype=jnp.float32) - dispatch_GSEC.sum(dtype=jnp.float32)
    dispatch_GSEC = constrain(dispatch_GSEC.astype(x_BTD.dtype), "group", None, None, None)
    combine_GSEC = gates_GSE.astype(x_BTD.dtype)[..., None] * dispatch_GSEC

    # Two constraints each way, from the group layout to the expert layout and back: XLA then moves the tokens by
    # all-to-all; with one of them only, it gathers.
    x_EGCD = jnp.einsum("GSEC,GSD->EGCD", dispatch_GSEC, x_GSD)
    x_EGCD = constrain(x_EGCD, None, "group", "capacity", "act_embed")
    x_EGCD = constrain(x_EGCD, "expert", "routed_group", "capacity", "act_embed")
    y_EGCD = expert_swiglu(x_EGCD, *experts)
    y_EGCD = constrain(y_EGCD, "expert", "routed_group", "capacity", "act_embed")
    y_EGCD = constrain(y_EGCD, None, "group", "capacity", "act_embed")
    y_GSD = jnp.einsum("EGCD,GSEC->GSD", y_EGCD, combine_GSEC)
    return y_GSD.reshape(x_BTD.shape), dropped


def moe_exact(x_BTD: jax.Array, gates_BTE: jax.Array, experts: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    """Every expert on every token, weighted by its gate; [B, T, D]. Nothing is dropped."""
    gate_EFD, up_EFD, down_EDF = experts
    gate = jnp.einsum("BTD,EFD->BTEF", x_BTD, gate_EFD)
    up = jnp.einsum("BTD,EFD->BTEF", x_BTD, up_EFD)
    hidden_BTEF = jax.nn.silu(gate) * up * gates_BTE.astype(x_BTD.dtype)[..., None]
    return jnp.einsum("BTEF,EDF->BTD", hidden_BTEF, down_EDF)


@jax.custom_jvp
def moe_few(x_BTD: jax.Array, gates_BTE: jax.Array, experts: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    """`moe_exact` for few tokens: each expert that one of them uses is read once, the others not at all.

    On a mesh every device goes through its own experts; the weights' "embed" axis must not be split. Derivatives are
    those of `moe_exact`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _used_experts(x_BTD, gates_BTE, experts).astype(x_BTD.dtype)
    x_spec = partition_spec(("routed_group", None, None), mesh, x_BTD.shape)
    gates_spec = partition_spec(("routed_group", None, "expert"), mesh, gates_BTE.shape)
    in_spec, out_spec = (partition_spec(names, mesh) for names in (("expert", "mlp", None), ("expert", None, "mlp")))

    def local(*args: Any) -> jax.Array:
        return jax.lax.psum(_used_experts(*args), AXIS_RULES["expert"] + AXIS_RULES["mlp"])

    specs = (x_spec, gates_spec, (in_spec, in_spec, out_spec))
    out_BTD = jax.shard_map(local, in_specs=specs, out_specs=x_spec, check_vma=False)(x_BTD, gates_BTE, experts)
    return out_BTD.astype(x_BTD.dtype)


@moe_few.defjvp
def _moe_few_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return jax.jvp(moe_exact, primals, tangents)


def _used_experts(x_BTD: jax.Array, gates_BTE: jax.Array, experts: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    """[B, T, D] float32: a loop over the experts with a gate that is not 0."""
    used_E = (gates_BTE != 0).any(axis=(0, 1))
    order_E = jnp.argsort(~used_E)
    matmul = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def add_expert(i: jax.Array, out_BTD: jax.Array) -> jax.Array:
        # Nothing done to a whole table (a conversion of its type) may be taken out of the loop.
        tables, expert = jax.lax.optimization_barrier((experts, order_E[i]))
        gate_FD, up_FD, down_DF = (jax.lax.dynamic_index_in_dim(table, expert, keepdims=False) for table in tables)
        gates_BT1 = jax.lax.dynamic_slice_in_dim(gates_BTE, expert, 1, axis=2).astype(x_BTD.dtype)
        gate_BTF, up_BTF = matmul("BTD,FD->BTF", x_BTD, gate_FD), matmul("BTD,FD->BTF", x_BTD, up_FD)
        hidden_BTF = (jax.nn.silu(gate_BTF) * up_BTF).astype(x_BTD.dtype) * gates_BT1
        return out_BTD + matmul("BTF,DF->BTD", hidden_BTF, down_DF)

    return jax.lax.fori_loop(0, used_E.sum(), add_expert, jnp.zeros(x_BTD.shape, jnp.float32))
