"""Many programs compiled, each once: what came out is kept beside the compiled programs of infer.py."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import qwen3_jax
import sharding
from qwen3_jax.aot.programs import Work, decode_step, prefill, train_step, use_compiler
from qwen3_jax.aot.report import Report, compile_report

_CACHE = Path.home() / ".cache" / "qwen3-jax" / "plan"
_PROGRAMS: dict[str, Callable[[Any], Work]] = {
    "train_step": train_step,
    "prefill": prefill,
    "decode_step": decode_step,
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A program to compile.

    program: "train_step", "prefill" or "decode_step". config: its `TrainConfig` or `DecodeConfig`.
    label: what distinguishes it from the others of a sweep.
    """

    program: str
    config: Any
    label: str = ""


def run_jobs(jobs: Sequence[Job], hlo_dir: Path | None = None) -> Iterator[Report | str]:
    """For each job, in their order, its report, or in one line why there is none.

    Each is compiled in a process of its own, whose memory ends with it, and which the compiler may take down. A report
    made before by the same code, for the same configuration, is taken from `~/.cache/qwen3-jax/plan`.

    Args:
      hlo_dir: where to keep the scheduled HLO; everything is then compiled anew.
    """
    context = multiprocessing.get_context("spawn")
    for job in jobs:
        kept = _CACHE / f"{_key(job)}.json"
        if hlo_dir is None and kept.is_file():
            yield Report(**json.loads(kept.read_text()))
            continue
        with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
            try:
                report = pool.submit(_run, job, hlo_dir).result()
            except ValueError as error:
                yield str(error)
                continue
            except concurrent.futures.process.BrokenProcessPool:
                yield "the compiler crashed, or ran out of this machine's memory"
                continue
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(dataclasses.asdict(report)))
        yield report


def _run(job: Job, hlo_dir: Path | None) -> Report:
    use_compiler()
    work = _PROGRAMS[job.program](job.config)

    def keep_text(text: str) -> None:
        if hlo_dir is not None:
            hlo_dir.mkdir(parents=True, exist_ok=True)
            (hlo_dir / f"{job.program}-{_key(job)[:8]}.hlo").write_text(text)

    return compile_report(work, job.config.mesh.topology, keep_text)


def _key(job: Job) -> str:
    """Of a job and of all that makes its report."""
    made_by = jax.__version__, version("libtpu"), _sources()
    return hashlib.sha256(repr((job.program, job.config, made_by)).encode()).hexdigest()


@functools.cache
def _sources() -> str:
    digest = hashlib.sha256()
    for package in (qwen3_jax, sharding):
        for path in sorted(Path(str(package.__file__)).parent.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
