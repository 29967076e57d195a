"""Where batches come from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from qwen3_jax.data import DataConfig, make_loader, survey, write_catalogue
from qwen3_jax.text.tokenizer import GENERATION_CONFIG, TOKENIZER_FILES, load_tokenizer
from qwen3_jax.train.next_token import Markers, packed_arrays
from qwen3_jax.train.objective import Batch, batch_structs


class Feed(Protocol):
    """Endless batches for an objective. All processes of a run call it alike.

    numbers: what the host knows of the batch last returned, for the metrics of its step; the same on all processes.
    """

    @property
    def numbers(self) -> Mapping[str, float]: ...

    def next(self, params: Any) -> Batch:
        """The next batch, as global arrays sharded as `batch_structs` says.

        `params` are the present weights, for a feed that asks the model; the step after this call takes over their
        memory, so none may be kept.
        """

    def get_state(self) -> dict[str, Any]:
        """Where this process is, after the batch last returned: for the checkpoint, as JSON data."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from there; `state` is the union of the states of all processes that there were."""

    def describe(self, directory: Path) -> None:
        """Leaves files in a run's directory that say where its batches come from."""


class FileFeed:
    """Packed documents; each process reads the rows that its devices hold.

    survey: what the first documents show. numbers: none.

    Raises:
      ValueError: for files that do not fit, or a batch that does not divide over the mesh.
    """

    numbers: Mapping[str, float] = MappingProxyType({})

    def __init__(self, config: DataConfig, mesh: Mesh, accumulation: int = 1) -> None:
        self._config = config
        self._structs = batch_structs(packed_arrays(config.batch_size, config.sequence_length), mesh, accumulation)
        struct = self._structs["tokens"]
        # More than one block of rows: a TPU host's chips are a square of the network, and several blocks of the mesh.
        blocks = struct.sharding.addressable_devices_indices_map(struct.shape).values()
        rows = sorted({row for block in blocks if block for row in range(config.batch_size)[block[0]]})
        self._index = {row: index for index, row in enumerate(rows)}
        self.survey = survey(config)
        self._loader = make_loader(config, rows)

    @property
    def markers(self) -> Markers | None:
        """Of thoughts, where there are conversations."""
        if not self.survey.has_chats:
            return None
        tokenizer = load_tokenizer(self._config.tokenizer)
        return tokenizer.think, tokenizer.end_think

    def next(self, params: Any) -> Batch:
        del params
        return {name: self._put(name, rows) for name, rows in next(self._loader).items()}

    def get_state(self) -> dict[str, Any]:
        return self._loader.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._loader.set_state(state)

    def describe(self, directory: Path) -> None:
        """The catalogue of the sources, the tokenizer, and the ids at which the trained model ends."""
        write_catalogue(self._config, directory)
        describe_tokenizer(self._config, directory, has_chats=self.survey.has_chats, is_base=self.survey.form.is_base)

    def _put(self, name: str, rows: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # other processes have devices without one
            block = range(self._config.batch_size)[index[0]]
            first = self._index[block.start]
            return rows[first : first + len(block), index[1]]

        struct = self._structs[name]
        return jax.make_array_from_callback(struct.shape, struct.sharding, shard)


def describe_tokenizer(config: DataConfig, directory: Path, *, has_chats: bool, is_base: bool) -> None:
    """Leaves the tokenizer in a run's directory, and the ids at which the trained model ends."""
    for file in (Path(config.tokenizer) / name for name in TOKENIZER_FILES):
        if file.is_file():
            shutil.copyfile(file, directory / file.name)
    # A base model that learns conversations ends its turns from now on, and is read as a model that does.
    ends = directory / GENERATION_CONFIG
    if (has_chats and is_base) or not ends.exists():
        im_end, end_of_text = load_tokenizer(config.tokenizer).eos_ids
        eos = [im_end, end_of_text] if has_chats else end_of_text
        ends.write_text(json.dumps({"bos_token_id": end_of_text, "eos_token_id": eos}, indent=2) + "\n")
