"""Batch decoding on a thinking budget, in one XLA program."""

from qwen3_jax.decode.batch import check_request, generate
from qwen3_jax.decode.budget import ThinkingTokens
from qwen3_jax.decode.request import Request, Result

__all__ = ["Request", "Result", "ThinkingTokens", "check_request", "generate"]
