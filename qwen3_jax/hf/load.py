"""Reading a checkpoint in Hugging Face's layout, shard by shard, onto a mesh."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding

from qwen3_jax.config import ModelConfig
from qwen3_jax.hf.mapping import Leaf, mismatches, model_leaves, unfuse_experts
from qwen3_jax.hf.tensor_file import DTYPES, INDEX_FILE, SINGLE_FILE, Spans, Tensor, open_tensors, param_dtype
from sharding import partition_spec


def load_checkpoint(
    directory: str | Path,
    dtype: Any = "float32",
    mesh: Mesh | None = None,
    stacked: bool = False,
    *,
    track: Callable[[Sequence[Leaf]], Iterable[Leaf]] = iter,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads `config.json` and the safetensors beside it. All names and shapes are checked before any weight is read.

    Each process reads only the slices of its own devices, one after another. Beyond the weights on CPU devices, host
    memory holds one shard of one weight, and briefly the shard before it and one tensor's part of it. Accepted are the
    released names, and experts fused into `mlp.experts.gate_up_proj` and `mlp.experts.down_proj`.
    `rotary_emb.inv_freq` is ignored. `lm_head.weight` of a model with tied embeddings (some released files have it) is
    ignored after a check that it equals the embedding table.

    Args:
      directory: holds config.json and either model.safetensors or model.safetensors.index.json with its files.
      dtype: of the weights: float32, bfloat16 or float16. None keeps the files' dtype (where the parts of a stacked
        weight differ, one that represents all of them exactly).
      mesh: the weights are sharded over it by their logical axes and `sharding.axis_rules`; None is the default device.
      stacked: the layout of the layers, see `qwen3_jax.model.layout`.
      track: wraps the sequence of weights to be read, to show progress.

    Returns:
      The configuration and `params`, plain arrays.

    Raises:
      ValueError: missing or truncated files; or tensors that are missing, unknown, of a wrong shape, or of an element
        type other than float32, bfloat16 and float16. The first few are named.
    """
    directory = Path(directory)
    target = None if dtype is None else param_dtype(dtype)
    config = ModelConfig.from_hf(directory)
    leaves = model_leaves(config, stacked)
    tensors = _find_tensors(directory)
    _check(directory, config, leaves, tensors)
    params = {}
    for leaf in track(leaves):
        kinds = {DTYPES[tensors[name].dtype] for name in leaf.tensors.values()}
        read = functools.partial(_read, leaf, tensors, target or functools.reduce(jnp.promote_types, kinds))
        params[leaf.path] = _place(leaf, read, mesh)
    return config, traverse_util.unflatten_dict(params)


def _find_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by released name, from the headers of its files."""
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file() and index.is_file():
        raise ValueError(f"model: {str(directory)!r} holds both {SINGLE_FILE} and {INDEX_FILE}; use one of them")
    if single.is_file():
        files, placed = [SINGLE_FILE], None
    elif index.is_file():
        try:
            placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted({"".join(file) for file in placed.values()})  # a TypeError for what is no text
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: not an index of safetensors files ({error!r})") from None
    elif parts := _whole_set(directory):
        files, placed = parts, None
    else:
        others = [
            path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf", ".safetensors")
        ]
        there = f"holds {', '.join(sorted(others)[:3])}" if others else "holds no weights"
        raise ValueError(
            f"model: {str(directory)!r} {there}; use {SINGLE_FILE}, or {INDEX_FILE} with its files, as "
            "save_pretrained of transformers writes them"
        )
    problems: list[str] = []
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not (directory / file).is_file():
            problems.append(f"{file} is listed in the index but does not exist")
            continue
        try:
            held = open_tensors(directory / file)
        except ValueError as error:
            problems.append(str(error))
            continue
        if placed is not None:
            named = {name for name, place in placed.items() if place == file}
            problems += [f"{name} is not in {file}, where the index lists it" for name in sorted(named - held.keys())]
            problems += [f"{name} is in {file}, but not in the index" for name in sorted(held.keys() - named)]
        tensors |= held
    problems += [
        f"{name} has elements of type {tensor.dtype} (use one of {', '.join(DTYPES)})"
        for name, tensor in tensors.items()
        if tensor.dtype not in DTYPES and not _is_ignored(name)
    ]
    _refuse(directory, problems)
    return unfuse_experts({name: tensor for name, tensor in tensors.items() if not _is_ignored(name)})


def _whole_set(directory: Path) -> list[str]:
    """The files `model-00001-of-0000N.safetensors` of a checkpoint without an index, if all N are there."""
    files = sorted(path.name for path in directory.glob("model-*-of-*.safetensors"))
    return (
        files if files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)] else []
    )


def _is_ignored(name: str) -> bool:
    return name.endswith("rotary_emb.inv_freq")


def _check(directory: Path, config: ModelConfig, leaves: Sequence[Leaf], tensors: dict[str, Tensor]) -> None:
    """Names and shapes of all tensors against those that the configuration asks for."""
    shapes = {name: leaf.tensor_shape for leaf in leaves for name in leaf.tensors.values()}
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    tied_head = config.tie_word_embeddings and head in tensors
    if tied_head:
        shapes[head] = shapes[embed]
    problems = mismatches(shapes, {name: tensor.shape for name, tensor in tensors.items()})
    if tied_head and not problems and not _equal(tensors[embed], tensors[head]):
        problems.append(f"tie_word_embeddings is true, but {head} differs from {embed}")
    _refuse(directory, problems)


def _equal(a: Tensor, b: Tensor, rows: int = 4096) -> bool:
    size, columns = a.shape
    chunks = [((i, min(i + rows, size)), (0, columns)) for i in range(0, size, rows)]
    return all(np.array_equal(a.read(chunk), b.read(chunk)) for chunk in chunks)


def _refuse(directory: Path, problems: Sequence[str], shown: int = 5) -> None:
    if problems:
        more = f"; and {len(problems) - shown} more" if len(problems) > shown else ""
        raise ValueError(f"model: {str(directory)!r}: {'; '.join(problems[:shown])}{more}")


def _read(leaf: Leaf, tensors: dict[str, Tensor], dtype: np.dtype[Any], spans: Spans) -> np.ndarray[Any, Any]:
    """The slice `spans` of a weight."""
    out = np.empty([stop - start for start, stop in spans], dtype)
    inside = leaf.tensor_spans(spans)
    for index, name in leaf.tensors.items():
        at = tuple(i - start for i, (start, _) in zip(index, spans, strict=False))
        if all(0 <= i < size for i, size in zip(at, out.shape, strict=False)):
            out[at] = tensors[name].read(inside).reshape(out.shape[leaf.lead :])
    return out


def _place(leaf: Leaf, read: Callable[[Spans], np.ndarray[Any, Any]], mesh: Mesh | None) -> Any:
    """The weight on its devices, read one shard at a time; a shard with several replicas is read once."""
    if mesh is None:
        return jax.device_put(read(tuple((0, size) for size in leaf.shape)))
    sharding = NamedSharding(mesh, partition_spec(leaf.axes, mesh, leaf.shape))
    devices: dict[Spans, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        assert index is not None  # None only for devices of other processes
        spans = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        devices.setdefault(spans, []).append(device)
    shards = [shard for spans, holders in devices.items() for shard in _put(read(spans), holders)]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def _put(shard: np.ndarray[Any, Any], devices: Sequence[jax.Device]) -> list[jax.Array]:
    # Wait: queued transfers would each hold their shard in host memory.
    return jax.block_until_ready([jax.device_put(shard, device) for device in devices])
