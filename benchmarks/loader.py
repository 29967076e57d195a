"""Tokens per second of the data loader alone, beside the train step that it feeds, for the tiny model and its data.

`python benchmarks/loader.py`; both in turns, as medians. The step is that of `configs/tiny/pretrain.yaml`, and the
loader does all that a run has it do: reads records, renders chats, tokenises, packs.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from decode import spread
from jax.sharding import Mesh

from qwen3_jax.cli.config_file import load_config
from qwen3_jax.data import DataConfig, make_loader
from qwen3_jax.tasks.arithmetic import write_dataset
from qwen3_jax.train import TrainConfig
from qwen3_jax.train.program import TrainProgram
from qwen3_jax.train.supervised import make_objective
from sharding import MeshConfig, make_mesh

CONFIG = Path(__file__).parents[1] / "configs" / "tiny" / "pretrain.yaml"
TURNS, BATCHES, STEPS = 5, 200, 20


def reading(data: DataConfig) -> Callable[[], float]:
    """Tokens per second of the next batches."""
    loader: Iterator[object] = make_loader(data)
    for _ in itertools.islice(loader, BATCHES):  # workers start, files are opened
        pass

    def turn() -> float:
        began = time.perf_counter()
        for _ in itertools.islice(loader, BATCHES):
            pass
        return BATCHES * data.batch_size * data.sequence_length / (time.perf_counter() - began)

    return turn


def training(config: TrainConfig, mesh: Mesh) -> Callable[[], float]:
    """Tokens per second of the next steps, all of them on one batch."""
    program = TrainProgram(config, make_objective(config), mesh)
    batch = jax.device_put(next(make_loader(config.data)))
    state = program.first_state(program.init(jax.random.key(0)))

    def turn() -> float:
        nonlocal state
        began = time.perf_counter()
        for _ in range(STEPS):
            state, _ = program.step(state, batch)
        jax.block_until_ready(state)
        return STEPS * config.data.batch_size * config.data.sequence_length / (time.perf_counter() - began)

    turn()  # compiles
    return turn


def main() -> None:
    config = load_config(TrainConfig, CONFIG)
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), 20_000, seed=0, vocab_size=config.model.vocab_size)
        sources = (dataclasses.replace(config.data.sources[0], paths=(f"{folder}/train.jsonl",)),)
        data = dataclasses.replace(config.data, sources=sources, tokenizer=folder)
        mesh = make_mesh(MeshConfig())
        with jax.set_mesh(mesh):
            turns = {"train step": training(dataclasses.replace(config, data=data), mesh)}
            for workers in (0, 2):
                turns[f"loader, {workers} workers" if workers else "loader in a thread"] = reading(
                    dataclasses.replace(data, workers=workers)
                )
            rates = {name: [] for name in turns}
            for _ in range(TURNS):
                for name, turn in turns.items():
                    rates[name].append(turn())
    step = statistics.median(rates["train step"])
    for name, values in rates.items():
        print(f"| {name} | {spread(values, 0)} | {statistics.median(values) / step:.1f} |")


if __name__ == "__main__":
    main()
