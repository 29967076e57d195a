"""infer.py over several processes on loopback that hold one model together: same answers, deaths, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from processes import Command

from qwen3_jax import hf
from qwen3_jax.cli.infer import main
from qwen3_jax.config import ModelConfig
from qwen3_jax.model import Qwen3
from qwen3_jax.serve import shipped_model
from qwen3_jax.tasks.arithmetic import held_out_chains

ROOT = Path(__file__).parents[2]
MESHES = {"experts": {"fsdp": 2, "expert": 2, "tensor": 2}, "dense": {"fsdp": 4, "tensor": 2}}
OPTIONS = ("--max-new-tokens", "40", "--batch-size", "8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, their meshes, `in.jsonl` (every kind of budget and of end, two prompt lengths, a line that cannot be
    answered), and `NAME.jsonl`: what one process on one device answers."""
    folder = tmp_path_factory.mktemp("processes")
    problems = held_out_chains(6, 12)
    records: list[dict[str, Any]] = [
        {"id": i, "prompt": problem.question, "thinking_budget": [-1, 0, 3, "auto"][i % 4], "seed": i}
        for i, problem in enumerate(problems)
    ]
    records[1] |= {"prompt": "Once more. " * 9 + problems[1].question}  # longer than the shortest bucket
    records[2] |= {"stop": ["1", " 2"], "temperature": 3.0}
    records.insert(3, {"id": "bad", "prompt": "x", "top_p": 3})
    (folder / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    shutil.copytree(shipped_model(), folder / "experts")
    config = dataclasses.replace(
        ModelConfig.from_hf(shipped_model()), num_experts=0, num_experts_per_tok=0, moe_intermediate_size=0
    )
    shapes = jax.eval_shape(Qwen3(config, stacked=False).init, jax.random.key(0), np.zeros((1, 4), np.int32))
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.1).astype(np.float32), shapes["params"])
    hf.save_checkpoint(folder / "dense", config, weights)
    shutil.copy(shipped_model() / "tokenizer.model", folder / "dense")
    for name, axes in MESHES.items():
        (folder / f"{name}.yaml").write_text("".join(f"{axis}: {size}\n" for axis, size in axes.items()))
        main([*words(folder, name, folder / f"{name}.jsonl", mesh=False)])
    return folder


def words(folder: Path, name: str, output: Path, mesh: bool = True, source: str = "in.jsonl") -> list[str]:
    on_mesh = ["--mesh", str(folder / f"{name}.yaml")] if mesh else []
    files = ["--input", str(folder / source), "--output", str(output)]
    return [*files, "--model", str(folder / name), *OPTIONS, *on_mesh]


def start(count: int, address: str, *argv: str, last: tuple[str, ...] = ()) -> list[Command]:
    """`count` processes with 8 / `count` devices each; the last one with other words, if there are some."""
    flags = f"--xla_force_host_platform_device_count={8 // count}"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    return [
        Command(
            "qwen3_jax.cli.infer:main",
            *(last if last and i == count - 1 else argv),
            env={**env, "JAX_PROCESS_ID": str(i)},
            cwd=ROOT,
        )
        for i in range(count)
    ]


def finish(processes: list[Command]) -> dict[str, Any]:
    """The summary, which process 0 alone prints."""
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    summaries = [[line for line in out.splitlines() if line.startswith("{")] for out, _ in said]
    assert summaries[1:] == [[]] * (len(processes) - 1)
    return json.loads(summaries[0][0])


def answers(path: Path) -> dict[Any, dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    keyed = {record["id"]: record for record in records}
    assert len(keyed) == len(records)
    return keyed


@pytest.mark.parametrize(("count", "name"), [(2, "experts"), (4, "dense")])
def test_one_model_over_all_processes_answers_as_one_process(
    folder: Path, count: int, name: str, coordinator_address: str, tmp_path: Path
) -> None:
    expected = answers(folder / f"{name}.jsonl")
    assert "error" in expected["bad"]
    assert len({record.get("thinking_end") for record in expected.values()}) >= (4 if name == "experts" else 2)
    summary = finish(start(count, coordinator_address, *words(folder, name, tmp_path / "out.jsonl")))
    assert answers(tmp_path / "out.jsonl") == expected
    assert (summary["done"], summary["errors"]) == (6, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.run.json"]


def test_a_process_that_is_killed_ends_all_and_the_same_command_goes_on(
    folder: Path, coordinator_address: str, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    argv = [*words(folder, "experts", output), "--samples", "8"]
    processes = start(2, coordinator_address, *argv)
    # The bad line's record comes first, then answers: some rows are in flight.
    while processes[0].poll() is None and (not output.exists() or output.read_bytes().count(b"\n") < 2):
        processes[0].wait_for_exit(0.05)
    processes[1].send_signal(signal.SIGKILL)
    (_, said), _ = (process.communicate() for process in processes)
    assert processes[0].returncode == 2
    errors = [line for line in said.splitlines() if "error:" in line]
    assert errors == ["error: process 1: died without reporting an error"]
    assert "Traceback" not in said
    written = output.read_bytes().count(b"\n")
    assert 2 <= written < 6 * 8 + 1
    summary = finish(start(2, coordinator_address, *argv))
    assert summary["resumed"] >= written - 2  # the error's record, and perhaps half a line
    assert summary["resumed"] + summary["done"] == 6 * 8
    first = {record["id"]: record for record in map(json.loads, output.open()) if record.get("sample", 0) == 0}
    assert first == answers(folder / "experts.jsonl")


def test_what_one_process_refuses_ends_all(folder: Path, coordinator_address: str, tmp_path: Path) -> None:
    """A bad line in strict mode is seen by all; another input than that of process 0 by the process that has it."""
    argv = words(folder, "experts", tmp_path / "out.jsonl")
    (folder / "other.jsonl").write_text('{"prompt": "x"}\n', encoding="utf-8")
    other = tuple(words(folder, "experts", tmp_path / "out.jsonl", source="other.jsonl"))
    for options, last, message in (
        (("--strict",), (), "in.jsonl:4: top_p: 3; use a number in [0, 1]"),
        ((), other, "other.jsonl' is another file than that of process 0; use the same on all of them"),
    ):
        processes = start(2, coordinator_address, *argv, *options, last=last)
        for process in processes:
            _, said = process.communicate()
            assert process.returncode == 2, said
            assert message in said
            assert "Traceback" not in said
