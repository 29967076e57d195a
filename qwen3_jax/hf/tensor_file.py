"""The tensors of a safetensors file, as the safetensors package gives them: known at once, read slice by slice."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Accepted element types by their name in the format.
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
}
# Start and stop along each axis.
Spans = tuple[tuple[int, int], ...]


def param_dtype(name: Any) -> np.dtype[Any]:
    """The dtype of this name; ValueError unless a checkpoint can hold it."""
    try:
        dtype = jnp.dtype(name)
    except TypeError:
        dtype = None
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype: {name!r}; one of float32, bfloat16, float16 fits")
    return dtype


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of an open file, or a piece of one: some rows of one expert.

    source: the whole tensor in the file, which stays open as long as this lives.
    dtype: name of its element type in the format.
    shape: of the tensor, or of the piece.
    expert: of a piece: index of its expert along the leading axis of the whole; `()` where this is the whole.
    first_row: of a piece.
    """

    source: Any
    dtype: str
    shape: tuple[int, ...]
    expert: tuple[int, ...] = ()
    first_row: int = 0

    def read(self, spans: Spans) -> np.ndarray[Any, Any]:
        """The part `spans`; nothing else of the file is read."""
        (start, stop), *others = spans
        rows = slice(self.first_row + start, self.first_row + stop)
        return self.source[(*self.expert, rows, *(slice(*span) for span in others))]


def open_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; ValueError unless header and size of the file fit together."""
    try:
        handle = safe_open(file, framework="np")
    except SafetensorError as error:
        raise ValueError(f"{file.name} is no sound safetensors file ({error})") from None
    sources = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (the handle is no mapping)
    return {name: Tensor(source, source.get_dtype(), tuple(source.get_shape())) for name, source in sources.items()}
