"""Counts of documents and tokens, in shards, lanes and reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

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

    def plus(self, other: Iterable[int]) -> Counts:
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))

    def minus(self, other: Iterable[int]) -> Counts:
        return Counts(*(a - b for a, b in zip(self, other, strict=True)))


@dataclasses.dataclass
class LabelCounts:
    """Counts of one source, in total and by label and value.

    `dataclasses.asdict` gives them as JSON data; a `Counts` becomes a list, in the order of its fields.
    """

    total: Counts = dataclasses.field(default_factory=Counts)
    labels: dict[str, dict[str, Counts]] = dataclasses.field(default_factory=dict)

    def add(self, counts: Counts, labels: Labels) -> None:
        """Adds a document, or a part of one, with these labels."""
        self.merge({"total": counts, "labels": {label: {value: counts} for label, value in labels.items()}})

    def merge(self, other: Mapping[str, Any]) -> None:
        """Adds the JSON data of another one."""
        self.total = self.total.plus(other["total"])
        for label, values in other["labels"].items():
            ours = self.labels.setdefault(label, {})
            for value, counts in values.items():
                ours[value] = ours.get(value, Counts()).plus(counts)
