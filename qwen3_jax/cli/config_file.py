"""YAML run files to frozen dataclasses, by draccus: `!include`, overrides on the command line, errors in one line."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Sequence
from pathlib import Path

import draccus
import yaml

T = typing.TypeVar("T")


def load_config(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """`cls` from the YAML file `path`, with `--section.key value` overrides.

    Raises:
      ValueError: one line that names the key, its value and what would fit.
    """
    if not Path(path).is_file():
        raise ValueError(f"config: {str(path)!r} does not exist; a YAML file fits")
    unknown = [word for word in overrides if word.startswith("--") and word[2:].split("=")[0] not in _keys(cls)]
    if unknown:
        key = unknown[0][2:].split("=")[0]
        near = difflib.get_close_matches(key, _keys(cls), n=1)
        raise ValueError(f"--{key}: no such key" + (f"; did you mean --{near[0]}?" if near else ""))
    try:
        return draccus.parse(cls, config_path=str(path), args=list(overrides), exit_on_error=False)
    except (draccus.utils.DraccusException, yaml.YAMLError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{path}: {_one_line(error)}") from None


def _keys(cls: typing.Any, prefix: str = "") -> list[str]:
    """Every dotted key of a nested dataclass."""
    keys = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        keys.append(prefix + field.name)
        for part in (hints[field.name], *typing.get_args(hints[field.name])):
            if dataclasses.is_dataclass(part):
                keys += _keys(part, f"{prefix}{field.name}.")
    return keys


def _one_line(error: BaseException) -> str:
    """The message in one line; where a class refused its fields, the class's own message, which names the field."""
    while "Couldn't instantiate class" in str(error) and error.__cause__ is not None:
        error = error.__cause__
    return " ".join(part.strip() for part in str(error).splitlines() if part.strip())
