"""Batch decoding on a thinking budget, in one XLA program."""

from qwen3_jax.decode.batch import generate
from qwen3_jax.decode.budget import ThinkingTokens
from qwen3_jax.decode.request import Request, Result

__all__ = ["Request", "Result", "ThinkingTokens", "generate"]
