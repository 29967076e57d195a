"""Training: what a step computes, that runs resume exactly, and that the mesh does not change the numbers."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from flax import linen as nn
from processes import Command
from program_cache import QUICK_COMPILE
from tensorboardX.proto.event_pb2 import Event
from tiny import MOE, yaml_fields

from qwen3_jax.config import ModelConfig
from qwen3_jax.model import Qwen3
from qwen3_jax.tasks.arithmetic import write_dataset
from qwen3_jax.train.flops import train_flops_per_token
from qwen3_jax.train.metrics import MetricsLog
from qwen3_jax.train.next_token import NextToken, packed_arrays
from qwen3_jax.train.objective import batch_structs
from qwen3_jax.train.step import TrainState, make_train_step
from sharding import MeshConfig, make_mesh

ROOT = Path(__file__).parents[2]
CONFIG = dataclasses.replace(
    MOE,
    vocab_size=512,
    hidden_size=32,
    intermediate_size=64,
    max_position_embeddings=128,
    tie_word_embeddings=True,
    num_experts=4,
    moe_intermediate_size=16,
    router_aux_loss_coef=0.1,
)


def make_batch(rows: int, length: int = 32) -> dict[str, jax.Array]:
    """Packed rows: two segments, padding at the end, and loss on some tokens only, unevenly over the rows."""
    rng = np.random.default_rng(0)
    segments = np.repeat([[1, 2, 0]], rows, axis=0).repeat([12, 16, 4], axis=1)
    positions = np.concatenate([np.arange(12), np.arange(16), np.arange(4)])[None].repeat(rows, axis=0)
    weights = (rng.random((rows, length)) < np.linspace(0.1, 0.9, rows)[:, None]) * (segments > 0)
    return {
        "tokens": jnp.array(rng.integers(0, 512, (rows, length)), jnp.int32),
        "targets": jnp.array(rng.integers(0, 512, (rows, length)), jnp.int32),
        "segment_ids": jnp.array(segments, jnp.int32),
        "positions": jnp.array(positions, jnp.int32),
        "loss_weights": jnp.array(weights, jnp.float32),
    }


@functools.cache
def one_step(
    accumulation: int, capacity_factor: float | None = 1.0, aux_coef: float = CONFIG.router_aux_loss_coef
) -> tuple[TrainState, dict[str, Any]]:
    """One step of plain gradient descent, so that the update is the gradient."""
    config = dataclasses.replace(CONFIG, router_aux_loss_coef=aux_coef)
    model = Qwen3(config, stacked=True, capacity_factor=capacity_factor, group_size=16)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16), jnp.int32)))["params"]
    optimizer = optax.sgd(1.0)
    step = jax.jit(make_train_step(NextToken(model, 8, 32), optimizer, accumulation))
    return step(TrainState(params, optimizer.init(params)), make_batch(8))


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_changes_nothing(accumulation: int) -> None:
    """The loss weighs tokens, not micro-batches, and the experts are balanced over the whole batch: the rows differ in
    weight and routing, so a mean of micro-batch means, or of their balance losses, would be off by per cents."""
    (whole, whole_metrics), (split, split_metrics) = one_step(1), one_step(accumulation)
    whole_metrics, split_metrics = dict(whole_metrics), dict(split_metrics)
    chex.assert_trees_all_close(split.params, whole.params, atol=1e-6)
    for name in ("router/balance_micro", "router/balance_step_running"):  # those two are of micro-batches
        del whole_metrics[name], split_metrics[name]
    chex.assert_trees_all_close(split_metrics, whole_metrics, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("quick_compile")
def test_the_balance_loss_is_in_the_gradient() -> None:
    with_balance, without = one_step(1)[0].params, one_step(1, aux_coef=0.0)[0].params
    moved = with_balance["layers_0_2"]["mlp"]["router"] - without["layers_0_2"]["mlp"]["router"]
    assert float(jnp.abs(moved).max()) > 1e-5


@pytest.mark.usefixtures("quick_compile")
def test_router_series_are_reported_per_layer() -> None:
    _, metrics = one_step(1)
    for name in ("dropped", "entropy", "load_max", "load_min"):
        chex.assert_shape(metrics[f"router/{name}"], (2,))
    assert (metrics["router/dropped"] > 0).all()
    assert (metrics["router/load_max"] >= 1).all()
    assert (metrics["router/load_min"] <= 1).all()
    _, exact = one_step(1, capacity_factor=None)
    assert (exact["router/dropped"] == 0).all()


def test_flops_of_a_known_model() -> None:
    """Qwen3-0.6B at 4096 tokens: 6 * 596 M for its (tied) matmuls, 6 * 28 * 2048 * 4096 for causal attention."""
    config = ModelConfig.preset("qwen3-0.6b")
    assert train_flops_per_token(config, 4096) == 6 * 596_049_920 + 6 * 28 * 2048 * 4096


def test_metrics_beyond_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": float(step), "router/dropped": [0.0, 0.5]})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut by a crash
    log = MetricsLog(tmp_path, 2)
    log.write(3, {"loss": 30.0})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert list((tmp_path / "tensorboard").iterdir())


def test_event_files_have_groups_of_layers(tmp_path: Path) -> None:
    """Twenty layers in eight groups: the largest of a maximum, the smallest of a minimum, the mean of the rest; three
    layers are a series each."""
    log = MetricsLog(tmp_path, 0)
    twenty = [float(layer) for layer in range(20)]
    twenty[3] = float("nan")
    log.write(5, {"loss": 2.0, "load_max": twenty, "load_min": twenty, "entropy": twenty, "dropped": [0.0, 0.5, 1.0]})
    log.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    values, content = {}, file.read_bytes()
    while content:  # records of TensorFlow's format: length, its checksum, an event, its checksum
        (length,) = struct.unpack_from("<Q", content)
        event = Event.FromString(content[12 : 12 + length])
        values |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        content = content[16 + length :]
    assert values["loss"] == (5, 2.0)
    assert [values[f"dropped/{layer}"] for layer in range(3)] == [(5, 0.0), (5, 0.5), (5, 1.0)]
    groups = ["0-1", "2-4", "5-6", "7-9", "10-11", "12-14", "15-16", "17-19"]
    assert len(values) == 1 + 3 + 3 * len(groups)
    expected = {
        "load_max": [1, 4, 6, 9],
        "load_min": [0, 2, 5, 7],
        "entropy": [0.5, 3, 5.5, 8],
    }  # not a number: left out
    for name, first in expected.items():
        assert [values[f"{name}/{group}"][1] for group in groups[:4]] == first
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["load_max"][3:5] == [None, 4.0]


# Runs of train.py itself.


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run: 6 steps, a checkpoint every 3."""
    directory = tmp_path_factory.mktemp("run")
    write_dataset(directory / "data", 400, seed=0, vocab_size=512)
    fields = {
        "model": yaml_fields(CONFIG),
        "data": {
            "sources": [{"name": "arithmetic", "paths": [str(directory / "data" / "train.jsonl")]}],
            "tokenizer": str(directory / "data"),
            "sequence_length": 64,
            "batch_size": 8,
        },
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2},
        "compute": {"dtype": "float32", "capacity_factor": 1.25, "group_size": 32, "remat": True},
        "output_dir": str(directory / "out"),
        "steps": 6,
        "checkpoint_every": 3,
        "log_every": 1,
    }
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def run_train(path: Path, *overrides: str, flags: str = "") -> tuple[int | None, str, str]:
    """The exit code of train.py, and what it prints on stdout and on stderr."""
    env = {**os.environ, "XLA_FLAGS": flags}
    process = Command("qwen3_jax.cli.train:main", str(path), *overrides, env=env, cwd=ROOT)
    out, err = process.communicate()
    return process.returncode, out, err


def metrics_of(directory: Path) -> list[dict[str, Any]]:
    """The series without what depends on the clock."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: v for name, v in line.items() if name not in ("tokens_per_second", "mfu") and "time/" not in name}
        for line in lines
    ]


def test_train_py_runs_resumes_exactly_and_is_the_same_on_eight_devices(run_file: Path, tmp_path: Path) -> None:
    """A run cut after its third step goes on to bit-identical numbers; eight devices give the same up to rounding."""
    whole, cut, eight = tmp_path / "whole", tmp_path / "cut", tmp_path / "eight"
    # An interpreter of its own: the script too is under test.
    command = [sys.executable, str(ROOT / "train.py"), str(run_file), "--output_dir", str(whole)]
    env = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(
        [*command, "--heat_map_every", "3"], env=env, capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "trained to step 6" in done.stdout
    series = metrics_of(whole)
    assert [line["step"] for line in series] == [1, 2, 3, 4, 5, 6]
    assert series[-1]["loss"] < series[0]["loss"]
    assert sorted(path.name for path in (whole / "heat_maps").iterdir()) == ["3.png", "6.png"]

    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "6")
    code, out, err = run_train(run_file, "--output_dir", str(cut))
    assert code == 0, err
    assert "from step 3" in " ".join(out.split())
    assert metrics_of(cut) == series

    mesh = ("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.expert", "2")
    flags = f"{QUICK_COMPILE} --xla_force_host_platform_device_count=8"
    code, _, err = run_train(run_file, "--output_dir", str(eight), *mesh, flags=flags)
    assert code == 0, err
    for one, many in zip(series, metrics_of(eight), strict=True):
        assert many["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert many["router/load_max"] == pytest.approx(one["router/load_max"], rel=1e-3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["--optimizer.learning_rte", "0.1"],
            "--optimizer.learning_rte: no such key; did you mean --optimizer.learning_rate?",
        ),
        (["--steps", "many"], "error: --steps: 'many'; use a value of type int"),
        (["--mesh.tensor", "3"], "mesh.fsdp: -1, but the other axes (3) do not divide 1 devices"),
        (["--accumulation", "3"], "accumulation: 3 does not divide data.batch_size (8); use a divisor"),
        (
            ["--data.sequence_length", "256"],
            "data.sequence_length: 256; use at most model.max_position_embeddings (128)",
        ),
    ],
)
def test_bad_configuration_is_one_line_and_exit_code_2(run_file: Path, overrides: list[str], message: str) -> None:
    code, _, err = run_train(run_file, *overrides)
    assert code == 2
    assert message in err
    assert len([line for line in err.splitlines() if line.strip()]) == 1


def test_a_sequence_that_the_context_axis_cannot_cut_is_refused() -> None:
    mesh = make_mesh(MeshConfig(fsdp=1, context=4, tensor=2))
    with pytest.raises(ValueError, match=r"^sequence_length: 36 on mesh\.context 4, .* use a multiple of 8$"):
        batch_structs(packed_arrays(4, 36), mesh)
