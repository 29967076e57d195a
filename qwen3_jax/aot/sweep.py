"""Compiles many programs, each once. Reports are cached in `~/.cache/qwen3-jax/plan`."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import qwen3_jax
import sharding
from qwen3_jax.aot.programs import (
    decode_step,
    prefill,
    rollout_prefill,
    rollout_step,
    rollout_weights,
    train_step,
    use_compiler,
)
from qwen3_jax.aot.report import Report, compile_report

_PROGRAMS = {
    program.__name__: program
    for program in (train_step, prefill, decode_step, rollout_weights, rollout_prefill, rollout_step)
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A program to compile.

    program: "train_step", with rollouts "rollout_weights", "rollout_prefill" and "rollout_step" before it; "prefill" or
      "decode_step". config: its `TrainConfig` or `DecodeConfig`.
    label: its values of the keys that a sweep changes.
    """

    program: str
    config: Any
    label: str = ""


def run_jobs(jobs: Sequence[Job], hlo_dir: Path | None = None) -> Iterator[Report | str]:
    """Yields for each job, in order, its report, or one line that says why there is none.

    Each job is compiled in its own process: this frees its memory, and a crash of the compiler ends that process alone.
    A cached report is used if the code, the configuration and the versions of jax and libtpu are the same.

    Args:
      hlo_dir: directory for the scheduled HLO; every job is then compiled again.
    """
    context = multiprocessing.get_context("spawn")
    cache = Path.home() / ".cache" / "qwen3-jax" / "plan"
    for job in jobs:
        kept = cache / f"{_key(job)}.json"
        if hlo_dir is None and kept.is_file():
            yield Report(**json.loads(kept.read_text()))
            continue
        with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
            outcome: Report | str
            try:
                outcome = pool.submit(_run, job, hlo_dir, kept).result()
            except ValueError as error:
                outcome = str(error)
            except concurrent.futures.process.BrokenProcessPool:
                outcome = "the compiler crashed, or ran out of this machine's memory"
        yield outcome


def _run(job: Job, hlo_dir: Path | None, kept: Path) -> Report:
    use_compiler()
    program: Any = _PROGRAMS[job.program]
    report, text = compile_report(program(job.config), job.config.mesh.topology)
    if hlo_dir is not None and text:
        hlo_dir.mkdir(parents=True, exist_ok=True)
        (hlo_dir / f"{job.program}-{_key(job)[:8]}.hlo").write_text(text)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(dataclasses.asdict(report)))
    return report


def _key(job: Job) -> str:
    """A hash of everything that a report depends on."""
    made_by = jax.__version__, version("libtpu")
    digest = hashlib.sha256(repr((job.program, job.config, made_by)).encode())
    for package in (qwen3_jax, sharding):
        for path in sorted(Path(str(package.__file__)).parent.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
