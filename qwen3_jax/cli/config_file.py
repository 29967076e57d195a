"""YAML run files to frozen dataclasses by draccus, with `!include`, command-line overrides, and one-line errors."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import textwrap
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import draccus
import yaml
from etils import epath

from qwen3_jax.cli.arguments import did_you_mean
from qwen3_jax.config import ModelConfig
from qwen3_jax.curate.stages import KINDS, RECORDS
from qwen3_jax.train import TrainConfig

T = typing.TypeVar("T")


def load_config(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """`cls` from the YAML file `path`, with `--section.key value` overrides.

    Raises:
      ValueError: one line with the key, its value, and what to use instead.
    """
    return decode_config(cls, _read(path), overrides, str(path))


def decode_config(cls: type[T], raw: dict[str, Any], overrides: Sequence[str], where: str) -> T:
    """`cls` from nested mappings, with `--section.key value` overrides. Error messages begin with `where`.

    Where `cls` has a `model`, it may be a name, a YAML file or a directory (see `load_model`); without one, it is that
    of `init_from`. The tokenizer of `data` and `eval_data` is that of `init_from` too, where none is given.
    """
    changes, known = _parse_overrides(overrides), _fields(cls)
    for key in _flat(changes):
        # An element of a list is named by its name: data.sources.NAME.paths.
        plain = re.sub(r"\bsources\.[^.]+\.", "sources.", key)
        if plain not in known and not _is_in_mapping(plain, known):
            raise ValueError(f"--{key}: no such key{did_you_mean(plain, known, '--')}")
    tree = raw
    try:
        tree = _with_start(cls, _merged(_with_model(cls, raw), changes))
        return draccus.decode(cls, _checked(cls, tree))
    except (draccus.utils.DraccusException, yaml.YAMLError, TypeError, ValueError) as error:
        line = _one_line(error, _places(cls, tree))
        # In a stage a key has another name than its flag: the stage is named instead.
        is_flag = line.partition(":")[0] in _flat(changes) and ": stages." not in where
        raise ValueError(f"--{line}" if is_flag else f"{where}: {line}") from None


def load_model(model: str) -> ModelConfig:
    """The model of a name in configs/model, of a YAML file like those, or of a directory with a config.json."""
    if Path(model).suffix in (".yaml", ".yml"):
        return load_config(ModelConfig, model)
    return ModelConfig.from_hf(model) if (epath.Path(model) / "config.json").exists() else ModelConfig.preset(model)


def load_plan(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The stages of a run file, see `load_stages`: a `TrainConfig` for those that train, and for those that make data
    what `qwen3_jax.curate.stages.KINDS` says."""
    return load_stages(TrainConfig, path, overrides, KINDS)


def load_runs(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, TrainConfig]:
    """What a run file trains: the stages that do by their names, or its one run by the name ""."""
    stages = load_plan(path, overrides)
    trained = {name: stage for name, stage in stages.items() if isinstance(stage, TrainConfig)}
    return trained if stages else {"": load_config(TrainConfig, path, overrides)}


def load_stages(
    cls: type[T], path: str | Path, overrides: Sequence[str] = (), others: typing.Mapping[str, type] | None = None
) -> dict[str, T]:
    """A `cls` for each stage of a run file, in order; empty if the file has no key `stages`.

    `stages` maps names to changes of the file's other keys. Nested mappings are merged key by key; other values are
    replaced. The override `--section.key value` changes every stage, `--stage.section.key value` one stage.

    The text `stage:NAME` stands for what an earlier stage leaves: its directory, or the file of its records.

    Args:
      others: classes of stages that are no `cls`, by the only key that such a stage has.

    Raises:
      ValueError: one line with stage, key, value, and what to use instead.
    """
    common, others = _read(path), others or {}
    stages = common.pop("stages", {})
    if not isinstance(stages, dict) or not all(isinstance(changes, dict) for changes in stages.values()):
        raise ValueError(f"{path}: stages: {stages!r}; use a mapping from names to mappings of changed keys")
    output_dir = _merged(common, _parse_overrides(_of_stage(overrides, "", stages))).get("output_dir", "")
    loaded, left = {}, dict[str, str]()
    for name, changes in stages.items():
        where, words = f"{path}: stages.{name}", _of_stage(overrides, name, stages)
        kind = next((key for key in changes if key in others), None)
        if kind is not None and len(changes) > 1:
            raise ValueError(f"{where}: {', '.join(changes)}; use {kind} alone in a stage of its own")
        directory = f"{output_dir}/{name}"
        if kind is None:
            loaded[name] = decode_config(cls, _linked(_merged(common, changes), left, where), words, where)
            left[name] = directory
        else:
            raw = {**_linked(changes[kind], left, where), "output_dir": directory}
            own = _of_stage([word.replace(f"--{name}.{kind}.", f"--{name}.") for word in overrides], name, stages, True)
            loaded[name] = decode_config(others[kind], raw, own, where)
            left[name] = f"{directory}/{RECORDS}"
    return loaded


def _linked(tree: Any, left: typing.Mapping[str, str], where: str) -> Any:
    """`tree` with what earlier stages leave in place of `stage:NAME`."""
    if isinstance(tree, dict):
        return {key: _linked(value, left, where) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_linked(value, left, where) for value in tree]
    if isinstance(tree, str) and tree.startswith("stage:"):
        name = tree.removeprefix("stage:")
        if name not in left:
            earlier = f"use one of {', '.join(left)}" if left else "none comes before it; use a path"
            raise ValueError(f"{where}: {tree!r} is no earlier stage; {earlier}, or move {name!r} up")
        return left[name]
    return tree


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
            raise ValueError(f"{word}: use --section.key value, and for several values --section.key '[a, b]'")
        flat[key] = draccus.cfgparsing.parse_string(value)
    return draccus.utils.deflatten(flat, sep=".")


def _of_stage(words: Sequence[str], name: str, stages: Collection[str], own: bool = False) -> list[str]:
    """The overrides of stage `name`: those without a stage, unless only its own are wanted, and those that begin with
    its name, which is removed."""
    selected: list[str] = []
    ours = True
    for word in words:
        if word.startswith("--"):
            owner, _, key = word[2:].partition(".")
            ours = owner == name or (owner not in stages and not own)
            word = f"--{key}" if owner in stages else word
        selected += [word] if ours else []
    return selected


def _merged(tree: dict[str, Any], changes: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`tree` updated with `changes`, recursively where both hold a mapping; in a list of mappings by their names."""
    merged = dict(tree)
    for key, value in changes.items():
        old = tree.get(key)
        if isinstance(value, dict) and isinstance(old, list) and all(isinstance(item, dict) for item in old):
            names = [item.get("name") for item in old]
            for name in value.keys() - set(names):
                raise ValueError(f"{prefix}{key}.{name}: no such name; use one of {', '.join(map(str, names))}")
            merged[key] = [_merged(item, value.get(name, {})) for name, item in zip(names, old, strict=True)]
        elif isinstance(value, dict) and isinstance(old, dict):
            merged[key] = _merged(old, value, f"{prefix}{key}.")
        else:
            merged[key] = value
    return merged


def _with_model(cls: typing.Any, tree: dict[str, Any]) -> dict[str, Any]:
    """The model's shape spelled out where it is a string, so that its keys can be changed."""
    model = tree.get("model")
    if not isinstance(model, str) or _own_fields(cls)["model"][2] is not ModelConfig:
        return tree
    return {**tree, "model": dataclasses.asdict(load_model(model))}


def _with_start(cls: typing.Any, tree: dict[str, Any], section: str = "") -> dict[str, Any]:
    """Model and tokenizer of `init_from` where none are given; in a section with an `init_from` of its own too."""
    tree, start = _with_model(cls, tree), tree.get("init_from")
    for name, (_, _, part) in _own_fields(cls).items():
        if part is not None and "init_from" in _fields(part) and isinstance(tree.get(name), dict):
            tree = {**tree, name: _with_start(part, tree[name], f"{name}.")}
    if "init_from" not in _fields(cls) or not isinstance(start, str):
        return tree
    found, model = {}, tree.get("model") or {}
    if isinstance(model, dict) and "hidden_size" not in model:  # none, or changes of some keys alone
        try:
            held = dataclasses.asdict(ModelConfig.from_hf(start))
        except ValueError as error:
            raise ValueError(f"{section}init_from: {str(error).removeprefix('model: ')}") from None
        found["model"] = _merged(held, model)
    for name in ("data", "eval_data"):
        if isinstance(data := tree.get(name), dict):
            found[name] = {"tokenizer": start, **data}
    return {**tree, **found}


def _checked(cls: typing.Any, tree: Any, prefix: str = "") -> Any:
    """`tree` with a list of one for each text where a list is meant.

    Raises:
      ValueError: a key that no field has, with the one that was probably meant.
    """
    if not isinstance(tree, dict):
        return tree
    fields, checked = _own_fields(cls), {}
    for key, value in tree.items():
        if key not in fields:
            near = did_you_mean(str(key), list(fields), prefix)
            raise ValueError(f"{prefix}{key}: no such key{near or '; use one of ' + ', '.join(fields)}")
        hint, part = fields[key][1:]
        if isinstance(value, str) and typing.get_origin(hint) is tuple:
            value = [value]
        if part is not None:
            one_by_one = isinstance(value, list | tuple)
            value = [_checked(part, item, f"{prefix}{key}.") for item in (value if one_by_one else [value])]
            value = value if one_by_one else value[0]
        checked[key] = value
    return checked


def _own_fields(cls: typing.Any) -> dict[str, tuple[dataclasses.Field[Any], Any, Any]]:
    """By name each field of a dataclass, its type, and the dataclass that it holds, alone, in a tuple or optionally."""
    hints = typing.get_type_hints(cls)
    parts = {name: (hint, *typing.get_args(hint)) for name, hint in hints.items()}
    return {
        field.name: (field, hints[field.name], next(filter(dataclasses.is_dataclass, parts[field.name]), None))
        for field in dataclasses.fields(cls)
    }


def _fields(cls: typing.Any, prefix: str = "") -> dict[str, tuple[Any, dataclasses.Field[Any]]]:
    """By dotted key every field of a nested dataclass, with the class that it is of."""
    found: dict[str, tuple[Any, dataclasses.Field[Any]]] = {}
    for name, (field, _, part) in _own_fields(cls).items():
        found[prefix + name] = cls, field
        if part is not None:
            found |= _fields(part, f"{prefix}{name}.")
    return found


def _is_in_mapping(key: str, known: dict[str, tuple[Any, dataclasses.Field[Any]]]) -> bool:
    """Whether a part of a dotted key is a field that holds a mapping, whose keys may be any."""
    parents = [known[parent] for end in range(len(key)) if key[end] == "." and (parent := key[:end]) in known]
    return any(typing.get_origin(typing.get_type_hints(cls)[field.name]) is dict for cls, field in parents)


def _flat(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys of nested mappings' leaves."""
    return [
        key
        for name, value in tree.items()
        for key in (_flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [f"{prefix}{name}"])
    ]


def describe_keys(cls: typing.Any, width: int = 80) -> str:
    """Every key of a run file with what its class's docstring says of it, wrapped to `width` columns."""
    lines = ["keys of CONFIG, each also a flag:"]
    for key, (owner, field) in _fields(cls).items():
        says = _described(owner).get(field.name, "")
        if field.default not in (dataclasses.MISSING, None, ()) and not dataclasses.is_dataclass(field.default):
            says += f" (default: {field.default})"
        text = textwrap.fill(says.strip(), width, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines += [f"  --{key.replace('sources.', 'sources.NAME.')}", *([text] if text.strip() else [])]
    return "\n".join(lines)


@functools.cache
def _described(cls: typing.Any) -> dict[str, str]:
    """What a dataclass's docstring says of each field: the text after `name: ` or `name, name: `."""
    text = " ".join((inspect.getdoc(cls) or "").split("Raises:")[0].split())
    name = "|".join(field.name for field in dataclasses.fields(cls))
    parts = re.split(rf"(?<![\w.`])((?:{name})(?:, (?:{name}))*): ", text)
    said = zip(parts[1::2], parts[2::2], strict=True)
    return {one: says.strip() for names, says in said for one in names.split(", ")}


def _one_line(error: BaseException, places: typing.Mapping[str, list[str]] | None = None) -> str:
    """The message in one line, beginning with the dotted key. Where a class refused its fields, it is the message of
    the class, which names the field; `places` are the keys of each class by its name."""
    within: list[str] = []
    while "Couldn't instantiate class" in str(error) and error.__cause__ is not None:
        found = re.search(r"class (\w+)", str(error))
        keys = (places or {}).get(found[1], []) if found else []
        within = keys[0].split(".") if len(keys) == 1 else []
        error = error.__cause__
    line = " ".join(part.strip() for part in str(error).splitlines() if part.strip())
    if found := re.search(r"Missing required field\(s\) `(\w+)`", line):
        sections = re.findall(r"`([\w.]+)`: ", line[: found.start()])[-1:]
        start = ", or init_from, whose it then is" if found[1] in ("model", "tokenizer") else ""
        return f"{'.'.join([*sections, found[1]])}: missing; set it{start}"
    if found := re.match(r"`([\w.]+)`: Couldn't parse (.+) into an? ([\w\[\], .]+)", line):
        return f"{found[1]}: {found[2]}; use a value of type {found[3]}"
    # The class may name the part of the key that leads to it, as "mesh.fsdp" or "sources.NAME.paths".
    named = line.partition(":")[0].split(".")
    shared = max(i for i in range(min(len(within), len(named)) + 1) if within[len(within) - i :] == named[:i])
    return ".".join([*within[: len(within) - shared], line]) if re.fullmatch(r"[\w.-]+", ".".join(named)) else line


def _places(cls: typing.Any, tree: typing.Any, prefix: str = "") -> dict[str, list[str]]:
    """By the name of each dataclass the keys of `tree` that hold one."""
    found: dict[str, list[str]] = {}
    for name, (_, _, part) in _own_fields(cls).items():
        held = tree.get(name) if isinstance(tree, dict) else None
        if part is not None and held is not None:
            found.setdefault(part.__name__, []).append(prefix + name)
            inside = held[0] if isinstance(held, list | tuple) and held else held
            for inner, keys in _places(part, inside, f"{prefix}{name}.").items():
                found.setdefault(inner, []).extend(keys)
    return found
