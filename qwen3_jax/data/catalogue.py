"""The catalogue of a run's sources, and how much of each the run has consumed (from its newest checkpoint)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from qwen3_jax.data import manifest
from qwen3_jax.data.config import DataConfig
from qwen3_jax.data.counts import Counts, LabelCounts
from qwen3_jax.data.source import expand
from qwen3_jax.plot import png

_NAME = "sources.json"
_UNKNOWN = "unknown"


def write_catalogue(config: DataConfig, directory: Path) -> None:
    """Writes licence, origin and languages of each source to `sources.json`. Defaults for the configuration's values
    come from the manifests of tokenised files."""
    entries = {}
    for source in config.sources:
        files = [file for path in source.paths for file in expand(path, f"sources.{source.name}.paths")]
        folders = {file.rpartition("/")[0]: file for file in files if file.endswith(".arrayrecord")}
        found = [entry for entry in map(manifest.beside, folders.values()) if entry is not None]
        entries[source.name] = {
            "licence": source.licence or _joined(entry.licence for entry in found),
            "origin": source.origin or _joined(entry.origin for entry in found),
            "languages": source.languages or sorted({language for entry in found for language in entry.languages}),
        }
    (directory / _NAME).write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _joined(values: Iterable[str | None]) -> str | None:
    return " + ".join(sorted({value for value in values if value})) or None


@dataclasses.dataclass(frozen=True)
class Consumption:
    """The data that a run has consumed up to `step`.

    Attributes:
      epochs: number of epochs of each source that were drawn.
      shares: {"source" | "licence" | "language" | a label of the documents: {value: Counts}}. All kinds have the same
        total. The language is the value of the label `language`, or else what the source declares.
    """

    step: int
    epochs: dict[str, float]
    shares: dict[str, dict[str, Counts]]

    def to_json(self) -> dict[str, Any]:
        shares = {kind: {value: c._asdict() for value, c in values.items()} for kind, values in self.shares.items()}
        return {"step": self.step, "epochs": self.epochs, "shares": shares}


def consumption(run: epath.Path | Path) -> Consumption:
    """The data that a run has consumed, from the lanes' counters in its newest checkpoint.

    Raises:
      ValueError: the directory is not that of a run with a checkpoint.
    """
    if not (run / _NAME).is_file():
        raise ValueError(f"run: {str(run)!r} holds no {_NAME}; use the output_dir of a training run")
    catalogue = json.loads((run / _NAME).read_text(encoding="utf-8"))
    step, lanes = _newest_lanes(run)
    consumed = {name: LabelCounts() for name in catalogue}
    epochs = dict.fromkeys(catalogue, 0.0)
    for lane in lanes:
        for name in catalogue:
            consumed[name].merge(lane["consumed"][name])
            epochs[name] += lane["sources"][name][0] / lane["order"]["sources"][name]["documents"]
    labels = sorted({label for source in consumed.values() for label in source.labels} - {"language"})
    shares: dict[str, dict[str, Counts]] = {kind: {} for kind in ("source", "licence", "language", *labels)}

    def add(kind: str, value: str, counts: Counts) -> None:
        shares[kind][value] = shares[kind].get(value, Counts()).plus(counts)

    for name, source in consumed.items():
        add("source", name, source.total)
        add("licence", catalogue[name]["licence"] or _UNKNOWN, source.total)
        for label in ("language", *labels):
            rest = source.total
            for value, counts in source.labels.get(label, {}).items():
                add(label, value, counts)
                rest = rest.minus(counts)
            if rest.tokens:
                declared = "+".join(catalogue[name]["languages"]) if label == "language" else ""
                add(label, declared or _UNKNOWN, rest)
    return Consumption(step, epochs, shares)


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


def _newest_lanes(run: epath.Path | Path) -> tuple[int, list[dict[str, Any]]]:
    """`(step, states of all lanes)` of the newest checkpoint."""
    directory = run / "checkpoints"
    steps = ocp.utils.checkpoint_steps(epath.Path(directory)) if directory.is_dir() else []
    for step in sorted(steps, reverse=True):
        files = sorted((directory / str(step) / "data").glob("*.json"))
        if files:
            return step, [state for file in files for state in json.loads(file.read_text()).values()]
    raise ValueError(f"run: {str(run)!r} has no checkpoint; use the output_dir of a training run that saved one")
