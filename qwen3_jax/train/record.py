"""What a run leaves of itself: the `run` item of a checkpoint, and files beside the checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from qwen3_jax.train.config import TrainConfig
from qwen3_jax.train.feed import Feed
from qwen3_jax.train.guard import Guard
from qwen3_jax.train.ledger import Ledger

_PACKAGES = {"qwen3-jax": "qwen3-jax", "jax": "jax", "flax": "flax", "orbax": "orbax-checkpoint"}


def run_record(config: TrainConfig, step: int, guard: Guard, ledger: Ledger) -> dict[str, Any]:
    """`step`, `config` (the seed in it), `code` (versions), `guard` and `ledger` (their states)."""
    counters = {name: value.item() for name, value in jax.device_get(vars(guard)).items()}
    record = {"step": step, "config": dataclasses.asdict(config), "code": code_version()}
    return json.loads(json.dumps({**record, "guard": counters, "ledger": ledger.state()}))


def describe_run(files: Path, config: TrainConfig, feed: Feed) -> None:
    """Leaves what it takes to export a checkpoint, and what says where batches came from; process 0 does."""
    if jax.process_index() == 0:
        (files / "config.json").write_text(json.dumps(config.model.to_hf(), indent=2) + "\n", encoding="utf-8")
        feed.describe(files)


@functools.cache
def code_version() -> dict[str, str]:
    """Versions of this package and of those that decide what a checkpoint holds, and the git commit if there is one."""
    found = {name: version(package) for name, package in _PACKAGES.items()}
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # an installed package has none
        found["commit"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return found


def changes(run: dict[str, Any], config: TrainConfig) -> list[str]:
    """`key: old, now new` for each setting in which `config` differs from the one that a checkpoint was saved under."""
    old, new = _flat(run["config"]), _flat(json.loads(json.dumps(dataclasses.asdict(config))))
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [f"{key}: {old.get(key)!r}, now {new.get(key)!r}" for key in keys if key != "output_dir"]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
