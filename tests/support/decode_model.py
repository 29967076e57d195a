"""A small random mixture-of-experts model whose rows meet every way to end, for the tests of whole decoding."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from qwen3_jax.config import ModelConfig
from qwen3_jax.decode import ThinkingTokens
from qwen3_jax.model import Qwen3, unstack_layers

V = 40
THINK, END, EOS, EOS_2, TOOL, END_TOOL, BREAK, GEN = range(28, 36)
NUM_TOKENS = 37  # ids 37, 38 and 39 decode to nothing
STOP = (BREAK, 3, 1, 2, END, BREAK)
TOKENS = ThinkingTokens(
    think=THINK,
    end_think=END,
    eos=(EOS, EOS_2),
    stop_ids=STOP,
    empty_block=(THINK, BREAK, END, BREAK),
    tool_call=TOOL,
    end_tool_call=END_TOOL,
    num_tokens=NUM_TOKENS,
)
CONFIG = ModelConfig(
    vocab_size=V,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_position_embeddings=62,
    rope_theta=1e4,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    mlp_only_layers=(0,),
)
MODEL = Qwen3(CONFIG, stacked=True)
EXPERTS = "layers_1_3"  # the layers that have some
LONG = (*[4] * 48, EOS, GEN, THINK)  # 51 ids, of which the context leaves 11


@functools.cache
def stacked_params() -> Any:
    """Random float32 weights whose logits are of order 2, larger for the markers, so that each of them is met."""
    shapes = nn.unbox(jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))["params"]
    mlp = shapes[EXPERTS]["mlp"]
    layers, experts, _, *table = mlp.pop("gate_up_proj").shape
    # Drawn apart: the tests' rows were chosen for the ends that these weights bring about.
    mlp["gate_proj"] = mlp["up_proj"] = jax.ShapeDtypeStruct((layers, experts, *table), jnp.float32)
    rng = np.random.default_rng(0)

    def weight(shape: tuple[int, ...], scale: float) -> np.ndarray:
        return rng.normal(scale=scale, size=shape).astype(np.float32)

    weights = jax.tree_util.tree_map_with_path(
        lambda path, leaf: weight(leaf.shape, 0.15) + ("norm" in path[-1].key), shapes
    )
    mlp = weights[EXPERTS]["mlp"]
    mlp["gate_up_proj"] = np.stack([mlp.pop("gate_proj"), mlp.pop("up_proj")], axis=2)
    head = weight((V, CONFIG.hidden_size), 0.35)
    head[[THINK, END, TOOL, END_TOOL]] *= 1.5
    head[[EOS, EOS_2]] *= 0.6
    return {**weights, "lm_head": head, "embed_tokens": weight((V, CONFIG.hidden_size), 1.0)}


@functools.cache
def params() -> Any:
    return unstack_layers(CONFIG, stacked_params())
