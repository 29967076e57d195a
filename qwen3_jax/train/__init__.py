"""Training on a mesh: one loop for any objective and any feed."""

from qwen3_jax.train.config import ComputeConfig, TrainConfig
from qwen3_jax.train.loop import train
from qwen3_jax.train.plan import link_stages, run_plan
from qwen3_jax.train.stop import StopSignal
from qwen3_jax.train.supervised import train_on_files

__all__ = ["ComputeConfig", "StopSignal", "TrainConfig", "link_stages", "train_on_files", "run_plan", "train"]
