"""Group size and capacity factor of the experts' dispatch: what each costs and drops.

`python benchmarks/moe_groups.py drops` counts dropped choices: of the model that ships on data of its own kind, and of
routers made uneven on purpose (`--experts 128`: of as many as Qwen3 has).
`python benchmarks/moe_groups.py time --factor 1.25` times the train step of a small
mixture of experts (8 layers, hidden 512, 32 experts of 256, top 8, batch 4 x 256, float32) for each group size, in
turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import qwen3_jax
from qwen3_jax import hf
from qwen3_jax.data import DataConfig, SourceConfig, make_loader
from qwen3_jax.model import Qwen3
from qwen3_jax.ops.moe import expert_capacity, route
from qwen3_jax.tasks.arithmetic import write_dataset
from qwen3_jax.train.next_token import NextToken
from qwen3_jax.train.step import TrainState, make_train_step
from train import LENGTH, ROWS, SHAPES

GROUPS = (32, 64, 128, 256)
FACTORS = (1.0, 1.25, 1.5, 2.0)
MINI = SHAPES["moe"]


def shipped_drops(batches: int = 8) -> Callable[[int, float], float]:
    """The shipped model (8 experts, top 2) on fresh records of the kind it was trained on, packed, 8 x 256 a batch."""
    config, params = hf.load_checkpoint(Path(qwen3_jax.__file__).parent / "assets" / "qwen3-tiny", dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), 2000, seed=1, vocab_size=config.vocab_size)
        paths, tokenizer = (f"{folder}/train.jsonl",), str(Path(qwen3_jax.__file__).parent / "assets" / "qwen3-tiny")
        sources = (SourceConfig(name="fresh", paths=paths),)
        loader = make_loader(DataConfig(sources=sources, tokenizer=tokenizer, sequence_length=LENGTH, batch_size=8))
        data = [next(loader) for _ in range(batches)]

    def rate(group_size: int, factor: float) -> float:
        model = Qwen3(config, stacked=True, capacity_factor=factor, group_size=group_size)
        forward = jax.jit(lambda *batch: model.apply({"params": params}, *batch).router)
        stats = [forward(batch["tokens"], batch["positions"], batch["segment_ids"]) for batch in data]
        return float(sum(s.dropped.sum() for s in stats) / sum(s.counts.sum() for s in stats))

    return rate


def uneven_drops(
    experts: int, everywhere: float, by_row: float, rows: int = 64, length: int = 1024
) -> Callable[[int, float], float]:
    """Top 8 of the experts, with random preferences: of all tokens alike, and of each row's own (its topic)."""
    rng = np.random.default_rng(0)
    bias = everywhere * rng.standard_normal(experts) + by_row * rng.standard_normal((rows, 1, experts))
    logits = rng.gumbel(size=(rows, length, experts)) + bias
    _, chosen, _ = route(jnp.asarray(logits), MINI.num_experts_per_tok, True, jnp.ones((rows, length), bool))

    def rate(group_size: int, factor: float) -> float:
        counts = np.asarray(chosen).reshape(-1, group_size, experts).sum(axis=1)
        capacity = expert_capacity(group_size, experts, MINI.num_experts_per_tok, factor)
        return float(np.maximum(counts - capacity, 0).sum() / counts.sum())

    return rate


def drops(experts: int) -> None:
    shipped = {"shipped model": shipped_drops()} if experts == MINI.num_experts else {}
    cases = shipped | {
        "even": uneven_drops(experts, 0.0, 0.0),
        "uneven": uneven_drops(experts, 0.5, 0.0),
        "by topic": uneven_drops(experts, 0.0, 0.5),
        "both": uneven_drops(experts, 0.5, 0.5),
    }
    print(f"| group | factor | {' | '.join(cases)} |")
    print(f"| --- | --- |{' --- |' * len(cases)}")
    for group_size in GROUPS if shipped else (128, 256, 512, 1024):
        for factor in FACTORS:
            rates = " | ".join(f"{rate(group_size, factor):.1%}" for rate in cases.values())
            print(f"| {group_size} | {factor} | {rates} |", flush=True)


def dispatch_share(group_size: int) -> float:
    """FLOPs of the products with the dispatch mask over those with the experts' weights, forward and backward: two and
    two products of 2 S (E C) D a group against three and six of 2 (E C) F D."""
    return 4 * group_size / (9 * MINI.moe_intermediate_size)


def times(factor: float, turns: int) -> None:
    tokens = np.random.default_rng(0).integers(0, MINI.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((ROWS, LENGTH), np.int32),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        "loss_weights": np.ones((ROWS, LENGTH), np.float32),
    }
    init = jax.jit(lambda key: nn.unbox(Qwen3(MINI, stacked=True).init(key, jnp.zeros((1, 8), jnp.int32)))["params"])
    params, optimizer = init(jax.random.key(0)), optax.adamw(1e-4)
    state = TrainState(params, optimizer.init(params))
    del params  # donated
    models = {size: Qwen3(MINI, stacked=True, capacity_factor=factor, group_size=size) for size in GROUPS}
    steps = {
        size: jax.jit(make_train_step(NextToken(model, ROWS, LENGTH), optimizer), donate_argnums=0)
        for size, model in models.items()
    }
    seconds: dict[int, list[float]] = {size: [] for size in GROUPS}
    for turn in range(turns + 1):
        for size, step in steps.items():
            begin = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
            if turn:  # the first one compiles
                seconds[size].append(time.perf_counter() - begin)
    base = seconds[GROUPS[-1]]
    print(f"factor {factor}\n| group | dispatch / expert FLOPs | s per step | tokens/s | step / step at {GROUPS[-1]} |")
    print("| --- | --- | --- | --- | --- |")
    for size, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, base, strict=True))
        middle = statistics.median(values)
        spread = f"{middle:.2f} ({min(values):.2f}..{max(values):.2f})"
        print(f"| {size} | {dispatch_share(size):.0%} | {spread} | {ROWS * LENGTH / middle:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["drops", "time"])
    parser.add_argument("--factor", type=float, default=1.25, help="capacity factor of the timed steps")
    parser.add_argument("--experts", type=int, default=MINI.num_experts, help="of the uneven routers")
    parser.add_argument("--turns", type=int, default=4)
    args = parser.parse_args()
    if args.what == "drops":
        drops(args.experts)
    else:
        times(args.factor, args.turns)
