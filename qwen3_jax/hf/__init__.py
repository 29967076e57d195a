"""Reading and writing checkpoints in Hugging Face's layout: one table of names, safetensors streamed to the mesh."""

from qwen3_jax.hf.load import load_checkpoint
from qwen3_jax.hf.save import new_directory, save_checkpoint

__all__ = ["load_checkpoint", "new_directory", "save_checkpoint"]
