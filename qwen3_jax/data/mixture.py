"""A source's documents in an endless order, from which the lanes draw."""

from __future__ import annotations

import dataclasses
import hashlib
import math

from qwen3_jax.data.config import DataConfig, Labels, SourceConfig
from qwen3_jax.data.examples import Cutter, Encoder, Example
from qwen3_jax.data.source import DocumentSource
from qwen3_jax.text.tokenizer import fingerprint, load_tokenizer


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A document cut into examples; none if it was passed over. `fits` is False if no later pass will keep it."""

    examples: list[Example]
    labels: Labels
    fits: bool = True


class Stream:
    """The documents of a source in an endless order: one epoch after the other, each shuffled by itself.

    Position p is in epoch p // (number of documents). The order is a function of the seed, the source's name and the
    epoch. Any position can be read.
    """

    def __init__(self, source: SourceConfig, documents: DocumentSource, encode: Encoder, cut: Cutter, data: DataConfig):
        self.source = source
        self.num_documents = len(documents)
        self._salt = uniform(data.seed, source.name)
        self._documents, self._encode, self._cut = documents, encode, cut
        self._shuffle = data.shuffle

    def draw(self, position: int) -> Drawn:
        """The document at `position`, or what is left of it by the source's `tokens` and `label_weights`.

        Raises:
          ValueError: `file:line: reason` for a document that is malformed.
        """
        epoch, index = divmod(position, self.num_documents)
        if self._shuffle:
            index = shuffled(index, self.num_documents, self._salt, epoch)
        document = self._documents[index]
        encoded = self._encode(document)
        least, most = self.source.tokens or (0, math.inf)
        keep = self.source.keep(encoded.labels)
        if keep == 0 or not least <= len(encoded.whole) <= most:
            return Drawn([], encoded.labels, fits=False)
        # Over the passes, keep = 0.3 gives each document its turn three times in ten, evenly spread.
        phase = uniform(self._salt, index)
        if math.floor(phase + (epoch + 1) * keep) == math.floor(phase + epoch * keep):
            return Drawn([], encoded.labels)
        return Drawn(self._cut(encoded, document), encoded.labels)


def open_streams(config: DataConfig) -> list[Stream]:
    """The streams of all sources, in the order of the configuration.

    Raises:
      ValueError: naming the path that does not fit, or the source that another tokenizer has tokenised.
    """
    encode, cut = Encoder(load_tokenizer(config.tokenizer)), Cutter(config.sequence_length)
    streams = []
    for source in config.sources:
        documents = DocumentSource(source.paths, f"sources.{source.name}.paths")
        ours = fingerprint(config.tokenizer)
        for found in documents.manifests:
            if found.tokenizer != ours:
                raise ValueError(
                    f"sources.{source.name}: tokenised by another tokenizer ({found.tokenizer}) than "
                    f"{config.tokenizer!r} ({ours}); files that `qwen3-jax tokenize` made with this one fit"
                )
        streams.append(Stream(source, documents, encode, cut, config))
    return streams


def uniform(*key: object) -> float:
    """A number in [0, 1) that is a function of `key` alone."""
    return _hash(*key) / 2**64


def shuffled(index: int, count: int, *key: object) -> int:
    """Where `index` comes in a permutation of range(count) that is a function of `key`, without the others.

    A Feistel network of four rounds over the next power of 4, walked until it is back in range (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains").
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
