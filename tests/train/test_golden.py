"""Golden loss curves: a refactoring must not change them. Whoever changes the mathematics, the data or their order on
purpose replaces the numbers by those that the failing assertion prints, and says why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import qwen3_jax
from qwen3_jax.cli.config_file import load_config, load_stages
from qwen3_jax.tasks.arithmetic import texts, training_records
from qwen3_jax.train import TrainConfig
from qwen3_jax.train.feed import FileFeed
from qwen3_jax.train.program import TrainProgram
from qwen3_jax.train.supervised import make_objective
from sharding import make_mesh

CONFIGS = Path(__file__).parents[2] / "configs"
TOKENIZER = Path(qwen3_jax.__file__).parent / "assets" / "qwen3-tiny"  # one that no test has to make first


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The records where the configurations look for them."""
    directory = tmp_path_factory.mktemp("golden")
    for name, file, records in (("tiny", "train", training_records), ("toy", "text", texts)):
        (directory / "runs" / name / "data").mkdir(parents=True)
        lines = "".join(json.dumps(record) + "\n" for record in records(300, seed=0))
        (directory / "runs" / name / "data" / f"{file}.jsonl").write_text(lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        yield


def losses(config: TrainConfig, params: Any = None) -> tuple[list[float], Any]:
    """Of the first four steps, from random weights or from these, on one device; and the weights after them."""
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    program = TrainProgram(config, make_objective(config), mesh)
    feed = FileFeed(config.data, mesh, config.accumulation)
    series = []
    with jax.set_mesh(mesh):
        params = program.init(jax.random.key(config.seed)) if params is None else params
        state = program.first_state(params)
        # Compiles in half the time; that the numbers depend on it by more than rounding would be a fault.
        step = program.lower().compile({"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})
        for _ in range(4):
            state, metrics = step(state, feed.next(state.train.params))
            series.append(float(metrics["loss"]))
    return series, state.train.params


def test_tiny() -> None:
    words = ["--data.tokenizer", str(TOKENIZER), "--data.sequence_length", "64", "--optimizer.warmup_steps", "1"]
    series, _ = losses(load_config(TrainConfig, CONFIGS / "tiny" / "pretrain.yaml", words))
    np.testing.assert_allclose(series, [6.1284227, 6.1462593, 5.7349386, 5.1091232], rtol=1e-5)


def test_the_toy_stages() -> None:
    """Each goes on with the weights of the one before: with one layer, and a warm-up that the steps get to see."""
    words = ["--data.tokenizer", str(TOKENIZER), "--model.num_hidden_layers", "1", "--optimizer.warmup_steps", "1"]
    words += ["--data.sequence_length", "64"]
    found, params = {}, None
    for name, config in load_stages(TrainConfig, CONFIGS / "pretrain" / "toy.yaml", words).items():
        found[name], params = losses(config, params)
    expected = {
        "s1": [5.757127, 5.818282, 5.341352, 4.764755],
        "s2": [4.376981, 4.365748, 4.276730, 3.825493],
        "s3": [3.668232, 3.570581, 3.453970, 3.341428],
    }
    assert found.keys() == expected.keys(), found
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
