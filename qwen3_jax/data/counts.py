"""What is counted of data: in shards, in lanes, in reports."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from qwen3_jax.data.config import Labels
from qwen3_jax.data.examples import Example


class Counts(NamedTuple):
    """Documents, tokens, and tokens in the loss. A text's chunks overlap in a token, which counts twice."""

    documents: int = 0
    tokens: int = 0
    loss_tokens: int = 0

    @classmethod
    def of(cls, example: Example, *, begins: bool = True) -> Counts:
        """Of an example, which is a document if it `begins` one. The first token of a segment is no target."""
        return cls(int(begins), len(example), int(example.loss_mask_N[1:].sum()))

    def plus(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))

    def minus(self, other: Counts) -> Counts:
        return Counts(*(a - b for a, b in zip(self, other, strict=True)))


@dataclasses.dataclass
class Tally:
    """Counts of one source, in all and by label and value."""

    total: Counts = dataclasses.field(default_factory=Counts)
    labels: dict[str, dict[str, Counts]] = dataclasses.field(default_factory=dict)

    def add(self, counts: Counts, labels: Labels) -> None:
        """Counts (part of) a document with these labels."""
        self.total = self.total.plus(counts)
        for label, value in labels.items():
            self._add(label, value, counts)

    def merge(self, other: Tally) -> None:
        """Takes in what another tally counted."""
        self.total = self.total.plus(other.total)
        for label, values in other.labels.items():
            for value, counts in values.items():
                self._add(label, value, counts)

    def _add(self, label: str, value: str, counts: Counts) -> None:
        values = self.labels.setdefault(label, {})
        values[value] = values.get(value, Counts()).plus(counts)

    def to_json(self) -> dict[str, object]:
        """Lists of numbers, in the order of Counts' fields."""
        labels = {label: {value: list(counts) for value, counts in d.items()} for label, d in self.labels.items()}
        return {"total": list(self.total), "labels": labels}

    @classmethod
    def from_json(cls, state: dict) -> Tally:
        """The inverse of `to_json`."""
        labels = {label: {value: Counts(*n) for value, n in d.items()} for label, d in state["labels"].items()}
        return cls(Counts(*state["total"]), labels)
