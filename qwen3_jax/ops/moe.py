"""Mixture of experts: router, dense einsum dispatch with capacity, dropless and exact modes (report, section 2).

The dispatch is GShard's (Lepikhin et al. 2020), with two departures:
1. An expert's slots are filled in the order of the tokens, not with all first choices before all second choices.
   Whether a token is dropped then depends on earlier tokens only, as everything in a causal model must.
2. Gate weights are not renormalised after a drop. The dropped expert's share is missing; the others are unchanged.

Shapes: B batch, T tokens, G groups, S tokens of a group, E experts, K experts per token, C slots of an expert for one
group (its capacity), P = C * G, N tokens of all rows, R (token, expert) pairs, D hidden_size, F moe_intermediate_size,
J = 2 F. Inside `moe_layer` the sizes are those of one device. The gate and up projections are one table [E, 2, F, D]:
one product instead of two, and fewer, larger collectives.
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
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jax.sharding import PartitionSpec

from sharding import partition_spec, spec_axes, split_axes

Dispatch = Callable[..., tuple[jax.Array, jax.Array]]
Experts = tuple[jax.Array, jax.Array]  # gate_up_E2FD, down_EDF
ROUTER_AXES = ("router", "router_embed")
_LANES = 128  # lanes of a TPU tile; the kernels need a number of rows that this divides
EXPERT_AXES = (("expert", "gate_up", "mlp", "expert_embed"), ("expert", "expert_embed", "mlp"))


@struct.dataclass
class RouterStats:
    """Statistics of one router for each row of a batch. They are sums without padding, so that rows, devices and
    micro-batches add up exactly.

    `counts` and `prob_sum` are [B, E], the others [B]. Those of a model have a leading dim of layers, and sums over rows
    have no B.

    counts: (token, expert) pairs routed to each expert, before any drop.
    prob_sum: softmax probabilities summed over tokens; the gradient of the balance loss flows through it.
    z_sum: squared logsumexp of the logits summed over tokens; the gradient of the z-loss flows through it.
    entropy_sum: entropy of the softmax in nats, summed over tokens.
    dropped: pairs that were dropped, their expert's slots being full.
    tokens: tokens routed.
    """

    counts: jax.Array
    prob_sum: jax.Array
    z_sum: jax.Array
    entropy_sum: jax.Array
    dropped: jax.Array
    tokens: jax.Array


def router_logits(x_BTD: jax.Array, router_ED: jax.Array) -> jax.Array:
    """[B, T, E] float32."""
    # HIGHEST: by default a TPU multiplies float32 in one bfloat16 pass, and near ties would be routed differently.
    x_BTD, router_ED = x_BTD.astype(jnp.float32), router_ED.astype(jnp.float32)
    return jnp.einsum("BTD,ED->BTE", x_BTD, router_ED, precision=jax.lax.Precision.HIGHEST)


def route(
    logits_BTE: jax.Array, top_k: int, norm_topk_prob: bool, valid_BT: jax.Array
) -> tuple[jax.Array, jax.Array, RouterStats]:
    """Softmax over all experts, then the top k of them.

    Returns:
      gates_BTE: weight of each expert in float32, 0 where it was not chosen.
      chosen_BTE: bool, at most K true per token, none for padding (`valid_BT` false).
      stats: with `dropped` 0.
    """
    logits_BTE = logits_BTE.astype(jnp.float32)
    valid_BT1 = valid_BT[..., None]
    z_BT1 = jax.nn.logsumexp(logits_BTE, axis=-1, keepdims=True)
    probs_BTE = jnp.exp(logits_BTE - z_BT1)
    _, experts_BTK = jax.lax.top_k(jax.lax.stop_gradient(probs_BTE), top_k)
    chosen_BTE = (experts_BTK[..., None] == jnp.arange(probs_BTE.shape[-1])[None, None, None]).any(axis=-2) & valid_BT1
    gates_BTE = jnp.where(chosen_BTE, probs_BTE, 0)
    if norm_topk_prob:
        gates_BTE /= jnp.where(valid_BT1, gates_BTE.sum(axis=-1, keepdims=True), 1)
    entropy_BT = z_BT1[..., 0] - (probs_BTE * logits_BTE).sum(axis=-1)
    stats = RouterStats(
        counts=chosen_BTE.sum(axis=1, dtype=jnp.float32),
        prob_sum=jnp.where(valid_BT1, probs_BTE, 0).sum(axis=1),
        z_sum=jnp.where(valid_BT, jnp.square(z_BT1[..., 0]), 0).sum(axis=1),
        entropy_sum=jax.lax.stop_gradient(jnp.where(valid_BT, entropy_BT, 0).sum(axis=1)),
        dropped=jnp.zeros_like(z_BT1[:, 0, 0]),
        tokens=valid_BT.sum(axis=1, dtype=jnp.float32),
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

    On a mesh this is one `shard_map`: each device routes its own tokens, so that only weights and the tokens sent to
    experts are communicated. A device holds complete groups: `group_size` divides its tokens of a row.
    """
    args = (x_BTD, valid_BT, router_ED, experts)

    def local(
        x_BTD: jax.Array, valid_BT: jax.Array, router_ED: jax.Array, experts: Experts
    ) -> tuple[jax.Array, RouterStats]:
        """One device, with its own tokens and its shards of the weights."""
        gate_up_E2FD, down_EDF = (_sum_gradient(table, n) for table, n in zip(experts, EXPERT_AXES, strict=True))
        logits_BTE = router_logits(x_BTD, _all_gather_fsdp(_sum_gradient(router_ED, ROUTER_AXES), ROUTER_AXES))
        gates_BTE, chosen_BTE, stats = route(logits_BTE, top_k, norm_topk_prob, valid_BT)
        # The transpose of `_vary` is an all-reduce over `tensor`. Placed here it adds up D numbers a token; after the
        # dispatch it would be K * D.
        x_BTD = _vary(x_BTD, split_axes("mlp"))
        x_BTD, gate_up_E2FD = _join_gradients((x_BTD, gate_up_E2FD))
        experts = _all_gather_fsdp(gate_up_E2FD, EXPERT_AXES[0]), _all_gather_fsdp(down_EDF, EXPERT_AXES[1])
        out_BTD, dropped_B = dispatch(x_BTD, gates_BTE, chosen_BTE, experts)
        out_BTD = jax.lax.psum(out_BTD, split_axes("mlp"))
        stats = dataclasses.replace(stats, dropped=dropped_B)
        # With a context axis each device saw a part of every row: this psum makes the sums those of the complete rows.
        return out_BTD, jax.tree.map(lambda sum_B: jax.lax.psum(sum_B, split_axes("length")), stats)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(*args)
    names = (("batch", "length", None), ("batch", "length"), ROUTER_AXES, EXPERT_AXES)
    specs = jax.tree.map(lambda x, n: partition_spec(n, mesh, x.shape), args, names)
    rows = partition_spec(("batch",), mesh)
    return jax.shard_map(local, in_specs=specs, out_specs=(specs[0], rows))(*args)


def _sum_gradient(weight: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """`weight`, with logical axes `names`. Its gradient is summed here over the mesh axes that shard tokens and do not
    shard the weight. (Over the FSDP axes, the transpose of the all-gather sums it.)"""
    own = [axis for name in names for axis in split_axes(name)]
    return _vary(weight, tuple(axis for axis in split_axes("batch") + split_axes("length") if axis not in own))


@jax.custom_vjp
def _join_gradients(xs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """`xs`. In the backward pass no gradient of them is used before all are computed.

    The gradient of the largest table is therefore computed early, and its reduce-scatter overlaps the rest of the
    layer's backward pass. XLA:TPU would schedule it last, with no computation left to hide it.
    """
    return xs


_join_gradients.defvjp(lambda xs: (xs, None), lambda _, grads: (jax.lax.optimization_barrier(grads),))


def _all_gather_fsdp(weight: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """`weight` all-gathered over the FSDP axes; still sharded over `expert` and `tensor`. The transpose is a
    reduce-scatter of the gradient."""
    axes = split_axes("embed")
    if not axes:
        return weight
    where = next(i for i, name in enumerate(names) if set(axes) <= set(split_axes(name)))
    return jax.lax.all_gather(weight, axes, axis=where, tiled=True)


def _vary(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`x`, marked as varying over these mesh axes; the transpose sums the gradient over them."""
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def expert_capacity(group_size: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
    """Slots per expert and group: ceil(S * K / E * capacity_factor), at most S."""
    return min(group_size, math.ceil(group_size * top_k / num_experts * capacity_factor))


def dispatch_mask(chosen_GSE: jax.Array, capacity: int) -> jax.Array:
    """[G, S, E, C] bool: token s of group g is in slot c of expert e. Tokens beyond the capacity are dropped.

    For one expert with C = 2, chosen by tokens 0, 2 and 3 of a group of four:

        chosen  slot   mask over c = 0, 1
        1       0      1 0
        0       0      0 0    not chosen
        1       1      0 1
        1       2      0 0    dropped: no slot 2
    """
    # A cumulative sum written as a product with a triangle of ones, which is faster on a TPU. It is exact: the terms
    # are 0 and 1, and float32 holds every integer up to 2**24.
    up_to_ST = jnp.tri(chosen_GSE.shape[1], dtype=jnp.float32)
    slot_GSE = jnp.einsum("ST,GTE->GSE", up_to_ST, chosen_GSE.astype(jnp.float32)).astype(jnp.int32) - 1
    return (slot_GSE[..., None] == jnp.arange(capacity)[None, None, None]) & chosen_GSE[..., None]


def expert_swiglu(x_EPD: jax.Array, gates_EP: jax.Array, experts: Experts) -> jax.Array:
    """Each expert's SwiGLU on the tokens in its slots, times their gates; [E, P, D]."""
    gate_up_E2FD, down_EDF = experts
    inner_EPJ = checkpoint_name(jnp.einsum("EPD,EJD->EPJ", x_EPD, _joined(gate_up_E2FD)), "mlp")
    gate_EPF, up_EPF = jnp.split(inner_EPJ, 2, axis=-1)
    return jnp.einsum("EPF,EDF->EPD", _swiglu(gate_EPF, up_EPF) * gates_EP[..., None], down_EDF)


def _joined(gate_up_E2FD: jax.Array) -> jax.Array:
    """[E, J, D]: gate's rows above up's."""
    return gate_up_E2FD.reshape(gate_up_E2FD.shape[0], -1, gate_up_E2FD.shape[-1])


@jax.custom_vjp
def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return _plain_swiglu(gate, up)


def _plain_swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


def _swiglu_bwd(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    # The barrier makes XLA store both gradients. Without it, the CPU backend fuses them into the weights' gradients:
    # they are then recomputed there element by element, in transposed order.
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
    """Dense einsum dispatch: `([B, T, D], number of dropped pairs per row)`. `group_size` must divide T.

    Inside `moe_layer` on a mesh, `experts` are this device's; tokens reach the experts of other devices by all-to-all.
    """
    batch, length, width = x_BTD.shape
    num_experts = gates_BTE.shape[-1]
    groups = batch * (length // group_size)
    x_GSD = x_BTD.reshape(groups, group_size, width)
    gates_GSE = gates_BTE.reshape(groups, group_size, num_experts).astype(x_BTD.dtype)
    chosen_GSE = chosen_BTE.reshape(groups, group_size, num_experts)
    over_GE = jnp.maximum(chosen_GSE.sum(axis=1, dtype=jnp.float32) - capacity, 0)
    dispatch_GSEC = dispatch_mask(chosen_GSE, capacity).astype(x_BTD.dtype)
    x_EPD = checkpoint_name(_to_experts(_to_slots(dispatch_GSEC, x_GSD)), "dispatch")
    # Gates multiply the slots, before the down projection. With a combine mask of gates after it (as in GShard), the
    # gates' gradient would need the down projection's output, to be stored or recomputed in the backward pass.
    gates_ECG = jnp.einsum("GSEC,GSE->ECG", dispatch_GSEC, gates_GSE)
    gates_EP = _to_experts(gates_ECG.reshape(num_experts, -1))
    y_EPD = _from_experts(expert_swiglu(x_EPD, gates_EP, experts))
    y_GSD = _from_slots(dispatch_GSEC, y_EPD)
    return y_GSD.reshape(x_BTD.shape), over_GE.reshape(batch, -1).sum(axis=1)


# `_gather` and `_scatter` are linear and transposes of each other. Registering the pair avoids JAX's rule, which would
# transpose the larger operand. The slots of all groups form one dim P, groups innermost: a TPU multiplies two long dims
# best, and C alone would not fill its tiles.


def _to_slots(dispatch_GSEC: jax.Array, x_GSD: jax.Array) -> jax.Array:
    """[E, P, D]: the token in each slot, zeros in empty slots."""
    return jax.custom_derivatives.linear_call(_gather, _scatter, dispatch_GSEC, x_GSD)


def _from_slots(dispatch_GSEC: jax.Array, y_EPD: jax.Array) -> jax.Array:
    """[G, S, D]: for each token, the sum over its slots."""
    return jax.custom_derivatives.linear_call(_scatter, _gather, dispatch_GSEC, y_EPD)


def _gather(dispatch_GSEC: jax.Array, x_GSD: jax.Array) -> jax.Array:
    x_GECD = jnp.einsum("GSEC,GSD->GECD", dispatch_GSEC, x_GSD)
    _, experts, _, width = x_GECD.shape
    return x_GECD.transpose(1, 2, 0, 3).reshape(experts, -1, width)


def _scatter(dispatch_GSEC: jax.Array, y_EPD: jax.Array) -> jax.Array:
    groups, _, experts, capacity = dispatch_GSEC.shape
    y_GECD = y_EPD.reshape(experts, capacity, groups, -1).transpose(2, 0, 1, 3)
    return jnp.einsum("GSEC,GECD->GSD", dispatch_GSEC, y_GECD)


def _to_experts(x_EPD: jax.Array) -> jax.Array:
    """All-to-all: from the slots of all experts for this device's groups, to the slots of this device's experts for the
    groups of all devices along the expert axis."""
    axes = split_axes("act_expert")
    return jax.lax.all_to_all(x_EPD, axes, split_axis=0, concat_axis=1, tiled=True) if axes else x_EPD


def _from_experts(y_EPD: jax.Array) -> jax.Array:
    """The inverse of `_to_experts`."""
    axes = split_axes("act_expert")
    return jax.lax.all_to_all(y_EPD, axes, split_axis=1, concat_axis=0, tiled=True) if axes else y_EPD


def moe_ragged(
    x_BTD: jax.Array, gates_BTE: jax.Array, chosen_BTE: jax.Array, experts: Experts, *, top_k: int
) -> tuple[jax.Array, jax.Array]:
    """Dropless dispatch: pairs sorted by expert, one grouped product for each table; `([B, T, D], zeros [B])`.

    Inside `moe_layer` on a mesh, tokens are all-gathered along the expert axis, each device applies its own experts,
    and the outputs are reduce-scattered: D numbers per token and device each way, whatever K is. The buffer holds the
    worst case, R = N * min(K, experts of the device) rows. A CPU has no grouped product (XLA multiplies every row with
    every expert there), so `moe_exact` is the faster dropless form on a CPU.
    """
    axes = split_axes("act_expert")
    num_local, width = experts[0].shape[0], x_BTD.shape[-1]
    x_ND = _gather_rows(x_BTD.reshape(-1, width), axes)
    first = jax.lax.axis_index(axes) * num_local if axes else 0
    gates_NE, chosen_NE = (
        jax.lax.dynamic_slice_in_dim(_gather_rows(x.reshape(-1, x.shape[-1]), axes), first, num_local, axis=1)
        for x in (gates_BTE, chosen_BTE)
    )
    out_ND = _own_experts(x_ND, gates_NE, chosen_NE, experts, top_k)
    out_ND = jax.lax.psum_scatter(out_ND, axes, scatter_dimension=0, tiled=True) if axes else out_ND
    return out_ND.reshape(x_BTD.shape), jnp.zeros_like(gates_BTE[:, 0, 0])


def _own_experts(x_ND: jax.Array, gates_NE: jax.Array, chosen_NE: jax.Array, experts: Experts, top_k: int) -> jax.Array:
    """[N, D]: for each token, the gate-weighted sum over those of its experts that this device holds.

    Pairs are sorted by expert. Three tokens with two experts each, on a device that holds experts 0 and 1 of three:
    token 0 chose experts 0 and 2, token 1 chose 1 and 2, token 2 chose 0 and 1.

        pair                0  1  2  3  4  5     pair r belongs to token r // 2
        key_R               0  2  1  2  0  1     its expert; 2 = not on this device
        row                 0  1  2  3  4  5     of the sorted buffer
        pair_R              0  4  2  5  1  3     argsort of key_R, which is stable
        expert of the row   0  0  1  1  -  -     sizes_E = [2, 2]; rows 4 and 5 are unused
        row_NK              [[0, 4], [2, 5], [1, 3]]     the inverse of pair_R: the rows of each token's pairs
    """
    gate_up_E2FD, down_EDF = experts
    num_local = gate_up_E2FD.shape[0]
    there_NK, expert_NK = jax.lax.top_k(chosen_NE.astype(jnp.int32), min(top_k, num_local))
    key_R = jnp.where(there_NK > 0, expert_NK, num_local).reshape(-1)
    pair_R = jnp.argsort(key_R)
    row_NK = jnp.argsort(pair_R).reshape(there_NK.shape)
    used_R1 = (key_R[pair_R] < num_local)[:, None]
    gates_NK = jnp.take_along_axis(gates_NE, expert_NK, axis=1)
    gates_R1 = gates_NK.reshape(-1)[pair_R][:, None].astype(x_ND.dtype)
    sizes_E = chosen_NE.sum(axis=0, dtype=jnp.int32)

    def product(x_RD: jax.Array, table_EFD: jax.Array) -> jax.Array:
        # Both masks are needed: the kernels leave unused rows uninitialised (NaN is possible) in the result, and in the
        # gradient, where 0 * NaN would spread.
        return jnp.where(used_R1, grouped_product(jnp.where(used_R1, x_RD, 0), table_EFD, sizes_E), 0)

    x_RD = _rows_of_pairs((pair_R, row_NK), x_ND)
    gate_RF, up_RF = jnp.split(checkpoint_name(product(x_RD, _joined(gate_up_E2FD)), "mlp"), 2, axis=-1)
    y_RD = product(_swiglu(gate_RF, up_RF) * gates_R1, down_EDF)
    return _sums_of_pairs((pair_R, row_NK), y_RD)


# `_read_tokens` and `_add_pairs` are linear and transposes of each other. Both gather rows; JAX's rule would make the
# transpose of a gather a scatter-add, which is slow on a TPU.


def _rows_of_pairs(order: tuple[jax.Array, jax.Array], x_ND: jax.Array) -> jax.Array:
    """[R, D]: the token of each row. order: `(pair_R, row_NK)` of `_own_experts`."""
    return jax.custom_derivatives.linear_call(_read_tokens, _add_pairs, order, x_ND)


def _sums_of_pairs(order: tuple[jax.Array, jax.Array], y_RD: jax.Array) -> jax.Array:
    """[N, D]: for each token, the sum over its rows."""
    return jax.custom_derivatives.linear_call(_add_pairs, _read_tokens, order, y_RD)


def _read_tokens(order: tuple[jax.Array, jax.Array], x_ND: jax.Array) -> jax.Array:
    pair_R, row_NK = order
    return x_ND[pair_R // row_NK.shape[1]]


def _add_pairs(order: tuple[jax.Array, jax.Array], y_RD: jax.Array) -> jax.Array:
    return y_RD[order[1]].sum(axis=1)


@jax.custom_vjp
def grouped_product(x_RD: jax.Array, table_EFD: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """[R, F]: each row times the table of its expert. The first `sizes_E[0]` rows belong to expert 0, the next
    `sizes_E[1]` to expert 1, and so on; the result is undefined for rows beyond the sum. Uses JAX's Megablox kernels on
    a TPU."""
    width_F, width_D = table_EFD.shape[1:]

    def kernel(x_RD: jax.Array, table_EFD: jax.Array, sizes_E: jax.Array) -> jax.Array:
        tile = _tile(x_RD.shape[0], width_D, width_F)
        return gmm(x_RD, table_EFD, sizes_E, x_RD.dtype, tile, transpose_rhs=True)

    return _on_tpu(kernel, _ragged_dot, x_RD, table_EFD, sizes_E)


def _grouped_product_bwd(
    saved: tuple[jax.Array, jax.Array, jax.Array], grad_RF: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x_RD, table_EFD, sizes_E = saved
    tile = _tile(x_RD.shape[0], *table_EFD.shape[1:])

    def to_rows(grad_RF: jax.Array, table_EFD: jax.Array, sizes_E: jax.Array) -> jax.Array:
        return gmm(grad_RF, table_EFD, sizes_E, grad_RF.dtype, tile)

    def to_table(x_RD: jax.Array, grad_RF: jax.Array, sizes_E: jax.Array) -> jax.Array:
        return tgmm(grad_RF.T, x_RD, sizes_E, x_RD.dtype, tile, num_actual_groups=sizes_E.shape[0])

    def plain_to_table(x_RD: jax.Array, grad_RF: jax.Array, sizes_E: jax.Array) -> jax.Array:
        return jax.vjp(lambda table_EFD: _ragged_dot(x_RD, table_EFD, sizes_E), table_EFD)[1](grad_RF)[0]

    grad_RD = _on_tpu(to_rows, jax.lax.ragged_dot, grad_RF, table_EFD, sizes_E)
    return grad_RD, _on_tpu(to_table, plain_to_table, x_RD, grad_RF, sizes_E), None


grouped_product.defvjp(lambda *args: (grouped_product(*args), args), _grouped_product_bwd)


def _ragged_dot(x_RD: jax.Array, table_EFD: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(x_RD, table_EFD.swapaxes(1, 2), sizes_E)


def _tile(rows: int, inner: int, outer: int) -> tuple[int, int, int]:
    """The tile sizes of the kernels: rows, inner dim, outer dim."""
    return math.gcd(rows, 512), min(inner, 1024), min(outer, 1024)


def _on_tpu(
    kernel: Callable[..., jax.Array], plain: Callable[..., jax.Array], rows: jax.Array, *args: jax.Array
) -> jax.Array:
    """`kernel(rows, *args)` on a TPU where `_LANES` divides the number of rows, otherwise `plain(rows, *args)`."""

    def unchecked(*args: jax.Array) -> jax.Array:
        # The kernels do not declare over which mesh axes their results vary, so check_vma would refuse them. A result
        # varies over every axis that an argument varies over.
        if jax.sharding.get_abstract_mesh().empty:
            return kernel(*args)
        none = PartitionSpec()
        specs = (none,) * len(args)
        out = jax.shard_map(kernel, in_specs=specs, out_specs=none, axis_names=set(), check_vma=False)(*args)
        varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in args))
        return _vary(out, tuple(sorted(varying)))

    if rows.shape[0] % _LANES:
        return plain(rows, *args)
    return jax.lax.platform_dependent(rows, *args, tpu=unchecked, default=plain)


def _gather_rows(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.all_gather(x, axes, axis=0, tiled=True) if axes else x


def moe_exact(x_BTD: jax.Array, gates_BTE: jax.Array, experts: Experts) -> jax.Array:
    """Every expert on every token, weighted by its gate; [B, T, D]. Nothing is dropped."""
    gate_up_E2FD, down_EDF = experts
    inner_2BTEF = jnp.einsum("BTD,EJFD->JBTEF", x_BTD, gate_up_E2FD)
    hidden_BTEF = jax.nn.silu(inner_2BTEF[0]) * inner_2BTEF[1] * gates_BTE.astype(x_BTD.dtype)[..., None]
    return jnp.einsum("BTEF,EDF->BTD", hidden_BTEF, down_EDF)


def moe_sorted(
    x_BTD: jax.Array, gates_BTE: jax.Array, chosen_BTE: jax.Array, experts: Experts, *, top_k: int
) -> jax.Array:
    """The same result as `moe_exact`, for many tokens on backends with a grouped product: only the chosen experts are
    applied to a token.

    On a mesh every device applies its own experts. The mesh axes of "expert" and "routed_group" must be disjoint.
    """

    def local(x_BTD: jax.Array, gates_BTE: jax.Array, chosen_BTE: jax.Array, experts: Experts) -> jax.Array:
        x_ND, gates_NE, chosen_NE = (x.reshape(-1, x.shape[-1]) for x in (x_BTD, gates_BTE, chosen_BTE))
        return _own_experts(x_ND, gates_NE, chosen_NE, experts, top_k).reshape(x_BTD.shape)

    return _over_own_experts(local, experts, x_BTD, gates_BTE, chosen_BTE)


def _over_own_experts(
    local: Callable[..., jax.Array], experts: Experts, x_BTD: jax.Array, *routes_BTE: jax.Array
) -> jax.Array:
    """`local(x_BTD, *routes_BTE, experts)`, which is a sum over experts. On a mesh each device sums over its own
    experts, and an all-reduce adds the devices' sums."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(x_BTD, *routes_BTE, experts)
    x_spec = partition_spec(("routed_group", None, None), mesh, x_BTD.shape)
    specs = jax.tree.map(lambda table, names: partition_spec(names, mesh, table.shape), experts, EXPERT_AXES)
    route_spec = PartitionSpec(x_spec[0], None, specs[0][0])

    def summed(*args: Any) -> jax.Array:
        return jax.lax.psum(local(*args), spec_axes(specs[0]))

    in_specs = (x_spec, *(route_spec for _ in routes_BTE), specs)
    return jax.shard_map(summed, in_specs=in_specs, out_specs=x_spec, check_vma=False)(x_BTD, *routes_BTE, experts)


@jax.custom_jvp
def moe_few(x_BTD: jax.Array, gates_BTE: jax.Array, experts: Experts) -> jax.Array:
    """The same result as `moe_exact`, for few tokens: the weights of unused experts are never read.

    On a mesh every device applies its own experts. The mesh axes of "expert" and "routed_group" must be disjoint.
    Derivatives are those of `moe_exact`.
    """
    return _over_own_experts(_used_experts, experts, x_BTD, gates_BTE)


@moe_few.defjvp
def _moe_few_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return jax.jvp(moe_exact, primals, tangents)


def _used_experts(x_BTD: jax.Array, gates_BTE: jax.Array, experts: Experts) -> jax.Array:
    """[B, T, D]: a loop over the experts that have a gate other than 0."""
    used_E = (gates_BTE != 0).any(axis=(0, 1))
    order_E = jnp.argsort(~used_E)
    matmul = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    gate_up_E2FD, down_EDF = experts
    # XLA:TPU gives an array a layout whose minor-most dim fills the 128 lanes: where F does not, that dim is D.
    # Transposing the table to that order costs nothing, and slices of it need no copy.
    transposed = down_EDF.shape[-1] % _LANES != 0
    experts = (_joined(gate_up_E2FD), down_EDF.swapaxes(1, 2) if transposed else down_EDF)

    def add_expert(i: jax.Array, out_BTD: jax.Array) -> jax.Array:
        # The barrier stops XLA from hoisting work on complete tables (a conversion to float32) out of the loop.
        tables, expert = jax.lax.optimization_barrier((experts, order_E[i]))
        inner_JD, down = (jax.lax.dynamic_index_in_dim(table, expert, keepdims=False) for table in tables)
        gates_BT1 = jax.lax.dynamic_slice_in_dim(gates_BTE, expert, 1, axis=2).astype(x_BTD.dtype)
        gate_BTF, up_BTF = jnp.split(matmul("BTD,JD->BTJ", x_BTD, inner_JD), 2, axis=-1)
        hidden_BTF = (jax.nn.silu(gate_BTF) * up_BTF).astype(x_BTD.dtype) * gates_BT1
        return out_BTD + matmul("BTF,FD->BTD" if transposed else "BTF,DF->BTD", hidden_BTF, down)

    out_BTD = jax.lax.fori_loop(0, used_E.sum(), add_expert, jnp.zeros(x_BTD.shape, jnp.float32))
    return out_BTD.astype(x_BTD.dtype)
