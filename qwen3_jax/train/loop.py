"""A training run from start, or from where it was cut, to its last step."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qwen3_jax import hf
from qwen3_jax.checkpoint import Checkpointer
from qwen3_jax.data import make_loader, write_catalogue
from qwen3_jax.model import Qwen3
from qwen3_jax.optim import make_optimizer, make_schedule, optimizer_shardings
from qwen3_jax.tokenizer import TOKENIZER_FILES
from qwen3_jax.train.config import TrainConfig
from qwen3_jax.train.flops import peak_flops, train_flops_per_token
from qwen3_jax.train.metrics import MetricsLog
from qwen3_jax.train.step import TrainState, make_train_step
from sharding import make_mesh, named_shardings, partition_spec


def train(config: TrainConfig, console: Console | None = None) -> TrainState:
    """Trains to `config.steps` and leaves the last checkpoint in `config.output_dir`.

    Raises:
      ValueError: for a configuration that does not fit the devices or the data.
      FloatingPointError: naming the step whose loss or gradient is not finite.
    """
    console = console or Console()
    mesh = make_mesh(config.mesh)
    output = Path(config.output_dir)
    loader = make_loader(config.data)
    model = Qwen3(
        config.model,
        dtype=jnp.dtype(config.compute.dtype),
        capacity_factor=config.compute.capacity_factor,
        group_size=config.compute.group_size,
        expert_dispatch=config.compute.expert_dispatch,
        remat=config.compute.remat,
    )
    optimizer = make_optimizer(config.optimizer, config.steps)
    schedule = make_schedule(config.optimizer, config.steps)
    checkpointer = Checkpointer(output / "checkpoints", config.keep)
    with jax.set_mesh(mesh):
        state, start = _start_state(config, model, optimizer, mesh, checkpointer, loader)
        # The batch's rows must divide over the mesh; said here in one line rather than by XLA in fifty.
        rows = config.data.batch_size // config.accumulation
        batch_spec = partition_spec(("batch", "length"), mesh, (rows, config.data.sequence_length))
        batch_sharding = NamedSharding(mesh, batch_spec)
        peak, peak_source = peak_flops(jax.devices())
        flops_per_token = train_flops_per_token(config.model, config.data.sequence_length)
        _announce(config, mesh, start, flops_per_token, peak, peak_source, console)
        (output / "config.json").write_text(json.dumps(config.model.to_hf(), indent=2) + "\n", encoding="utf-8")
        write_catalogue(config.data, output)
        for name in TOKENIZER_FILES:
            if (Path(config.data.tokenizer) / name).is_file():
                shutil.copyfile(Path(config.data.tokenizer) / name, output / name)
        log = MetricsLog(output, start)
        step_fn = jax.jit(make_train_step(model, optimizer, config.accumulation, config.router), donate_argnums=0)
        tokens_per_step = config.data.batch_size * config.data.sequence_length

        def report(step: int, metrics: dict[str, jax.Array], since: float, progress: Progress, task: Any) -> float:
            """Waits for a step and logs its numbers, timed from `since`, the end of the step before; returns its end.

            Called one step late, so that the devices never wait for the host.
            """
            values = {name: np.asarray(value, np.float64).tolist() for name, value in jax.device_get(metrics).items()}
            end = time.perf_counter()
            values.pop("router/load", None)
            for name, value in values.items():
                if not np.isfinite(value).all():
                    raise FloatingPointError(f"step {step}: {name} is {value}; the last checkpoint is before it")
            rate = tokens_per_step / (end - since)
            mfu = rate * flops_per_token / peak
            status = f"loss {values['loss']:.4f}  {rate:,.0f} tokens/s  MFU {mfu:.1%}"
            progress.update(task, completed=step, status=status)
            if step % config.log_every == 0 or step == config.steps:
                extra = {"learning_rate": float(schedule(step - 1)), "tokens": step * tokens_per_step}
                log.write(step, {**values, **extra, "tokens_per_second": rate, "mfu": mfu})
            return end

        columns = (
            TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        pending: tuple[int, dict[str, jax.Array]] | None = None
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=config.steps, completed=start, status="compiling")
            clock = time.perf_counter()
            for step in range(start + 1, config.steps + 1):
                batch = {
                    name: jax.make_array_from_process_local_data(batch_sharding, value)
                    for name, value in next(loader).items()
                }
                state, metrics = step_fn(state, batch)
                if pending is not None:
                    clock = report(*pending, clock, progress, task)
                pending = (step, metrics)
                if step % config.checkpoint_every == 0 or step == config.steps:
                    # A checkpoint must never hold weights that a bad step has spoilt.
                    report(*pending, clock, progress, task)
                    pending = None
                    checkpointer.save(step, state.params, state.optimizer, loader)
                    clock = time.perf_counter()
        log.close()
        checkpointer.close()
    console.print(f"trained to step {config.steps}; checkpoint in {output / 'checkpoints' / str(config.steps)}")
    return state


def _start_state(
    config: TrainConfig, model: Qwen3, optimizer: Any, mesh: Mesh, checkpointer: Checkpointer, loader: Any
) -> tuple[TrainState, int]:
    """The state to go on from and its step: the newest checkpoint, `init_from`, or random weights.

    Shapes are learnt by `eval_shape` and shardings derived from them; nothing is ever built unsharded.
    """
    # Nothing but the rows' division over the mesh depends on the sample.
    sample = jnp.zeros((mesh.size, 8), jnp.int32)
    init_model = Qwen3(config.model)
    boxed = jax.eval_shape(init_model.init, jax.random.key(0), sample)["params"]
    abstract = nn.unbox(boxed)
    replicated = NamedSharding(mesh, PartitionSpec())
    params_shardings = named_shardings(boxed, mesh)
    state_shardings = optimizer_shardings(optimizer, abstract, params_shardings, replicated)

    def struct(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    step = checkpointer.latest_step()
    if step is not None:
        params = jax.tree.map(struct, abstract, params_shardings)
        optimizer_state = jax.tree.map(struct, jax.eval_shape(optimizer.init, abstract), state_shardings)
        return TrainState(*checkpointer.restore(step, params, optimizer_state, loader)), step
    if config.init_from is not None:
        loaded, params = hf.load_checkpoint(config.init_from, dtype="float32", mesh=mesh, stacked=True)
        if loaded != config.model:
            raise ValueError(f"init_from: {config.init_from!r} holds another architecture than `model` describes")
    else:
        init = jax.jit(lambda key: nn.unbox(init_model.init(key, sample))["params"], out_shardings=params_shardings)
        params = init(jax.random.key(config.seed))
    return TrainState(params, jax.jit(optimizer.init, out_shardings=state_shardings)(params)), 0


def _announce(
    config: TrainConfig, mesh: Mesh, start: int, flops: float, peak: float, peak_source: str, console: Console
) -> None:
    """What the configuration comes to, before the first step."""
    model, data = config.model, config.data
    tokens = data.batch_size * data.sequence_length
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "one device"
    # float32 weights, two moments and a gradient.
    memory = 16 * model.num_params / math.prod(mesh.shape[axis] for axis in ("fsdp", "expert", "tensor"))
    console.print(
        f"model    {model.num_params:,} weights, {model.num_active_params:,} active\n"
        f"batch    {data.batch_size} x {data.sequence_length} = {tokens:,} tokens in {config.accumulation} "
        f"micro-batches; {config.steps * tokens:,} tokens in {config.steps:,} steps, from step {start:,}\n"
        f"mesh     {len(mesh.devices.flat)} devices, {axes}; about {memory / 2**20:,.0f} MiB of weights, gradient and "
        f"moments a device\n"
        f"compute  {config.compute.dtype}, {flops / 1e6:,.1f} MFLOP a token; peak {peak / 1e12:,.2f} TFLOP/s "
        f"({peak_source})",
        highlight=False,
    )
