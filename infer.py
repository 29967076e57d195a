"""Decodes on a thinking budget: `python infer.py --prompt "What is 2 + 3? /think" --thinking-budget 4`."""

from qwen3_jax.cli.infer import main

if __name__ == "__main__":
    main()
