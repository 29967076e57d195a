"""Counts of documents and tokens, in shards, lanes and reports."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from qwen3_jax.data.config import Labels
from qwen3_jax.data.examples import Example


class Counts(NamedTuple):
    """Documents, tokens, and tokens in the loss. The token in which two chunks of a text overlap counts twice."""

    documents: int = 0
    tokens: int = 0
    loss_tokens: int = 0

    @classmethod
    def of(cls, example: Example, *, begins: bool = True) -> Counts:
        """The counts of an example. It counts as a document if it `begins` one. Its first token is not a target."""
        return cls(int(begins), len(example), int(example.loss_mask_N[1:].sum()))

    def plus(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))

    def minus(self, other: Counts) -> Counts:
        return Counts(*(a - b for a, b in zip(self, other, strict=True)))


@dataclasses.dataclass
class LabelCounts:
    """Counts of one source, in total and by label and value."""

    total: Counts = dataclasses.field(default_factory=Counts)
    labels: dict[str, dict[str, Counts]] = dataclasses.field(default_factory=dict)

    def add(self, counts: Counts, labels: Labels) -> None:
        """Adds a document, or a part of one, with these labels."""
        self.total = self.total.plus(counts)
        for label, value in labels.items():
            self._add(label, value, counts)

    def merge(self, other: LabelCounts) -> None:
        """Adds the counts of `other`."""
        self.total = self.total.plus(other.total)
        for label, values in other.labels.items():
            for value, counts in values.items():
                self._add(label, value, counts)

    def _add(self, label: str, value: str, counts: Counts) -> None:
        values = self.labels.setdefault(label, {})
        values[value] = values.get(value, Counts()).plus(counts)

    def to_json(self) -> dict[str, object]:
        """JSON data; counts are lists in the order of the fields of `Counts`."""
        labels = {label: {value: list(counts) for value, counts in d.items()} for label, d in self.labels.items()}
        return {"total": list(self.total), "labels": labels}

    @classmethod
    def from_json(cls, state: dict) -> LabelCounts:
        """The inverse of `to_json`."""
        labels = {label: {value: Counts(*n) for value, n in d.items()} for label, d in state["labels"].items()}
        return cls(Counts(*state["total"]), labels)
