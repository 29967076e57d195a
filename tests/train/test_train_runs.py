"""Runs of train.py, as processes: killed, stopped, damaged, on other meshes, over several processes."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml
from processes import Command
from program_cache import QUICK_COMPILE
from tiny import TRAINED, yaml_fields

from qwen3_jax.cli.config_file import load_config
from qwen3_jax.tasks.arithmetic import write_dataset
from qwen3_jax.train import TrainConfig

ROOT = Path(__file__).parents[2]
STEPS, KILLS = 80, 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run.yaml`: 80 steps and a checkpoint every other one."""
    folder = tmp_path_factory.mktemp("runs")
    write_dataset(folder / "data", 400, seed=0, vocab_size=512)
    sources = [{"name": "arithmetic", "paths": [str(folder / "data" / "train.jsonl")]}]
    data = {"sources": sources, "tokenizer": str(folder / "data")}
    fields = {
        "model": yaml_fields(TRAINED),
        "data": {**data, "sequence_length": 32, "batch_size": 8},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2},
        "compute": {"dtype": "float32", "remat": False},
        "output_dir": str(folder / "whole"),
        "steps": STEPS,
        "checkpoint_every": 2,
        "log_every": 1,
        "spike_factor": 3.0,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(fields))
    return folder


def start(
    folder: Path, output: str, *overrides: str, max_file_bytes: int | None = None, XLA_FLAGS: str = "", **env: str
) -> Command:
    """train.py on one device."""
    words = (str(folder / "run.yaml"), "--output_dir", str(folder / output), *overrides)
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "XLA_FLAGS": XLA_FLAGS, **env}
    return Command("qwen3_jax.cli.train:main", *words, env=environment, cwd=ROOT, max_file_bytes=max_file_bytes)


def quick_start(folder: Path, output: str, *overrides: str, devices: int = 1, **options: Any) -> Command:
    """The same, compiled in less time: for runs whose numbers are not compared to the bit."""
    flags = f"{QUICK_COMPILE} --xla_force_host_platform_device_count={devices}"
    return start(folder, output, *overrides, XLA_FLAGS=flags, **options)


def finish(process: Command, code: int = 0) -> str:
    """What it prints: on stdout if it should end well, else on stderr."""
    out, err = process.communicate()
    assert process.returncode == code, out + err
    return " ".join((out if code == 0 else err).split())


def lines_of(output: Path) -> list[dict[str, Any]]:
    """Whole lines of the metrics, without what depends on the clock."""
    path = output / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    records = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    timing = ("tokens_per_second", "mfu")
    return [{k: v for k, v in record.items() if k not in timing and "time/" not in k} for record in records]


def arrays_of(output: Path, step: int) -> dict[str, Any]:
    with ocp.StandardCheckpointer() as checkpointer:
        path = output / "checkpoints" / str(step)
        return {name: checkpointer.restore(path / name) for name in ("params", "optimizer")}


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[dict[str, Any]]:
    """The series of a run that nothing interrupts."""
    said = finish(start(folder, "whole"))
    assert f"trained to step {STEPS}" in said
    assert f"step {STEPS}/{STEPS}: loss " in said
    assert "s since the first start: step" in said
    series = lines_of(folder / "whole")
    assert [line["step"] for line in series] == list(range(1, STEPS + 1))
    assert series[-1]["loss"] < series[0]["loss"] - 1
    kept, output = load_config(TrainConfig, folder / "whole" / "config.yaml"), ["--output_dir", str(folder / "whole")]
    assert kept == load_config(TrainConfig, folder / "run.yaml", output)
    return series


def test_killed_twenty_times_the_series_and_the_weights_are_the_same_to_the_bit(
    folder: Path, whole: list[dict[str, Any]]
) -> None:
    """SIGKILL at a random moment: three times while starting, else one to three steps after the first new one.

    There is a save every other step, and it takes longer than a step, so that most kills fall into one: those that
    leave a half-written directory. At least five must. A run that comes to its end, because this process had to wait
    for its turn, is begun anew.
    """
    rng = random.Random(0)
    output = folder / "killed"
    kills = in_save = 0
    while kills < KILLS or in_save < 5:
        process = start(folder, output.name)
        starting = kills in (0, 7, 14)
        if starting:
            time.sleep(rng.uniform(0, 2))
        else:
            # A start forgets the lines after its checkpoint.
            wait_for_lines(process, output, count_lines(output) + rng.randint(1, 3))
            time.sleep(rng.uniform(0, 0.02))
        process.kill()
        if process.returncode == 0:
            assert lines_of(output) == whole
            shutil.rmtree(output)
            continue
        assert process.returncode == -signal.SIGKILL
        kills += 1
        in_save += not starting and any((output / "checkpoints").glob("*tmp*"))
    print(f"{kills} kills, {in_save} of them while saving, the last after step {count_lines(output)}")
    finish(start(folder, output.name))
    assert lines_of(output) == whole
    jax.tree.map(np.testing.assert_array_equal, arrays_of(output, STEPS), arrays_of(folder / "whole", STEPS))


def count_lines(output: Path) -> int:
    path = output / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_lines(process: Command, output: Path, lines: int) -> None:
    while process.poll() is None and count_lines(output) < lines:
        time.sleep(0.001)


@pytest.fixture(scope="module")
def stopped(folder: Path, whole: list[dict[str, Any]]) -> int:
    """The step at which SIGTERM stops a run, whose output is `stopped`."""
    process = start(folder, "stopped")
    wait_for_lines(process, folder / "stopped", STEPS - 30)
    before = count_lines(folder / "stopped")
    process.send_signal(signal.SIGTERM)
    said = process.wait_for("SIGTERM: stopping after this step")
    after = count_lines(folder / "stopped")
    said += finish(process)
    step = lines_of(folder / "stopped")[-1]["step"]
    # A step is told of when the next one has been handed to the devices, and that one is still finished.
    assert before < step <= after + 2
    assert f"stopped by SIGTERM at step {step}; checkpoint saved" in said
    return step


def test_sigterm_saves_within_a_step_and_the_run_goes_on_as_if_nothing_had_been(
    folder: Path, whole: list[dict[str, Any]], stopped: int
) -> None:
    shutil.copytree(folder / "stopped", folder / "resumed")
    assert f"from step {stopped}" in finish(start(folder, "resumed"))
    assert lines_of(folder / "resumed") == whole


def test_sigterm_while_the_last_checkpoint_is_written_leaves_it_whole(folder: Path) -> None:
    """A run that has ended before the signal reaches it is tried again."""
    for attempt in range(20):
        output = folder / f"last{attempt}"
        process = quick_start(folder, output.name, "--steps", "4")
        while process.poll() is None and not (output / "checkpoints" / "4.orbax-checkpoint-tmp").exists():
            time.sleep(0.001)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        said = finish(process)
        assert (output / "checkpoints" / "4").is_dir()
        if "trained to step 4" not in said:
            break
    assert "stopped by SIGTERM at step 4; checkpoint saved" in said


def test_steps_to_be_traced_may_be_cut_by_a_restart(folder: Path) -> None:
    """Either part leaves its trace."""
    for number, steps in enumerate(("4", "8"), start=1):
        finish(quick_start(folder, "traced", "--steps", steps, "--profile", "[3, 6]"))
        assert len(list((folder / "traced" / "profile").rglob("*.xplane.pb"))) == number


def test_a_second_ctrl_c_ends_the_run_at_once(folder: Path) -> None:
    """While it compiles, when Python's own signal handlers would have to wait."""
    command = [sys.executable, str(ROOT / "train.py"), str(folder / "run.yaml"), "--output_dir", str(folder / "ended")]
    env = {**os.environ, "PYTHONWARNINGS": "ignore", "XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    while "compute" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    while "SIGINT: stopping after this step" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130
    assert lines_of(folder / "ended") == []


def test_a_checkpoint_of_another_model_is_refused(folder: Path, stopped: int) -> None:
    """Of other shapes, or with other weights."""
    experts = "--model.num_experts 4 --model.num_experts_per_tok 2 --model.moe_intermediate_size 32".split()
    refusal = f"error: checkpoint {stopped}: '{folder / 'stopped' / 'checkpoints'}' holds other arrays than this run"
    for overrides in (["--model.hidden_size", "32"], experts):
        assert refusal in finish(start(folder, "stopped", *overrides), code=2)


def test_damaged_checkpoints_are_named_and_the_series_comes_out_the_same(
    folder: Path, whole: list[dict[str, Any]], stopped: int
) -> None:
    output = folder / "damaged"
    shutil.copytree(folder / "stopped", output)
    cut, flipped, *_ = sorted((int(path.name) for path in (output / "checkpoints").iterdir()), reverse=True)
    victim = max((output / "checkpoints" / str(cut)).rglob("d/*"), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-10])
    victim = max((output / "checkpoints" / str(flipped)).rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 16
    victim.write_bytes(content)
    said = finish(start(folder, "damaged"))
    assert f"checkpoint {cut} is damaged: " in said
    assert (
        f"checkpoint {flipped} is damaged: {victim.relative_to(output / 'checkpoints' / str(flipped))} is not" in said
    )
    assert lines_of(output) == whole
    assert (output / "checkpoints" / f"{flipped}.damaged").is_dir()


def test_bad_steps_in_a_row_end_the_run_with_the_data_and_a_checkpoint(folder: Path) -> None:
    """The rate spoils the weights in the second step; the third to fifth cannot be taken."""
    overrides = ["--optimizer.learning_rate", "1e38", "--max_bad_steps", "3", "--spike_factor", "null"]
    said = finish(quick_start(folder, "bad", *overrides), code=2)
    file = folder / "bad" / "bad_step_5.npz"
    assert "error: step 5: loss is 6.2" in said
    assert "gradient norm nan: 3 bad steps in a row" in said
    assert f"its batch is in {file}; checkpoint 6 saved" in said
    assert (folder / "bad" / "checkpoints" / "6").is_dir()
    assert np.load(file)["tokens"].shape == (8, 32)
    lines = lines_of(folder / "bad")
    assert [(line["step"], line["skipped"]) for line in lines] == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (6, 1)]
    assert lines[-1]["grad_norm"] is None
    record = json.loads((folder / "bad" / "checkpoints" / "6" / "run" / "metadata").read_text())
    assert (record["step"], record["guard"]["skipped"], record["config"]["max_bad_steps"]) == (6, 4, 3)
    assert {"qwen3-jax", "jax", "flax", "orbax"} <= record["code"].keys()


def test_bad_steps_that_an_evaluation_tells_of_leave_a_checkpoint_too(folder: Path) -> None:
    held_out = json.dumps(yaml.safe_load((folder / "run.yaml").read_text())["data"])
    overrides = ["--optimizer.learning_rate", "1e38", "--max_bad_steps", "3", "--spike_factor", "null"]
    overrides += ["--eval_data", held_out, "--eval_every", "5", "--checkpoint_every", "1000"]
    assert "checkpoint 5 saved" in finish(quick_start(folder, "told", *overrides), code=2)
    assert (folder / "told" / "checkpoints" / "5").is_dir()


def test_a_disk_too_small_for_a_checkpoint_is_refused_before_training(folder: Path) -> None:
    disk = folder / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    try:
        said = finish(start(folder, "disk"), code=2)
        assert f"error: output_dir: '{disk}' has 1 MiB free; a checkpoint needs 2 MiB" in said
        assert lines_of(disk) == []
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_run_begins_with_the_weights_of_another(folder: Path, whole: list[dict[str, Any]]) -> None:
    """Its loss begins where the other's ended; the optimiser, the rate and the data begin anew."""
    overrides = ["--init_from", str(folder / "whole"), "--steps", "4", "--eval_every", "2", "--eval_batches", "2"]
    held_out = {name: str(value) for name, value in yaml.safe_load((folder / "run.yaml").read_text())["data"].items()}
    overrides += ["--profile", "[2, 3]"]
    overrides += ["--optimizer.learning_rate", "1e-4"]  # so that step 2 leaves the weights nearly as they were
    for name in ("sources", "tokenizer", "sequence_length", "batch_size"):
        overrides += [f"--eval_data.{name}", held_out[name]]
    said = finish(start(folder, "second", *overrides))
    assert f"{folder / 'whole'}: weights of step {STEPS}" in said
    assert all(f"step {step}: eval_loss " in said for step in (2, 4))
    lines = lines_of(folder / "second")
    assert lines[0]["loss"] < whole[0]["loss"] / 3
    assert lines[0]["learning_rate"] == 0
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4]
    assert lines[1]["eval_loss"] < whole[0]["loss"] / 3
    assert list((folder / "second" / "profile").rglob("*.xplane.pb"))
    assert "this run uses" not in said
    assert "another tokenizer" not in said
    overrides = ["--init_from", str(folder / "whole"), "--model.intermediate_size", "128"]
    said = finish(start(folder, "third", *overrides), code=2)
    assert "has intermediate_size 256; model.intermediate_size: 128" in said
    overrides = ["--init_from", str(folder / "whole"), "--steps", "3", "--model.rope_theta", "5000"]
    said = finish(start(folder, "fourth", *overrides))
    assert f"init_from: {folder / 'whole'} has rope_theta 10000.0; this run uses 5000" in said.replace("\n", " ")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder: Path) -> None:
    said = finish(start(folder, "small", "--model.vocab_size", "256"), code=2)
    assert re.search(r"error: model\.vocab_size: 256, but data\.tokenizer '.*' has \d+ tokens; use at least \d+", said)
    assert not (folder / "small" / "metrics.jsonl").exists()


# Twelve steps on other meshes. The rates of all are the same, and no bit of the data.
SHORT = ["--steps", "12", "--checkpoint_every", "3", "--keep", "4"]


def on_devices(folder: Path, output: str, devices: int, *overrides: str) -> list[dict[str, Any]]:
    """The series of one process on a mesh of so many devices."""
    finish(quick_start(folder, output, *SHORT, *overrides, devices=devices))
    return lines_of(folder / output)


def forget(output: Path, step: int) -> None:
    """Deletes the checkpoints after `step`."""
    for path in (output / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)


def losses(series: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in series]


def test_a_run_that_changes_its_mesh_has_the_same_losses(folder: Path) -> None:
    """Eight devices, four from step 3 on, two from step 6, eight from step 9, against eight all along."""
    eight = on_devices(folder, "eight", 8)
    shutil.copytree(folder / "eight", folder / "moved")
    for step, devices in ((3, 4), (6, 2), (9, 8)):
        forget(folder / "moved", step)
        moved = on_devices(folder, "moved", devices)
    assert len(moved) == 12
    np.testing.assert_allclose(losses(moved), losses(eight), rtol=1e-5)


def test_key_value_heads_that_are_replicated_are_named(folder: Path) -> None:
    said = finish(quick_start(folder, "heads", *SHORT, "--mesh.fsdp", "1", "--mesh.tensor", "4", devices=4))
    assert "tensor 4 does not divide the 2 key-value heads: each device has all of them" in said


def start_many(
    folder: Path, output: str, address: str, count: int, *overrides: str, victim: int | None = None
) -> list[Command]:
    """One run in `count` processes with a device each, which meet at `address`; the victim cannot write 20 kB."""
    env = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    limits = [20_000 if i == victim else None for i in range(count)]
    return [
        quick_start(folder, output, *overrides, max_file_bytes=limit, **env, JAX_PROCESS_ID=str(i))
        for i, limit in enumerate(limits)
    ]


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_train_the_same_numbers_as_one(folder: Path, count: int, coordinator_address: str) -> None:
    """And one process goes on from their checkpoint with the same."""
    one = on_devices(folder, f"one{count}", count)
    output = f"many{count}"
    first, *others = [finish(process) for process in start_many(folder, output, coordinator_address, count, *SHORT)]
    assert "trained to step 12" in first
    assert not any("step" in other for other in others)
    many = lines_of(folder / output)
    assert len(many) == 12
    print(f"{count} processes: {'the same to the bit' if many == one else 'not the same to the bit'}")
    np.testing.assert_allclose(losses(many), losses(one), rtol=1e-6)
    assert len(list((folder / output / "checkpoints" / "12" / "data").glob("process_*.json"))) == count
    forget(folder / output, 6)
    assert on_devices(folder, output, count)[:6] == many[:6]
    np.testing.assert_allclose(losses(lines_of(folder / output)), losses(one), rtol=1e-6)


def test_a_signal_to_one_process_stops_all_after_the_same_step(folder: Path, coordinator_address: str) -> None:
    """SIGTERM to the process that writes nothing: the other one tells the step, and both end well."""
    processes = start_many(folder, "both", coordinator_address, 2, "--steps", "100000", "--checkpoint_every", "100000")
    wait_for_lines(processes[0], folder / "both", 5)
    processes[1].send_signal(signal.SIGTERM)
    said, _ = [finish(process) for process in processes]
    step = lines_of(folder / "both")[-1]["step"]
    assert f"stopped by SIGTERM at step {step}; checkpoint saved" in said
    assert [path.name for path in (folder / "both" / "checkpoints").iterdir()] == [str(step)]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_save_that_one_process_cannot_write_ends_all_and_the_one_before_counts(
    folder: Path, coordinator_address: str, victim: int
) -> None:
    """Neither waits for the other: both name the checkpoint and the reason."""
    output = f"cut{victim}"
    for process in start_many(folder, output, coordinator_address, 2, "--steps", "4"):
        finish(process)
    processes = start_many(folder, output, coordinator_address, 2, victim=victim)
    said = [finish(process, code=2) for process in processes]
    reason = f"checkpoint 6: '{folder / output / 'checkpoints'}': File too large; it was not saved"
    assert f"error: {reason}" in said[victim]
    assert f"error: process {victim}: {reason}" in said[1 - victim]
    assert "from step 4" in finish(quick_start(folder, output, "--steps", "8"))
