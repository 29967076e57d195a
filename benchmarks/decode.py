"""Speed of prefill and decoding: against what memory allows, against the loop without budgets, against other programs.

`python benchmarks/decode.py --batch 1 8 --dtype float32` measures this project with random weights, greedily;
`--peers transformers llama_cpp` runs those beside it, in turns (README.md says how they are installed).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from qwen3_jax import hf
from qwen3_jax.config import ModelConfig
from qwen3_jax.decode import Request, ThinkingTokens
from qwen3_jax.decode.opening import UNLIMITED
from qwen3_jax.decode.pack import pack, pack_markers
from qwen3_jax.decode.programs import network, resume, start
from qwen3_jax.decode.schedule import round_up
from qwen3_jax.model import Qwen3

REENTRY = 32  # steps between leaving the loop and entering it again
PEERS = Path(__file__).parent / "peers"
VENVS = Path(__file__).parents[1] / "runs" / "peers"

Measure = Callable[[int, int, int], tuple[float, float]]  # (batch, prompt, new) -> prefill seconds, seconds per step


def random_weights(config: ModelConfig, dtype: Any) -> dict[str, Any]:
    """Weights of one array per layer, as a checkpoint of that dtype gives them."""
    model = Qwen3(config, stacked=False)
    init = jax.jit(lambda key: nn.unbox(model.init(key, jnp.zeros((1, 1), jnp.int32)))["params"])
    return jax.tree.map(lambda x: x.astype(dtype), init(jax.random.key(0)))


def thinking_tokens(vocab_size: int) -> ThinkingTokens:
    """Markers at the end of the vocabulary, where nothing is sampled: every row runs to its last token."""
    think, end_think, eos = range(vocab_size - 3, vocab_size)
    stop = (*range(100, 123), end_think, 123)
    return ThinkingTokens(think, end_think, (eos,), stop, (think, 123, end_think, 123), num_tokens=vocab_size - 64)


@functools.partial(jax.jit, static_argnames=("model", "new"), donate_argnames=("cache",))
def bare_loop(params: Any, token_B: Any, position_B: Any, cache: Any, *, model: Qwen3, new: int) -> Any:
    """Greedy decoding by the same forward pass and nothing else."""
    forward, ones_BT = network(model, params), jnp.ones_like(token_B)[:, None]

    def step(carry: Any) -> Any:
        i, token_B, tokens_BM, cache = carry
        logits_BV, cache = forward(token_B[:, None], (position_B + i)[:, None], ones_BT, cache)
        token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        return i + 1, token_B, jax.lax.dynamic_update_slice(tokens_BM, token_B[:, None], (0, i)), cache

    tokens_BM = jnp.zeros((token_B.shape[0], new), jnp.int32)
    return jax.lax.while_loop(lambda carry: carry[0] < new, step, (0, token_B, tokens_BM, cache))[2:]


@dataclasses.dataclass
class Ours:
    """This project's decoder; `variant` is budgets, bare (the same forward without them) or reentry."""

    model: Qwen3
    params: Any
    variant: str = "budgets"

    def __call__(self, batch: int, prompt: int, new: int) -> tuple[float, float]:
        config = self.model.config
        tokens = thinking_tokens(config.vocab_size)
        prompts = np.random.default_rng(0).integers(0, config.vocab_size - 64, (batch, prompt)).tolist()
        requests = [
            Request(ids, thinking_budget=new // 2, start_in_think=True, max_new_tokens=new + 1) for ids in prompts
        ]
        packed = pack(requests, [new + 1] * batch, config, tokens, prompt_slots=round_up(prompt))
        markers = jax.device_put(pack_markers(tokens, config.vocab_size))
        begin = time.perf_counter()
        state, written = start(self.params, packed, markers, np.int32(0), model=self.model, columns=round_up(new + 1))
        jax.block_until_ready(state)
        prefilled = time.perf_counter()
        if self.variant == "bare":
            last = (state.last_B, packed.rows.prompt_len_B)
            jax.block_until_ready(bare_loop(self.params, *last, state.cache, model=self.model, new=new))
        else:
            steps = np.int32(REENTRY if self.variant == "reentry" else UNLIMITED)
            while jax.device_get(written.budget.active_B).any():
                state, written = resume(self.params, state, packed.rows, markers, steps, model=self.model)
        return prefilled - begin, (time.perf_counter() - prefilled) / new


class Peer:
    """Another program, in a process of its own that waits between its turns."""

    def __init__(self, python: Path, *args: str) -> None:
        command = [str(python), *args]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def __call__(self, batch: int, prompt: int, new: int) -> tuple[float, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{batch} {prompt} {new}\n")
        self._process.stdin.flush()
        prefill, step = self._read().split()
        return float(prefill), float(step)

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args}: ended; its own message is above")
        return line


def start_peers(names: Sequence[str], checkpoint: Path, threads: int) -> dict[str, Peer]:
    """Those whose virtual environment is there; `name:word` hands the driver a further word."""
    peers = {}
    for name in names:
        driver, *words = name.split(":")
        python = VENVS / driver / "bin" / "python"
        if python.exists():
            peers[name] = Peer(python, str(PEERS / f"{driver}_peer.py"), str(checkpoint), str(threads), *words)
        else:
            print(f"{name}: skipped, {python} is not there")
    return peers


@functools.cache
def bandwidth_probe() -> Callable[[], float]:
    """A function that tells how many bytes per second a float32 matrix-vector product of an LM head's size reads."""
    matrix, vector, product = jnp.ones((151936, 1024)), jnp.ones(1024), jax.jit(jnp.matmul)

    def probe() -> float:
        begin = time.perf_counter()
        product(matrix, vector).block_until_ready()
        return matrix.nbytes / (time.perf_counter() - begin)

    return probe


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median (least..greatest)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def compare(contestants: Mapping[str, Measure], batch: int, prompt: int, new: int, reps: int, read: int) -> None:
    """Warms each up, runs them in turns, prints a table.

    Ratios are medians over the turns, above 1 where the first contestant is faster. `read`: bytes a step must read; the
    floor is its time at the best bandwidth seen between the turns.
    """
    speeds, turns = [], []
    for _ in range(reps + 1):
        turns.append({name: measure(batch, prompt, new) for name, measure in contestants.items()})
        speeds += [bandwidth_probe()() for _ in range(4)]
    del turns[0]
    floor_ms = read / max(speeds) * 1e3
    print(f"\nfloor {floor_ms:.1f} ms ({read / 1e9:.2f} GB at {max(speeds) / 1e9:.1f} GB/s)\n")
    print(f"| {batch} x {prompt} + {new} | prefill tok/s | ratio | ms per step | tok/s | of floor | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    first = next(iter(contestants))
    for name in contestants:
        prefill = [batch * prompt / turn[name][0] for turn in turns]
        steps = [turn[name][1] * 1e3 for turn in turns]
        ratios = [statistics.median(turn[name][i] / turn[first][i] for turn in turns) for i in (0, 1)]
        speed, share = batch * 1e3 / statistics.median(steps), floor_ms / statistics.median(steps)
        print(
            f"| {name} | {spread(prefill, 0)} | {ratios[0]:.2f} | {spread(steps)} | {speed:.1f} "
            f"| {share:.0%} | {ratios[1]:.3f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b", help="a preset of configs/model")
    parser.add_argument("--layers", type=int, help="fewer than the preset's")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of the peers")
    parser.add_argument("--variants", action="store_true", help="also the loop without budgets, and with re-entries")
    parser.add_argument("--peers", nargs="*", default=[], help="transformers, transformers:static, llama_cpp")
    args = parser.parse_args()

    config = ModelConfig.preset(args.shape)
    config = dataclasses.replace(config, num_hidden_layers=args.layers or config.num_hidden_layers)
    params = random_weights(config, args.dtype)
    model = Qwen3(config, dtype=jnp.dtype(args.dtype))
    contestants: dict[str, Measure] = {"ours": Ours(model, params)}
    if args.variants:
        contestants |= {"ours, no budgets": Ours(model, params, "bare")}
        contestants |= {f"ours, re-entered every {REENTRY}": Ours(model, params, "reentry")}
    if args.peers:
        checkpoint = VENVS / f"{args.shape}-{config.num_hidden_layers}-{args.dtype}"
        if not checkpoint.exists():
            hf.save_checkpoint(checkpoint, config, params)
        contestants |= start_peers(args.peers, checkpoint, args.threads)

    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    if not config.tie_word_embeddings:  # only rows of the table are read
        weights -= params["embed_tokens"].nbytes
    print(f"{args.shape}, {config.num_hidden_layers} layers, {args.dtype}")
    slot = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * jnp.dtype(args.dtype).itemsize
    for batch in args.batch:
        read = weights + batch * (args.prompt + args.new // 2) * slot
        compare(contestants, batch, args.prompt, args.new, args.reps, read)


if __name__ == "__main__":
    main()
