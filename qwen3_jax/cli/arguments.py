"""Command lines: a parser whose errors are one line, and types of arguments."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from etils import epath

from qwen3_jax.checkpoint import CHECKPOINTS
from qwen3_jax.train.start import code_version

_FLAG = re.compile(r"(?<!\S)--[a-z][\w-]*")


class Parser(argparse.ArgumentParser):
    """Refuses a command line in one line, with the flag that was probably meant."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        if "required" in message:  # perhaps since it was mistyped
            flags = set(_FLAG.findall(self.format_help()))
            self.refuse([word for word in self._words if _FLAG.match(word) and word.partition("=")[0] not in flags])
        raise ValueError(f"{message}; {self.prog} --help lists what there is")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = self.parse_known_args(args, namespace)
        self.refuse(rest)
        return found

    def refuse(self, words: Sequence[str]) -> None:
        """Refuses words that the command line has too many."""
        for word in words[:1]:
            flags = _FLAG.findall(self.format_help())
            raise ValueError(f"{word}: no such argument{did_you_mean(word.partition('=')[0], flags)}")


def did_you_mean(word: str, known: Collection[str], prefix: str = "") -> str:
    """The end of a message about an unknown word: the nearest known one, if one is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def version() -> str:
    """This package and those that decide what a run computes, for `--version`."""
    return ", ".join(f"{name} {number}" for name, number in code_version().items())


def one_run(text: str) -> epath.Path:
    """A path that is not the output_dir of a run in stages: each stage has a directory of its own in it."""
    path = epath.Path(text)
    holds_weights = (path / "config.json").exists() or (path / CHECKPOINTS).exists()
    inside = path.iterdir() if path.is_dir() and not holds_weights else ()
    stages = sorted(str(stage) for stage in inside if (stage / CHECKPOINTS).is_dir())
    if stages:
        raise argparse.ArgumentTypeError(f"{text!r} holds the stages of a plan; use one of {', '.join(stages)}")
    return path


def run_on_disk(text: str) -> Path:
    """Both: on a disk, and not the output_dir of a run in stages."""
    return Path(one_run(str(on_disk(text))))


def on_disk(text: str) -> Path:
    """A path on a disk, not in a bucket."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text!r}; use a path on a disk")
    return Path(text)
