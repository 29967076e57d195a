"""transformers as a peer of `benchmarks/train.py`: `python transformers_train_peer.py CONFIG ROWS LENGTH`.

Answers each line on stdin with the seconds of one train step: random weights, torch's fused AdamW. Needs torch and
transformers.
"""

from __future__ import annotations

import sys
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM

if __name__ == "__main__":
    rows, length = int(sys.argv[2]), int(sys.argv[3])
    config = AutoConfig.from_pretrained(sys.argv[1])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, config.vocab_size, (rows, length))
    for _ in sys.stdin:
        begin = time.perf_counter()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(time.perf_counter() - begin, flush=True)
