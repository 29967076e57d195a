"""Plots the throughput and memory of several programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwen3_jax.aot.report import Report
from qwen3_jax.plot import png


def plot_sweep(path: Path, reports: Sequence[tuple[str, Report]]) -> None:
    """A PNG of tokens/s per chip over HBM per chip, a point for each compiled program; a hollow one does not fit."""
    with png(path) as axes:
        for number, (label, report) in enumerate(reports):
            if report.tokens_per_second is None:
                continue
            x, y = report.hbm_bytes / 2**30, report.tokens_per_second / report.chips
            color = f"C{number}"
            axes.scatter(x, y, color=color, facecolor=color if report.fits else "none", label=label)
        for capacity in {report.capacity / 2**30 for _, report in reports}:
            axes.axvline(capacity, color="gray", linestyle="--")
        axes.set(xlabel="HBM per chip, GiB (dashed: capacity)", ylabel="tokens/s per chip, estimated")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)
