"""Distillation on given text: the loss by its definition, on meshes, in memory, and through train.py."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import yaml
from flax import linen as nn

from qwen3_jax import hf
from qwen3_jax.cli.train import main as train
from qwen3_jax.model import Qwen3
from qwen3_jax.serve import shipped_model
from qwen3_jax.tasks.arithmetic import write_dataset
from qwen3_jax.train.config import TeacherConfig
from qwen3_jax.train.distill import Distill
from qwen3_jax.train.frozen import Frozen
from qwen3_jax.train.next_token import NextToken, in_thought
from qwen3_jax.train.objective import batch_structs
from qwen3_jax.train.step import TrainState, make_train_step
from sharding import MeshConfig, make_mesh, named_shardings

ROWS, LENGTH, MARKERS = 8, 16, (5, 6)
SMALL = {"vocab_size": 64, "hidden_size": 32, "head_dim": 8, "intermediate_size": 48, "initializer_range": 0.3}
DENSE = dataclasses.replace(tiny.DENSE, **SMALL)
MOE = dataclasses.replace(DENSE, hidden_size=48, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16)
PAIRS = {"dense from experts": (DENSE, MOE), "experts from dense": (MOE, DENSE)}


@functools.cache
def weights(config: Any, seed: int) -> Any:
    init = Qwen3(config, stacked=True).init
    return nn.unbox(jax.jit(init)(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"])


@functools.cache
def rows() -> dict[str, np.ndarray]:
    """Two documents and padding a row; some have a thought, and some tokens weigh nothing."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(7, 64, (ROWS, LENGTH))
    tokens[:, 1], tokens[::2, 4], tokens[1::2, 12] = MARKERS[0], MARKERS[1], MARKERS[1]
    segments = np.repeat([[1, 2, 0]], ROWS, axis=0).repeat([7, 7, 2], axis=1)
    arrays = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "segment_ids": segments,
        "positions": np.concatenate([np.arange(n) for n in (7, 7, 2)])[None].repeat(ROWS, axis=0),
    }
    loss = (rng.random((ROWS, LENGTH)) < 0.8) * (segments > 0)
    return {name: x.astype(np.int32) for name, x in arrays.items()} | {"loss_weights": loss.astype(np.float32)}


def objective(student: Any, teacher: Any, beta: float = 0.3) -> Distill:
    config = TeacherConfig(teacher, "nowhere", beta=beta, temperature=2.0)
    options = {"stacked": True, "dtype": jnp.dtype("float32")}
    model, teacher_model = Qwen3(student, expert_dispatch="ragged", **options), Qwen3(teacher, **options)
    return Distill(config, Frozen("teacher", teacher_model), model, ROWS, LENGTH, None, MARKERS)


def step(made: Distill, student: Any, teacher: Any, mesh: MeshConfig, accumulation: int = 1) -> tuple[Any, Any]:
    """`(metrics, weights after a step of SGD)`."""
    found = make_mesh(mesh, jax.devices()[: math.prod(mesh.axes.values())])
    boxed = jax.eval_shape(made.model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    shardings = named_shardings(boxed, found)
    structs = batch_structs(made.arrays, found, accumulation)
    batch = made.teacher.flat(teacher) | rows()
    with jax.set_mesh(found):
        params = jax.device_put(student, shardings)
        batch = {name: jax.device_put(x, structs[name].sharding) for name, x in batch.items()}
        optimizer = optax.sgd(1.0)
        run = jax.jit(make_train_step(made, optimizer, accumulation, shardings))
        state, metrics = run(TrainState(params, optimizer.init(params)), batch)
        return jax.device_get((metrics, state.params))


@pytest.mark.parametrize("pair", PAIRS)
def test_the_loss_is_the_divergence_of_the_two_models(pair: str) -> None:
    """Written out in float64 from both models' logits; thoughts and answers apart."""
    student, teacher = PAIRS[pair]
    made, batch, beta = objective(student, teacher), rows(), 0.3
    inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
    logs = []
    for model, params in ((made.teacher.model, weights(teacher, 1)), (made.model, weights(student, 0))):
        logits = np.asarray(model.apply({"params": params}, *inputs).logits, np.float64) / 2.0
        logits -= logits.max(-1, keepdims=True)
        logs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    (log_p, log_q), (p, q) = logs, map(np.exp, logs)
    log_m = np.log(beta * p + (1 - beta) * q)
    divergence = (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)

    metrics, _ = step(made, weights(student, 0), weights(teacher, 1), MeshConfig(fsdp=1))
    weight, thought = batch["loss_weights"], np.zeros((ROWS, LENGTH), bool)
    for row in range(ROWS):  # from <think>, in the first document only, to what comes before the next token
        thought[row, 1 : 4 if row % 2 == 0 else 7] = True
    for name, part in (("loss", np.ones_like(thought)), ("loss_thought", thought), ("loss_answer", ~thought)):
        expected = (divergence * weight * part).sum() / (weight * part).sum()
        assert metrics[name] == pytest.approx(expected, rel=1e-5), name
    assert "accuracy" not in metrics
    np.testing.assert_array_equal(in_thought({name: jnp.asarray(x) for name, x in batch.items()}, MARKERS), thought)


@pytest.mark.parametrize(
    ("pair", "mesh"),
    [
        ("dense from experts", MeshConfig(fsdp=2, expert=2, tensor=2)),
        ("experts from dense", MeshConfig(data=2, fsdp=2, context=2)),
    ],
)
def test_the_mesh_changes_nothing(pair: str, mesh: MeshConfig) -> None:
    student, teacher = PAIRS[pair]
    made, given = objective(student, teacher), (weights(student, 0), weights(teacher, 1))
    one, many = step(made, *given, MeshConfig(fsdp=1)), step(made, *given, mesh, accumulation=2)
    for name in ("loss", "loss_thought", "loss_answer", "grad_norm"):
        assert many[0][name] == pytest.approx(one[0][name], rel=1e-5), name
    chex.assert_trees_all_close(many[1], one[1], atol=1e-5, rtol=0)


def test_a_student_that_equals_its_teacher_learns_nothing() -> None:
    made = objective(DENSE, DENSE)
    metrics, after = step(made, weights(DENSE, 0), weights(DENSE, 0), MeshConfig(fsdp=1))
    assert abs(metrics["loss"]) < 1e-9
    chex.assert_trees_all_close(after, weights(DENSE, 0), atol=1e-6, rtol=0)


def test_the_program_holds_neither_logits_nor_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits exist for a chunk of tokens at a time; the teacher's weights are arguments."""
    monkeypatch.setattr("qwen3_jax.ops.loss._CHUNK_BYTES", ROWS * LENGTH * 64 * 4 // 4)
    made = objective(DENSE, MOE)
    batch = made.teacher.flat(weights(MOE, 1)) | rows()
    run = make_train_step(made, optax.sgd(1.0))
    text = jax.jit(run).lower(TrainState(weights(DENSE, 0), optax.sgd(1.0).init(weights(DENSE, 0))), batch).as_text()
    assert f"tensor<{ROWS * LENGTH // 8}x64xf32>" in text
    assert f"{ROWS}x{LENGTH}x64x" not in text
    assert f"{ROWS * LENGTH}x64x" not in text
    assert len(text) < 2_000_000


def test_held_out_losses_are_apart_for_thoughts_and_answers() -> None:
    """Of the next token too; where nothing thinks, there is no number."""
    batch = {name: jnp.asarray(x) for name, x in rows().items()}
    made = NextToken(Qwen3(DENSE, stacked=True), ROWS, LENGTH, None, MARKERS)
    for thinks in (True, False):
        if not thinks:
            batch["tokens"] = jnp.where(batch["tokens"] == MARKERS[0], 9, batch["tokens"])
        totals = made.totals(weights(DENSE, 0), {name: x[None] for name, x in batch.items()})
        _, sums = made.loss(weights(DENSE, 0), batch, totals, None)
        metrics = {name: float(value) for name, value in made.metrics(sums, totals).items()}
        if thinks:
            parts = [float(sums[part][1]) for part in ("thought", "answer")]
            mixed = sum(metrics[f"loss_{name}"] * n for name, n in zip(("thought", "answer"), parts, strict=True))
            assert mixed / sum(parts) == pytest.approx(metrics["loss"], rel=1e-5)
            assert metrics["loss_thought"] != pytest.approx(metrics["loss_answer"], rel=1e-3)
        else:
            assert math.isnan(metrics["loss_thought"])
            assert metrics["loss_answer"] == pytest.approx(metrics["loss"], rel=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file, its data, and a teacher of another size with experts."""
    directory = tmp_path_factory.mktemp("distill")
    write_dataset(directory / "data", 300, seed=0, vocab_size=512)
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    teacher = dataclasses.replace(tiny.TRAINED, hidden_size=48, initializer_range=0.2, **experts)
    hf.save_checkpoint(directory / "teacher", teacher, weights(teacher, 3))
    shutil.copy(directory / "data" / "tokenizer.model", directory / "teacher")
    run = {
        "model": tiny.yaml_fields(tiny.TRAINED),
        "data": {
            "sources": [{"name": "chats", "paths": [str(directory / "data" / "train.jsonl")]}],
            "tokenizer": str(directory / "data"),
            "sequence_length": 64,
            "batch_size": 8,
        },
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
        "compute": {"dtype": "float32", "remat": False},
        "teacher": {"init_from": str(directory / "teacher"), "beta": 1.0},
        "steps": 30,
        "log_every": 1,
        "eval_every": 30,
    }
    run["eval_data"] = run["data"]
    (directory / "run.yaml").write_text(yaml.safe_dump({**run, "output_dir": str(directory / "out")}))
    return directory


def test_a_run_comes_nearer_to_its_teacher(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The teacher's shape is read from its directory, and its weights are cast to the dtype of the computation."""
    train([str(folder / "run.yaml")])
    assert "teacher" in capsys.readouterr().out
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    last = lines[-1]
    assert last["eval_loss"] < 0.7 * lines[0]["loss"]
    assert min(last["eval_loss_thought"], last["eval_loss_answer"]) < last["eval_loss"]
    train([str(folder / "run.yaml"), "--steps", "34", "--output_dir", str(folder / "out")])  # resumes, teacher and all
    resumed = [json.loads(line)["step"] for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    assert resumed == list(range(1, 35))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--teacher.beta", "2"], r"--teacher.beta: 2.0; use a number from 0 to 1"),
        (["--teacher.temperature", "0"], r"--teacher.temperature: 0.0; use a number above 0"),
        (["--teacher.init_from", "nowhere"], r"teacher.init_from: 'nowhere'"),
        (["--teacher.model.vocab_size", "500"], r"teacher.model.vocab_size: 500; use a teacher with the student's"),
        (["--teacher.model.num_hidden_layers", "3"], r"teacher.init_from: .* has num_hidden_layers 2; teacher.model"),
        (["--data.tokenizer", "{other}"], r"teacher.init_from: .* has another tokenizer than .*other"),
    ],
)
def test_an_unfit_teacher_is_one_line(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = folder / "other"
    if not other.exists():
        other.mkdir()
        shutil.copy(shipped_model() / "tokenizer.model", other)
    out = folder / "refused"
    with pytest.raises(SystemExit, match="2"):
        train([str(folder / "run.yaml"), "--output_dir", str(out), *(word.format(other=other) for word in words)])
    told = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, told), told
    assert not (out / "checkpoints").exists()
