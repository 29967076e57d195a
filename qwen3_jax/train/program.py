"""What a run computes, made from its configuration alone: a laptop can compile it for a pod."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen3_jax.chips import BY_DEVICE_KIND
from qwen3_jax.model import Qwen3
from qwen3_jax.optim import make_optimizer, optimizer_shardings
from qwen3_jax.train.config import TrainConfig
from qwen3_jax.train.objective import Objective, batch_structs
from qwen3_jax.train.step import Guard, GuardedState, TrainState, make_train_step, skip_bad_steps
from sharding import named_shardings

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


class TrainProgram:
    """The train step of a run and what it takes, for the devices of a mesh; all but `lower` is called with the mesh in
    context (`jax.set_mesh`).

    step: `(state, batch) -> (state, metrics)`, jitted; it takes over the state's memory.
    state, batch: a `GuardedState` and the objective's arrays, as shapes and shardings.
    init, init_optimizer: make random weights of a key, and the optimiser's state of weights; nothing is ever unsharded.
    """

    def __init__(self, config: TrainConfig, objective: Objective, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        optimizer = make_optimizer(config.optimizer, config.steps * objective.updates)
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.batch = batch_structs(objective.arrays, mesh, config.accumulation * objective.updates)
        # Only divisibility matters: rows by the mesh, tokens by 2 x context.
        sample = np.zeros((mesh.size, 2 * mesh.size), np.int32)
        init = functools.partial(Qwen3(config.model, stacked=True).init, tokens_BT=sample)
        boxed = jax.eval_shape(lambda: init(jax.random.key(0)))["params"]
        shardings = named_shardings(boxed, mesh)
        self.init = jax.jit(lambda key: nn.unbox(init(key))["params"], out_shardings=shardings)
        params = jax.tree.map(_struct, nn.unbox(boxed), shardings)
        moments_shardings = optimizer_shardings(optimizer, params, shardings, self.replicated)
        self.init_optimizer = jax.jit(optimizer.init, out_shardings=moments_shardings)
        moments = jax.tree.map(_struct, jax.eval_shape(optimizer.init, params), moments_shardings)
        guard = jax.tree.map(lambda x: _struct(x, self.replicated), jax.eval_shape(Guard.create))
        self.state = GuardedState(TrainState(params, moments), guard)
        step = make_train_step(objective, optimizer, config.accumulation, shardings)
        # Metrics are replicated: every process reads them. The state keeps its shardings.
        state_shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        self.step = jax.jit(
            skip_bad_steps(step, config.spike_factor),
            donate_argnums=0,
            out_shardings=(state_shardings, self.replicated),
            compiler_options=_compiler_options(mesh.devices.flat[0]),
        )

    def first_state(self, params: Any) -> GuardedState:
        """The state of a run that starts from these weights."""
        return GuardedState(TrainState(params, self.init_optimizer(params)), self.guard())

    def guard(self, **counters: Any) -> Guard:
        """`Guard.create`, replicated."""
        return jax.device_put(Guard.create(**counters), self.replicated)

    def lower(self) -> jax.stages.Lowered:
        """The step for the mesh's devices, to be compiled. They need not be there, if no mesh is in context."""
        with jax.set_mesh(self.mesh):
            return self.step.lower(self.state, self.batch)


def _compiler_options(device: jax.Device) -> dict[str, str] | None:
    if device.platform != "tpu":
        return None
    chip = BY_DEVICE_KIND.get(device.device_kind)
    return _TPU_OPTIONS | (_SPARSE_CORE_OPTIONS if chip and chip.sparse_cores else {})


def _struct(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
