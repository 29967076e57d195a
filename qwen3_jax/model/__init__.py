"""The network in Linen: modules declare weights and call `ops`."""

from qwen3_jax.model.layout import is_stacked, stack_layers, unstack_layers
from qwen3_jax.model.qwen3 import Output, Qwen3, head_weight, unembed

__all__ = ["Output", "Qwen3", "head_weight", "is_stacked", "stack_layers", "unembed", "unstack_layers"]
