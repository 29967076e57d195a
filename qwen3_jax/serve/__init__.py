"""From text to text: a model directory, requests as JSON records, answers as JSON records."""

from qwen3_jax.serve.engine import Engine, shipped_model

__all__ = ["Engine", "shipped_model"]
