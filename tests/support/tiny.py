"""The tiny models of the tests, dense and with experts; what a test needs otherwise, it replaces."""

from __future__ import annotations

import dataclasses
from typing import Any

from qwen3_jax.config import ModelConfig

DENSE = ModelConfig(
    vocab_size=96,
    hidden_size=40,  # not num_attention_heads * head_dim, as in the released 0.6B, 4B, 32B and both MoE models
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=56,
    max_position_embeddings=256,
    rope_theta=10_000.0,
)
MOE = dataclasses.replace(DENSE, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24)
# What runs of train.py train: large enough to learn in some tens of steps, with the tokenizer of `write_dataset`.
TRAINED = dataclasses.replace(
    DENSE,
    vocab_size=512,
    hidden_size=64,
    intermediate_size=256,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)


def yaml_fields(config: ModelConfig) -> dict[str, Any]:
    """The config as the `model` section of a run file."""
    fields = dataclasses.asdict(config).items()
    return {name: value for name, value in fields if value is not None and name != "mlp_only_layers"}
