"""Post-training that learns from the model's own samples."""

from qwen3_jax.ops.policy import policy_loss
from qwen3_jax.rl.advantages import group_advantages

__all__ = ["group_advantages", "policy_loss"]
