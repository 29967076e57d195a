"""Qwen3 in JAX and Flax: training, post-training and decoding on a thinking budget, for Cloud TPU."""
