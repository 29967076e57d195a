"""The table of names: which tensors of the released files make up which weight of ours. Both directions use it.

One of our weights is its tensors reshaped (heads as a dim of their own) and stacked (layers, experts), not transposed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import traverse_util

from qwen3_jax.config import ModelConfig
from qwen3_jax.hf.tensor_file import Spans, Tensor
from qwen3_jax.model import Qwen3
from qwen3_jax.model.layout import layer_name, run_name

# Our path, with "layer" for the layer's name, to the released name.
_TENSORS = {
    "embed_tokens": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
    "layer/input_layernorm": "model.layers.{layer}.input_layernorm.weight",
    "layer/self_attn/q_proj": "model.layers.{layer}.self_attn.q_proj.weight",
    "layer/self_attn/k_proj": "model.layers.{layer}.self_attn.k_proj.weight",
    "layer/self_attn/v_proj": "model.layers.{layer}.self_attn.v_proj.weight",
    "layer/self_attn/o_proj": "model.layers.{layer}.self_attn.o_proj.weight",
    "layer/self_attn/q_norm": "model.layers.{layer}.self_attn.q_norm.weight",
    "layer/self_attn/k_norm": "model.layers.{layer}.self_attn.k_norm.weight",
    "layer/post_attention_layernorm": "model.layers.{layer}.post_attention_layernorm.weight",
    "layer/mlp/gate_proj": "model.layers.{layer}.mlp.gate_proj.weight",
    "layer/mlp/up_proj": "model.layers.{layer}.mlp.up_proj.weight",
    "layer/mlp/down_proj": "model.layers.{layer}.mlp.down_proj.weight",
}
_MOE_TENSORS = _TENSORS | {
    "layer/mlp/router": "model.layers.{layer}.mlp.gate.weight",
    "layer/mlp/gate_up_proj": "model.layers.{layer}.mlp.experts.{expert}.{gate_up}.weight",
    "layer/mlp/down_proj": "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
}
_GATE_UP = ("gate_proj", "up_proj")
# transformers 5 stores all experts of a layer in one tensor [E, rows, columns], gate's rows before up's.
_FUSED = {"gate_up_proj": _GATE_UP, "down_proj": ("down_proj",)}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One of our weights, and the tensors of the released files that make it up.

    path: of the weight in `params`.
    shape: of the weight.
    axes: its logical axes.
    tensors: index along the leading dims (layers, experts, gate and up; `()` without leading dims) -> tensor name.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    tensors: dict[tuple[int, ...], str]

    @property
    def lead(self) -> int:
        """Number of leading dims."""
        return len(next(iter(self.tensors)))

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each tensor."""
        return tuple(stop for _, stop in self.tensor_spans(tuple((0, size) for size in self.shape)))

    def tensor_spans(self, spans: Spans) -> Spans:
        """The slice of each tensor that corresponds to the slice `spans` of the weight. In a tensor, the dims of heads
        and head_dim are merged into rows or columns."""
        merged: list[tuple[int, int]] = []
        for axis, size, span in list(zip(self.axes, self.shape, spans, strict=True))[self.lead :]:
            if axis == "head_dim":
                assert span == (0, size)  # no rule shards head_dim
                merged[-1] = (merged[-1][0] * size, merged[-1][1] * size)
            else:
                merged.append(span)
        return tuple(merged)


def model_leaves(config: ModelConfig, stacked: bool) -> list[Leaf]:
    """All weights of a model, in the stacked or the per-layer layout."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    # Always traced stacked: a run of layers is traced once. Without a mesh: the devices do not divide one token.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        boxed = jax.eval_shape(Qwen3(config, stacked=True).init, jax.random.key(0), tokens)["params"]
    runs = {run_name(start, stop): range(start, stop) for start, stop in config.layer_runs}
    leaves = []
    for path, box in traverse_util.flatten_dict(boxed).items():
        shape, axes = box.value.shape, box.names
        if path[0] not in runs:
            leaves.append(_leaf(path, shape, axes, _TENSORS["/".join(path)], range(0)))
            continue
        run = runs[path[0]]
        table = _MOE_TENSORS if config.is_moe_layer(run.start) else _TENSORS
        template = table["/".join(("layer", *path[1:]))]
        if stacked:
            leaves.append(_leaf(path, shape, axes, template, run))
        else:
            for i in run:
                leaves.append(_leaf((layer_name(i), *path[1:]), shape[1:], axes[1:], template, range(i, i + 1)))
    return leaves


def _leaf(
    path: tuple[str, ...], shape: tuple[int, ...], axes: tuple[str | None, ...], template: str, layers: range
) -> Leaf:
    lead = sum(axis in ("layers", "expert", "gate_up") for axis in axes)
    tensors = {}
    for index in itertools.product(*map(range, shape[:lead])):
        at = dict(zip(axes, index, strict=False))
        layer = layers[at.get("layers", 0)] if layers else None
        tensors[index] = template.format(layer=layer, expert=at.get("expert"), gate_up=_GATE_UP[at.get("gate_up", 0)])
    return Leaf(path, shape, axes, tensors)


def mismatches(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with arrays of the shapes `found`, where those of the shapes `wanted` are expected, by name."""
    missing = [name for name in wanted if name not in found]
    unknown = [name for name in found if name not in wanted]
    problems = [hint] if (hint := _renamed(missing, unknown)) else []
    # In turns, so that the first few show both.
    pairs = itertools.zip_longest(
        (f"{name} is missing" for name in missing), (f"{name} is unknown" for name in unknown)
    )
    problems += [problem for pair in pairs for problem in pair if problem]
    return problems + [
        f"{name} has shape {list(found[name])}, not {list(shape)}"
        for name, shape in wanted.items()
        if found.get(name, shape) != shape
    ]


def _renamed(missing: Sequence[str], unknown: Sequence[str]) -> str:
    """What to do where one prefix, too many or too few, makes the difference; empty where none does."""
    for short, long, advice in ((missing, unknown, "remove"), (unknown, missing, "add")):
        prefixes = {name.removesuffix(short[0]) for name in long if short and name.endswith(f"{short[0]}")}
        for prefix in sorted(prefixes - {""}, key=len):
            if {prefix + name for name in short} <= set(long):
                return f"the names of {len(short)} tensors fit once you {advice} the prefix {prefix!r}"
    return ""


def unfuse_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under their released names; a tensor of fused experts becomes one tensor per expert."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        parts = _FUSED.get(last, ())
        fused = parts and prefix.endswith(".mlp.experts") and len(tensor.shape) == 3
        if not fused or tensor.shape[1] % len(parts):
            out[name] = tensor
            continue
        experts, rows, columns = tensor.shape[0], tensor.shape[1] // len(parts), tensor.shape[2]
        for expert, (i, part) in itertools.product(range(experts), enumerate(parts)):
            piece = dataclasses.replace(tensor, shape=(rows, columns), expert=(expert,), first_row=i * rows)
            out[f"{prefix}.{expert}.{part}.weight"] = piece
    return out
