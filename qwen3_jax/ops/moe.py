"""Mixture of experts: router, dense einsum dispatch with capacity, dropless and exact modes (report, section 2).

Departures from GShard (Lepikhin et al. 2020), whose dispatch this is:
1. An expert's places go to tokens in their order, not to all first choices before all second ones: whether a token is
   dropped then depends on earlier tokens only, as everything else in a causal model does.
2. Gate weights are not renormalised after a drop: the dropped expert's share is missing, the others' are unchanged.

Shapes: B batch, T tokens, G groups, S tokens of a group, E experts, K experts per token, C places of an expert for one
group, P = C * G, N tokens of all rows, R (token, choice) pairs, D hidden_size, F moe_intermediate_size, J = 2 F.
Inside `moe_layer` these are one device's. Gate and up are one table, [E, 2, F, D]: one product in place of two, and
fewer and larger collectives.
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
_LANES = 128  # of a TPU's tiles, and the rows that a tile of a kernel holds
EXPERT_AXES = (("expert", "gate_up", "mlp", "expert_embed"), ("expert", "expert_embed", "mlp"))


@struct.dataclass
class RouterStats:
    """What one router did with each row of a batch, as sums, so that rows and batches add up exactly. Padding is left
    out. `counts` and `prob_sum` are [B, E], the others [B]; a model's have a leading axis of layers, and sums over rows
    have no B.

    counts: (token, choice) pairs sent to each expert, before any drop.
    prob_sum: softmax probabilities summed over tokens; the balance loss has its gradient from here.
    z_sum: squared logsumexp of the logits summed over tokens; the z-loss has its gradient from here.
    entropy_sum: entropy of the softmax in nats, summed over tokens.
    dropped: pairs that found no place.
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
      stats: with `dropped` 0.
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
    gate_up_E2FD, down_EDF = (_for_own_tokens(table, names) for table, names in zip(experts, EXPERT_AXES, strict=True))
    logits_BTE = router_logits(x_BTD, _gathered(_for_own_tokens(router_ED, ROUTER_AXES), ROUTER_AXES))
    gates_BTE, chosen_BTE, stats = route(logits_BTE, top_k, norm_topk_prob, valid_BT)
    # Here and not where tokens meet weights: the gradient is then summed over the axis for D numbers a token, not K D.
    x_BTD = _vary(x_BTD, split_axes("mlp"))
    x_BTD, gate_up_E2FD = _leave_together((x_BTD, gate_up_E2FD))
    experts = _gathered(gate_up_E2FD, EXPERT_AXES[0]), _gathered(down_EDF, EXPERT_AXES[1])
    out_BTD, dropped_B = dispatch(x_BTD, gates_BTE, chosen_BTE, experts)
    out_BTD = jax.lax.psum(out_BTD, split_axes("mlp"))
    stats = dataclasses.replace(stats, dropped=dropped_B)
    return out_BTD, jax.tree.map(lambda sum_B: jax.lax.psum(sum_B, split_axes("length")), stats)


def _for_own_tokens(weight: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """A weight with these logical axes; its gradient is here summed over those that split tokens and not the weight."""
    split = [axis for name in names for axis in split_axes(name)]
    return _vary(weight, tuple(axis for axis in split_axes("batch") + split_axes("length") if axis not in split))


@jax.custom_vjp
def _leave_together(xs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """`xs`; backward, no gradient is used before all are there. The largest table's is then scattered while those of
    the rest of the layer are computed: by itself XLA:TPU does that last, and waits with nothing left beside it."""
    return xs


_leave_together.defvjp(lambda xs: (xs, None), lambda _, grads: (jax.lax.optimization_barrier(grads),))


def _gathered(weight: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """A weight whole but for what the axes "expert" and "tensor" of the mesh split; its gradient is scattered."""
    axes = split_axes("embed")
    if not axes:
        return weight
    where = next(i for i, name in enumerate(names) if set(axes) <= set(split_axes(name)))
    return jax.lax.all_gather(weight, axes, axis=where, tiled=True)


def _vary(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`x`, from here on taken to differ along these mesh axes: its gradient is summed over them here."""
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def expert_capacity(group_size: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
    """Places per expert and group: ceil(S * K / E * capacity_factor), at most S."""
    return min(group_size, math.ceil(group_size * top_k / num_experts * capacity_factor))


def dispatch_mask(chosen_GSE: jax.Array, capacity: int) -> jax.Array:
    """[G, S, E, C] bool: token s of group g sits at place c of expert e. Tokens beyond the capacity are dropped."""
    # A running sum, as a product: exact, being of zeros and ones, and on a TPU faster than a sum.
    up_to_ST = jnp.tri(chosen_GSE.shape[1], dtype=jnp.float32)
    place_GSE = jnp.einsum("ST,GTE->GSE", up_to_ST, chosen_GSE.astype(jnp.float32)).astype(jnp.int32) - 1
    return (place_GSE[..., None] == jnp.arange(capacity)) & chosen_GSE[..., None]


def expert_swiglu(x_EPD: jax.Array, gates_EP: jax.Array, experts: Experts) -> jax.Array:
    """Each expert's SwiGLU on its own tokens, times their gates; [E, P, D]."""
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
    x_EPD = checkpoint_name(_to_experts(_to_places(dispatch_GSEC, x_GSD)), "dispatch")
    # Weighted at their places, not by a mask of weights, and before the last product: its result is then needed no
    # more in the backward pass.
    gates_ECG = jnp.einsum("GSEC,GSE->ECG", dispatch_GSEC, gates_GSE)
    gates_EP = _to_experts(gates_ECG.reshape(num_experts, -1))
    y_EPD = _from_experts(expert_swiglu(x_EPD, gates_EP, experts))
    y_GSD = _from_places(dispatch_GSEC, y_EPD)
    return y_GSD.reshape(x_BTD.shape), over_GE.reshape(batch, -1).sum(axis=1)


# Each of the two is the other's transpose. Said here, it is computed in the same order of axes: by its own rule, jax
# would transpose the larger operand first. An expert's places of all groups then become one axis, the groups inside:
# a TPU multiplies two long axes, and C alone would not fill its tiles.


def _to_places(dispatch_GSEC: jax.Array, x_GSD: jax.Array) -> jax.Array:
    """[E, P, D]: at each place its token, zeros where there is none."""
    return jax.custom_derivatives.linear_call(_gather, _scatter, dispatch_GSEC, x_GSD)


def _from_places(dispatch_GSEC: jax.Array, y_EPD: jax.Array) -> jax.Array:
    """[G, S, D]: for each token the sum of its places."""
    return jax.custom_derivatives.linear_call(_scatter, _gather, dispatch_GSEC, y_EPD)


def _gather(dispatch_GSEC: jax.Array, x_GSD: jax.Array) -> jax.Array:
    x_GECD = jnp.einsum("GSEC,GSD->GECD", dispatch_GSEC, x_GSD)
    _, experts, _, width = x_GECD.shape
    return x_GECD.transpose(1, 2, 0, 3).reshape(experts, -1, width)


def _scatter(dispatch_GSEC: jax.Array, y_EPD: jax.Array) -> jax.Array:
    groups, _, experts, places = dispatch_GSEC.shape
    y_GECD = y_EPD.reshape(experts, places, groups, -1).transpose(2, 0, 1, 3)
    return jnp.einsum("GSEC,GECD->GSD", dispatch_GSEC, y_GECD)


def _to_experts(x_EPD: jax.Array) -> jax.Array:
    """From all experts' places for own groups to own experts' places for the groups of all devices that share them."""
    axes = split_axes("act_expert")
    return jax.lax.all_to_all(x_EPD, axes, split_axis=0, concat_axis=1, tiled=True) if axes else x_EPD


def _from_experts(y_EPD: jax.Array) -> jax.Array:
    """The way back of `_to_experts`."""
    axes = split_axes("act_expert")
    return jax.lax.all_to_all(y_EPD, axes, split_axis=1, concat_axis=0, tiled=True) if axes else y_EPD


def moe_ragged(
    x_BTD: jax.Array, gates_BTE: jax.Array, chosen_BTE: jax.Array, experts: Experts, *, top_k: int
) -> tuple[jax.Array, jax.Array]:
    """Dropless dispatch: pairs sorted by expert, one grouped product for each table; `([B, T, D], zeros [B])`.

    Inside `moe_layer` on a mesh, the tokens of all devices that share the experts are gathered, each device works for
    its own experts, and the sums are scattered back: D numbers a token and device each way, whatever K. The buffer has
    room for the worst case, N = gathered tokens times min(K, own experts) rows. A CPU has no grouped product (XLA
    multiplies every row with every expert there): `moe_exact` is the faster dropless form on one.
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
    """[N, D]: the weighted sum of what each token's experts among these make of it."""
    gate_up_E2FD, down_EDF = experts
    num_local = gate_up_E2FD.shape[0]
    # Pairs in the order of their experts, those of no expert here last; and where each token's pairs are in that order.
    there_NK, expert_NK = jax.lax.top_k(chosen_NE.astype(jnp.int32), min(top_k, num_local))
    key_R = jnp.where(there_NK > 0, expert_NK, num_local).reshape(-1)
    pair_R = jnp.argsort(key_R)
    place_NK = jnp.argsort(pair_R).reshape(there_NK.shape)
    used_R1 = (key_R[pair_R] < num_local)[:, None]
    gates_NK = jnp.take_along_axis(gates_NE, expert_NK, axis=1)
    gates_R1 = gates_NK.reshape(-1)[pair_R][:, None].astype(x_ND.dtype)
    sizes_E = chosen_NE.sum(axis=0, dtype=jnp.int32)

    def product(x_RD: jax.Array, table_EFD: jax.Array) -> jax.Array:
        # What a kernel leaves in rows of no expert, here and in the gradient, may not be a number.
        return jnp.where(used_R1, grouped_product(jnp.where(used_R1, x_RD, 0), table_EFD, sizes_E), 0)

    x_RD = _rows_of_pairs((pair_R, place_NK), x_ND)
    gate_RF, up_RF = jnp.split(checkpoint_name(product(x_RD, _joined(gate_up_E2FD)), "mlp"), 2, axis=-1)
    y_RD = product(_swiglu(gate_RF, up_RF) * gates_R1, down_EDF)
    return _sums_of_pairs((pair_R, place_NK), y_RD)


# As above, each of the two is the other's transpose: both read, where jax's own would scatter.


def _rows_of_pairs(order: tuple[jax.Array, jax.Array], x_ND: jax.Array) -> jax.Array:
    """[R, D]: for each pair its token. order: the pairs [R], and the places of each token's pairs in it [N, K]."""
    return jax.custom_derivatives.linear_call(_read_tokens, _add_pairs, order, x_ND)


def _sums_of_pairs(order: tuple[jax.Array, jax.Array], y_RD: jax.Array) -> jax.Array:
    """[N, D]: for each token the sum of its pairs."""
    return jax.custom_derivatives.linear_call(_add_pairs, _read_tokens, order, y_RD)


def _read_tokens(order: tuple[jax.Array, jax.Array], x_ND: jax.Array) -> jax.Array:
    pair_R, place_NK = order
    return x_ND[pair_R // place_NK.shape[1]]


def _add_pairs(order: tuple[jax.Array, jax.Array], y_RD: jax.Array) -> jax.Array:
    return y_RD[order[1]].sum(axis=1)


@jax.custom_vjp
def grouped_product(x_RD: jax.Array, table_EFD: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """[R, F]: each row times the table of its expert; the first `sizes_E[0]` rows are the first expert's. Rows beyond
    all experts' are undefined. On a TPU by JAX's Megablox kernels."""
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
    """What one step of a kernel multiplies."""
    return math.gcd(rows, 512), min(inner, 1024), min(outer, 1024)


def _on_tpu(
    kernel: Callable[..., jax.Array], plain: Callable[..., jax.Array], rows: jax.Array, *args: jax.Array
) -> jax.Array:
    """`kernel(rows, *args)` on a TPU whose tiles fit the number of rows, elsewhere `plain(rows, *args)`."""

    def unchecked(*args: jax.Array) -> jax.Array:
        # The kernels do not say along which mesh axes their results vary: along all that their arguments do.
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
    """`moe_exact` for many tokens where there is a grouped product: each token meets its own experts alone.

    On a mesh every device works for its own experts; "expert" and "routed_group" must be split over different axes.
    """

    def local(x_BTD: jax.Array, gates_BTE: jax.Array, chosen_BTE: jax.Array, experts: Experts) -> jax.Array:
        x_ND, gates_NE, chosen_NE = (x.reshape(-1, x.shape[-1]) for x in (x_BTD, gates_BTE, chosen_BTE))
        return _own_experts(x_ND, gates_NE, chosen_NE, experts, top_k).reshape(x_BTD.shape)

    return _over_own_experts(local, experts, x_BTD, gates_BTE, chosen_BTE)


def _over_own_experts(
    local: Callable[..., jax.Array], experts: Experts, x_BTD: jax.Array, *routes_BTE: jax.Array
) -> jax.Array:
    """`local(x_BTD, *routes_BTE, experts)`, a sum over experts; on a mesh over each device's own, then over devices."""
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
    """`moe_exact` for few tokens: each expert that one of them uses is read once, the others not at all.

    On a mesh every device goes through its own experts; "expert" and "routed_group" must be split over different axes.
    Derivatives are those of `moe_exact`.
    """
    return _over_own_experts(_used_experts, experts, x_BTD, gates_BTE)


@moe_few.defjvp
def _moe_few_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return jax.jvp(moe_exact, primals, tangents)


def _used_experts(x_BTD: jax.Array, gates_BTE: jax.Array, experts: Experts) -> jax.Array:
    """[B, T, D]: a loop over the experts with a gate that is not 0."""
    used_E = (gates_BTE != 0).any(axis=(0, 1))
    order_E = jnp.argsort(~used_E)
    matmul = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    gate_up_E2FD, down_EDF = experts
    # A TPU lays an axis that does not fill its lanes before the others: turned like that, a table is read as it lies.
    turned = down_EDF.shape[-1] % _LANES != 0
    experts = (_joined(gate_up_E2FD), down_EDF.swapaxes(1, 2) if turned else down_EDF)

    def add_expert(i: jax.Array, out_BTD: jax.Array) -> jax.Array:
        # Nothing done to a whole table (a conversion of its type) may be taken out of the loop.
        tables, expert = jax.lax.optimization_barrier((experts, order_E[i]))
        inner_JD, down = (jax.lax.dynamic_index_in_dim(table, expert, keepdims=False) for table in tables)
        gates_BT1 = jax.lax.dynamic_slice_in_dim(gates_BTE, expert, 1, axis=2).astype(x_BTD.dtype)
        gate_BTF, up_BTF = jnp.split(matmul("BTD,JD->BTJ", x_BTD, inner_JD), 2, axis=-1)
        hidden_BTF = (jax.nn.silu(gate_BTF) * up_BTF).astype(x_BTD.dtype) * gates_BT1
        return out_BTD + matmul("BTF,FD->BTD" if turned else "BTF,DF->BTD", hidden_BTF, down)

    out_BTD = jax.lax.fori_loop(0, used_E.sum(), add_expert, jnp.zeros(x_BTD.shape, jnp.float32))
    return out_BTD.astype(x_BTD.dtype)
