"""Writing a checkpoint in Hugging Face's layout, which transformers loads."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from safetensors.numpy import save_file

from qwen3_jax.config import ModelConfig
from qwen3_jax.hf.mapping import mismatches, model_leaves
from qwen3_jax.hf.tensor_file import INDEX_FILE, SINGLE_FILE, param_dtype
from qwen3_jax.model.layout import is_stacked


@dataclasses.dataclass(frozen=True)
class Part:
    """One tensor to be written: its name and shape, and its path and leading indices in `params`."""

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    index: tuple[int, ...]


def save_checkpoint(
    directory: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    dtype: Any = None,
    max_shard_bytes: int = 2_000_000_000,
    *,
    track: Callable[[Sequence[Part]], Iterable[Part]] = iter,
) -> None:
    """Writes `config.json` and safetensors under the released names. `directory` appears when all files are written.

    Host memory holds the tensors of one file at a time, so `max_shard_bytes` bounds it. A collective: all processes
    must call this, and process 0 writes.

    Args:
      directory: must not exist, or be empty.
      config: of the model.
      params: its weights in either layout, boxed or plain, sharded or not.
      dtype: of the tensors: float32, bfloat16 or float16. None keeps the dtype of the weights, if all have the same.
      max_shard_bytes: maximum bytes of tensors in one file. More bytes in total make several files and an index.
      track: wraps the sequence of tensors to be written, to show progress.

    Raises:
      ValueError: `directory` is not empty, or `params` are not the weights of `config`.
    """
    flat = traverse_util.flatten_dict(nn.unbox(params))
    leaves = model_leaves(config, is_stacked(config, params))
    wanted = {"/".join(leaf.path): leaf.shape for leaf in leaves}
    problems = mismatches(wanted, {"/".join(path): x.shape for path, x in flat.items()})
    if problems:
        raise ValueError(f"params: {'; '.join(problems[:5])}; use the weights of this configuration")
    kinds = {str(x.dtype) for x in flat.values()}
    if dtype is None and len(kinds) > 1:
        raise ValueError(f"dtype: None, but the weights have {', '.join(sorted(kinds))}; use one of these")
    target = param_dtype(kinds.pop() if dtype is None else dtype)
    parts = [Part(name, leaf.tensor_shape, leaf.path, at) for leaf in leaves for at, name in leaf.tensors.items()]
    parts.sort(key=lambda part: [int(word) if word.isdigit() else word for word in part.name.split(".")])
    tensors = (
        # "C": safetensors writes the buffer of an array, whatever its strides are.
        (part.name, _to_host(flat[part.path], part.index).reshape(part.shape).astype(target, "C", copy=False))
        for part in track(parts)
    )
    if jax.process_index() == 0:
        with new_directory(directory) as partial:
            _write_files(partial, parts, target.itemsize, tensors, max_shard_bytes)
            _write_json(partial / "config.json", {**config.to_hf(), "torch_dtype": target.name})
    else:
        for _ in tensors:  # `_to_host` is a collective
            pass
    multihost_utils.sync_global_devices("hf.save_checkpoint")


@contextmanager
def new_directory(directory: str | Path) -> Iterator[Path]:
    """A temporary directory beside `directory`, renamed to it at the end of the block and deleted on an exception.

    Raises:
      ValueError: `directory` exists and is not an empty directory.
    """
    directory = Path(directory)
    if directory.exists() and not (directory.is_dir() and next(directory.iterdir(), None) is None):
        raise ValueError(f"target: {str(directory)!r} exists; use a new or empty directory")
    partial = directory.with_name(f"{directory.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _to_host(x: Any, index: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """`x[index]` of an array on the host or, however sharded, on devices."""
    if isinstance(x, np.ndarray):
        return x[index]
    sharding = x.sharding
    replicated = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
    # Slice on the device: a jax.Array caches its host copy, so np.asarray(x) would hold all of `x` in host memory.
    return np.asarray(_slice(x, index, replicated))


@functools.partial(jax.jit, static_argnames="sharding")
def _slice(x: jax.Array, index: tuple[jax.Array, ...], sharding: Sharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(x[index], sharding)


def _write_files(
    directory: Path,
    parts: Sequence[Part],
    itemsize: int,
    tensors: Iterator[tuple[str, np.ndarray[Any, Any]]],
    max_shard_bytes: int,
) -> None:
    """Writes the tensors in order, in as few files as `max_shard_bytes` allows, and an index for several files."""
    counts, sizes = [0], [0]  # number and bytes of the tensors in each file
    for part in parts:
        size = math.prod(part.shape) * itemsize
        if counts[-1] and sizes[-1] + size > max_shard_bytes:
            counts.append(0)
            sizes.append(0)
        counts[-1] += 1
        sizes[-1] += size
    placed: dict[str, str] = {}
    for number, count in enumerate(counts, start=1):
        file = SINGLE_FILE if len(counts) == 1 else f"model-{number:05d}-of-{len(counts):05d}.safetensors"
        held = dict(itertools.islice(tensors, count))
        save_file(held, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)  # safetensors makes files that nobody else can read
        placed |= dict.fromkeys(held, file)
        del held  # free the memory before the next file's tensors are gathered
    if len(counts) > 1:
        _write_json(directory / INDEX_FILE, {"metadata": {"total_size": sum(sizes)}, "weight_map": placed})


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
