"""Training on a mesh."""

from qwen3_jax.train.config import ComputeConfig, TrainConfig
from qwen3_jax.train.loop import train

__all__ = ["ComputeConfig", "TrainConfig", "train"]
