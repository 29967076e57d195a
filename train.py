"""Trains Qwen3 on a mesh: `python train.py configs/tiny/pretrain.yaml [--section.key value ...]`."""

from qwen3_jax.cli.train import main

if __name__ == "__main__":
    main()
