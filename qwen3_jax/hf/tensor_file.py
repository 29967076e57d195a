"""The tensors of a safetensors file: names and shapes are read at once, contents slice by slice."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LFS = b"version https://git-lfs"
# Accepted element types by their name in the format.
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
}
# Start and stop along each axis.
Spans = tuple[tuple[int, int], ...]


def param_dtype(name: Any) -> np.dtype[Any]:
    """The dtype of this name; ValueError unless it is in `DTYPES`."""
    try:
        dtype = jnp.dtype(name)
    except TypeError:
        dtype = None
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype: {name!r}; use one of float32, bfloat16, float16")
    return dtype


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of an open file, or a part of one: some rows of one expert.

    source: the safetensors slice of the complete tensor. It keeps the file open.
    dtype: name of the element type in the format.
    shape: of the tensor, or of the part.
    expert: of a part: index of the expert along the leading dim of the tensor; `()` for a complete tensor.
    first_row: of a part.
    """

    source: Any
    dtype: str
    shape: tuple[int, ...]
    expert: tuple[int, ...] = ()
    first_row: int = 0

    def read(self, spans: Spans) -> np.ndarray[Any, Any]:
        """The slice `spans`; nothing else of the file is read."""
        (start, stop), *others = spans
        rows = slice(self.first_row + start, self.first_row + stop)
        return self.source[(*self.expert, rows, *(slice(*span) for span in others))]


def open_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; ValueError where the header is invalid or does not match the file's size."""
    try:
        handle = safe_open(file, framework="np")
    except SafetensorError as error:
        with file.open("rb") as opened:
            if opened.read(len(_LFS)) == _LFS:
                raise ValueError(f"{file.name} is a git-lfs pointer; fetch the file with git lfs pull") from None
        raise ValueError(f"{file.name} is not a valid safetensors file ({error})") from None
    sources = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (the handle is no mapping)
    return {name: Tensor(source, source.get_dtype(), tuple(source.get_shape())) for name, source in sources.items()}
