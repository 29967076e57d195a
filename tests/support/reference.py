"""The PyTorch reference at tiny size: transformers' Qwen3 with random weights, and the same weights as our params.

The mapping here is written apart from `qwen3_jax.hf`, so that a mistake in one of them shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

try:
    import torch
    from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
except ImportError:
    pytest.skip("the PyTorch reference is not installed: pip install -e '.[parity]'", allow_module_level=True)

from qwen3_jax.config import ModelConfig


def torch_config(config: ModelConfig) -> Qwen3Config | Qwen3MoeConfig:
    """transformers' configuration of the same network, through our `to_hf`."""
    kind = Qwen3MoeConfig if config.num_experts else Qwen3Config
    # Each expert in turn: transformers' other kernels add in another order, or only in bfloat16.
    return kind(**config.to_hf(), attn_implementation="eager", experts_implementation="eager")


def torch_model(config: ModelConfig, seed: int = 0) -> PreTrainedModel:
    """A float32 model whose weights are all random: norms about 1 +- 0.2, matrices at a size that keeps every layer's
    output, and the logits, of order 1. At the usual 0.02 most mistakes would hide below the tolerance."""
    hf = torch_config(config)
    model = (Qwen3MoeForCausalLM if config.num_experts else Qwen3ForCausalLM)(hf).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(1 + 0.2 * noise)
            elif name.endswith("embed_tokens.weight") and not config.tie_word_embeddings:
                weight.copy_(noise)
            else:
                weight.copy_(noise * 1.4 * weight.shape[-1] ** -0.5)
    return model


def to_params(config: ModelConfig, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Per-layer params from transformers' names: weights, or their gradients."""
    rest = {name: tensor.detach().float().numpy() for name, tensor in weights.items()}
    n, k, h, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size

    def take(name: str, *shape: int) -> jnp.ndarray:
        value = rest.pop(f"{name}.weight")
        return jnp.asarray(value.reshape(shape) if shape else value)

    params: dict[str, Any] = {"embed_tokens": take("model.embed_tokens"), "norm": take("model.norm")}
    if not config.tie_word_embeddings:
        params["lm_head"] = take("lm_head")
    for i in range(config.num_hidden_layers):
        layer, attention, mlp = (f"model.layers.{i}{part}" for part in ("", ".self_attn", ".mlp"))
        if config.is_moe_layer(i):
            gate_up = np.stack(np.split(rest.pop(f"{mlp}.experts.gate_up_proj"), 2, axis=1), axis=1)
            experts = {"gate_up_proj": gate_up, "down_proj": rest.pop(f"{mlp}.experts.down_proj")}
            mlp_weights = {name: jnp.asarray(value) for name, value in experts.items()}
            mlp_weights["router"] = take(f"{mlp}.gate")
        else:
            mlp_weights = {name: take(f"{mlp}.{name}") for name in ("gate_proj", "up_proj", "down_proj")}
        params[f"layer_{i}"] = {
            "input_layernorm": take(f"{layer}.input_layernorm"),
            "post_attention_layernorm": take(f"{layer}.post_attention_layernorm"),
            "self_attn": {
                "q_proj": take(f"{attention}.q_proj", n, h, d),
                "k_proj": take(f"{attention}.k_proj", k, h, d),
                "v_proj": take(f"{attention}.v_proj", k, h, d),
                "o_proj": take(f"{attention}.o_proj", d, n, h),
                "q_norm": take(f"{attention}.q_norm"),
                "k_norm": take(f"{attention}.k_norm"),
            },
            "mlp": mlp_weights,
        }
    assert not rest, f"unmapped: {sorted(rest)}"
    return params


def torch_params(config: ModelConfig, model: PreTrainedModel) -> dict[str, Any]:
    """The model's weights as per-layer params."""
    return to_params(config, dict(model.named_parameters()))


def torch_logits(model: PreTrainedModel, tokens: np.ndarray, **inputs: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] as float32."""
    with torch.no_grad():
        tensors = {name: torch.tensor(np.asarray(value)) for name, value in inputs.items()}
        return model(torch.tensor(np.asarray(tokens)), **tensors).logits.float().numpy()


def random_tokens(config: ModelConfig, batch: int, length: int, seed: int = 0) -> np.ndarray:
    """Token ids [B, T]."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length))


def relative_error(actual: Any, expected: Any) -> float:
    """Largest difference, relative to the largest expected value where that exceeds 1."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.abs(actual - expected).max() / max(1.0, np.abs(expected).max()))
