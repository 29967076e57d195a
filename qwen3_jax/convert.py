"""Conversion of a checkpoint from Hugging Face's layout to Orbax, or back."""

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
from qwen3_jax.checkpoint import PARAMS, find_params, restore_params
from qwen3_jax.config import ModelConfig
from qwen3_jax.text.tokenizer import TOKENIZER_FILES


def convert(source: epath.Path | Path, target: Path, dtype: str | None = None) -> None:
    """Converts a checkpoint and copies the files of the tokenizer. The kind of `source` is detected.

    An Orbax checkpoint here is a directory with `config.json` and `params`, the stacked weights as a
    StandardCheckpointer tree. A training run's output directory can be a source too: its newest verified checkpoint is
    used. The host's memory holds one copy of the weights. `target` appears under its name when everything is written.

    dtype: of the weights; None converts bit for bit.

    Raises:
      ValueError: `source` is neither kind of checkpoint or is damaged, or `target` exists and is not empty.
    """
    console = Console()

    def announce(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False)

    # On the CPU: the host's memory holds models that one accelerator's does not.
    with hf.new_directory(target) as building, jax.default_device(jax.local_devices(backend="cpu")[0]):
        if (orbax := find_params(source, announce)) is not None:
            config, params = ModelConfig.from_hf(source), _load_orbax(orbax)
            writing = partial(track, description="writing", console=console)
            hf.save_checkpoint(building, config, params, dtype, track=writing)
        else:
            config, params = hf.load_checkpoint(
                source, dtype=dtype, stacked=True, track=partial(track, description="reading", console=console)
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


def _load_orbax(path: epath.Path) -> dict[str, Any]:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    held = ocp.StandardCheckpointHandler().metadata(path).tree
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), held)
    return restore_params(path, wanted)


def _size(path: Path) -> int:
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
    )
