"""Where a run starts: at its newest verified checkpoint, at other weights, or at random ones; and what it leaves of
itself for that, in the `run` item of a checkpoint and in files beside the checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import yaml
from etils import epath
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from rich.console import Console

from qwen3_jax import hf
from qwen3_jax.checkpoint import Checkpointer, find_params, restore_params
from qwen3_jax.config import ModelConfig
from qwen3_jax.text.tokenizer import GENERATION_CONFIG, fingerprint
from qwen3_jax.train.config import TrainConfig
from qwen3_jax.train.feed import Feed
from qwen3_jax.train.ledger import Ledger
from qwen3_jax.train.program import TrainProgram
from qwen3_jax.train.run_directory import RunDirectory
from qwen3_jax.train.step import Guard, GuardedState, TrainState

# Fields of a model that shape no weight: the configuration of the weights and that of the run may differ in them.
_NO_WEIGHT_SHAPE = {"rope_theta", "rope_scaling", "max_position_embeddings", "initializer_range"}
_NO_WEIGHT_SHAPE |= {"router_aux_loss_coef", "bos_token_id", "eos_token_id", "pad_token_id"}
_PACKAGES = {"qwen3-jax": "qwen3-jax", "jax": "jax", "flax": "flax", "orbax": "orbax-checkpoint"}


def start_state(
    program: TrainProgram,
    feed: Feed,
    directory: RunDirectory,
    checkpointer: Checkpointer,
    ledger: Ledger,
    console: Console,
) -> tuple[GuardedState, int]:
    """`(state to go on from, the last step that it has done)`; moves `feed` and `ledger` to where they were then.

    Raises:
      ValueError: `init_from` is unfit, no checkpoint of this run is verified, or the disk has no room for one.
    """

    def announce(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    config, abstract = program.config, program.state.train
    directory.check_space(abstract)
    with ledger.phase("checkpoint"):
        step = checkpointer.newest_verified(announce)
        if step is not None:
            *arrays, places, run = checkpointer.restore(step, abstract.params, abstract.optimizer)
            feed.set_state(places)
            ledger.resume(run["ledger"])
            for line in changes(run, config):
                announce(f"changed  {line}")
            return GuardedState(TrainState(*arrays), program.guard(**run["guard"])), step
    with ledger.phase("compile"):
        if config.init_from is not None:
            with contextlib.suppress(ValueError):  # one without a tokenizer
                if fingerprint(config.init_from) != fingerprint(config.data.tokenizer):
                    announce(f"init_from: {config.init_from} has another tokenizer than {config.data.tokenizer}")
            params = load_weights("", config.init_from, config.model, abstract.params, program.mesh, announce)
        else:
            params = program.init(jax.random.key(config.seed))
        return program.first_state(params), 0


def load_weights(
    section: str, init_from: str, config: ModelConfig, params: Any, mesh: Mesh, announce: Callable[[str], None]
) -> Any:
    """The weights of a Hugging Face checkpoint, of one that `qwen3-jax convert` wrote, or of a run's newest.

    Args:
      section: of the configuration that has `init_from`, for messages; with a point at its end.
      params: their shapes, one dtype, and shardings on `mesh`; layers are stacked.

    Raises:
      ValueError: naming `init_from`, for a checkpoint that is unfit.
    """
    source, field = epath.Path(init_from), f"{section}init_from"
    found_config = ModelConfig.from_hf(source)
    for name, theirs, ours in different_weights(found_config, config):
        raise ValueError(f"{field}: {init_from!r} has {name} {theirs!r}; {section}model.{name}: {ours!r}")
    for name in ("rope_theta", "rope_scaling", "max_position_embeddings"):
        if (theirs := getattr(found_config, name)) != (ours := getattr(config, name)):
            announce(f"{field}: {source} has {name} {theirs!r}; this run uses {ours!r}")
    try:
        found = find_params(source, announce)
        if found is not None:
            return restore_params(found, params)
        dtype = jax.tree.leaves(params)[0].dtype
        loaded = hf.load_checkpoint(source, dtype=dtype, mesh=mesh, stacked=True)[1]
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None
    announce(f"{source}: {config.num_params:,} weights read")
    return loaded


def different_weights(one: ModelConfig, other: ModelConfig) -> list[tuple[str, Any, Any]]:
    """`(field, value, other value)` of each field in which two models differ and that shapes weights."""
    names = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in _NO_WEIGHT_SHAPE]
    pairs = [(name, getattr(one, name), getattr(other, name)) for name in names]
    return [pair for pair in pairs if pair[1] != pair[2]]


def run_record(config: TrainConfig, step: int, guard: Guard, ledger: Ledger) -> dict[str, Any]:
    """`step`, `config` (the seed in it), `code` (versions), `guard` and `ledger` (their states)."""
    counters = {name: value.item() for name, value in jax.device_get(vars(guard)).items()}
    record = {"step": step, "config": dataclasses.asdict(config), "code": code_version()}
    return json.loads(json.dumps({**record, "guard": counters, "ledger": ledger.state()}))


def describe_run(files: Path, config: TrainConfig, feed: Feed) -> None:
    """Leaves what it takes to export a checkpoint, what says where batches came from, and `config.yaml`, which train.py
    takes; process 0 does."""
    if jax.process_index() == 0:
        feed.describe(files)
        raw = config.model.to_hf()
        if (ends := files / GENERATION_CONFIG).exists():
            generation = json.loads(ends.read_text(encoding="utf-8"))
            raw |= {key: generation[key] for key in ("bos_token_id", "eos_token_id") if key in generation}
        (files / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        plain = json.loads(json.dumps(dataclasses.asdict(config)))
        (files / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")


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
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    old, new = (flatten_dict(tree, sep=".") for tree in (run["config"], now))
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [f"{key}: {old.get(key)!r}, now {new.get(key)!r}" for key in keys if key != "output_dir"]
