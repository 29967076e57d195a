"""Batch decoding on a thinking budget, in one XLA program."""

from qwen3_jax.decode.batch import generate
from qwen3_jax.decode.budget import ThinkingTokens
from qwen3_jax.decode.pack import check_request
from qwen3_jax.decode.pool import Pool
from qwen3_jax.request import Request, Result

__all__ = ["Pool", "Request", "Result", "ThinkingTokens", "check_request", "generate"]
