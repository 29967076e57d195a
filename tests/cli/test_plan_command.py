"""`qwen3-jax plan` with the real compiler: small programs for small slices, and two of the recipes for theirs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qwen3_jax.aot.programs import ROLLOUT_PHASES
from qwen3_jax.cli.main import main

ROOT = Path(__file__).parents[2]
TINY = ["--config", "configs/tiny/pretrain.yaml", "--topology", "v5e:2x4", "--model.num_hidden_layers", "2"]
SMALL = [*TINY, "--data.batch_size", "16", "--mesh.fsdp", "8"]
DENSE = [*SMALL, "--model.num_experts", "0"]


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


Plan = Callable[..., Done]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home directory for this file, so that its tests share the cache of compiled programs, and no other."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def plan(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tpu_compiler: None) -> Plan:
    """The command, in this process. It compiles in processes that it starts."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XLA_FLAGS", "")

    def run(*words: str) -> Done:
        code: object = 0
        try:
            main(["plan", *words])
        except SystemExit as end:
            code = end.code
        assert isinstance(code, int)
        return Done(code, *capsys.readouterr())

    return run


def records(plan: Plan, *words: str) -> list[dict[str, Any]]:
    done = plan(*words, "--json")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_train_step(plan: Plan) -> None:
    """AdamW holds two numbers for each weight. A step needs three passes' products; with remat four are made, and the
    places of experts are more than their tokens."""
    (record,) = records(plan, *SMALL)
    assert record["fits"]
    assert record["mesh"] == {"fsdp": 8}
    assert record["hbm"]["optimizer"] == pytest.approx(2 * record["hbm"]["parameters"], rel=0.01)
    assert record["hbm_bytes"] == pytest.approx(sum(record["hbm"].values()))
    executed = record["work"]["matrix products"] + record["work"]["kernels"]
    assert record["flops"] < executed < 4 * record["flops"]
    assert 0 < record["mfu"] < 1
    assert record["step_s"] <= record["slow_step_s"]
    assert {c["kind"] for c in record["collectives"]} >= {"all-gather"}
    assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["step_s"])


def test_decoding(plan: Plan) -> None:
    """Prefill and step of the model that ships; a step reads no less than the floor."""
    words = "--infer --model qwen3-tiny --topology v5e:2x4 --batch 16 --context 512".split()
    prefill, step = records(plan, *words)
    assert [prefill["program"], step["program"]] == ["prefill", "decode_step"]
    assert step["tokens"] == 16
    assert step["step_s"] / step["floor_s"] >= 1
    assert prefill["hbm"]["cache"] == step["hbm"]["cache"] > 0
    # Layers are no loop here: what they have in common is one row.
    rows = [(row["kind"], row["shape"], row["source"]) for row in step["costliest"]]
    assert len(set(rows)) == len(rows)
    assert any(row["count"] % 3 == 0 for row in step["costliest"])
    page = plan(*words)
    assert "floor of memory bandwidth" in page.stdout


def test_the_phases_of_a_step_on_rollouts(plan: Plan) -> None:
    """What training holds is in memory while answers are decoded; the table adds up the phases."""
    words = [
        *DENSE,
        "--model.num_hidden_layers",
        "1",
        "--data.sequence_length",
        "128",
        "--rollouts.max_new_tokens",
        "64",
        "--rollouts.rows",
        "8",
    ]
    words += ["--rollouts.samples", "4"]
    weights, prefill, step, update = records(plan, *words)
    assert [r["program"] for r in (weights, prefill, step, update)] == list(ROLLOUT_PHASES)
    assert update["what"].startswith("train step on rollouts, 16 rows of 128 tokens")
    for phase in (prefill, step):
        assert phase["hbm"]["training: optimizer"] == update["hbm"]["optimizer"] > 0
        assert phase["hbm"]["cache"] > 0
    assert weights["hbm"]["decoding weights"] == step["hbm"]["parameters"]
    table = plan(*words, "--new-tokens", "32", "--prompt-tokens", "16").stdout.split("a step: ")[1]
    assert table.startswith("16 answers of 32 tokens to prompts of 16")
    # 16 answers in 8 places are two times 32 steps; 16 + 32 tokens, two to a row of 128, fill half of the rows.
    assert re.search(r"rollout_step +64 ", table)
    assert "per chip" in table


def test_a_chip_of_two_cores_is_one_device(plan: Plan) -> None:
    words = "--infer --model qwen3-tiny --topology v4:2x2x1 --batch 16 --context 512".split()
    assert [record["chips"] for record in records(plan, *words)] == [4, 4]


def test_a_sweep_compiles_each_combination_once(plan: Plan, tmp_path: Path) -> None:
    words = [*DENSE, "--sweep", "mesh", "{fsdp: 8}", "{data: 2, fsdp: 4}", "--sweep", "compute.remat", "true", "false"]
    done = plan(*words, "--price", "4.2", "--plot", str(tmp_path / "sweep.png"))
    assert done.returncode == 0, done.stderr
    title, _, *rows = done.stdout.strip().splitlines()
    assert title.startswith("train_step on v5e:2x4; *") or title.startswith("train_step on ")
    assert [row[0] for row in rows] == ["*", " ", " ", " "]
    costs = [float(row.split()[-1]) for row in rows]
    assert costs == sorted(costs)
    assert len(rows) == 4
    rates = [float(row.split("ms")[1].split()[0].replace(",", "")) for row in rows]
    assert rates == sorted(rates, reverse=True)
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    first, again = (records(plan, *words) for _ in range(2))
    assert len({record["label"] for record in first}) == 4
    assert first == again  # the seconds of compiling too


def test_what_does_not_fit_is_said_and_ends_with_1(plan: Plan) -> None:
    """A cache of 52 GB on a chip of 16 GiB: 3 layers, keys and values of 2 heads of 32 in bfloat16, for 131,072 rows of
    512 places. The compiler refuses, and the page says what to change."""
    words = "--infer --model qwen3-tiny --topology v5e:1x1 --batch 131072 --context 512".split()
    done = plan(*words)
    assert done.returncode == 1, done.stderr
    assert "DOES NOT FIT" in done.stdout
    assert "the largest part is cache: use fewer rows, a shorter context, or more chips" in done.stdout


def test_hlo_is_kept_on_request(tmp_path: Path, home: Path) -> None:
    """By the command that is installed."""
    pytest.importorskip("libtpu", reason="libtpu is for Linux x86-64 only")
    env = {**os.environ, "HOME": str(home), "XLA_FLAGS": ""}
    command = [str(Path(sys.executable).parent / "qwen3-jax"), "plan", *DENSE, "--hlo", str(tmp_path / "hlo")]
    subprocess.run(command, env=env, cwd=ROOT, check=True)
    (file,) = (tmp_path / "hlo").iterdir()
    assert file.read_text().startswith("HloModule")


@pytest.mark.slow
@pytest.mark.parametrize("size", ["qwen3-0.6b", "qwen3-30b-a3b"])
def test_recipes_fit(plan: Plan, size: str) -> None:
    """The smallest and a mixture of experts, each on its slice, as `make plan-all` compiles all of them."""
    (record,) = records(plan, "--config", f"configs/pretrain/{size}.yaml")
    assert record["fits"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (TINY[:2], "mesh.topology: None; name a slice, for instance v5p:4x4x4 (--topology)"),
        ([*TINY, "--topology", "v9:2x2"], "chip: 'v9:2x2' is unknown"),
        ([*TINY, "--topology", "v5p:3x3x3"], "mesh.topology: 'v5p:3x3x3': INVALID_ARGUMENT"),
        ([*TINY, "--mesh.fsdp", "3"], "needs 3 devices, there are 8"),
        ([*TINY, "--stage", "s1"], "--stage: 's1'; use a plan of stages"),
        ([*TINY, "--batch", "3"], "--batch: 3; use --infer with it"),
        ([*TINY, "--compute.kep", "[]"], "--compute.kep: no such key; did you mean --compute.keep?"),
        ([*TINY, "--sweep", "mesh"], "--sweep mesh: no values"),
        ([*TINY, "--price", "-3"], "--price: -3.0; use a number >= 0"),
        ([*TINY, "--plot", "x.png"], "--plot: x.png; use --sweep with it"),
        (["--infer", "--topology", "v5e:2x4"], "--model: none"),
        (["--infer", "--model", "qwen3-9b", "--topology", "v5e:2x4"], "model preset: 'qwen3-9b' is unknown"),
        (
            ["--infer", "--model", "qwen3-tiny", "--topology", "v5e:2x4", "--context", "7"],
            "context: 7; use an even number",
        ),
    ],
)
def test_refusals(plan: Plan, words: list[str], message: str) -> None:
    done = plan(*words)
    assert done.returncode == 2
    error = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1, done.stderr
    assert message in error[0]
