"""A released checkpoint to an Orbax one, or back."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from rich.console import Console
from rich.progress import track

from qwen3_jax import hf
from qwen3_jax.checkpoint import CHECKPOINTS, PARAMS, absolute, find_whole
from qwen3_jax.config import ModelConfig
from qwen3_jax.text.tokenizer import TOKENIZER_FILES


def convert(source: epath.Path | Path, target: Path) -> None:
    """Converts a checkpoint, bit for bit, and copies the tokenizer's files along.

    The Orbax side is a directory with `config.json` and `params`, the stacked weights as a StandardCheckpointer tree.
    A training run's output directory is read as one, with the weights of its newest checkpoint. The weights pass
    through the host's memory, where they are once; `target` appears when all is written.

    Raises:
      ValueError: `source` is no such checkpoint or not a sound one, or `target` exists and is not empty.
    """
    console = Console()
    # The host holds models that one accelerator does not.
    with hf.new_directory(target) as building, jax.default_device(jax.local_devices(backend="cpu")[0]):
        if (orbax := _find_orbax(source, console)) is not None:
            config, params = ModelConfig.from_hf(source), _load_orbax(orbax)
            hf.save_checkpoint(building, config, params, track=partial(track, description="writing", console=console))
        else:
            config, params = hf.load_checkpoint(
                source, dtype=None, stacked=True, track=partial(track, description="reading", console=console)
            )
            _save_orbax(building, config, params)
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                (building / name).write_bytes((source / name).read_bytes())
        written = sorted((path.name, _size(path)) for path in building.iterdir())
    console.print(f"{target}: {config.num_params:,} weights", soft_wrap=True, highlight=False)
    for name, size in written:
        console.print(f"  {name}  {size:,} bytes", soft_wrap=True, highlight=False)


def _save_orbax(directory: Path, config: ModelConfig, params: dict[str, Any]) -> None:
    (directory / "config.json").write_text(json.dumps(config.to_hf(), indent=2) + "\n", encoding="utf-8")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.absolute() / PARAMS, params)


def _find_orbax(source: epath.Path | Path, console: Console) -> epath.Path | None:
    """Where the Orbax weights of `source` lie, a training run's newest ones; None if it has none."""
    if (source / PARAMS).is_dir():
        return absolute(source / PARAMS)
    if not (source / CHECKPOINTS).is_dir():
        return None
    newest = find_whole(source / CHECKPOINTS, console.print)
    if newest is None:
        raise ValueError(f"source: {str(source / CHECKPOINTS)!r} holds no step; a run that has saved one fits")
    console.print(f"{source}: step {newest.name}", soft_wrap=True, highlight=False)
    return newest / PARAMS


def _load_orbax(path: epath.Path) -> dict[str, Any]:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    held = ocp.StandardCheckpointHandler().metadata(path).tree
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), held)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, wanted)


def _size(path: Path) -> int:
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
    )
