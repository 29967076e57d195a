"""Where the numbers of a run go: a JSONL file, TensorBoard event files, and pictures of the experts' load.

Shapes: L routed layers, E experts.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from qwen3_jax.checkpoint import reason_of
from qwen3_jax.train.run_directory import METRICS

_GROUPS = 8
_FLUSH_EVERY = 30.0  # seconds between the moments when TensorBoard can see what is new
_SPREAD = 8.0  # colours run from an eighth of the mean load to eight times it


class MetricsLog:
    """Writes one line a step to `metrics.jsonl`, and the same to TensorBoard, layers there in groups.

    A run that resumes from step `start` deletes what was logged after it, so that the series is that of a run that was
    never interrupted.

    Raises:
      OSError: naming the directory.
    """

    def __init__(self, directory: Path, start: int) -> None:
        self._path = directory / METRICS
        events = directory / "tensorboard"
        with self._named():
            events.mkdir(parents=True, exist_ok=True)
            kept = []
            if self._path.exists():
                text = self._path.read_text(encoding="utf-8")
                lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
                kept = [line for line in lines if json.loads(line)["step"] <= start]
            # Replaced, not rewritten: a crash while writing must not lose the series.
            fresh = self._path.with_suffix(".tmp")
            fresh.write_text("".join(kept), encoding="utf-8")
            fresh.replace(self._path)
            self._file = self._path.open("a", encoding="utf-8")
            # Written by this thread: SummaryWriter's own dies of a full disk, and then its queue is waited for.
            self._events = EventsWriter(str(events / "events"))
            self._flushed = 0.0
            self._put(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Logs floats, and lists of floats (one value a routed layer); what is not finite becomes null.

        Raises:
          OSError: naming the directory.
        """
        metrics = {name: _finite(value) for name, value in metrics.items()}
        values = []
        for name, value in metrics.items():
            parts = _by_group(name, value) if isinstance(value, list) else {name: value}
            values += [Summary.Value(tag=tag, simple_value=part) for tag, part in parts.items() if part is not None]
        with self._named():
            self._file.write(json.dumps({"step": step, **metrics}, allow_nan=False) + "\n")
            self._file.flush()
            self._put(Event(step=step, summary=Summary(value=values)))

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes `<name>/<step>.png`, and to TensorBoard, a picture [height, width, 3] uint8.

        Raises:
          OSError: naming the directory.
        """
        directory = self._path.with_name(name)
        with self._named():
            directory.mkdir(exist_ok=True)
            matplotlib.image.imsave(directory / f"{step}.png", image)
            self._put(Event(step=step, summary=summary.image(name, image, dataformats="HWC")))

    def close(self) -> None:
        """Flushes both.

        Raises:
          OSError: naming the directory.
        """
        with self._named(), closing(self._events):
            self._file.close()

    def _put(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)
        if event.wall_time - self._flushed >= _FLUSH_EVERY:
            self._flushed = event.wall_time
            self._events.flush()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(f"metrics: {str(self._path.parent)!r}: {reason_of(error)}") from None


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


def _by_group(name: str, values: list[float | None]) -> dict[str, float | None]:
    """One number for each of up to eight groups of neighbouring layers: the largest of a maximum, the smallest of a
    minimum, the mean of what else there is."""
    bounds = np.linspace(0, len(values), min(len(values), _GROUPS) + 1).astype(int)
    reduce = max if name.endswith("_max") else min if name.endswith("_min") else statistics.fmean
    groups: dict[str, float | None] = {}
    for start, stop in itertools.pairwise(bounds):
        known = [value for value in values[start:stop] if value is not None]
        label = f"{name}/{start}" if stop - start == 1 else f"{name}/{start}-{stop - 1}"
        groups[label] = reduce(known) if known else None
    return groups


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return value if math.isfinite(value) else None
