"""The stages of a plan that make data: a model answers, answers are selected, records are fused.

Each leaves `records.jsonl` in its directory, which a later stage reads. Run again, a stage that was cut goes on, and
one that is done does nothing, unless what it is made of has changed: then it is made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from qwen3_jax.curate.files import complete
from qwen3_jax.curate.filters import FilterConfig
from qwen3_jax.curate.fuse import FuseConfig, fuse, table
from qwen3_jax.curate.select import select
from qwen3_jax.data.source import DocumentSource
from qwen3_jax.serve import Engine
from qwen3_jax.serve.files import Tally, decode_file
from qwen3_jax.text.chat_format import TemplateChoice
from sharding import MeshConfig, make_mesh, num_parts

RECORDS = "records.jsonl"
_MADE_OF = "made_of.json"

Announce = Callable[[Any], None]
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """A model answers a file of queries, as infer.py does.

    output_dir: of the stage. input: the file. model: a run, a stage (`stage:NAME`), or a directory of a checkpoint.
    samples: answers to each line. rows: places that decode together. dtype: of the weights.
    settings: of lines that do not have them, as `enable_thinking` or `thinking_budget`; see infer.py --help.
    mesh: of all devices, one model over them; process 0 writes.
    chat_template: see infer.py --help.
    """

    input: str
    model: str
    output_dir: str
    samples: int = 1
    rows: int = 64
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    chat_template: TemplateChoice = "own"

    def __post_init__(self) -> None:
        for name in ("samples", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; use a number >= 1")


@dataclasses.dataclass(frozen=True)
class SelectConfig:
    """Answers are judged and filtered into training records, as `qwen3-jax select` does.

    output_dir: of the stage. input: a file of answers, or a stage (`stage:NAME`). verifier: of records without one.
    filters: what is dropped.
    """

    input: str
    output_dir: str
    verifier: str = "exact"
    filters: FilterConfig = dataclasses.field(default_factory=FilterConfig)


@dataclasses.dataclass(frozen=True)
class FuseStage(FuseConfig):
    """Records of both modes are fused, as `qwen3-jax fuse` does. output_dir: of the stage."""

    output_dir: str = ""


# By the key that such a stage has in a run file.
KINDS = {"sample": SampleConfig, "select": SelectConfig, "fuse": FuseStage}


class Stopped(Exception):
    """A signal came while a stage sampled; its name is the argument."""


def sample(
    config: SampleConfig, asked: Callable[[], str | None], report: Callable[[Tally], None], announce: Announce
) -> None:
    """All processes of a plan call it alike.

    Args:
      asked: tells whether to stop, see `StopSignal.asked`; it is asked whenever the decoding loop is left.

    Raises:
      ValueError: the model or the input is unfit, or a line cannot be answered.
      Stopped: what was answered until then is kept.
    """
    mesh = make_mesh(config.mesh)

    def told(tally: Tally) -> None:
        report(tally)
        if (signal := asked()) is not None:
            raise Stopped(signal)

    with jax.set_mesh(mesh):
        if config.rows % (parts := num_parts("attention_batch")):
            raise ValueError(f"sample.rows: {config.rows}; use a multiple of the mesh's {parts} parts")
        engine = Engine.load(config.model, config.dtype, mesh, chat_template=config.chat_template, announce=announce)
        directory = _directory(config.output_dir)
        tally = decode_file(
            engine,
            Path(config.input),
            directory / RECORDS,
            settings={**config.settings, "model": config.model, "dtype": config.dtype},
            defaults=config.settings,
            rows=config.rows,
            samples=config.samples,
            strict=True,
            writes=jax.process_index() == 0,
            report=told,
            announce=announce,
        )
    announce(f"sampled  {tally.samples:,} answers to {tally.prompts:,} lines, {tally.resumed:,} of them before")


def run_select(config: SelectConfig, report: Progress, announce: Announce) -> None:
    """Called by one process.

    Raises:
      ValueError: of `select`.
    """
    files = [config.input, *config.filters.validation, *filter(None, [config.filters.easy_answers])]
    with _once(config, files, announce) as directory:
        if directory is not None:
            source, target = Path(config.input), directory / RECORDS
            announce(select(source, target, config.verifier, config.filters, report, announce).table())


def run_fuse(config: FuseStage, report: Progress, announce: Announce) -> None:
    """Called by one process.

    Raises:
      ValueError: of `fuse`.
    """
    with _once(config, [*config.thinking, *config.non_thinking], announce) as directory:
        if directory is not None:
            announce(table(fuse(config, directory / RECORDS, report)))


@contextlib.contextmanager
def _once(config: Any, files: list[str], announce: Announce) -> Any:
    """The directory to make the records in; None where they are there, made of the same files and settings."""
    directory = _directory(config.output_dir)
    contents = {file: DocumentSource([file], "input").content for file in files}
    made_of = json.dumps({"settings": dataclasses.asdict(config), "files": contents}, indent=2, sort_keys=True)
    path = directory / _MADE_OF
    if (directory / RECORDS).exists() and path.exists():
        if path.read_text(encoding="utf-8") == made_of:
            announce(f"finished: {directory / RECORDS}")
            yield None
            return
        announce(f"changed  what {directory / RECORDS} is made of; it is made again")
    yield directory
    with complete(path) as file:
        file.write(made_of.encode())


def is_not_made_yet(paths: Sequence[str]) -> str:
    """Which of the files of a source a stage of a plan has still to make; empty if none."""
    return next((path for path in paths if Path(path).name == RECORDS and not Path(path).exists()), "")


def _directory(path: str) -> Path:
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    return directory
