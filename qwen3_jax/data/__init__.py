"""Training data: documents in files to packed batches."""

from qwen3_jax.data.loader import DataConfig, make_loader

__all__ = ["DataConfig", "make_loader"]
