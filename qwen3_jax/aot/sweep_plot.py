"""Plots the throughput and memory of several programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwen3_jax.aot.report import Report
from qwen3_jax.plot import png


def plot_sweep(path: Path, program: str, reports: Sequence[tuple[str, Report]]) -> None:
    """A PNG of tokens/s per chip over HBM per chip, a point for each combination, the fastest that fits first.

    The fastest that fits is a star; a hollow point does not fit.
    """
    with png(path) as axes:
        for number, (label, report) in enumerate(reports):
            if report.tokens_per_second is None:
                continue
            x, y = report.hbm_bytes / 2**30, report.tokens_per_second / report.chips
            color, best = f"C{number}", number == 0 and report.fits
            axes.scatter(
                *(x, y),
                s=160 if best else 40,
                marker="*" if best else "o",
                color=color,
                facecolor=color if report.fits else "none",
                label=f"{label} (best)" if best else label,
            )
        for capacity in {report.capacity / 2**30 for _, report in reports}:
            axes.axvline(capacity, color="gray", linestyle="--")
        topologies = " and ".join(sorted({report.topology for _, report in reports}))
        axes.set(
            xlabel="HBM per chip, GiB (dashed: capacity)",
            ylabel="tokens/s per chip, estimated",
            title=f"{program} on {topologies}",
        )
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])  # room above the best, whose star is large
        axes.legend(fontsize=7)
