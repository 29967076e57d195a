"""Training data: documents in files to packed batches."""

from qwen3_jax.data.catalogue import write_catalogue
from qwen3_jax.data.config import DataConfig, SourceConfig
from qwen3_jax.data.lint import Survey, survey
from qwen3_jax.data.loader import make_loader

__all__ = ["DataConfig", "SourceConfig", "Survey", "make_loader", "survey", "write_catalogue"]
