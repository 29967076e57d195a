"""The network: one forward function for training, rollout and serving.

Shapes: B batch, T tokens, S cache slots, D hidden_size, V vocab_size, L routed layers, E experts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from qwen3_jax.cache import EMPTY, KVCache, write_slots
from qwen3_jax.config import ModelConfig
from qwen3_jax.model.layers import Activation, Context, ExpertDispatch, Layer, declare
from qwen3_jax.model.layout import is_stacked, layer_name, run_name
from qwen3_jax.ops import cpu
from qwen3_jax.ops.arrays import linear, lookup
from qwen3_jax.ops.moe import RouterStats
from qwen3_jax.ops.norm import rms_norm
from qwen3_jax.ops.rope import rope_tables
from qwen3_jax.ops.zigzag import from_zigzag, to_zigzag
from sharding import constrain, num_parts


@struct.dataclass
class Output:
    """Result of a forward pass. Under jit, fields that are not used are not computed.

    logits: [B, T, V] float32.
    hidden: [B, T, D], after the last norm; `unembed` turns any part of it into logits.
    router: RouterStats with a leading axis of the L routed layers; None for a dense model.
    cache: the updated cache; None if none was given.
    """

    logits: jax.Array
    hidden: jax.Array
    router: RouterStats | None
    cache: KVCache | None


class Qwen3(nn.Module):
    """Qwen3, dense or mixture of experts (report, section 2).

    config: the architecture.
    dtype: of activations and of weights where they are used; None takes the embedding table's.
    capacity_factor: slots per expert as a multiple of the mean load; further tokens are dropped. None drops nothing.
    group_size: tokens that share an expert's slots; with larger groups dispatch costs more and drops fewer tokens.
    expert_dispatch: "einsum" uses those two; "ragged" drops nothing and ignores both, see `moe_ragged`.
    stacked: the layout of the weights, see `layout`: one array for a run of equal layers, which training scans over; or
      one for each layer, as `hf.load_checkpoint` reads them and as a cache needs them.
    remat: recompute each layer's activations in the backward pass, except those in `keep`:
      "qkv" (before norm and rotation), "attention" (the kernel's result and the projection of it), "mlp" (gate and up)
      and, of experts, "dispatch" (tokens in their slots).
    """

    config: ModelConfig
    dtype: Any = None
    capacity_factor: float | None = None
    group_size: int = 256
    expert_dispatch: ExpertDispatch = "einsum"
    stacked: bool = False
    remat: bool = False
    keep: tuple[Activation, ...] = ()

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: KVCache | None = None,
        *,
        prefill: bool = False,
    ) -> Output:
        """Logits of the next token at every position.

        Args:
          tokens_BT: token ids.
          positions: [B, T] position of each token in its own sequence; None counts from 0 at each segment's start.
          segment_ids: [B, T], tokens attend within their segment only; 0 is padding, ignored by attention, experts
            and statistics. None is one segment per row.
          cache: keys and values of earlier tokens; a row is then one sequence, and its `positions` must be given.
          prefill: the cache is empty: the tokens attend to each other only, and their keys and values are written to
            the cache.

        Raises:
          ValueError: naming the argument that contradicts the others.
        """
        cfg = self.config
        if not self.is_initializing() and is_stacked(cfg, self.variables["params"]) != self.stacked:
            raise ValueError(
                f"stacked: {self.stacked}, but the weights are in the other layout; use {not self.stacked}"
            )
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens_BT)
        if positions is None:
            if cache is not None:
                raise ValueError("positions: None; with a cache, give the position of each token")
            positions = segment_positions(segment_ids)
        if cache is None:
            tokens_BT, positions, segment_ids = (to_zigzag(x) for x in (tokens_BT, positions, segment_ids))
        elif num_parts("length") > 1:
            raise ValueError(f"mesh.context: {num_parts('length')}; use 1 with a cache")
        elif self.stacked:
            raise ValueError("stacked: True; with a cache, use False and weights of `unstack_layers`")

        embed_VD = declare(self, "embed_tokens", (cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"), self._normal())
        x_BTD = lookup(embed_VD, tokens_BT).astype(self.dtype or embed_VD.dtype)
        x_BTD = constrain(x_BTD, "batch", "length", "act_embed")
        cos_BTR, sin_BTR = rope_tables(cfg, positions)
        if cache is None:
            context = Context(cos_BTR, sin_BTR, segment_ids)
            if self.stacked:
                x_BTD, stats = self._scanned_layers(x_BTD, context)
            else:
                x_BTD, stats, _ = self._separate_layers(x_BTD, context, None)
            x_BTD = from_zigzag(x_BTD)
        else:
            stored_BT = jnp.where(segment_ids > 0, positions, EMPTY)
            positions_BS = jax.lax.dynamic_update_slice(cache.positions_BS, stored_BT, (0, cache.next_slot))
            context = Context(cos_BTR, sin_BTR, segment_ids, cache.next_slot)
            if not prefill:
                mask_BTS = positions_BS[:, None, :] <= positions[:, :, None]
                context = dataclasses.replace(context, mask_BTS=mask_BTS, write_late=cpu.platform() != "cpu")
            x_BTD, stats, cached = self._separate_layers(x_BTD, context, cache)
            keys, values = zip(*cached, strict=True)
            next_slot = cache.slot_after(tokens_BT.shape[1])
            cache = dataclasses.replace(cache, keys=keys, values=values, positions_BS=positions_BS, next_slot=next_slot)
        routed = [layers for layers in stats if layers is not None]
        router = jax.tree.map(lambda *layers: jnp.concatenate(layers), *routed) if routed else None

        scale_D = declare(self, "norm", (cfg.hidden_size,), ("norm",), nn.initializers.ones)
        hidden_BTD = rms_norm(x_BTD, scale_D, cfg.rms_norm_eps)
        head_VD = embed_VD
        if not cfg.tie_word_embeddings:
            head_VD = declare(self, "lm_head", (cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"), self._normal())
        return Output(unembed(hidden_BTD, head_VD), hidden_BTD, router, cache)

    def _normal(self) -> Any:
        return nn.initializers.normal(self.config.initializer_range)

    def _body(self) -> Any:
        # prevent_cse is needed outside a scan only, and costs fusions inside one.
        policy = jax.checkpoint_policies.save_only_these_names(*self.keep)
        return nn.remat(Layer, prevent_cse=not self.stacked, policy=policy) if self.remat else Layer

    def _layer(self, module: Any, layer: int, name: str) -> Any:
        moe = self.config.is_moe_layer(layer)
        return module(self.config, moe, self.capacity_factor, self.group_size, self.expert_dispatch, name=name)

    def _scanned_layers(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, list[RouterStats | None]]:
        """The router's statistics have one entry per run of layers, with a leading axis of its layers."""
        stats = []
        for start, stop in self.config.layer_runs:
            scanned = nn.scan(
                self._body(),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast,),
                length=stop - start,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x_BTD, (run_stats, _) = self._layer(scanned, start, run_name(start, stop))(x_BTD, context)
            stats.append(run_stats)
        return x_BTD, stats

    def _separate_layers(
        self, x_BTD: jax.Array, context: Context, cache: KVCache | None
    ) -> tuple[jax.Array, list[RouterStats | None], list[Any]]:
        """The statistics and the keys and values have one entry per layer."""
        body, stats, cached = self._body(), [], []
        for i in range(self.config.num_hidden_layers):
            old = None if cache is None else (cache.keys[i], cache.values[i])
            x_BTD, (layer_stats, new) = self._layer(body, i, layer_name(i))(x_BTD, context, old)
            stats.append(jax.tree.map(lambda x: x[None], layer_stats))
            cached.append(new)
        if cache is not None and context.write_late:
            # A TPU fetches a layer's cache into vector memory to read it. Written while it is there, all of it would
            # have to go back.
            x_BTD, cached = jax.lax.optimization_barrier((x_BTD, cached))
            olds = zip(cache.keys, cache.values, strict=True)
            cached = [write_slots(old, k, v, cache.next_slot) for old, (k, v) in zip(olds, cached, strict=True)]
        return x_BTD, stats, cached


def segment_positions(segment_ids_BT: jax.Array) -> jax.Array:
    """[B, T] position of each token counted from the start of its segment."""
    index_1T = jnp.arange(segment_ids_BT.shape[1])[None]
    starts_BT = segment_ids_BT != jnp.pad(segment_ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return index_1T - jax.lax.cummax(jnp.where(starts_BT, index_1T, 0), axis=1)


def head_weight(config: ModelConfig, params: Any) -> jax.Array:
    """The output head [V, D]: the embedding table where they are tied."""
    return params["embed_tokens" if config.tie_word_embeddings else "lm_head"]


def unembed(hidden_BTD: jax.Array, head_VD: jax.Array) -> jax.Array:
    """Logits [B, T, V] in float32."""
    return constrain(linear(hidden_BTD, head_VD, dtype=jnp.float32), "batch", "length", "act_vocab")
