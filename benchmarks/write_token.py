"""What choosing, forcing and writing a token costs a step, against a bare argmax, over logits of Qwen3's vocabulary.

`python benchmarks/write_token.py`: the decoding loop over a look-up table in place of the network, greedy, on a budget.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from decode import thinking_tokens

from qwen3_jax.config import ModelConfig
from qwen3_jax.decode import Request
from qwen3_jax.decode.budget import UNLIMITED
from qwen3_jax.decode.loop import begin, decode, read_prompts
from qwen3_jax.decode.pack import pack, pack_markers

NEW, TURNS = 128, 7


def measure(batch: int) -> None:
    """Prints milliseconds a step of both loops, in turns: median (least..greatest)."""
    config = ModelConfig.preset("qwen3-0.6b")
    tokens = thinking_tokens(config.vocab_size)
    requests = [Request((1, 2, 3), thinking_budget=40, max_new_tokens=NEW)] * batch
    packed = jax.device_put(pack(requests, [NEW] * batch, config, tokens, prompt_slots=32))
    markers = jax.device_put(pack_markers(tokens, config.vocab_size))
    table = jax.random.normal(jax.random.key(0), (4, batch, config.vocab_size))

    def forward(tokens_BT: Any, positions_BT: Any, segment_ids_BT: Any, cache: Any) -> Any:
        return table[positions_BT[0, -1] % 4], cache

    @jax.jit
    def ours() -> jax.Array:
        prompts = read_prompts(forward, packed.prompt_BP, packed.there_BP, jnp.zeros(()))
        state = begin(prompts, packed.rows, packed.budget, markers, NEW)
        return decode(forward, state, packed.rows, markers, jnp.int32(UNLIMITED)).tokens_BM

    @jax.jit
    def bare() -> jax.Array:
        def step(i: Any, out_BM: Any) -> Any:
            logits_BV, _ = forward(None, jnp.full((batch, 1), i), None, None)
            token_B1 = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)[:, None]
            return jax.lax.dynamic_update_slice(out_BM, token_B1, (0, i))

        return jax.lax.fori_loop(0, NEW, step, jnp.zeros((batch, NEW), jnp.int32))

    times: dict[str, list[float]] = {"ours": [], "bare": []}
    for _ in range(TURNS + 1):
        for name, loop in (("ours", ours), ("bare", bare)):
            started = time.perf_counter()
            np.asarray(loop())
            times[name].append((time.perf_counter() - started) / NEW * 1e3)
    for name, values in times.items():
        least, most = min(values[1:]), max(values[1:])  # the first turn compiles
        print(f"batch {batch}, {name}: {statistics.median(values[1:]):.2f} ms ({least:.2f}..{most:.2f})")


if __name__ == "__main__":
    for size in (1, 8):
        measure(size)
