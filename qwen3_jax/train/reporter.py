"""What a run prints and logs: its plan before the first step, a progress bar, and the metrics of each step."""

from __future__ import annotations

import math
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from qwen3_jax.optim import make_schedule
from qwen3_jax.train.config import TrainConfig
from qwen3_jax.train.flops import peak_flops
from qwen3_jax.train.ledger import Ledger
from qwen3_jax.train.metrics import MetricsLog, heat_map
from qwen3_jax.train.objective import Batch, Metrics, Objective
from qwen3_jax.train.run_directory import RunDirectory

_SECONDS_PER_LINE = 30


class Reporter:
    """Reports the steps after `start`, on a terminal by a bar, else in a line now and then.

    A step is reported when the next one is added, so that the devices never wait for the host. Only process 0 writes
    to the directory; the others should have a quiet console.
    """

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        mesh: Mesh,
        directory: RunDirectory,
        start: int,
        ledger: Ledger,
        console: Console,
    ) -> None:
        self._config, self._objective, self._directory = config, objective, directory
        self._ledger, self._console = ledger, console
        self._schedule = make_schedule(config.optimizer, config.steps * objective.updates)
        self._peak, peak_source = peak_flops(jax.devices(), config.compute.dtype)
        self._announce(mesh, start, peak_source)
        self._log = MetricsLog(directory.files, start) if jax.process_index() == 0 else None
        self._progress = Progress(
            "step {task.completed:,.0f}/{task.total:,.0f}",
            BarColumn(),
            "{task.fields[status]}",
            TimeElapsedColumn(),
            "ETA",
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("", total=config.steps, completed=start, status="compiling")
        self._added: tuple[int, Metrics, Batch, dict[str, float]] | None = None
        self._failure: str | None = None
        self._clock = ledger.stepping()  # when the last report ended
        self._last_line = 0.0

    def add(self, step: int, metrics: Metrics, batch: Batch, numbers: dict[str, float]) -> str | None:
        """Reports the step added before, once the devices have done it; this one is reported later, with `numbers`.

        Returns: why the run must end, None if it continues. Too many bad steps in a row end it.
        """
        failure = self.flush()
        self._added = (step, metrics, batch, numbers)
        return failure

    def flush(self, extra: dict[str, float] | None = None) -> str | None:
        """Reports the step added last, once the devices have done it, with `extra` numbers; returns what `add` does."""
        if self._added is not None:
            (step, metrics, batch, known), self._added = self._added, None
            numbers = self._report(step, jax.device_get(metrics), known | (extra or {}))
            if numbers["skipped"] and numbers["skipped_in_row"] >= self._config.max_bad_steps:
                self._failure = self._failure or self._give_up(step, numbers, batch)
        return self._failure

    def waits(self) -> bool:
        """Whether the devices still work on the step added last."""
        loss: Any = self._added and self._added[1]["loss"]
        return loss is not None and not loss.is_ready()

    def _report(self, step: int, metrics: dict[str, np.ndarray], extra: dict[str, float]) -> dict[str, Any]:
        """Logs a step's numbers and returns them, lists where they are per layer."""
        values = {name: np.asarray(value, np.float64) for name, value in metrics.items()}
        numbers = {name: value.tolist() for name, value in values.items() if value.ndim < 2} | extra
        seconds, tokens = self._ledger.stepping() - self._clock, self._objective.tokens
        self._clock += seconds
        rate, mfu = tokens / seconds, self._objective.flops / seconds / self._peak
        status = f"loss {numbers['loss']:.4f}  {rate:,.0f} tokens/s  MFU {mfu:.1%}"
        if "reward" in extra:
            status = f"reward {extra['reward']:.3f}  {status}"
        if "eval_loss" in extra:
            said = ", ".join(f"{name} {value:.4f}" for name, value in extra.items() if math.isfinite(value))
            self._console.print(f"step {step:,}: {said}", highlight=False, soft_wrap=True)
        self._progress.update(self._task, completed=step, status=status)
        is_last, now = step == self._config.steps, time.perf_counter()
        if not self._console.is_terminal and (is_last or now - self._last_line >= _SECONDS_PER_LINE):
            self._last_line = now
            self._console.print(f"step {step:,}/{self._config.steps:,}: {status}", highlight=False, soft_wrap=True)
        if numbers["skipped"]:
            self._console.print(f"step {step} skipped: loss {numbers['loss']}, gradient norm {numbers['grad_norm']}")
        for name, limit in self._objective.limits.items():
            if numbers[name] > limit:
                self._console.print(f"step {step}: {name} {numbers[name]:.4g} is above {limit}", highlight=False)
        if self._log and (step % self._config.log_every == 0 or is_last or "eval_loss" in extra):
            # The schedule counts the updates of the steps taken.
            taken = (step - int(numbers["skipped_total"])) * self._objective.updates
            numbers |= {"learning_rate": float(self._schedule(max(taken - 1, 0))), "tokens": step * tokens}
            numbers |= {"tokens_per_second": rate, "mfu": mfu, "time/goodput": self._ledger.goodput()}
            times = {f"time/{name}": round(value, 3) for name, value in self._ledger.seconds().items()}
            self._log.write(step, numbers | times)
        if self._log and "router/load" in values and step % self._config.heat_map_every == 0:
            self._log.picture(step, "heat_maps", heat_map(values["router/load"], f"step {step:,}"))
        return numbers

    def _give_up(self, step: int, numbers: dict[str, Any], batch: Batch) -> str:
        """Why a run ends with this step, whose batch is saved. All processes call it alike."""
        name = f"bad_step_{step}.npz"
        # Its rows: a teacher's weights, which come with them, are known.
        arrays = {key: x for key, x in batch.items() if self._objective.arrays[key].axes[0] == "batch"}
        rows = multihost_utils.process_allgather(arrays, tiled=True)
        if jax.process_index() == 0:
            np.savez(self._directory.files / name, **rows)
        return (
            f"step {step}: loss is {numbers['loss']}, gradient norm {numbers['grad_norm']}: "
            f"{numbers['skipped_in_row']:.0f} bad steps in a row; its batch is in {self._directory.directory / name}"
        )

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._progress.stop()
        if self._log:
            try:
                self._log.close()
            except OSError:
                if raised[1] is None:
                    raise

    def _announce(self, mesh: Mesh, start: int, peak_source: str) -> None:
        """What the configuration comes to."""
        config, model, tokens = self._config, self._config.model, self._objective.tokens
        shape = " x ".join(map(str, next(iter(self._objective.arrays.values())).shape))
        axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "one device"
        heads, tensor = model.num_key_value_heads, mesh.shape["tensor"]
        if heads % tensor:
            axes += f"; tensor {tensor} does not divide the {heads} key-value heads: each device has all of them"
        # float32 weights, two moments and a gradient.
        memory = 16 * model.num_params / math.prod(mesh.shape[axis] for axis in ("fsdp", "expert", "tensor"))
        self._console.print(
            f"model    {model.num_params:,} weights, {model.num_active_params:,} active\n"
            f"batch    {shape} = {tokens:,} tokens in {config.accumulation} micro-batches; "
            f"{config.steps * tokens:,} tokens in {config.steps:,} steps, from step {start:,}\n"
            f"mesh     {len(mesh.devices.flat)} devices, {axes}; about {memory / 2**20:,.0f} MiB of weights, gradient "
            f"and moments a device\n"
            f"compute  {config.compute.dtype}, {self._objective.flops / tokens / 1e6:,.1f} MFLOP a token; peak "
            f"{self._peak / 1e12:,.2f} TFLOP/s ({peak_source})",
            highlight=False,
            soft_wrap=True,
        )
