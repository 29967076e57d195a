"""Speed of the train step on this machine: tokens per second and MFU, beside other programs.

`python benchmarks/train.py moe` or `dense`; `--peers transformers tunix` runs those beside it, in turns (README.md says
how they are installed). All do the same: a batch of 4 x 256 random tokens, float32, forward, backward, the gradient cut
to norm 1, AdamW.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from decode import PEERS, VENVS, spread
from flax import linen as nn

from qwen3_jax.config import ModelConfig
from qwen3_jax.model import Qwen3
from qwen3_jax.optim import OptimizerConfig, make_optimizer
from qwen3_jax.train.flops import peak_flops, train_flops_per_token
from qwen3_jax.train.next_token import NextToken
from qwen3_jax.train.step import TrainState, make_train_step

ROWS, LENGTH = 4, 256
SHAPES = {
    "moe": ModelConfig(
        vocab_size=32768,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=1536,
        max_position_embeddings=4096,
        rope_theta=1e6,
        num_experts=32,
        num_experts_per_tok=8,
        moe_intermediate_size=256,
        tie_word_embeddings=True,
    ),
    "dense": dataclasses.replace(ModelConfig.preset("qwen3-0.6b"), num_hidden_layers=4),
}
# How the experts are computed: with room for 1.25 times the mean load, what is above it dropped, or all of them.
VARIANTS: dict[str, dict[str, Any]] = {
    "ours": {"capacity_factor": 1.25, "group_size": 64},
    "ours:exact": {"capacity_factor": None},
}

# Of a layer with experts only what its products made is kept for the backward pass; norms, softmaxes and the like are
# computed again there, which is less than to write and read them. In the dense shape it is more.
REMAT: dict[str, dict[str, Any]] = {
    "moe": {"remat": True, "keep": ("qkv", "attention", "mlp", "dispatch")},
    "dense": {"remat": False},
}

Measure = Callable[[], float]  # seconds of a step


def ours(config: ModelConfig, compute: dict[str, Any]) -> Measure:
    """This project's step with random weights."""
    model = Qwen3(config, stacked=True, **compute)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-4, warmup_steps=0), steps=10**6)
    params = jax.jit(lambda key: nn.unbox(model.init(key, jnp.zeros((1, 8), jnp.int32)))["params"])(jax.random.key(0))
    state = TrainState(params, jax.jit(optimizer.init)(params))
    del params
    step = jax.jit(make_train_step(NextToken(model, ROWS, LENGTH), optimizer), donate_argnums=0)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((ROWS, LENGTH), np.int32),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        "loss_weights": np.ones((ROWS, LENGTH), np.float32),
    }

    def measure() -> float:
        nonlocal state
        begin = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - begin

    return measure


class Peer:
    """Another program, in a process of its own that waits between its turns."""

    def __init__(self, name: str, config: Path) -> None:
        command = [str(VENVS / name / "bin" / "python"), str(PEERS / f"{name}_train_peer.py"), str(config)]
        command += [str(ROWS), str(LENGTH)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print("step", file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args}: ended; its own message is above")
        return float(line)


def compare(contestants: dict[str, Measure], config: ModelConfig, reps: int) -> None:
    """Warms each up twice, runs them in turns, prints a table. A ratio is the median over the turns of the
    contestant's time by that of the first: above 1 where the first is faster."""
    for _ in range(2):
        for measure in contestants.values():
            measure()
    turns = [{name: measure() for name, measure in contestants.items()} for _ in range(reps)]
    peak, source = peak_flops(jax.devices())
    flops = train_flops_per_token(config, LENGTH)
    print(f"\n{config.num_params:,} weights, {config.num_active_params:,} active; {flops / 1e6:,.0f} MFLOP a token")
    print(f"peak {peak / 1e9:,.0f} GFLOP/s ({source})\n")
    print(f"| {ROWS} x {LENGTH}, float32 | ms per step | tokens/s | MFU | ratio |")
    print("| --- | --- | --- | --- | --- |")
    first = next(iter(contestants))
    for name in contestants:
        seconds = [turn[name] for turn in turns]
        rate = ROWS * LENGTH / statistics.median(seconds)
        ratio = statistics.median(turn[name] / turn[first] for turn in turns)
        times = spread([value * 1e3 for value in seconds], 0)
        print(f"| {name} | {times} | {rate:,.0f} | {rate * flops / peak:.0%} | {ratio:.2f} |", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES, help="moe: 8 layers of 32 experts; dense: 0.6B cut to 4 layers")
    parser.add_argument("--variants", nargs="+", default=["ours"], choices=VARIANTS)
    parser.add_argument("--peers", nargs="*", default=[], choices=("transformers", "tunix"))
    parser.add_argument("--reps", type=int, default=5)
    args = parser.parse_args(argv)
    config = SHAPES[args.shape]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "config.json"
        path.write_text(json.dumps(config.to_hf()), encoding="utf-8")
        contestants: dict[str, Measure] = {
            name: ours(config, VARIANTS[name] | REMAT[args.shape]) for name in args.variants
        }
        for name in args.peers:
            if (VENVS / name / "bin" / "python").exists():
                contestants[name] = Peer(name, path)
            else:
                print(f"{name}: skipped, {VENVS / name / 'bin' / 'python'} is not there")
        compare(contestants, config, args.reps)


if __name__ == "__main__":
    main()
