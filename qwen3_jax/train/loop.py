"""A training run from start, or from where it was cut, to its last step."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console

from qwen3_jax.checkpoint import Checkpointer
from qwen3_jax.train.config import TrainConfig
from qwen3_jax.train.evaluation import HeldOut
from qwen3_jax.train.feed import Feed
from qwen3_jax.train.ledger import Ledger
from qwen3_jax.train.output import Output
from qwen3_jax.train.program import Program, batch_sharding
from qwen3_jax.train.record import changes, run_record
from qwen3_jax.train.report import Report
from qwen3_jax.train.start import Start, start_state
from qwen3_jax.train.step import Batch, Metrics
from qwen3_jax.train.stop import StopSignal
from sharding import make_mesh


def train(config: TrainConfig, stop: StopSignal, console: Console) -> str | None:
    """Trains to `config.steps`, or to the step in which SIGTERM or Ctrl-C comes, and leaves a checkpoint of it.

    All processes of a run call it alike; see `sharding.start_processes`.

    Args:
      stop: entered. console: quiet in all processes but the first.

    Returns:
      The name of the signal that came, if one did.

    Raises:
      ValueError: for a configuration that does not fit the devices, the data or the disk.
      OSError: naming the checkpoint that could not be written.
      FloatingPointError: naming the step at which `max_bad_steps` in a row were not finite; there is a checkpoint.
    """
    mesh = make_mesh(config.mesh)
    with (
        Output(config.output_dir) as output,
        jax.set_mesh(mesh),
        Checkpointer(output.checkpoints, config.keep, config.keep_every) as checkpointer,
    ):
        run = _Run(config, mesh, output, checkpointer, stop, console)
        reason = run.steps()
    if reason is None and jax.process_count() == 1:
        reason = stop.asked()  # while the last checkpoint was written; of several processes none knows it of another
    if reason is None:
        console.print(f"trained to step {run.step}; checkpoint in {output.checkpoints / str(run.step)}", soft_wrap=True)
    else:
        console.print(f"stopped by {reason} at step {run.step}; checkpoint saved", soft_wrap=True)
    console.print(f"time     {run.ledger.summary()}", highlight=False, soft_wrap=True)
    return reason


class _Run:
    """The parts of a run, put together, and the steps."""

    def __init__(
        self,
        config: TrainConfig,
        mesh: Mesh,
        output: Output,
        checkpointer: Checkpointer,
        stop: StopSignal,
        console: Console,
    ) -> None:
        self.config, self.output, self.console = config, output, console
        self.checkpointer, self.stop = checkpointer, stop
        program = Program(config, mesh)
        self.feed = Feed(config.data, batch_sharding(config.data, mesh, config.accumulation))
        self.held_out: HeldOut | None = None
        if config.eval_data is not None:
            held_out = Feed(config.eval_data, batch_sharding(config.eval_data, mesh, 1))
            self.held_out = HeldOut(program.model, held_out, config.eval_batches)
        began = time.perf_counter()
        start = start_state(program, output, checkpointer, self.feed, self._announce)
        self.state, self.step = start.state, start.step
        self.ledger = Ledger(start.run.get("ledger"))
        self.ledger.book("checkpoint" if start.run else "compile", time.perf_counter() - began)
        self._announce_changes(start)
        self.report = Report(config, mesh, output.files, start.step, self.ledger, console)
        self.step_fn = program.step
        self.compiled: jax.stages.Compiled | None = None
        self.pending: tuple[int, Metrics, Batch] | None = None
        self.failure: str | None = None
        self.tracing = False

    def steps(self) -> str | None:
        """Runs to the last step; returns the name of the signal that stopped it before, if one did."""
        config, reason = self.config, None
        with self.report:
            while self.step < config.steps and reason is None and self.failure is None:
                self._advance()
                reason = self.stop.asked()
                last = self.step == config.steps or reason is not None
                if self.held_out is not None and (self.step % config.eval_every == 0 or self.step == config.steps):
                    self._evaluate()
                traced = config.profile is not None and self.step == config.profile[1]
                if self.tracing and (traced or last or self.failure):
                    self._end_trace()
                # Not sooner: whatever tells of a step, as the two above do, may find a failure.
                if last or self.failure or self.step % config.checkpoint_every == 0:
                    self._save()
        if self.failure is not None:
            raise FloatingPointError(f"{self.failure}; checkpoint {self.step} saved")
        return reason

    def _advance(self) -> None:
        """One step further: hands the devices the next step, then tells of the one before."""
        profile = self.config.profile
        if profile is not None and not self.tracing and profile[0] <= self.step + 1 <= profile[1]:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # it hooks into every thread, and Orbax starts and ends some meanwhile
            jax.profiler.start_trace(str(self.output.files / "profile"), profiler_options=options)
            self.tracing = True
        began = time.perf_counter()
        batch = next(self.feed)
        loss: Any = self.pending[1]["loss"] if self.pending is not None else None
        busy = loss is not None and not loss.is_ready()
        self.ledger.book("step" if busy else "data", time.perf_counter() - began)
        if self.compiled is None:
            with self.ledger.phase("compile"):
                self.compiled = self.step_fn.lower(self.state, batch).compile()
            self.report.restart_clock()
        with self.ledger.phase("step"):
            self.state, metrics = self.compiled(self.state, batch)
            self._report_pending()
            self.step += 1
            self.pending = (self.step, metrics, batch)

    def _end_trace(self) -> None:
        """Ends the profiler's trace with the last step, even where a run ends amid the steps to be traced."""
        with self.ledger.phase("step"):
            self._report_pending()
        jax.profiler.stop_trace()
        self.tracing = False

    def _report_pending(self, **extra: float) -> None:
        """Tells of the step that is still to be told of, and gives up if it was one bad step too many."""
        if self.pending is None:
            return
        step, metrics, batch = self.pending
        self.pending = None
        values = self.report.step(step, metrics, **extra)
        row = int(values["skipped_in_row"])
        if values["skipped"] and row >= self.config.max_bad_steps and self.failure is None:
            name = f"bad_step_{step}.npz"
            rows = multihost_utils.process_allgather(batch, tiled=True)
            if jax.process_index() == 0:
                np.savez(self.output.files / name, **rows)
            self.failure = (
                f"step {step}: loss is {values['loss']}, gradient norm {values['grad_norm']}: {row} bad steps in a "
                f"row; its batch is in {self.output.directory / name}"
            )

    def _evaluate(self) -> None:
        """Logs the held-out loss with the step's own numbers."""
        assert self.held_out is not None
        with self.ledger.phase("step"):
            jax.block_until_ready(self.state)
        with self.ledger.phase("eval"):
            loss = self.held_out.loss(self.state.train.params)
        self._report_pending(eval_loss=loss)
        self.report.restart_clock()

    def _save(self) -> None:
        """Starts a checkpoint, once all that it holds has been told of."""
        with self.ledger.phase("step"):
            self._report_pending()
        with self.ledger.phase("checkpoint"):
            self.output.publish()  # first: who goes on from a checkpoint needs the series up to it
            record = run_record(self.config, self.step, self.state.guard, self.ledger)
            train = self.state.train
            self.checkpointer.save(self.step, train.params, train.optimizer, self.feed.get_state(), record)
        self.report.restart_clock()

    def _announce(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def _announce_changes(self, start: Start) -> None:
        for line in changes(start.run, self.config) if start.run else []:
            self._announce(f"changed  {line}")
