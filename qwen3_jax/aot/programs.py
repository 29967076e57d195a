"""The programs of train.py and infer.py for a slice that is not there: what is compiled, and what it holds and does.

XLA's TPU compiler comes with libtpu and runs on any Linux machine; the arrays are shapes and shardings.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from qwen3_jax.chips import find_chip
from qwen3_jax.config import ModelConfig
from qwen3_jax.decode.programs import StepShapes, lower_prefill, lower_step, step_shapes
from qwen3_jax.decode.schedule import STEPS, max_prefill_rows
from qwen3_jax.train.config import TrainConfig
from qwen3_jax.train.flops import train_flops_per_token
from qwen3_jax.train.pretrain import next_token
from qwen3_jax.train.program import TrainProgram
from sharding import MeshConfig, make_mesh, num_parts


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Decoding as infer.py does it, in bfloat16.

    batch: rows. context: tokens that a row has room for, half of them its prompt.
    """

    model: ModelConfig
    mesh: MeshConfig
    batch: int = 32
    context: int = 8192

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch: {self.batch}; a number >= 1 fits")
        if self.context < 2 or self.context % 2:
            raise ValueError(f"context: {self.context}; an even number >= 2 fits")
        if self.context > self.model.max_position_embeddings:
            most = self.model.max_position_embeddings
            raise ValueError(f"context: {self.context}; at most max_position_embeddings ({most}) fits")


@dataclasses.dataclass(frozen=True)
class Work:
    """A program and what one run of it does.

    what: in words, with its sizes. held: bytes of a chip's HBM by what they hold, as long as the program is used.
    elsewhere: those of them that are not the program's arguments, but lie beside it.
    tokens: that all chips take in or write. flops: that these need, of all chips; what is recomputed or padded does not
      count. bytes: of all chips' HBM that must be read; of training, 0.
    is_loop: what counts is a step of the program's loop.
    unknown_trips: how often a loop runs whose trips data decides.
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
    """Makes libtpu compile without a TPU; before jax starts a backend.

    Raises:
      ValueError: libtpu is not there.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("libtpu: not installed; `pip install 'jax[tpu]'`, on Linux x86-64, fits")
    # There is no TPU machine to ask, two may compile at once, and JAX's cache cannot read such programs back.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_WORKER_HOSTNAMES="localhost")
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_platforms", "cpu")


def topology_shape(name: str) -> list[int]:
    """Chips along each axis of a slice's network, by its name."""
    return [int(size) for size in re.findall(r"\d+", name.partition(":")[2])]


def topology_mesh(config: MeshConfig) -> Mesh:
    """The mesh on the slice that it names, see `use_compiler`.

    Raises:
      ValueError: no topology, one that does not exist, or axes that do not multiply to its chips.
    """
    name = config.topology
    if name is None:
        raise ValueError("mesh.topology: None; a slice, such as v5p:4x4x4, fits (--topology)")
    shape, options = topology_shape(name), dict[str, Any]()
    if math.prod(shape) < 4:  # less than a host
        options["chips_per_host_bounds"] = [*shape, 1, 1][:3]
    if find_chip(name).name == "v4":  # its two cores are one device where they are not asked for apart
        options["chip_config_name"] = "megacore"
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"mesh.topology: {name!r}: {str(error).splitlines()[0]}; such as v5p:4x4x4 fits") from None
    return make_mesh(config, devices)


def train_step(config: TrainConfig) -> Work:
    """One optimiser step.

    Raises:
      ValueError: as `topology_mesh`, or sizes that do not divide over the mesh.
    """
    mesh, data = topology_mesh(config.mesh), config.data
    program = TrainProgram(config, next_token(config), mesh)
    state = program.state.train
    micro = data.batch_size // config.accumulation
    tokens = data.batch_size * data.sequence_length
    return Work(
        what=f"train step, {data.batch_size:,} rows of {data.sequence_length:,} tokens, {micro:,} at a time",
        mesh=mesh,
        lower=program.lower,
        held={"parameters": shard_bytes(state.params), "optimizer": shard_bytes(state.optimizer)},
        tokens=tokens,
        flops=tokens * train_flops_per_token(config.model, data.sequence_length),
    )


def prefill(config: DecodeConfig) -> Work:
    """The prompts of as many rows as infer.py admits at once, while the cache of all rows is there.

    Raises: as `topology_mesh`.
    """
    mesh, model, prompt = topology_mesh(config.mesh), config.model, config.context // 2
    takes = decode_shapes(config, mesh)
    with jax.set_mesh(mesh):
        rows = min(config.batch, max_prefill_rows(prompt, num_parts("attention_batch")))
    head = model.vocab_size * model.hidden_size  # of last tokens alone
    forward = train_flops_per_token(model, prompt) / 3 - 2 * head
    state = shard_bytes(takes.state)
    return Work(
        what=f"prefill, {rows:,} of {config.batch:,} rows, prompts of {prompt:,} tokens",
        mesh=mesh,
        lower=lambda: lower_prefill(model, mesh, batch=rows, prompt_slots=prompt),
        held={"parameters": shard_bytes(takes.params), "cache": state},
        elsewhere=state,
        tokens=rows * prompt,
        flops=rows * prompt * forward,
    )


def decode_step(config: DecodeConfig) -> Work:
    """One token for every row: the body of the decoding loop.

    Raises: as `topology_mesh`.
    """
    mesh, model = topology_mesh(config.mesh), config.model
    takes = decode_shapes(config, mesh)
    forward = train_flops_per_token(model, config.context) / 3
    return Work(
        what=f"decode step, {config.batch:,} rows with {config.context:,} places each",
        mesh=mesh,
        lower=lambda: lower_step(model, mesh, takes),
        held={"parameters": shard_bytes(takes.params), "cache": shard_bytes(takes.state)},
        tokens=config.batch,
        flops=config.batch * forward,
        bytes=_must_read(config, takes),
        is_loop=True,
        unknown_trips=_experts_in_use(config, takes),
    )


def decode_shapes(config: DecodeConfig, mesh: Mesh) -> StepShapes:
    """What a step takes."""
    half = config.context // 2
    return step_shapes(config.model, mesh, batch=config.batch, slots=(half, half), columns=STEPS)


def _must_read(config: DecodeConfig, takes: StepShapes) -> float:
    """Bytes that a step reads of all chips' HBM, nothing twice: of experts those in use, and the whole cache.

    Of E experts a batch of n tokens with k choices each is expected to use 1 - (1 - k/E)^n.
    """
    model, cache = config.model, takes.state.cache
    share = 1 - (1 - model.num_experts_per_tok / model.num_experts) ** config.batch if model.num_experts else 1.0
    total = 0.0
    for path, x in jax.tree_util.tree_leaves_with_path((takes.params, cache.keys, cache.values)):
        name = jax.tree_util.keystr(path)
        if "embed_tokens" in name and not model.tie_word_embeddings:
            continue  # a few rows of it
        is_expert = model.num_experts and "mlp" in name and "router" not in name
        total += math.prod(x.shape) * x.dtype.itemsize * (share if is_expert else 1)
    return total


def _experts_in_use(config: DecodeConfig, takes: StepShapes, draws: int = 1000) -> float:
    """Experts of a layer in use on the chip that has most of them, for which the others wait: the mean over random
    choices."""
    model = config.model
    if not model.num_experts:
        return 1.0
    table = takes.params[f"layer_{model.num_hidden_layers - 1}"]["mlp"]["down_proj"]
    rng, chips = np.random.default_rng(0), model.num_experts // table.sharding.shard_shape(table.shape)[0]
    total = 0
    for _ in range(draws):
        order = rng.random((config.batch, model.num_experts)).argpartition(model.num_experts_per_tok, axis=-1)
        used = np.zeros(model.num_experts, bool)
        used[order[:, : model.num_experts_per_tok]] = True
        total += used.reshape(chips, -1).sum(axis=-1).max()
    return total / draws


def shard_bytes(tree: Any) -> float:
    """Bytes of each device, of arrays or of shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
