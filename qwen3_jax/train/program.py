"""What a run computes, made from its configuration alone: a laptop can compile it for a pod."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen3_jax.chips import BY_DEVICE_KIND
from qwen3_jax.data import DataConfig
from qwen3_jax.model import Qwen3
from qwen3_jax.optim import make_optimizer, optimizer_shardings
from qwen3_jax.train.config import TrainConfig
from qwen3_jax.train.guard import Guard, GuardedState, skip_bad_steps
from qwen3_jax.train.step import TrainState, make_train_step
from sharding import named_shardings, partition_spec

_BATCH_DTYPES = {
    "tokens": jnp.int32,
    "targets": jnp.int32,
    "segment_ids": jnp.int32,
    "positions": jnp.int32,
    "loss_weights": jnp.float32,
}

# What XLA's TPU compiler does not do by itself: matrix products in blocks of more of the vector memory
# (97 % of a v5p's peak by its own estimate, 84 % with its 16 MiB; with 64 MiB 98 %, for six times the time to compile),
# and collectives beside computation. No xla_tpu_enable_async_collective_fusion: newer compilers refuse it on every chip
# but v5e, because it may give wrong results.
_TPU_OPTIONS = {
    "xla_tpu_scoped_vmem_limit_kib": "32768",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
}
# SparseCores gather weights and reduce-scatter gradients beside computation, over one, two or three axes of the torus;
# without them, the matrix units wait for both.
_SPARSE_CORE_OPTIONS = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
}


class Program:
    """The train step of a run and what it takes; all but `lower` is called with the mesh in context (`jax.set_mesh`).

    model, optimizer: as configured.
    step: `(state, batch) -> (state, metrics)`, jitted; it takes over the state's memory.
    state: the `GuardedState` as shapes and shardings. init: makes random weights of a key, nothing is ever unsharded.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        compute = config.compute
        self.model = Qwen3(
            config.model,
            dtype=jnp.dtype(compute.dtype),
            capacity_factor=compute.capacity_factor,
            group_size=compute.group_size,
            expert_dispatch=compute.expert_dispatch,
            remat=compute.remat,
            keep=compute.keep,
            stacked=True,
        )
        self.optimizer = make_optimizer(config.optimizer, config.steps)
        self.replicated = NamedSharding(mesh, PartitionSpec())
        # Nothing but the division over the mesh depends on it: of its rows, and of its tokens in two chunks a device.
        sample = np.zeros((mesh.size, 2 * mesh.size), np.int32)
        init = functools.partial(Qwen3(config.model, stacked=True).init, tokens_BT=sample)
        boxed = jax.eval_shape(lambda: init(jax.random.key(0)))["params"]
        lies = named_shardings(boxed, mesh)
        self.init = jax.jit(lambda key: nn.unbox(init(key))["params"], out_shardings=lies)
        params = jax.tree.map(_struct, nn.unbox(boxed), lies)
        optimizer_lies = optimizer_shardings(self.optimizer, params, lies, self.replicated)
        moments = jax.tree.map(_struct, jax.eval_shape(self.optimizer.init, params), optimizer_lies)
        guard = jax.tree.map(lambda x: _struct(x, self.replicated), jax.eval_shape(Guard.create))
        self.state = GuardedState(TrainState(params, moments), guard)
        step = make_train_step(self.model, self.optimizer, config.accumulation, config.router, lies)
        # Metrics must be whole on every process; the state stays where it lies.
        state_lies = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        self.step = jax.jit(
            skip_bad_steps(step, config.spike_factor),
            donate_argnums=0,
            out_shardings=(state_lies, self.replicated),
            compiler_options=_compiler_options(mesh.devices.flat[0]),
        )

    def init_optimizer(self, params: Any) -> Any:
        """The optimiser's first state for these weights."""
        lies = jax.tree.map(lambda leaf: leaf.sharding, self.state.train.optimizer)
        return jax.jit(self.optimizer.init, out_shardings=lies)(params)

    def lower(self) -> jax.stages.Lowered:
        """The step for the mesh's devices, to be compiled. They need not be there, if no mesh is in context."""
        data = self.config.data
        lies = batch_sharding(data, self.mesh, self.config.accumulation)
        shape = (data.batch_size, data.sequence_length)
        batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=lies) for name, dtype in _BATCH_DTYPES.items()}
        with jax.set_mesh(self.mesh):
            return self.step.lower(self.state, batch)


def batch_sharding(data: DataConfig, mesh: Mesh, accumulation: int) -> NamedSharding:
    """Of each array [batch_size, sequence_length] of a batch.

    Raises:
      ValueError: the rows of a micro-batch, or their tokens, do not divide over the mesh.
    """
    context = mesh.shape["context"]
    if context > 1 and data.sequence_length % (2 * context):
        raise ValueError(
            f"sequence_length: {data.sequence_length} on mesh.context {context}, two chunks a device; a multiple "
            f"of {2 * context} fits"
        )
    # Said here in one line rather than by XLA in fifty.
    spec: Any = partition_spec(("batch", "length"), mesh, (data.batch_size // accumulation, data.sequence_length))
    return NamedSharding(mesh, spec)


def _compiler_options(device: jax.Device) -> dict[str, str] | None:
    if device.platform != "tpu":
        return None
    chip = BY_DEVICE_KIND.get(device.device_kind)
    return _TPU_OPTIONS | (_SPARSE_CORE_OPTIONS if chip and chip.sparse_cores else {})


def _struct(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
