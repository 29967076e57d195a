"""The programs of train.py and infer.py, lowered for a TPU slice that need not exist, with their memory and work.

XLA's TPU compiler comes with libtpu and runs on any Linux x86-64 machine. The arrays are shapes with shardings.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from qwen3_jax.chips import find_chip
from qwen3_jax.config import ModelConfig
from qwen3_jax.decode.programs import StepShapes, lower_prefill, lower_step, step_shapes
from qwen3_jax.decode.schedule import STEPS, bucket, max_prefill_rows
from qwen3_jax.decode.weights import lower_weights
from qwen3_jax.rl.objective import PolicyGradient
from qwen3_jax.rl.run import policy_objective
from qwen3_jax.train.config import TrainConfig
from qwen3_jax.train.distill import Distill
from qwen3_jax.train.flops import train_flops_per_token
from qwen3_jax.train.next_token import NextToken
from qwen3_jax.train.objective import Objective
from qwen3_jax.train.program import TrainProgram
from qwen3_jax.train.supervised import make_objective
from sharding import MeshConfig, make_mesh, num_parts


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Decoding as infer.py does it.

    batch: number of rows. context: cache slots of a row. prompt: those of its prompt; None: half of them.
    dtype: of weights and cache.
    """

    model: ModelConfig
    mesh: MeshConfig
    batch: int = 32
    context: int = 8192
    prompt: int | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch: {self.batch}; use a number >= 1")
        longest = self.model.max_position_embeddings
        if not 2 <= self.context <= longest or self.context % 2:
            raise ValueError(
                f"context: {self.context}; use an even number >= 2, at most max_position_embeddings ({longest})"
            )
        if self.prompt is not None and not 1 <= self.prompt < self.context:
            raise ValueError(f"prompt: {self.prompt}; use a number >= 1, below context ({self.context})")

    @property
    def slots(self) -> tuple[int, int]:
        """Of the prompt, and of what is written after it."""
        prompt = self.context // 2 if self.prompt is None else self.prompt
        return prompt, self.context - prompt


@dataclasses.dataclass(frozen=True)
class Work:
    """A program, and the work of one run on all chips.

    what: a description with its sizes. held: bytes of one chip's HBM by content, allocated while the program is in use.
    elsewhere: those bytes of `held` that are not arguments of the program.
    tokens: tokens that are read or written. flops: FLOPs that they need, without recomputation and padding. bytes: HBM
      bytes that must be read; 0 for training.
    is_loop: the cost is that of one step of the program's loop.
    unknown_trips: the number of trips of a loop whose trips depend on data.
    """

    what: str
    mesh: Mesh
    lower: Callable[[], jax.stages.Lowered]
    held: dict[str, float]
    tokens: int
    flops: float
    bytes: float = 0.0
    elsewhere: float = 0.0
    is_loop: bool = False
    unknown_trips: float = 1.0


def use_compiler() -> None:
    """Makes libtpu compile without a TPU. Call it before JAX starts a backend.

    Raises:
      ValueError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("libtpu: not installed; `pip install 'jax[tpu]'` on Linux x86-64")
    # There is no TPU metadata server to query, several processes may compile at once, and JAX's cache cannot read
    # such programs back.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_WORKER_HOSTNAMES="localhost")
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_platforms", "cpu")


def topology_shape(name: str) -> list[int]:
    """Chips along each axis of the slice's torus: [4, 4, 4] for "v5p:4x4x4"."""
    return [int(size) for size in re.findall(r"\d+", name.partition(":")[2])]


def topology_mesh(config: MeshConfig) -> Mesh:
    """The mesh on the slice that `config` names. Call `use_compiler` first.

    Raises:
      ValueError: the topology is missing or unknown, or the axes do not multiply to its chips.
    """
    name = config.topology
    if name is None:
        raise ValueError("mesh.topology: None; name a slice, for instance v5p:4x4x4 (--topology)")
    shape, options = topology_shape(name), dict[str, Any]()
    if math.prod(shape) < 4:  # a part of one host
        options["chips_per_host_bounds"] = [*shape, 1, 1][:3]
    if find_chip(name).name == "v4":  # JAX shows the two cores of a v4 as one device
        options["chip_config_name"] = "megacore"
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"mesh.topology: {name!r}: {reason}; name a slice, for instance v5p:4x4x4") from None
    return make_mesh(config, devices)


def train_step(config: TrainConfig) -> Work:
    """One optimizer step.

    Raises:
      ValueError: as `topology_mesh`, or sizes that do not divide by the mesh.
    """
    mesh, data = topology_mesh(config.mesh), config.data
    program, objective, held = _training(config, mesh)
    micro = data.batch_size // (config.accumulation * objective.updates)
    what = "train step" if config.teacher is None else "distillation step"
    if config.rollouts is not None:
        what += " on rollouts" + (f", {objective.updates} updates" if objective.updates > 1 else "")
    return Work(
        what=f"{what}, {data.batch_size:,} rows of {data.sequence_length:,} tokens, {micro:,} at a time",
        mesh=mesh,
        lower=program.lower,
        held=held,
        tokens=objective.tokens,
        flops=objective.flops,
        unknown_trips=config.accumulation if objective.may_be_empty else 1.0,
    )


def _training(config: TrainConfig, mesh: Mesh) -> tuple[TrainProgram, Objective, dict[str, float]]:
    """The program of a run, its objective, and the bytes of a chip's HBM that it holds from step to step."""
    objective: PolicyGradient | NextToken
    if config.rollouts is not None and config.teacher is None:
        objective = policy_objective(config)
    else:
        objective = make_objective(config, markers=(0, 1))
    program = TrainProgram(config, objective, mesh)
    state = program.state.train
    held = {"parameters": shard_bytes(state.params), "optimizer": shard_bytes(state.optimizer)}
    others = {"teacher": objective.teacher} if isinstance(objective, Distill) else {}
    if isinstance(objective, PolicyGradient) and objective.reference is not None:
        others["reference"] = objective.reference
    return (
        program,
        objective,
        held
        | {name: shard_bytes([program.batch[array] for array in frozen.arrays]) for name, frozen in others.items()},
    )


# The phases of a step on rollouts. What training holds stays in memory.
ROLLOUT_PHASES = ("rollout_weights", "rollout_prefill", "rollout_step", "train_step")


def rollout_weights(config: TrainConfig) -> Work:
    """The weights into the decoding layout.

    Raises: as `topology_mesh`.
    """
    mesh, decoding = topology_mesh(config.mesh), _decoding(config)
    program, _, held = _training(config, mesh)
    params = program.state.train.params
    cast = shard_bytes(decode_shapes(decoding, mesh).params)
    return Work(
        what=f"weights to decode with, in {decoding.dtype}",
        mesh=mesh,
        lower=lambda: lower_weights(config.model, params, mesh, decoding.dtype),
        held=held | {"decoding weights": cast},
        elsewhere=sum(held.values()) - held["parameters"],
        tokens=0,
        flops=0.0,
        bytes=(shard_bytes(params) + cast) * mesh.size,
    )


def rollout_prefill(config: TrainConfig) -> Work:
    """Prefill of as many prompts as are admitted at once.

    Raises: as `topology_mesh`.
    """
    return _beside_training(config, prefill(_decoding(config)))


def rollout_step(config: TrainConfig) -> Work:
    """One token for each row: the body of the decoding loop.

    Raises: as `topology_mesh`.
    """
    return _beside_training(config, decode_step(_decoding(config)))


def prefill_rows(config: TrainConfig) -> int:
    """Prompts of rollouts that are read at once."""
    return _prefill_rows(_decoding(config), topology_mesh(config.mesh))


def _decoding(config: TrainConfig) -> DecodeConfig:
    """The decoding of a run's rollouts, with the cache that its pool allocates."""
    assert config.rollouts is not None
    new, rows = bucket(config.rollouts.max_new_tokens), config.rollouts.rows
    prompt = bucket(config.data.sequence_length - config.rollouts.max_new_tokens)
    longest = max(prompt + new, config.model.max_position_embeddings)  # slots of a bucket need no position
    model = dataclasses.replace(config.model, max_position_embeddings=longest)
    return DecodeConfig(model, config.mesh, rows, prompt + new, prompt, config.rollouts.dtype)


def _beside_training(config: TrainConfig, work: Work) -> Work:
    held = {f"training: {name}": size for name, size in _training(config, work.mesh)[2].items()}
    return dataclasses.replace(
        work, what=f"rollouts: {work.what}", held=work.held | held, elsewhere=work.elsewhere + sum(held.values())
    )


def prefill(config: DecodeConfig) -> Work:
    """Prefill of as many rows as infer.py admits at once, while the cache of all rows is allocated.

    Raises: as `topology_mesh`.
    """
    mesh, model, (prompt, _) = topology_mesh(config.mesh), config.model, config.slots
    takes, rows = decode_shapes(config, mesh), _prefill_rows(config, mesh)
    head = model.vocab_size * model.hidden_size  # only the last token of a prompt needs it
    forward = train_flops_per_token(model, prompt) / 3 - 2 * head
    state = shard_bytes(takes.state)
    return Work(
        what=f"prefill, {rows:,} of {config.batch:,} rows, prompts of {prompt:,} tokens",
        mesh=mesh,
        lower=lambda: lower_prefill(model, mesh, batch=rows, prompt_slots=prompt, dtype=jnp.dtype(config.dtype)),
        held={"parameters": shard_bytes(takes.params), "cache": state},
        elsewhere=state,
        tokens=rows * prompt,
        flops=rows * prompt * forward,
    )


def _prefill_rows(config: DecodeConfig, mesh: Mesh) -> int:
    """Prompts that are read at once."""
    with jax.set_mesh(mesh):
        return min(config.batch, max_prefill_rows(config.slots[0], num_parts("attention_batch")))


def decode_step(config: DecodeConfig) -> Work:
    """One token for each row: the body of the decoding loop.

    Raises: as `topology_mesh`.
    """
    mesh, model = topology_mesh(config.mesh), config.model
    takes = decode_shapes(config, mesh)
    forward = train_flops_per_token(model, config.context) / 3
    return Work(
        what=f"decode step, {config.batch:,} rows with {config.context:,} cache slots each",
        mesh=mesh,
        lower=lambda: lower_step(model, mesh, takes, jnp.dtype(config.dtype)),
        held={"parameters": shard_bytes(takes.params), "cache": shard_bytes(takes.state)},
        tokens=config.batch,
        flops=config.batch * forward,
        bytes=_must_read(config, takes),
        is_loop=True,
        unknown_trips=_experts_in_use(config, takes),
    )


def decode_shapes(config: DecodeConfig, mesh: Mesh) -> StepShapes:
    """The arguments of a decode step, as shapes."""
    options: dict[str, Any] = {"slots": config.slots, "columns": STEPS, "dtype": jnp.dtype(config.dtype)}
    return step_shapes(config.model, mesh, batch=config.batch, **options)


def _must_read(config: DecodeConfig, takes: StepShapes) -> float:
    """HBM bytes of all chips that a step must read, each once: the experts in use, all other weights, the cache.

    A batch of n tokens, each with k of E experts, uses an expected share of 1 - (1 - k/E)^n of the experts.
    """
    model, cache = config.model, takes.state.cache
    share = 1 - (1 - model.num_experts_per_tok / model.num_experts) ** config.batch if model.num_experts else 1.0
    total = 0.0
    for path, x in jax.tree_util.tree_leaves_with_path((takes.params, cache.keys, cache.values)):
        name = jax.tree_util.keystr(path)
        if "embed_tokens" in name and not model.tie_word_embeddings:
            continue  # a step reads a few rows of it
        is_expert = model.num_experts and "mlp" in name and "router" not in name
        total += math.prod(x.shape) * x.dtype.itemsize * (share if is_expert else 1)
    return total


def _experts_in_use(config: DecodeConfig, takes: StepShapes) -> float:
    """Experts of one layer in use on the chip that has most of them, for which the other chips wait: the mean over
    random choices."""
    model = config.model
    if not model.num_experts:
        return 1.0
    table = takes.params[f"layer_{model.num_hidden_layers - 1}"]["mlp"]["down_proj"]
    rng, chips = np.random.default_rng(0), model.num_experts // table.sharding.shard_shape(table.shape)[0]
    draws, total = min(1000, max(2**22 // config.batch, 1)), 0  # a large batch needs few, and each takes long
    for _ in range(draws):
        order = rng.random((config.batch, model.num_experts)).argpartition(model.num_experts_per_tok, axis=-1)
        uses = np.bincount(order[:, : model.num_experts_per_tok].ravel(), minlength=model.num_experts)
        total += (uses > 0).reshape(chips, -1).sum(axis=-1).max()
    return total / draws


def shard_bytes(tree: Any) -> float:
    """Bytes on each device of a tree of arrays, or of shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
