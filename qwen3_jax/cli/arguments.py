"""Argument types for argparse."""

from __future__ import annotations

import argparse
from pathlib import Path

from etils import epath

from qwen3_jax.checkpoint import CHECKPOINTS


def one_run(text: str) -> epath.Path:
    """A path that is not the output_dir of a run in stages: each stage has a directory of its own in it."""
    path = epath.Path(text)
    holds_weights = (path / "config.json").exists() or (path / CHECKPOINTS).exists()
    inside = path.iterdir() if path.is_dir() and not holds_weights else ()
    stages = sorted(str(stage) for stage in inside if (stage / CHECKPOINTS).is_dir())
    if stages:
        raise argparse.ArgumentTypeError(f"{text!r} holds the stages of a plan; use one of {', '.join(stages)}")
    return path


def on_disk(text: str) -> Path:
    """A path on a disk, not in a bucket."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text!r}; use a path on a disk")
    return Path(text)
