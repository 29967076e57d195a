"""Plots as PNG files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from etils import epath


@contextmanager
def png(path: epath.Path | Path) -> Iterator[Any]:
    """Matplotlib axes to draw on. On leaving the block the figure is written to `path`; its directory is created."""
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
