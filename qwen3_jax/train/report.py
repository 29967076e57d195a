"""What a run tells of itself: the plan before the first step, a progress bar, and the metrics of each step."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qwen3_jax.data import write_catalogue
from qwen3_jax.optim import make_schedule
from qwen3_jax.text.tokenizer import TOKENIZER_FILES
from qwen3_jax.train.config import TrainConfig
from qwen3_jax.train.flops import peak_flops, train_flops_per_token
from qwen3_jax.train.heatmap import heat_map
from qwen3_jax.train.ledger import Ledger
from qwen3_jax.train.metrics import MetricsLog

_SECONDS_PER_LINE = 30


class Report:
    """Tells of the steps after `start`, on a terminal by a bar, else in a line now and then.

    Only process 0 writes to `files`; the others should have a quiet console.
    """

    def __init__(
        self, config: TrainConfig, mesh: Mesh, files: Path, start: int, ledger: Ledger, console: Console
    ) -> None:
        self._config, self._ledger, self._console = config, ledger, console
        self._schedule = make_schedule(config.optimizer, config.steps)
        self._tokens = config.data.batch_size * config.data.sequence_length
        self._flops = train_flops_per_token(config.model, config.data.sequence_length)
        self._peak, peak_source = peak_flops(jax.devices())
        self._announce(mesh, start, peak_source)
        self._log: MetricsLog | None = None
        if jax.process_index() == 0:
            _describe(config, files)
            self._log = MetricsLog(files, start)
        columns = (
            TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task("", total=config.steps, completed=start, status="compiling")
        self._clock = time.perf_counter()
        self._told = 0.0

    def restart_clock(self) -> None:
        """The next step is timed from here."""
        self._clock = time.perf_counter()

    def step(self, step: int, metrics: dict[str, jax.Array], **extra: float) -> dict[str, Any]:
        """Waits for a step, logs its numbers and returns them, lists where they are per layer.

        The step is timed from the end of the one before. Should be called one step late, so that the devices never
        wait for the host.
        """
        values = {name: np.asarray(value, np.float64) for name, value in jax.device_get(metrics).items()}
        numbers = {name: value.tolist() for name, value in values.items() if value.ndim < 2} | extra
        end = time.perf_counter()
        rate, self._clock = self._tokens / (end - self._clock), end
        mfu = rate * self._flops / self._peak
        status = f"loss {numbers['loss']:.4f}  {rate:,.0f} tokens/s  MFU {mfu:.1%}"
        self._progress.update(self._task, completed=step, status=status)
        last = step == self._config.steps
        if not self._console.is_terminal and (last or end - self._told >= _SECONDS_PER_LINE):
            self._told = end
            self._console.print(f"step {step:,}/{self._config.steps:,}: {status}", highlight=False, soft_wrap=True)
        if numbers["skipped"]:
            self._console.print(f"step {step} skipped: loss {numbers['loss']}, gradient norm {numbers['grad_norm']}")
        if self._log and (step % self._config.log_every == 0 or last or extra):
            taken = step - int(numbers["skipped_total"])  # the schedule counts the steps taken
            numbers |= {"learning_rate": float(self._schedule(max(taken - 1, 0))), "tokens": step * self._tokens}
            spent = {f"time/{name}": round(seconds, 3) for name, seconds in self._ledger.seconds().items()}
            timing = {"tokens_per_second": rate, "mfu": mfu, "time/goodput": self._ledger.goodput(), **spent}
            self._log.write(step, numbers | timing)
        if self._log and "router/load" in values and step % self._config.heat_map_every == 0:
            self._log.picture(step, "heat_maps", heat_map(values["router/load"], f"step {step:,}"))
        return numbers

    def __enter__(self) -> Report:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._log:
            try:
                self._log.close()
            except OSError:
                if error is None:
                    raise

    def _announce(self, mesh: Mesh, start: int, peak_source: str) -> None:
        """What the configuration comes to."""
        config, model, data = self._config, self._config.model, self._config.data
        axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "one device"
        heads, tensor = model.num_key_value_heads, mesh.shape["tensor"]
        if heads % tensor:
            axes += f"; tensor {tensor} does not divide the {heads} key-value heads: each device has all of them"
        # float32 weights, two moments and a gradient.
        memory = 16 * model.num_params / math.prod(mesh.shape[axis] for axis in ("fsdp", "expert", "tensor"))
        self._console.print(
            f"model    {model.num_params:,} weights, {model.num_active_params:,} active\n"
            f"batch    {data.batch_size} x {data.sequence_length} = {self._tokens:,} tokens in {config.accumulation} "
            f"micro-batches; {config.steps * self._tokens:,} tokens in {config.steps:,} steps, from step {start:,}\n"
            f"mesh     {len(mesh.devices.flat)} devices, {axes}; about {memory / 2**20:,.0f} MiB of weights, gradient "
            f"and moments a device\n"
            f"compute  {config.compute.dtype}, {self._flops / 1e6:,.1f} MFLOP a token; peak "
            f"{self._peak / 1e12:,.2f} TFLOP/s ({peak_source})",
            highlight=False,
            soft_wrap=True,
        )


def _describe(config: TrainConfig, files: Path) -> None:
    """Leaves beside the checkpoints what it takes to export them, and to tell what the data is."""
    write_catalogue(config.data, files)
    (files / "config.json").write_text(json.dumps(config.model.to_hf(), indent=2) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (Path(config.data.tokenizer) / name).is_file():
            shutil.copyfile(Path(config.data.tokenizer) / name, files / name)
