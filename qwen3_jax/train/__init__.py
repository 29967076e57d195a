"""Training on a mesh."""

from qwen3_jax.train.config import ComputeConfig, TrainConfig
from qwen3_jax.train.loop import train
from qwen3_jax.train.plan import link_stages, run_plan
from qwen3_jax.train.stop import StopSignal

__all__ = ["ComputeConfig", "StopSignal", "TrainConfig", "link_stages", "run_plan", "train"]
