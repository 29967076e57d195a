"""A plot of the data that a run has consumed."""

from __future__ import annotations

from pathlib import Path

from etils import epath

from qwen3_jax.data.catalogue import Consumption
from qwen3_jax.plot import png


def plot_consumption(consumption: Consumption, path: epath.Path | Path) -> None:
    """A bar for each kind (source, licence, ...), divided by the tokens of its values, as a PNG."""
    kinds = list(consumption.shares)
    with png(path) as axes:
        for row, kind in enumerate(kinds):
            values = sorted(consumption.shares[kind].items(), key=lambda item: -item[1].tokens)
            total = sum(counts.tokens for _, counts in values)
            left = 0.0
            for number, (value, counts) in enumerate(values):
                share = counts.tokens / max(total, 1)
                axes.barh(row, share, left=left, color=f"C{number % 10}", edgecolor="white")
                if share > 0.08:
                    axes.text(left + share / 2, row, f"{value}\n{share:.0%}", ha="center", va="center", fontsize=7)
                left += share
        axes.set(
            xlabel="share of the tokens",
            xlim=(0, 1),
            yticks=range(len(kinds)),
            yticklabels=kinds,
            title=f"consumed up to step {consumption.step:,}",
        )
        axes.invert_yaxis()
