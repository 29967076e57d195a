"""Post-training that learns from the model's own samples."""

from qwen3_jax.rl.advantages import group_advantages
from qwen3_jax.rl.policy import Policy, policy_loss

__all__ = ["Policy", "group_advantages", "policy_loss"]
