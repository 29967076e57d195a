"""A source's documents in an endless order, which the lanes draw from."""

from __future__ import annotations

import dataclasses
import hashlib
import math

from qwen3_jax.data.config import DataConfig, Labels, SourceConfig
from qwen3_jax.data.examples import Cutter, Encoder, Example, fingerprint_of
from qwen3_jax.data.source import DocumentSource


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A document cut into examples. There are none in an epoch that skips it. `eligible`: False if every epoch does,
    or if no example has a token in the loss."""

    examples: list[Example]
    labels: Labels
    eligible: bool = True


class Stream:
    """The documents of a source in an endless order: epoch after epoch, each in a shuffled order of its own.

    Position p is in epoch p // (number of documents). The order is a function of the seed, the source's name and the
    epoch. Positions have random access. `order` is the part of `Mixture.order` that concerns this source.

    Raises:
      ValueError: naming the path that cannot be used, or the source that another tokenizer has tokenised.
    """

    def __init__(self, source: SourceConfig, encode: Encoder, cut: Cutter, data: DataConfig, encoding: str):
        self.source = source
        self._encode, self._cut, self._shuffle = encode, cut, data.shuffle
        self._salt = uniform(data.seed, source.name)
        self._documents = DocumentSource(source.paths, f"sources.{source.name}.paths")
        self.num_documents = len(self._documents)
        self.order = {
            "documents": self.num_documents,
            "content": self._documents.content,
            "weight": source.weight,
            "tokens": list(source.tokens) if source.tokens else None,
            "label_weights": source.label_weights,
        }
        for theirs in self._documents.tokenizers - {encoding}:
            raise ValueError(
                f"sources.{source.name}: tokenised by another tokenizer ({theirs}) than {data.tokenizer!r} "
                f"({encoding}); use files that `qwen3-jax tokenize` made with this one"
            )

    def draw(self, position: int) -> Drawn:
        """The document at `position`, without examples if the source's `tokens` or `label_weights` skip it.

        Raises:
          ValueError: `file:line: reason` for a malformed document.
        """
        epoch, index = document_at(position, self.num_documents, self._salt if self._shuffle else None)
        document = self._documents[index]
        encoded = self._encode(document)
        low, high = self.source.tokens or (0, math.inf)
        fraction = self.source.epoch_fraction(encoded.labels)
        if fraction == 0 or not low <= len(encoded) <= high:
            return Drawn([], encoded.labels, eligible=False)
        # Used in the epochs in which phase + epoch * fraction passes an integer: with a fraction of 0.3, in three of
        # ten epochs, evenly spaced. The phase spreads the documents over the epochs.
        phase = uniform(self._salt, index)
        if math.floor(phase + (epoch + 1) * fraction) == math.floor(phase + epoch * fraction):
            return Drawn([], encoded.labels)
        examples = self._cut(encoded, document)
        return Drawn(examples, encoded.labels, eligible=bool(examples))


class Mixture:
    """The streams of all sources, in the order of the configuration, and what the lanes need beside them.

    order: everything that determines the order of the tokens, as JSON data. A position is valid under the same order
      only.

    Raises:
      ValueError: of `Stream`.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        encode, cut = Encoder.of(config.encoding), Cutter(config.sequence_length)
        self.pad_id = encode.tokenizer.pad_id
        encoding = fingerprint_of(config.encoding)
        self.streams = [Stream(source, encode, cut, config, encoding) for source in config.sources]
        self.order = {
            "seed": config.seed,
            "shuffle": config.shuffle,
            "batch_size": config.batch_size,
            "sequence_length": config.sequence_length,
            "tokenizer": encoding,
            "sources": {stream.source.name: stream.order for stream in self.streams},
        }


def document_at(position: int, count: int, salt: float | None) -> tuple[int, int]:
    """`(epoch, index)` of a position in the endless order of `count` documents. `salt`: None does not shuffle them."""
    epoch, index = divmod(position, count)
    return epoch, index if salt is None else shuffled(index, count, salt, epoch)


def uniform(*key: object) -> float:
    """A number in [0, 1), a hash of `key`."""
    return _hash(*key) / 2**64


def shuffled(index: int, count: int, *key: object) -> int:
    """The image of `index` under a permutation of range(count) that `key` selects, in constant time and memory.

    A Feistel network of four rounds over the next power of 4, applied until the result is in range (cycle walking;
    Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = 2**half - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            left, right = right, left ^ (_hash(*key, turn, right) & mask)
        index = left << half | right
        if index < count:
            return index


def _hash(*key: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest())
