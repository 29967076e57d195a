"""Runs that read from and write to gs://, against a server on this machine."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from array_record.python.array_record_module import ArrayRecordWriter
from gcs_server import Bucket, gcs_server
from processes import Command
from program_cache import QUICK_COMPILE
from pyarrow import parquet
from tiny import TRAINED, yaml_fields

from qwen3_jax.tasks.arithmetic import write_dataset

ROOT = Path(__file__).parents[2]
STEPS = 40


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with gcs_server() as (address, bucket), pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", address)  # for gcsfs
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        yield bucket


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, bucket: Bucket) -> Path:
    """`run.yaml`: a checkpoint every fourth step; its data lies in the bucket in every format."""
    folder = tmp_path_factory.mktemp("bucket")
    write_dataset(folder / "data", 200, seed=0, vocab_size=512)
    lines = (folder / "data" / "train.jsonl").read_bytes().splitlines(keepends=True)
    files = folder / "files"
    files.mkdir()
    write_formats(files, lines)
    sources = []
    for name in ("a.jsonl", "b.parquet", "c.arrayrecord"):
        bucket.put(f"data/{name}", (files / name).read_bytes())
        sources.append({"name": name[0], "paths": [f"gs://bucket/data/{name[0]}*"]})
    fields = {
        "model": yaml_fields(TRAINED),
        "data": {"sources": sources, "tokenizer": str(folder / "data"), "sequence_length": 32, "batch_size": 8},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2},
        "compute": {"dtype": "float32", "remat": False},
        "output_dir": "gs://bucket/run",
        "steps": STEPS,
        "checkpoint_every": 4,
        "log_every": 1,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(fields))
    here = json.loads(json.dumps(fields).replace("gs://bucket/data", str(files)))
    (folder / "here.yaml").write_text(yaml.safe_dump({**here, "output_dir": str(folder / "here")}))
    return folder


def write_formats(directory: Path, lines: list[bytes]) -> None:
    """A third of the records in each format."""
    thirds = [lines[third::3] for third in range(3)]
    (directory / "a.jsonl").write_bytes(b"".join(thirds[0]))
    records = [{"messages": json.loads(line)["messages"]} for line in thirds[1]]
    parquet.write_table(pa.Table.from_pylist(records), directory / "b.parquet", row_group_size=50)
    writer = ArrayRecordWriter(str(directory / "c.arrayrecord"), "group_size:1")
    for line in thirds[2]:
        writer.write(line)
    writer.close()


def command(folder: Path, target: str, *words: str, flags: str = "", **more: str) -> Command:
    env = {**os.environ, "HOME": str(folder), "XLA_FLAGS": flags, **more}
    return Command(target, *words, env=env, cwd=ROOT)


def train(folder: Path, config: str = "run.yaml", *overrides: str, **options: str) -> Command:
    return command(folder, "qwen3_jax.cli.train:main", str(folder / config), *overrides, **options)


def finish(process: Command, code: int = 0) -> str:
    """What it printed."""
    said = "".join(process.communicate())
    assert process.returncode == code, said
    return " ".join(said.split())


def series(text: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in r.items() if k not in ("tokens_per_second", "mfu") and "time/" not in k} for r in records]


def saved_steps(bucket: Bucket) -> list[int]:
    """Steps of the checkpoints that count."""
    with bucket.lock:
        names = [name.split("/") for name in bucket.objects]
    return sorted(int(n[2]) for n in names if n[:2] == ["run", "checkpoints"] and n[3:] == ["commit_success.txt"])


def begun_steps(bucket: Bucket) -> set[int]:
    with bucket.lock:
        names = [name.split("/") for name in bucket.objects]
    return {int(n[2]) for n in names if n[:2] == ["run", "checkpoints"] and n[2].isdecimal()}


def test_a_run_in_a_bucket_killed_damaged_exported(folder: Path, bucket: Bucket) -> None:
    """Killed with SIGKILL twice after a checkpoint and twice while it saves one, of which half is left; then the
    newest whole one is damaged. The series in the bucket is that of a run on this disk which nothing interrupts, and
    what is exported from there are that run's weights."""
    said = finish(train(folder, "here.yaml"))
    assert f"trained to step {STEPS}" in said
    expected = series((folder / "here" / "metrics.jsonl").read_text())
    assert [line["step"] for line in expected] == list(range(1, STEPS + 1))

    rng = random.Random(0)
    for kill in range(4):
        process, before = train(folder), saved_steps(bucket)
        with bucket.hold(f"checkpoints/{STEPS}/"):  # it cannot end
            while process.poll() is None and saved_steps(bucket)[-1:] == before[-1:]:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.05))
            if kill % 2 == 0:
                process.kill()
        if kill % 2:
            with bucket.hold("/commit_success.txt") as reached:
                while process.poll() is None and not reached.wait(0.1):
                    pass
                process.kill()
            assert max(begun_steps(bucket)) > saved_steps(bucket)[-1]
        assert process.returncode == -signal.SIGKILL
    newest = saved_steps(bucket)[-1]
    assert newest < STEPS
    name = max(
        (name for name in bucket.objects if name.startswith(f"run/checkpoints/{newest}/params")),
        key=lambda name: len(bucket.objects[name][1]),
    )
    content = bytearray(bucket.objects[name][1])
    content[len(content) // 2] ^= 16
    bucket.put(name, bytes(content))

    said = finish(train(folder))
    damaged = name.removeprefix(f"run/checkpoints/{newest}/")
    assert f"checkpoint {newest} is damaged: {damaged} is not as it was written" in said
    assert f"checkpoint in gs://bucket/run/checkpoints/{STEPS}" in said
    assert series(bucket.objects["run/metrics.jsonl"][1].decode()) == expected
    assert any(name.startswith("run/tensorboard/") for name in bucket.objects)
    assert any(name.startswith(f"run/checkpoints/{newest}.damaged/") for name in bucket.objects)

    for source, target in (("gs://bucket/run", "there"), (str(folder / "here"), "here")):
        finish(command(folder, "qwen3_jax.cli.main:main", "convert", source, str(folder / "exported" / target)))
    exported = [(folder / "exported" / name / "model.safetensors").read_bytes() for name in ("there", "here")]
    assert exported[0] == exported[1]


def test_two_processes_in_a_bucket(folder: Path, bucket: Bucket, coordinator_address: str) -> None:
    """Two processes train; one with two devices goes on from their checkpoint of step 8: the numbers are those of one
    run here."""
    steps = ("--steps", "12", "--checkpoint_every", "4", "--output_dir")
    devices = f"{QUICK_COMPILE} --xla_force_host_platform_device_count=2"
    finish(train(folder, "run.yaml", *steps, str(folder / "two"), flags=devices))
    expected = [line["loss"] for line in series((folder / "two" / "metrics.jsonl").read_text())]

    env = {"JAX_COORDINATOR_ADDRESS": coordinator_address, "JAX_NUM_PROCESSES": "2"}
    words = (*steps, "gs://bucket/two")
    for process in [
        train(folder, "run.yaml", *words, flags=QUICK_COMPILE, **env, JAX_PROCESS_ID=str(i)) for i in range(2)
    ]:
        finish(process)
    got = [line["loss"] for line in series(bucket.objects["two/metrics.jsonl"][1].decode())]
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert len([name for name in bucket.objects if name.startswith("two/checkpoints/8/data/process_")]) == 2
    for name in [name for name in bucket.objects if name.startswith("two/checkpoints/12/")]:
        del bucket.objects[name]
    assert "from step 8" in finish(train(folder, "run.yaml", *words, flags=devices))
    got = [line["loss"] for line in series(bucket.objects["two/metrics.jsonl"][1].decode())]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_bucket_that_is_not_there_is_refused_in_one_line(folder: Path, bucket: Bucket) -> None:
    text = (folder / "run.yaml").read_text().replace("gs://bucket/run", "gs://other/run")
    (folder / "other.yaml").write_text(text)
    said = finish(train(folder, "other.yaml"), code=2)
    assert "error: output_dir: 'gs://other/run': " in said
    assert "Traceback" not in said
