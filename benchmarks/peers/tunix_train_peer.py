"""tunix as a peer of `benchmarks/train.py`: `python tunix_train_peer.py CONFIG ROWS LENGTH`.

Answers each line on stdin with the seconds of one train step: tunix's network with random weights, optax's AdamW, one
jitted function whose state is donated. Needs google-tunix.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen3.model import ModelConfig, Qwen3

if __name__ == "__main__":
    raw, rows, length = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]), int(sys.argv[3])
    config = ModelConfig(
        num_layers=raw["num_hidden_layers"],
        vocab_size=raw["vocab_size"],
        embed_dim=raw["hidden_size"],
        hidden_dim=raw.get("moe_intermediate_size", raw["intermediate_size"]),
        num_heads=raw["num_attention_heads"],
        head_dim=raw["head_dim"],
        num_kv_heads=raw["num_key_value_heads"],
        rope_theta=raw["rope_theta"],
        norm_eps=raw["rms_norm_eps"],
        use_tied_embedding=raw["tie_word_embeddings"],
        num_experts=raw.get("num_experts"),
        num_experts_per_tok=raw.get("num_experts_per_tok"),
        dtype=jnp.float32,
        param_dtype=jnp.float32,
    )
    network, params = nnx.split(Qwen3(config, rngs=nnx.Rngs(0)))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4, b1=0.9, b2=0.95, weight_decay=0.1))
    state = params, jax.jit(optimizer.init)(params)
    del params
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, length + 1)).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    mask = np.tril(np.ones((length, length), bool))[None].repeat(rows, axis=0)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits, _ = nnx.merge(network, params)(tokens[:, :-1], positions, None, mask)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: Any, tokens: jax.Array) -> Any:
        params, optimizer_state = state
        value, grads = jax.value_and_grad(loss)(params, tokens)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), value

    for _ in sys.stdin:
        begin = time.perf_counter()
        state, value = jax.block_until_ready(train_step(state, tokens))
        print(time.perf_counter() - begin, flush=True)
