"""Bad input ends a command, all its processes, with one line and exit code 2."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from etils import epath

from qwen3_jax.checkpoint import CHECKPOINTS
from sharding import end_others

P = ParamSpec("P")
T = TypeVar("T")


def exits_cleanly(main: Callable[P, T]) -> Callable[P, T]:
    """Wraps a command's main: a ValueError, FloatingPointError or OSError is printed, not traced; Ctrl-C is
    quiet."""

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return main(*args, **kwargs)
        except (ValueError, FloatingPointError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            end_others(str(error))
            sys.exit(2)
        except KeyboardInterrupt:
            end_others("Ctrl-C")
            sys.exit(130)
        except Exception as error:
            end_others(repr(error))
            raise

    return wrapped


def one_run(text: str) -> epath.Path:
    """The type of an argument that may be a run's output_dir, and cannot be that of a plan."""
    path = epath.Path(text)
    holds_weights = (path / "config.json").exists() or (path / CHECKPOINTS).exists()
    inside = path.iterdir() if path.is_dir() and not holds_weights else ()
    stages = sorted(str(stage) for stage in inside if (stage / CHECKPOINTS).is_dir())
    if stages:
        raise argparse.ArgumentTypeError(f"{text!r} holds the stages of a plan; one of {', '.join(stages)} fits")
    return path


def on_disk(text: str) -> Path:
    """The type of an argument that is a path, and cannot be one in a bucket."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text!r}; a path on a disk fits")
    return Path(text)
