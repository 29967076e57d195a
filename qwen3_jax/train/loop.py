"""A training run from its start, or from where it was cut, to its last step."""

from __future__ import annotations

import time

import jax
from jax.sharding import Mesh
from rich.console import Console

from qwen3_jax.checkpoint import Checkpointer
from qwen3_jax.train.config import TrainConfig
from qwen3_jax.train.feed import Feed
from qwen3_jax.train.ledger import Ledger
from qwen3_jax.train.objective import Objective
from qwen3_jax.train.profiler import Profiler
from qwen3_jax.train.program import TrainProgram
from qwen3_jax.train.reporter import Reporter
from qwen3_jax.train.run_directory import RunDirectory
from qwen3_jax.train.start import describe_run, run_record, start_state
from qwen3_jax.train.step import HeldOut
from qwen3_jax.train.stop import StopSignal


def train(
    config: TrainConfig,
    objective: Objective,
    feed: Feed,
    mesh: Mesh,
    stop: StopSignal,
    console: Console,
    held_out: HeldOut | None = None,
) -> str | None:
    """Trains to `config.steps`, or to the step in which SIGTERM or Ctrl-C comes, and leaves a checkpoint of it.

    All processes of a run call it alike; see `sharding.start_processes`.

    Args:
      feed: of batches that fit the objective. held_out: evaluated every `config.eval_every` steps and after the last.
      stop: entered. console: quiet in all processes but the first.

    Returns:
      The name of the signal that came, if one did.

    Raises:
      ValueError: for a configuration that does not fit the devices, the data or the disk.
      OSError: naming the checkpoint that could not be written.
      FloatingPointError: naming the step at which `max_bad_steps` in a row were not finite; there is a checkpoint.
    """
    reason: str | None = None
    failure: str | None = None
    ledger = Ledger()
    program = TrainProgram(config, objective, mesh)
    with (
        RunDirectory(config.output_dir) as directory,
        jax.set_mesh(mesh),
        Checkpointer(directory.checkpoints, config.keep, config.keep_every) as checkpointer,
    ):
        state, step = start_state(program, feed, directory, checkpointer, ledger, console)
        describe_run(directory.files, config, feed)
        if step >= config.steps:
            console.print(f"finished: step {step} of {config.steps}; to go on use a larger steps", soft_wrap=True)
            return None
        profiler = Profiler(config.profile, directory.files / "profile")
        with Reporter(config, objective, mesh, directory, step, ledger, console) as reporter:
            with ledger.phase("compile"):
                train_step = program.lower().compile()
            while step < config.steps and reason is None and failure is None:
                # Step. The host reports the step before while the devices work on this one.
                step += 1
                profiler.start(step)
                began = time.perf_counter()
                batch = feed.next(state.train.params)
                ledger.book("step" if reporter.waits() else "data", time.perf_counter() - began)
                with ledger.phase("step"):
                    state, metrics = train_step(state, batch)
                    failure = reporter.add(step, metrics, batch, dict(feed.numbers))

                reason = stop.asked()
                is_last = step == config.steps or reason is not None
                saves = is_last or step % config.checkpoint_every == 0

                # Evaluate.
                extra: dict[str, float] = {}
                if held_out is not None and (step % config.eval_every == 0 or step == config.steps):
                    with ledger.phase("step"):
                        jax.block_until_ready(state)
                    with ledger.phase("eval"):
                        extra |= held_out.losses(state.train.params)

                # Report this step too, if the run does not simply continue after it.
                if extra or saves or failure or profiler.ends_with(step):
                    with ledger.phase("step"):
                        failure = reporter.flush(extra)
                if is_last or failure or profiler.ends_with(step):
                    profiler.stop()

                # Save. Metrics are copied first: a run that resumes from a checkpoint needs the lines up to it.
                if saves or failure:
                    with ledger.phase("checkpoint"):
                        directory.publish()
                        record = run_record(config, step, state.guard, ledger)
                        checkpointer.save(step, state.train.params, state.train.optimizer, feed.get_state(), record)
        if failure is not None:
            raise FloatingPointError(f"{failure}; checkpoint {step} saved")

    # A signal that came while the last checkpoint was written. One of several processes cannot know of the others'.
    if reason is None and jax.process_count() == 1:
        reason = stop.asked()
    if reason is None:
        console.print(f"trained to step {step}; checkpoint in {directory.checkpoints / str(step)}", soft_wrap=True)
    else:
        console.print(f"stopped by {reason} at step {step}; checkpoint saved", soft_wrap=True)
    console.print(f"time     {ledger.summary()}", highlight=False, soft_wrap=True)
    return reason
