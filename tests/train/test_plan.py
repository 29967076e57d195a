"""Plans: what a stage is made of, and the toy plan through train.py, whole and killed in its second stage."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from processes import Command

from qwen3_jax.cli import tokenize
from qwen3_jax.cli.config_file import load_stages
from qwen3_jax.cli.main import main as qwen3_jax
from qwen3_jax.data import make_loader
from qwen3_jax.model import Qwen3
from qwen3_jax.optim import make_schedule
from qwen3_jax.tasks.arithmetic import write_dataset
from qwen3_jax.train import TrainConfig, link_stages
from qwen3_jax.train.next_token import NextToken
from qwen3_jax.train.step import TrainState, make_train_step

ROOT = Path(__file__).parents[2]
PRETRAIN = ROOT / "configs" / "pretrain"
TOY = PRETRAIN / "toy.yaml"
SIZES = [
    *("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-32b"),
    *("qwen3-30b-a3b", "qwen3-235b-a22b"),
]
CHIPS = {"v6e:4x4": 16, "v5p:4x4x4": 64, "v6e:16x16": 256, "v5p:4x8x8": 256}


# The plans as they are written.


@pytest.mark.parametrize("size", SIZES)
def test_the_stages_are_those_of_the_report(size: str) -> None:
    """Section 3.2: tokens, sequence lengths, RoPE base, length mix, and a rate that S2 lets fall faster than S1."""
    s1, s2, s3 = load_stages(TrainConfig, PRETRAIN / f"{size}.yaml").values()
    assert [stage.data.sequence_length for stage in (s1, s2, s3)] == [4096, 4096, 32768]
    assert [stage.model.rope_theta for stage in (s1, s2, s3)] == [1e4, 1e4, 1e6]
    tokens = [stage.steps * stage.data.batch_size * stage.data.sequence_length for stage in (s1, s2, s3)]
    assert tokens == pytest.approx([30e12, 5e12, 300e9], rel=1e-4)
    assert {source.weight: source.tokens for source in s3.data.sources} == {0.75: (16384, 32768), 0.25: (4096, 16383)}
    share = [{source.name: source.weight for source in stage.data.sources} for stage in (s1, s2)]
    assert [sum(weights.values()) for weights in share] == pytest.approx([1.0, 1.0])
    assert all(share[1][raised] > 1.5 * share[0].get(raised, 0.0) for raised in ("reasoning", "code", "synthetic"))

    ends = []
    for stage in (s1, s2, s3):
        schedule = make_schedule(stage.optimizer, stage.steps)
        ends.append((float(schedule(stage.optimizer.warmup_steps)), float(schedule(stage.steps))))
    peak = s1.optimizer.learning_rate
    assert ends[0][0] == pytest.approx(peak)
    assert ends[1][0] == pytest.approx(ends[0][1])
    assert ends[2] == pytest.approx((ends[1][1], ends[1][1]))
    falls = [(first - last) / steps for (first, last), steps in zip(ends, tokens, strict=False)]
    assert falls[1] > 2 * falls[0]


@pytest.mark.parametrize("size", SIZES)
def test_the_rows_divide_over_the_mesh_that_the_plan_is_laid_out_for(size: str) -> None:
    """A row of a micro-batch for each of the mesh's batch axes, and as many tokens a chip in every stage."""
    tokens = set()
    for stage in load_stages(TrainConfig, PRETRAIN / f"{size}.yaml").values():
        chips = CHIPS[stage.mesh.topology or ""]
        mesh = stage.mesh.sizes(chips)
        rows = stage.data.batch_size // stage.accumulation
        assert rows % (mesh["data"] * mesh["fsdp"] * mesh["expert"]) == 0
        assert stage.data.sequence_length % (2 * mesh["context"]) == 0
        tokens.add(rows * stage.data.sequence_length // chips)
    assert tokens in ({8192}, {16384})


def test_stages_follow_each_other() -> None:
    stages = link_stages(load_stages(TrainConfig, TOY, ["--init_from", "start", "--output_dir", "out"]))
    assert [(stage.init_from, stage.output_dir) for stage in stages.values()] == [
        ("start", "out/s1"),
        ("out/s1", "out/s2"),
        ("out/s2", "out/s3"),
    ]


def test_an_option_is_for_all_stages_or_for_one() -> None:
    words = ["--seed", "7", "--s2.steps=30", "--s3.optimizer.warmup_steps", "2"]
    stages = load_stages(TrainConfig, TOY, words)
    assert [stage.seed for stage in stages.values()] == [7, 7, 7]
    assert [stage.steps for stage in stages.values()] == [1200, 30, 200]
    assert [stage.optimizer.warmup_steps for stage in stages.values()] == [100, 10, 2]
    assert load_stages(TrainConfig, ROOT / "configs" / "tiny" / "pretrain.yaml") == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--s2.model.hidden_size", "64"], r"stages.s2.model.hidden_size: 64; use that of the first stage, 128"),
        (["--s3.output_dir", "x"], "stages.s3.output_dir: 'x'; use the plan's, set outside stages"),
        (["--s4.steps", "1"], "--s4.steps: no such key"),
        (["--s2.stepz", "1"], "--stepz: no such key; did you mean --steps?"),
        (["--s2.steps", "5"], "toy.yaml: stages.s2: steps: 5 do not hold warmup_steps"),
        (["--steps"], "--steps: use --section.key value"),
    ],
)
def test_bad_plans_are_refused_by_name(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        link_stages(load_stages(TrainConfig, TOY, words))


# The toy plan through train.py.

SMALL = """--model.hidden_size 32 --model.num_hidden_layers 1 --compute.group_size 32 --optimizer.warmup_steps 2
    --s1.steps 8 --s2.steps 60 --s3.steps 5 --checkpoint_every 6 --log_every 1
    --data.batch_size 8 --data.sequence_length 64 --s3.data.sequence_length 128""".split()


def start_plan(directory: Path, name: str, *overrides: str) -> Command:
    """train.py in `directory`, where the data are; its output goes to runs/`name`."""
    words = (str(TOY), *SMALL, "--output_dir", f"runs/{name}", *overrides)
    return Command("qwen3_jax.cli.train:main", *words, env={**os.environ, "XLA_FLAGS": ""}, cwd=directory)


def finish(process: Command) -> str:
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    return out


def metrics_of(directory: Path) -> list[dict[str, Any]]:
    """The series, without what depends on the clock."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    clock = ("tokens_per_second", "mfu", "time/")
    return [{key: value for key, value in line.items() if not key.startswith(clock)} for line in lines]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The toy plan, run whole, and what it said."""
    directory = tmp_path_factory.mktemp("plan")
    write_dataset(directory / "runs" / "toy" / "data", 600, seed=0, vocab_size=512)
    return directory, finish(start_plan(directory, "whole"))


def test_each_stage_is_trained_as_the_plan_says(plan: tuple[Path, str]) -> None:
    directory, _ = plan
    for name, steps, length, theta in (("s1", 8, 64, 1e2), ("s2", 60, 64, 1e2), ("s3", 5, 128, 2e2)):
        series = metrics_of(directory / "runs" / "whole" / name)
        assert [line["tokens"] for line in series] == [8 * length * step for step in range(1, steps + 1)]
        assert json.loads((directory / "runs" / "whole" / name / "config.json").read_text())["rope_theta"] == theta


@pytest.mark.parametrize(("before", "stage"), [("s1", "s2"), ("s2", "s3")])
def test_a_stage_begins_with_the_weights_that_the_last_one_ended_with(
    plan: tuple[Path, str], before: str, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first loss of a stage is that of its first batch under those weights, and its own RoPE base: the other base
    gives another loss."""
    directory, _ = plan
    monkeypatch.chdir(directory)
    stages = load_stages(TrainConfig, TOY, SMALL)
    last = directory / "runs" / "whole" / before / "checkpoints" / str(stages[before].steps) / "params"
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    held = ocp.StandardCheckpointHandler().metadata(last).tree
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), held)
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(last, wanted)
    batch = {name: jnp.asarray(value) for name, value in next(iter(make_loader(stages[stage].data))).items()}

    def loss(model: Any) -> float:
        compute, optimizer = stages[stage].compute, optax.sgd(0.0)
        network = Qwen3(model, stacked=True, capacity_factor=compute.capacity_factor, group_size=compute.group_size)
        step = jax.jit(make_train_step(NextToken(network, *batch["tokens"].shape), optimizer))
        _, metrics = step(TrainState(params, optimizer.init(params)), batch)
        return float(metrics["loss"])

    first = metrics_of(directory / "runs" / "whole" / stage)[0]["loss"]
    assert loss(stages[stage].model) == pytest.approx(first, rel=1e-5)
    other = "s3" if stage == "s2" else "s2"
    assert loss(stages[other].model) != pytest.approx(first, rel=1e-4)


def test_a_plan_that_was_killed_in_a_stage_goes_on_there_to_the_same_numbers(plan: tuple[Path, str]) -> None:
    """SIGKILL in the second stage, after a checkpoint and before its end; started again, every stage's series is that
    of the plan that was not killed, to the bit."""
    directory, _ = plan
    cut, whole = directory / "runs" / "cut", directory / "runs" / "whole"
    process = start_plan(directory, "cut")
    while not (cut / "s2" / "checkpoints" / "6").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.kill()
    assert not (cut / "s2" / "checkpoints" / "60").exists()
    assert not (cut / "s3").exists()

    out = finish(start_plan(directory, "cut"))
    assert "stage s2, 2 of 3" in " ".join(out.split())
    assert "stage s1" not in " ".join(out.split())
    assert "from step 0" not in " ".join(out.split()).split("stage s3")[0]
    for stage in ("s1", "s2", "s3"):
        assert metrics_of(cut / stage) == metrics_of(whole / stage)


def test_a_signal_in_the_last_step_of_a_stage_stops_the_plan(plan: tuple[Path, str]) -> None:
    """It comes while the stage's only step is compiled, which no cache may shorten."""
    words = [str(TOY), *SMALL, "--output_dir", "runs/short", "--s1.steps", "1", "--s1.optimizer.warmup_steps", "0"]
    env = {**os.environ, "XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, str(ROOT / "train.py"), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=env, cwd=plan[0], **pipes)
    assert process.stdout is not None
    while "compute" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert "stopped by SIGTERM at step 1; checkpoint saved" in out
    assert "stage    s2" not in out
    assert not (plan[0] / "runs" / "short" / "s2").exists()


@pytest.mark.parametrize("command", [["convert", "{run}", "{run}/exported"], ["data", "report", "{run}"]])
def test_a_plan_is_not_a_run(plan: tuple[Path, str], command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run = plan[0] / "runs" / "whole"
    with pytest.raises(SystemExit, match="2"):
        qwen3_jax([word.format(run=run) for word in command])
    assert f"holds the stages of a plan; use one of {run}/s1, {run}/s2, {run}/s3" in capsys.readouterr().err


def test_the_sources_of_all_stages_are_tokenised(plan: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(plan[0])
    qwen3_jax(["tokenize", str(TOY), "ids", "--workers", "1", "--data.seed", "3"])  # keys as in train.py
    names = {source.name for stage in load_stages(TrainConfig, TOY).values() for source in stage.data.sources}
    assert {path.name for path in (plan[0] / "ids").iterdir()} == names
    assert all((plan[0] / "ids" / name / "manifest.json").is_file() for name in names)


def test_a_name_for_other_files_than_in_a_stage_before_is_not_tokenised(tmp_path: Path) -> None:
    text = TOY.read_text().replace("../model", str(ROOT / "configs" / "model")).replace("optimizer.yaml", "o.yaml")
    (tmp_path / "o.yaml").write_text((PRETRAIN / "optimizer.yaml").read_text())
    first, s2, rest = text.partition("  s2:")
    (tmp_path / "plan.yaml").write_text(first + s2 + rest.replace("text.jsonl", "other.jsonl", 1))
    args = argparse.Namespace(
        config=tmp_path / "plan.yaml", out=tmp_path / "ids", workers=1, documents_per_shard=9, overrides=[]
    )
    with pytest.raises(ValueError, match=r"^stages\.s2\.data\.sources\.all: other paths, turns, chat_template or"):
        tokenize.run(args)


def test_a_plan_that_is_done_changes_nothing(plan: tuple[Path, str]) -> None:
    directory, _ = plan
    before = metrics_of(directory / "runs" / "whole" / "s3")
    out = " ".join(finish(start_plan(directory, "whole")).split())
    assert "finished: step 5 of 5" in out
    assert "stage s2" not in out
    assert metrics_of(directory / "runs" / "whole" / "s3") == before
