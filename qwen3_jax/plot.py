"""Plots as files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from etils import epath


@contextmanager
def png(path: epath.Path | Path) -> Iterator[Any]:
    """Axes to draw on; at the end they are at `path`, in a folder that is made for it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.grid(alpha=0.3)
    try:
        yield axes
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            figure.savefig(file, dpi=150)
    finally:
        plt.close(figure)
