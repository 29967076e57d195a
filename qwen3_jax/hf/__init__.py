"""Checkpoints of the released models, in and out: one mapping table, safetensors streamed to and from the mesh."""

from qwen3_jax.hf.load import load_checkpoint
from qwen3_jax.hf.save import new_directory, save_checkpoint

__all__ = ["load_checkpoint", "new_directory", "save_checkpoint"]
