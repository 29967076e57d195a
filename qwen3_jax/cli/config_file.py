"""YAML run files to frozen dataclasses by draccus, with `!include`, command-line overrides, and one-line errors."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import draccus
import yaml

from qwen3_jax.config import ModelConfig

T = typing.TypeVar("T")


def load_config(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """`cls` from the YAML file `path`, with `--section.key value` overrides.

    Raises:
      ValueError: one line with the key, its value, and what to use instead.
    """
    return decode_config(cls, _read(path), overrides, str(path))


def decode_config(cls: type[T], raw: dict[str, Any], overrides: Sequence[str], where: str) -> T:
    """`cls` from nested mappings, with `--section.key value` overrides. Error messages begin with `where`."""
    unknown = [word for word in overrides if word.startswith("--") and word[2:].split("=")[0] not in _keys(cls)]
    if unknown:
        key = unknown[0][2:].split("=")[0]
        near = difflib.get_close_matches(key, _keys(cls), n=1)
        raise ValueError(f"--{key}: no such key" + (f"; did you mean --{near[0]}?" if near else ""))
    try:
        return draccus.decode(cls, _merged(raw, _parse_overrides(overrides)))
    except (draccus.utils.DraccusException, yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: {_one_line(error)}") from None


def load_model(model: str) -> ModelConfig:
    """The model of a name in configs/model, or of a YAML file like those."""
    is_file = Path(model).suffix in (".yaml", ".yml")
    return load_config(ModelConfig, model) if is_file else ModelConfig.preset(model)


def load_stages(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> dict[str, T]:
    """A `cls` for each stage of a run file, in order; empty if the file has no key `stages`.

    `stages` maps names to changes of the file's other keys. Nested mappings are merged key by key; other values are
    replaced. The override `--section.key value` changes every stage, `--stage.section.key value` one stage.

    Raises:
      ValueError: one line with stage, key, value, and what to use instead.
    """
    common = _read(path)
    stages = common.pop("stages", {})
    if not isinstance(stages, dict) or not all(isinstance(changes, dict) for changes in stages.values()):
        raise ValueError(f"{path}: stages: {stages!r}; use a mapping from names to mappings of changed keys")
    return {
        name: decode_config(cls, _merged(common, changes), _of_stage(overrides, name, stages), f"{path}: stages.{name}")
        for name, changes in stages.items()
    }


def _read(path: str | Path) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ValueError(f"config: {str(path)!r} does not exist; use a YAML file")
    try:
        with open(path, encoding="utf-8") as file:
            raw = draccus.cfgparsing.load_config(file, file=path)
    except (draccus.utils.DraccusException, OSError) as error:
        raise ValueError(f"{path}: {_one_line(error.__cause__ or error)}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: {raw!r}; use keys with values")
    return raw


def _parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Nested mappings from `--section.key value` and `--section.key=value`."""
    flat: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        key, _, value = word.removeprefix("--").partition("=")
        if "=" not in word:
            value = next(rest, "--")
        if not word.startswith("--") or value.startswith("--"):
            raise ValueError(f"{word}: use --section.key value")
        flat[key] = draccus.cfgparsing.parse_string(value)
    return draccus.utils.deflatten(flat, sep=".")


def _of_stage(words: Sequence[str], name: str, stages: Collection[str]) -> list[str]:
    """The overrides of stage `name`: those without a stage, and those that begin with its name, which is removed."""
    selected: list[str] = []
    ours = True
    for word in words:
        if word.startswith("--"):
            owner, _, key = word[2:].partition(".")
            ours = owner not in stages or owner == name
            word = f"--{key}" if owner in stages else word
        selected += [word] if ours else []
    return selected


def _merged(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`tree` updated with `changes`, recursively where both hold a mapping."""
    merged = dict(tree)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(tree.get(key), dict)
        merged[key] = _merged(tree[key], value) if both else value
    return merged


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
    """The message in one line. Where a class refused its fields, the message of the class, which names the field."""
    while "Couldn't instantiate class" in str(error) and error.__cause__ is not None:
        error = error.__cause__
    return " ".join(part.strip() for part in str(error).splitlines() if part.strip())
