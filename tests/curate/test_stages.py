"""A plan whose stages make data: the toy recipe through train.py, whole and killed, and plans that cannot be."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import Command

from qwen3_jax.cli.config_file import load_config, load_plan
from qwen3_jax.cli.main import main as qwen3_jax
from qwen3_jax.cli.train import main as train
from qwen3_jax.curate.filters import FilterConfig
from qwen3_jax.curate.fuse import FuseConfig
from qwen3_jax.curate.stages import FuseStage, SampleConfig, SelectConfig
from qwen3_jax.serve import shipped_model
from qwen3_jax.tasks.arithmetic import write_dataset
from qwen3_jax.train import TrainConfig, link_stages

TOY = Path(__file__).parents[2] / "configs" / "post" / "toy.yaml"
RECORDS = "records.jsonl"
# From the model that ships, so that there are right answers to select.
SMALL = f"""--init_from {shipped_model()} --compute.group_size 32 --optimizer.warmup_steps 1 --data.sequence_length 128
    --cold_start.steps 2 --answers.sample.rows 2 --fusion.steps 12 --checkpoint_every 4 --log_every 1""".split()


def start_plan(directory: Path, *overrides: str, **env: str) -> Command:
    words = (str(TOY), *SMALL, *overrides)
    return Command("qwen3_jax.cli.train:main", *words, env={**os.environ, "XLA_FLAGS": "", **env}, cwd=directory)


def finish(process: Command) -> str:
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    return " ".join(out.split())


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The series, without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("tokens_per_second", "mfu", "time/")
    return [{key: value for key, value in line.items() if not key.startswith(clock)} for line in lines]


def prepare(directory: Path) -> Path:
    write_dataset(directory / "runs" / "toy" / "data", 600, seed=0, vocab_size=512)
    return directory


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The plan, run whole, and what it said."""
    directory = prepare(tmp_path_factory.mktemp("whole"))
    return directory / "runs" / "toy" / "post", finish(start_plan(directory))


def test_each_stage_hands_on_what_it_made(whole: tuple[Path, str]) -> None:
    post, said = whole
    for number, name in enumerate(("cold_start", "answers", "thinking", "fused", "fusion"), 1):
        assert f"stage {name}, {number} of 5" in said
    answers, selected, fused = (
        [json.loads(line) for line in (post / name / RECORDS).read_text().splitlines()]
        for name in ("answers", "thinking", "fused")
    )
    assert len(answers) == 20
    weights = json.loads((post / "answers" / f"{RECORDS}.run.json").read_text())["weights"]
    right = [answer for answer in answers if answer["content"] == answer["answer"]]
    assert 10 < len(selected) == len(right)
    for record in selected:
        assert record["provenance"]["weights"] == weights
        assert record["provenance"]["model"] == "runs/toy/post/cold_start"
        # Those of thinking mode, which neither the line nor the stage gives, too.
        sampled = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_new_tokens": 48, "seed": 0}
        assert record["provenance"]["settings"] == sampled
        assert record["provenance"]["sample"] == 0
        assert record["labels"]["made_by"] == f"cold_start@{weights[:8]}"
    assert len(fused) > 10
    assert {record["labels"]["mode"] for record in fused} == {"thinking", "non-thinking"}
    assert json.loads((post / "fusion" / "config.json").read_text())["hidden_size"] == 128


def test_what_made_the_data_is_in_the_report(whole: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    post, _ = whole
    qwen3_jax(["data", "report", str(post / "fusion"), "--json"])
    shares = json.loads(capsys.readouterr().out)["shares"]
    assert shares.keys() >= {"made_by", "mode"}
    assert any(value.startswith("cold_start@") for value in shares["made_by"])


def wait_for(process: Command, is_there: Callable[[], bool]) -> None:
    while not is_there():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def test_killed_twice_it_ends_with_the_same_files_and_numbers(whole: tuple[Path, str], tmp_path: Path) -> None:
    """SIGKILL while it samples, SIGTERM while it samples again, SIGKILL while it trains on what was made."""
    post = prepare(tmp_path) / "runs" / "toy" / "post"
    answers = post / "answers" / RECORDS

    def lines() -> int:
        return answers.read_bytes().count(b"\n") if answers.exists() else 0

    process = start_plan(tmp_path)
    wait_for(process, lambda: lines() >= 3)
    process.kill()
    process.communicate()
    begun = lines()
    assert begun < 20
    process = start_plan(tmp_path)
    wait_for(process, lambda: lines() > begun)
    process.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM; the same command goes on" in finish(process)
    assert lines() < 20
    assert not (post / "thinking").exists()
    process = start_plan(tmp_path)
    wait_for(process, (post / "fusion" / "checkpoints" / "4").exists)
    process.kill()
    process.communicate()
    assert not (post / "fusion" / "checkpoints" / "12").exists()
    said = finish(start_plan(tmp_path))
    assert "stage fusion, 5 of 5" in said
    assert "stage fused" not in said

    for name in ("thinking", "fused"):
        assert (post / name / RECORDS).read_bytes() == (whole[0] / name / RECORDS).read_bytes()
    assert sorted(answers.read_text().splitlines()) == sorted((whole[0] / "answers" / RECORDS).read_text().splitlines())
    for name in ("cold_start", "fusion"):
        assert metrics_of(post / name) == metrics_of(whole[0] / name)


def test_two_processes_make_what_one_makes(whole: tuple[Path, str], tmp_path: Path, coordinator_address: str) -> None:
    """Both train and sample together; process 0 alone selects, fuses and writes."""
    post = prepare(tmp_path) / "runs" / "toy" / "post"
    meeting = {"JAX_COORDINATOR_ADDRESS": coordinator_address, "JAX_NUM_PROCESSES": "2"}
    processes = [start_plan(tmp_path, **meeting, JAX_PROCESS_ID=str(i)) for i in range(2)]
    first, second = [finish(process) for process in processes]
    assert "stage fusion, 5 of 5" in first
    assert "stage" not in second
    for name in ("answers", "thinking", "fused"):
        made, expected = ((directory / name / RECORDS).read_text().splitlines() for directory in (post, whole[0]))
        assert sorted(map(what_is_learnt, made)) == sorted(map(what_is_learnt, expected))
    for name in ("cold_start", "fusion"):
        series, expected = ([line["loss"] for line in metrics_of(run / name)] for run in (post, whole[0]))
        np.testing.assert_allclose(series, expected, rtol=1e-5)


def what_is_learnt(line: str) -> str:
    """A record or an answer without its provenance: weights trained on two devices are not the same to the last bit."""
    return json.dumps({key: value for key, value in json.loads(line).items() if key not in ("provenance", "labels")})


def test_stages_are_read_into_what_runs_them() -> None:
    stages = link_stages(load_plan(TOY, [*SMALL, "--output_dir", "out"]))
    kinds = {name: type(stage) for name, stage in stages.items()}
    assert kinds == {
        **{"cold_start": TrainConfig, "answers": SampleConfig, "thinking": SelectConfig},
        **{"fused": FuseStage, "fusion": TrainConfig},
    }
    cold_start, answers, thinking, fused, fusion = stages.values()
    assert answers.model == cold_start.output_dir == fusion.init_from == "out/cold_start"
    assert thinking.input == "out/answers/records.jsonl"
    assert fused.thinking == ("out/thinking/records.jsonl",)
    assert fusion.data.sources[0].paths == ("out/fused/records.jsonl",)
    assert (cold_start.steps, answers.rows, fusion.steps) == (2, 2, 12)


@pytest.mark.parametrize("size", ["qwen3-8b", "qwen3-30b-a3b"])
def test_the_recipes_are_plans(size: str) -> None:
    stages = link_stages(load_plan(TOY.with_name(f"{size}.yaml")))
    cold_start, answers, thinking, fused, fusion = stages.values()
    assert isinstance(cold_start, TrainConfig)
    assert isinstance(fusion, TrainConfig)
    assert cold_start.model == fusion.model
    assert fusion.init_from == answers.model == cold_start.output_dir
    assert fused.thinking == (f"{thinking.output_dir}/{RECORDS}",)


def test_files_to_begin_with_are_read() -> None:
    load_config(FilterConfig, TOY.with_name("filters.yaml"))
    assert load_config(FuseConfig, TOY.with_name("fuse.yaml")).cut == 0.0
    config = load_config(TrainConfig, TOY.with_name("distill-8b.yaml"), ["--teacher.model", "qwen3-235b-a22b"])
    assert config.teacher is not None
    assert config.teacher.model.num_experts == 128


def test_problems_of_reasoning_gym_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("reasoning_gym")
    out = tmp_path / "q.jsonl"
    qwen3_jax(["problems", "chain_sum", str(out), "--count", "3", "--settings", '{"max_terms": 2}'])
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == [f"chain_sum-0-{i}" for i in range(3)]
    with pytest.raises(SystemExit, match="2"):
        qwen3_jax(["problems", "chain_sums", str(tmp_path / "no.jsonl")])
    assert "problems: 'chain_sums'; use one of" in capsys.readouterr().err
    assert not list(tmp_path.glob("no.jsonl*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("stage:cold_start", "stage:fusion"),
            "stages.answers: 'stage:fusion' is no earlier stage",
        ),
        (
            ("paths: [stage:fused]", "paths: [stage:fuse]"),
            "stages.fusion: 'stage:fuse' is no earlier stage",
        ),
        (("      rows: 256", "      row: 256"), "stages.answers: row: no such key; did you mean rows"),
        (("{mode: true, agreement: true}", "{easy_rate: 2}"), "stages.thinking: filters.easy_rate: 2.0; use a share"),
        (("    sample:\n", "    steps: 3\n    sample:\n"), "stages.answers: steps, sample; use sample alone"),
        (("      thinking: stage:thinking\n", ""), "stages.fused: thinking: missing; set it"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_before_it_begins(
    change: tuple[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = TOY.read_text().replace("../pretrain", str(TOY.parents[1] / "pretrain"))
    assert change[0] in text
    (tmp_path / "plan.yaml").write_text(text.replace(*change))
    with pytest.raises(SystemExit, match="2"):
        train([str(tmp_path / "plan.yaml"), *SMALL, "--output_dir", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
