"""Batch decoding on a thinking budget, in one XLA program."""

from qwen3_jax.decode.batch import generate
from qwen3_jax.decode.opening import check_request
from qwen3_jax.decode.pool import Pool
from qwen3_jax.decode.schedule import Event
from qwen3_jax.decode.score import score
from qwen3_jax.request import Request, Result
from qwen3_jax.text.thinking import ThinkingTokens

__all__ = ["Event", "Pool", "Request", "Result", "ThinkingTokens", "check_request", "generate", "score"]
