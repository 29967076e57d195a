"""The train step of a tiny model, compiled with the project's options for every generation of TPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen3_jax.aot import read_cost
from qwen3_jax.aot.programs import train_step
from qwen3_jax.chips import find_chip
from qwen3_jax.cli.config_file import load_config
from qwen3_jax.train import TrainConfig

TINY = Path(__file__).parents[2] / "configs" / "tiny" / "pretrain.yaml"
SMALL = "--model.num_hidden_layers 1 --data.batch_size 4 --data.sequence_length 128 --mesh.fsdp 4".split()


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.usefixtures("tpu_compiler")
def test_a_train_step_compiles(topology: str) -> None:
    """The compiler refuses an option that is unknown, and one that it calls unsafe for the chip."""
    work = train_step(load_config(TrainConfig, TINY, [*SMALL, "--mesh.topology", topology]))
    text = work.lower().compile().as_text()
    assert text is not None
    cost = read_cost(text, find_chip(topology))
    assert 0 < work.flops / work.mesh.size < cost.flops("matmul") + cost.flops("kernel")
    assert "all-gather" in {c.kind for c in cost.collectives}
