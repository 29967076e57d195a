"""A source's documents in an endless order, from which the lanes draw."""

from __future__ import annotations

import dataclasses
import hashlib
import math

import grain

from qwen3_jax.data.config import DataConfig, Labels, SourceConfig
from qwen3_jax.data.examples import Cutter, Encoder, Example
from qwen3_jax.data.source import DocumentSource
from qwen3_jax.tokenizer import fingerprint, load_tokenizer


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
        order = grain.MapDataset.range(len(documents))
        self._order = order.shuffle(seed=int(self._salt * 2**32)) if data.shuffle else order

    def draw(self, position: int) -> Drawn:
        """The document at `position`, or what is left of it by the source's `tokens` and `label_weights`.

        Raises:
          ValueError: `file:line: reason` for a document that is malformed.
        """
        index: int = self._order[position]
        document = self._documents[index]
        encoded = self._encode(document)
        least, most = self.source.tokens or (0, math.inf)
        keep = self.source.keep(encoded.labels)
        if keep == 0 or not least <= len(encoded.whole) <= most:
            return Drawn([], encoded.labels, fits=False)
        # Over the passes, keep = 0.3 gives each document its turn three times in ten, evenly spread.
        epoch = position // self.num_documents
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


def uniform(*parts: object) -> float:
    """A number in [0, 1) that is a function of `parts` alone."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=4).digest()
    return int.from_bytes(digest) / 2**32
