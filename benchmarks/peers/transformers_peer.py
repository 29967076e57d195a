"""transformers as a peer of `benchmarks/decode.py`: `python transformers_peer.py CHECKPOINT THREADS [static]`.

Answers each line `batch prompt new` on stdin with `prefill seconds, seconds per decode step` (greedy). A bare loop over
the model's own forward, faster than `generate`. `static` takes the cache of fixed size and compiles the decode step.
Needs torch and transformers.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.utils import logging


@torch.inference_mode()
def run(model: Any, step: Any, static: bool, rows: int, prompt: int, new: int) -> tuple[float, float]:
    """One prefill of `rows` prompts and `new` steps."""
    config = model.config
    cache = StaticCache(config=config, max_cache_len=prompt + new + 1) if static else DynamicCache(config=config)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size - 64, (rows, prompt), generator=generator)
    begin = time.perf_counter()
    logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    next_B = logits[:, -1].argmax(-1, keepdim=True)
    prefilled = time.perf_counter()
    for i in range(new):
        position = torch.full((rows, 1), prompt + i)
        logits = step(next_B, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        next_B = logits[:, -1].argmax(-1, keepdim=True)
    return prefilled - begin, (time.perf_counter() - prefilled) / new


if __name__ == "__main__":
    logging.disable_progress_bar()
    torch.set_num_threads(int(sys.argv[2]))
    loaded = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
    fixed = sys.argv[3:] == ["static"]
    compiled = torch.compile(loaded) if fixed else loaded
    print("ready", flush=True)
    for line in sys.stdin:
        print(*run(loaded, compiled, fixed, *map(int, line.split())), flush=True)
