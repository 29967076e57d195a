"""Which expert carries what, as a picture."""

from __future__ import annotations

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_SPREAD = 8.0  # colours run from an eighth of the mean load to eight times it


def heat_map(load_LE: np.ndarray, title: str) -> np.ndarray:
    """A picture [height, width, 3] uint8 of each routed layer's (rows, the first on top) load on each expert.

    `load_LE` is a multiple of the layer's mean. The colours' scale is logarithmic and always the same, so that pictures
    compare: white at the mean, blue below, red above.
    """
    load_LE = np.clip(np.asarray(load_LE, np.float64), 1 / _SPREAD, _SPREAD)
    layers, experts = load_LE.shape
    figure = Figure(figsize=(min(16, 4 + 0.1 * experts), min(16, 2 + 0.12 * layers)), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="expert", ylabel="routed layer")
    # No smoothing: a pixel in between would be a load that no expert has.
    image = axes.imshow(
        load_LE, norm=LogNorm(1 / _SPREAD, _SPREAD), cmap="RdBu_r", aspect="auto", interpolation="nearest"
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar = figure.colorbar(image, label="load, mean = 1", ticks=[1 / _SPREAD, 0.25, 0.5, 1, 2, 4, _SPREAD])
    bar.ax.set_yticklabels(["≤1/8", "1/4", "1/2", "1", "2", "4", "≥8"])
    bar.ax.minorticks_off()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
