"""The configuration of the training data: sources, their weights, and the shape of the batches."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple, get_args

from qwen3_jax.text.chat_format import TemplateChoice

Labels = dict[str, str]
# What is learnt of a chat with several rounds, each a user's query and what answers it. "each": an example for each
# round, as it stood when the round was written, with that round in the loss. "last": the complete chat, with the last
# round in the loss. "all": the complete chat, with every assistant turn in the loss; those before the last round have
# lost their thoughts. "auto": "each" for chats that would lose thoughts, "all" for the others.
Turns = Literal["auto", "each", "last", "all"]


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Documents of one origin.

    Attributes:
      name: short and unique; it seeds the order of the source's documents.
      paths: files or globs (a list, or one alone), local or on a file system that fsspec knows (gs://); .jsonl, .txt,
        .parquet, .arrayrecord.
      weight: the source's share of the tokens is weight / sum of all weights.
      licence, origin, languages: for the catalogue; defaults come from the manifests of tokenised files.
      tokens: [min, max], inclusive; documents with another number of tokens are skipped.
      label_weights: {label: {value: weight}}; relative frequencies of the source's documents by their records' labels.
        "*" stands for every other value and for a missing label; its default is 1. The weights of several labels
        multiply. A document is used in a fraction weight / (largest weight) of the epochs.

    Raises:
      ValueError: naming the field, its value and what to use instead.
    """

    name: str
    paths: tuple[str, ...]
    weight: float = 1.0
    licence: str | None = None
    origin: str | None = None
    languages: tuple[str, ...] = ()
    tokens: tuple[int, int] | None = None
    label_weights: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ValueError(f"sources.name: {self.name!r}; use a name without /")
        where = f"sources.{self.name}"
        for key in ("paths", "languages"):
            value = getattr(self, key)
            object.__setattr__(self, key, (value,) if isinstance(value, str) else tuple(value))
        if not self.paths:
            raise ValueError(f"{where}.paths: (); use a list of at least one file or glob")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"{where}.weight: {self.weight!r}; use a number > 0")
        if self.tokens is not None:
            low, high = self.tokens
            if not 2 <= low <= high:
                raise ValueError(f"{where}.tokens: {[low, high]}; use [min, max] with 2 <= min <= max")
            object.__setattr__(self, "tokens", (low, high))
        for label, weights in self.label_weights.items():
            for value, weight in weights.items():
                if not 0 <= weight < float("inf"):
                    raise ValueError(f"{where}.label_weights.{label}.{value}: {weight!r}; use a number >= 0")
            if max({"*": 1.0, **weights}.values()) == 0:
                raise ValueError(f"{where}.label_weights.{label}: all 0; use at least one number > 0")

    def epoch_fraction(self, labels: Labels) -> float:
        """The fraction of the epochs in which a document with these labels is used."""
        fraction = 1.0
        for label, given in self.label_weights.items():
            weights = {"*": 1.0, **given}
            fraction *= weights.get(labels.get(label, "*"), weights["*"]) / max(weights.values())
        return fraction


class Encoding(NamedTuple):
    """What the ids of a document depend on; see `DataConfig`."""

    tokenizer: str
    turns: Turns = "auto"
    chat_template: TemplateChoice = "own"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The mixture and the shape of the batches.

    Attributes:
      sources: of the mixture.
      tokenizer: directory of the tokenizer.
      sequence_length: tokens of a packed row.
      batch_size: rows of a step, over all processes.
      seed: of the order of the documents.
      shuffle: False: every epoch has the documents in the order of the files.
      turns: what of a chat with several rounds is learnt, see `Turns`.
      chat_template: "own": chats are written as the template in the tokenizer's directory writes them; "ours": in the
        nearest of Qwen3's formats, whatever that template is.
      accept_changed: resume although files of the sources are not those of the checkpoint. Documents that were drawn
        for rows that are not complete yet are drawn from the new files.
      workers: processes per host that read and tokenise; 0 reads in a thread. The batches do not depend on it.

    Raises:
      ValueError: naming the field, its value and what to use instead.
    """

    sources: tuple[SourceConfig, ...]
    tokenizer: str
    sequence_length: int
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    turns: Turns = "auto"
    chat_template: TemplateChoice = "own"
    accept_changed: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))
        if not self.sources:
            raise ValueError("sources: (); use a list of at least one source")
        names = [source.name for source in self.sources]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"sources.name: {twice[0]!r} occurs twice; use a name of its own for each source")
        for key, minimum in (("sequence_length", 2), ("batch_size", 1), ("workers", 0)):
            if getattr(self, key) < minimum:
                raise ValueError(f"{key}: {getattr(self, key)!r}; use a number >= {minimum}")
        for key, choices in (("turns", get_args(Turns)), ("chat_template", get_args(TemplateChoice))):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key}: {getattr(self, key)!r}; use one of {', '.join(choices)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: {self.seed!r}; use a number from 0 to 2**32 - 1")

    @property
    def encoding(self) -> Encoding:
        """How documents become ids."""
        return Encoding(self.tokenizer, self.turns, self.chat_template)
