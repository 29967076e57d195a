"""Mixture of experts: router, dense einsum dispatch with capacity, dropless and exact modes (report, section 2).

Departures from GShard (Lepikhin et al. 2020), whose dispatch this is:
1. An expert's places go to tokens in their order, not to all first choices before all second ones: whether a token is
   dropped then depends on earlier tokens only, as everything else in a causal model does.
2. Gate weights are not renormalised after a drop: the dropped expert's share is missing, the others' are unchanged.

Shapes: B batch, T tokens, G groups, S tokens of a group, E experts, K experts per token, C places of an expert for one
group, N tokens of all rows, R (token, choice) pairs, D hidden_size, F moe_intermediate_size. Inside `moe_layer` these
are one device's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sharding import AXIS_RULES, partition_spec, split_axes

Dispatch = Callable[..., tuple[jax.Array, jax.Array]]
Experts = tuple[jax.Array, jax.Array, jax.Array]  # gate_EFD, up_EFD, down_EDF
ROUTER_AXES = ("router", "embed")
EXPERT_AXES = (("expert", "mlp", "embed"), ("expert", "mlp", "embed"), ("expert", "embed", "mlp"))


@struct.dataclass
class RouterStats:
    """What one router did with each row of a batch, as sums, so that rows and batches add up exactly. Padding is left
    out.

    counts_BE: (token, choice) pairs sent to each expert, before any drop.
    prob_sum_BE: softmax probabilities summed over tokens; the balance loss has its gradient from here.
    z_sum_B: squared logsumexp of the logits summed over tokens; the z-loss has its gradient from here.
    entropy_sum_B: entropy of the softmax in nats, summed over tokens.
    dropped_B: pairs that found no place.
    tokens_B: tokens routed.
    """

    counts_BE: jax.Array
    prob_sum_BE: jax.Array
    z_sum_B: jax.Array
    entropy_sum_B: jax.Array
    dropped_B: jax.Array
    tokens_B: jax.Array


def router_logits(x_BTD: jax.Array, router_ED: jax.Array) -> jax.Array:
    """[B, T, E] float32."""
    # HIGHEST: a TPU would otherwise multiply float32 in one bfloat16 pass, and near ties would route differently.
    x_BTD, router_ED = x_BTD.astype(jnp.float32), router_ED.astype(jnp.float32)
    return jnp.einsum("BTD,ED->BTE", x_BTD, router_ED, precision=jax.lax.Precision.HIGHEST)


def route(
    logits_BTE: jax.Array, top_k: int, norm_topk_prob: bool, valid_BT: jax.Array
) -> tuple[jax.Array, jax.Array, RouterStats]:
    """Softmax over all experts, then the top k of them.

    Returns:
      gates_BTE: weight of each expert in float32, 0 where it was not chosen.
      chosen_BTE: bool, at most K true per token, none for padding (`valid_BT` false).
      stats: with `dropped_B` 0.
    """
    logits_BTE = logits_BTE.astype(jnp.float32)
    valid_BT1 = valid_BT[..., None]
    z_BT1 = jax.nn.logsumexp(logits_BTE, axis=-1, keepdims=True)
    probs_BTE = jnp.exp(logits_BTE - z_BT1)
    _, experts_BTK = jax.lax.top_k(jax.lax.stop_gradient(probs_BTE), top_k)
    chosen_BTE = (experts_BTK[..., None] == jnp.arange(probs_BTE.shape[-1])).any(axis=-2) & valid_BT1
    gates_BTE = jnp.where(chosen_BTE, probs_BTE, 0)
    if norm_topk_prob:
        gates_BTE /= jnp.where(valid_BT1, gates_BTE.sum(axis=-1, keepdims=True), 1)
    entropy_BT = z_BT1[..., 0] - (probs_BTE * logits_BTE).sum(axis=-1)
    stats = RouterStats(
        counts_BE=chosen_BTE.sum(axis=1, dtype=jnp.float32),
        prob_sum_BE=jnp.where(valid_BT1, probs_BTE, 0).sum(axis=1),
        z_sum_B=jnp.where(valid_BT, jnp.square(z_BT1[..., 0]), 0).sum(axis=1),
        entropy_sum_B=jax.lax.stop_gradient(jnp.where(valid_BT, entropy_BT, 0).sum(axis=1)),
        dropped_B=jnp.zeros_like(z_BT1[:, 0, 0]),
        tokens_B=valid_BT.sum(axis=1, dtype=jnp.float32),
    )
    return gates_BTE, chosen_BTE, stats


def moe_layer(
    x_BTD: jax.Array,
    valid_BT: jax.Array,
    router_ED: jax.Array,
    experts: Experts,
    *,
    top_k: int,
    norm_topk_prob: bool,
    dispatch: Dispatch,
) -> tuple[jax.Array, RouterStats]:
    """Router and experts, `([B, T, D], stats)`; `dispatch` is `moe_capacity` or `moe_ragged` with its settings.

    On a mesh all of it is one `shard_map`: a device routes its own tokens, so that nothing but the tokens sent to
    experts and the weights ever moves. The tokens of a row that a device holds are whole groups.
    """
    local = functools.partial(_moe_local, top_k=top_k, norm_topk_prob=norm_topk_prob, dispatch=dispatch)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(x_BTD, valid_BT, router_ED, experts)
    names = (("batch", "length", None), ("batch", "length"), ROUTER_AXES, EXPERT_AXES)
    args = (x_BTD, valid_BT, router_ED, experts)
    specs = jax.tree.map(lambda x, n: partition_spec(n, mesh, x.shape), args, names)
    rows = partition_spec(("batch",), mesh)
    return jax.shard_map(local, in_specs=specs, out_specs=(specs[0], rows))(*args)


def _moe_local(
    x_BTD: jax.Array,
    valid_BT: jax.Array,
    router_ED: jax.Array,
    experts: Experts,
    *,
    top_k: int,
    norm_topk_prob: bool,
    dispatch: Dispatch,
) -> tuple[jax.Array, RouterStats]:
    """`moe_layer` on one device: tokens of its own, its part of the weights."""
    experts = jax.tree.map(_whole_embed, experts, EXPERT_AXES)
    logits_BTE = router_logits(x_BTD, _whole_embed(router_ED, ROUTER_AXES))
    gates_BTE, chosen_BTE, stats = route(logits_BTE, top_k, norm_topk_prob, valid_BT)
    # Here and not where tokens meet weights: the gradient is then summed over the axis for D numbers a token, not K D.
    x_BTD = _vary(x_BTD, split_axes("mlp"))
    out_BTD, dropped_B = dispatch(x_BTD, gates_BTE, chosen_BTE, experts)
    out_BTD = jax.lax.psum(out_BTD, split_axes("mlp"))
    stats = dataclasses.replace(stats, dropped_B=dropped_B)
    return out_BTD, jax.tree.map(lambda sum_B: jax.lax.psum(sum_B, split_axes("length")), stats)


def _whole_embed(weight: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """A weight with these logical axes, "embed" gathered. Its gradient is then scattered over that axis, and only after
    that summed over the others that the tokens are split over."""
    split = [axis for name in names for axis in split_axes(name)]
    weight = _vary(weight, tuple(axis for axis in split_axes("batch") + split_axes("length") if axis not in split))
    axes = split_axes("embed")
    return jax.lax.all_gather(weight, axes, axis=names.index("embed"), tiled=True) if axes else weight


def _vary(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`x`, from here on taken to differ along these mesh axes: its gradient is summed over them here."""
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def expert_capacity(group_size: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
    """Places per expert and group: ceil(S * K / E * capacity_factor), at most S."""
    return min(group_size, math.ceil(group_size * top_k / num_experts * capacity_factor))


def dispatch_mask(chosen_GSE: jax.Array, capacity: int) -> jax.Array:
    """[G, S, E, C] bool: token s of group g sits at place c of expert e. Tokens beyond the capacity are dropped."""
    place_GSE = jnp.cumsum(chosen_GSE, axis=1, dtype=jnp.int32) - 1
    return (place_GSE[..., None] == jnp.arange(capacity)) & chosen_GSE[..., None]


def expert_swiglu(x_EGCD: jax.Array, experts: Experts) -> jax.Array:
    """Each expert's SwiGLU on its own tokens; [E, G, C, D]."""
    gate_EFD, up_EFD, down_EDF = experts
    gate = jnp.einsum("EGCD,EFD->EGCF", x_EGCD, gate_EFD)
    up = jnp.einsum("EGCD,EFD->EGCF", x_EGCD, up_EFD)
    return jnp.einsum("EGCF,EDF->EGCD", _swiglu(gate, up), down_EDF)


@jax.custom_vjp
def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return _plain_swiglu(gate, up)


def _plain_swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


def _swiglu_bwd(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Kept whole: a CPU would otherwise compute them again, transposed and number by number, for the weights' gradients.
    return jax.lax.optimization_barrier(jax.vjp(_plain_swiglu, *saved)[1](grad))


_swiglu.defvjp(lambda gate, up: (_plain_swiglu(gate, up), (gate, up)), _swiglu_bwd)


def moe_capacity(
    x_BTD: jax.Array,
    gates_BTE: jax.Array,
    chosen_BTE: jax.Array,
    experts: Experts,
    *,
    capacity: int,
    group_size: int,
) -> tuple[jax.Array, jax.Array]:
    """Dense einsum dispatch: `([B, T, D], pairs dropped of each row)`. `group_size` must divide T.

    Inside `moe_layer` on a mesh, `experts` are this device's and tokens travel to the others' by all-to-all.
    """
    batch, length, width = x_BTD.shape
    num_experts = gates_BTE.shape[-1]
    groups = batch * (length // group_size)
    x_GSD = x_BTD.reshape(groups, group_size, width)
    gates_GSE = gates_BTE.reshape(groups, group_size, num_experts).astype(x_BTD.dtype)
    chosen_GSE = chosen_BTE.reshape(groups, group_size, num_experts)
    over_GE = jnp.maximum(chosen_GSE.sum(axis=1, dtype=jnp.float32) - capacity, 0)
    dispatch_GSEC = dispatch_mask(chosen_GSE, capacity).astype(x_BTD.dtype)
    x_EGCD = _to_places(dispatch_GSEC, x_GSD)
    y_EGCD = _from_experts(expert_swiglu(_to_experts(x_EGCD), experts))
    # Weighted at their places, not by a mask of weights: one product less in the backward pass.
    gates_EGC = jnp.einsum("GSEC,GSE->EGC", dispatch_GSEC, gates_GSE)
    y_GSD = _from_places(dispatch_GSEC, y_EGCD * gates_EGC[..., None])
    return y_GSD.reshape(x_BTD.shape), over_GE.reshape(batch, -1).sum(axis=1)


# Each of the two is the other's transpose. Said here, it is computed in the same order of axes: by its own rule, jax
# would transpose the larger operand first.


def _to_places(dispatch_GSEC: jax.Array, x_GSD: jax.Array) -> jax.Array:
    """[E, G, C, D]: at each place its token, zeros where there is none."""
    return jax.custom_derivatives.linear_call(_gather, _scatter, dispatch_GSEC, x_GSD)


def _from_places(dispatch_GSEC: jax.Array, y_EGCD: jax.Array) -> jax.Array:
    """[G, S, D]: for each token the sum of its places."""
    return jax.custom_derivatives.linear_call(_scatter, _gather, dispatch_GSEC, y_EGCD)


def _gather(dispatch_GSEC: jax.Array, x_GSD: jax.Array) -> jax.Array:
    return jnp.einsum("GSEC,GSD->EGCD", dispatch_GSEC, x_GSD)


def _scatter(dispatch_GSEC: jax.Array, y_EGCD: jax.Array) -> jax.Array:
    return jnp.einsum("GSEC,EGCD->GSD", dispatch_GSEC, y_EGCD)


def _to_experts(x_EGCD: jax.Array) -> jax.Array:
    """From all experts' places for own groups to own experts' places for the groups of all devices that share them."""
    axes = split_axes("expert")
    return jax.lax.all_to_all(x_EGCD, axes, split_axis=0, concat_axis=1, tiled=True) if axes else x_EGCD


def _from_experts(y_EGCD: jax.Array) -> jax.Array:
    """The way back of `_to_experts`."""
    axes = split_axes("expert")
    return jax.lax.all_to_all(y_EGCD, axes, split_axis=1, concat_axis=0, tiled=True) if axes else y_EGCD


def moe_ragged(
    x_BTD: jax.Array, gates_BTE: jax.Array, chosen_BTE: jax.Array, experts: Experts, *, top_k: int
) -> tuple[jax.Array, jax.Array]:
    """Dropless dispatch: pairs sorted by expert, one grouped product for each table; `([B, T, D], zeros [B])`.

    Inside `moe_layer` on a mesh, the tokens of all devices that share the experts are gathered, each device works for
    its own experts, and the sums are scattered back: D numbers a token and device each way, whatever K. The buffer has
    room for the worst case, N = gathered tokens times min(K, own experts) rows. A CPU has no grouped product (XLA
    multiplies every row with every expert there): `moe_exact` is the faster dropless form on one.
    """
    axes = split_axes("expert")
    gate_EFD, up_EFD, down_EDF = experts
    num_local, width = gate_EFD.shape[0], x_BTD.shape[-1]
    x_ND = _gather_rows(x_BTD.reshape(-1, width), axes)
    first = jax.lax.axis_index(axes) * num_local if axes else 0
    gates_NE, chosen_NE = (
        jax.lax.dynamic_slice_in_dim(_gather_rows(x.reshape(-1, x.shape[-1]), axes), first, num_local, axis=1)
        for x in (gates_BTE, chosen_BTE)
    )
    num_tokens = x_ND.shape[0]
    rows = num_tokens * min(top_k, num_local)
    # Expert-major order is the order wanted: no sort.
    pair_R = jnp.flatnonzero(chosen_NE.T, size=rows, fill_value=0)
    used_R1 = (jnp.arange(rows) < chosen_NE.sum())[:, None]
    token_R, expert_R = pair_R % num_tokens, pair_R // num_tokens
    sizes_E = chosen_NE.sum(axis=0, dtype=jnp.int32)

    x_RD = jnp.where(used_R1, x_ND[token_R], 0)
    gate_RF, up_RF = (jax.lax.ragged_dot(x_RD, table.swapaxes(1, 2), sizes_E) for table in (gate_EFD, up_EFD))
    y_RD = jax.lax.ragged_dot(jax.nn.silu(gate_RF) * up_RF, down_EDF.swapaxes(1, 2), sizes_E)
    weight_R1 = gates_NE[token_R, expert_R].astype(x_BTD.dtype)[:, None]
    # What a backend leaves in rows of no expert is undefined.
    out_ND = jnp.zeros_like(x_ND).at[token_R].add(jnp.where(used_R1, y_RD * weight_R1, 0))
    out_ND = jax.lax.psum_scatter(out_ND, axes, scatter_dimension=0, tiled=True) if axes else out_ND
    return out_ND.reshape(x_BTD.shape), jnp.zeros_like(gates_BTE[:, 0, 0])


def _gather_rows(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.all_gather(x, axes, axis=0, tiled=True) if axes else x


def moe_exact(x_BTD: jax.Array, gates_BTE: jax.Array, experts: Experts) -> jax.Array:
    """Every expert on every token, weighted by its gate; [B, T, D]. Nothing is dropped."""
    gate_EFD, up_EFD, down_EDF = experts
    gate = jnp.einsum("BTD,EFD->BTEF", x_BTD, gate_EFD)
    up = jnp.einsum("BTD,EFD->BTEF", x_BTD, up_EFD)
    hidden_BTEF = jax.nn.silu(gate) * up * gates_BTE.astype(x_BTD.dtype)[..., None]
    return jnp.einsum("BTEF,EDF->BTD", hidden_BTEF, down_EDF)


@jax.custom_jvp
def moe_few(x_BTD: jax.Array, gates_BTE: jax.Array, experts: Experts) -> jax.Array:
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


def _used_experts(x_BTD: jax.Array, gates_BTE: jax.Array, experts: Experts) -> jax.Array:
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
