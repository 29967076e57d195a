"""Exact and near duplicates among documents, and overlap with evaluation sets.

Texts are compared as sequences of words (runs of letters and digits), in NFKC and lower case. Spacing and punctuation
make no difference.

- Exact: the same words.
- Near: the Jaccard similarity of the sets of five-word shingles reaches a threshold. MinHash with 128 permutations and
  locality-sensitive hashing estimate it (Broder 1997). The default is 0.8, as in Lee et al. 2022 (arXiv 2107.06499).
- Overlap: a run of n words that also occurs in a document of an evaluation set; n = 13, as in Brown et al. 2020 (arXiv
  2005.14165, appendix C).

Of duplicates, the first document is kept. Memory is about 2 KiB per document, for the MinHash signatures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from qwen3_jax.data.records import read_record
from qwen3_jax.data.source import Document, DocumentSource
from qwen3_jax.text.records import parse_record

Kind = Literal["exact", "near", "overlap"]

NGRAM = 13
THRESHOLD = 0.8
_SHINGLE = 5
_PERMUTATIONS = 128
_WORD = re.compile(r"[^\W_]+")


@dataclasses.dataclass(frozen=True)
class Finding:
    """A document to drop, the reason, and the document that it duplicates. Both are stored without their content."""

    document: Document
    kind: Kind
    like: Document

    def to_json(self) -> dict[str, str]:
        """JSON data with the locations of both, for which their files are read up to the documents."""
        return {"place": self.document.location, "kind": self.kind, "like": self.like.location}


class Checker:
    """Compares each document with the documents before it and with evaluation sets.

    Args:
      evaluations: files of evaluation sets, read like sources; of a record that is no training record (a question and
        its answer under other keys), every string is used.
      ngram: words of an overlap.
      threshold: of near duplicates, in (0, 1); 0 turns the search for them off.

    Raises:
      ValueError: an unusable file or number; or datasketch, which near duplicates need, is not installed.
    """

    def __init__(self, evaluations: Sequence[str], ngram: int = NGRAM, threshold: float = THRESHOLD) -> None:
        if ngram < 1:
            raise ValueError(f"ngram: {ngram}; use a number >= 1")
        if not 0 <= threshold < 1:
            raise ValueError(f"near: {threshold}; use a number from 0 (off) to below 1")
        self._ngram = ngram
        self._seen: dict[bytes, Document] = {}
        self._find_near = _near_finder(threshold) if threshold else lambda words, document: None
        self._evaluated: dict[bytes, Document] = {}
        self.num_too_short = 0  # documents of evaluation sets with fewer than `ngram` words
        for document in DocumentSource(evaluations, "eval") if evaluations else ():
            words = _words(_evaluated_text(document))
            self.num_too_short += len(words) < ngram
            for gram in _grams(words, ngram):
                self._evaluated.setdefault(gram, _without_content(document))

    def check(self, document: Document) -> Finding | None:
        """The reason to drop the document, None if there is none. Overlap has priority over duplicates."""
        words = _words(text_of(document))
        document = _without_content(document)
        found = self._overlap(words)
        if found is not None:
            return Finding(document, "overlap", found)
        first = self._seen.setdefault(_digest(words), document)
        if first is not document:
            return Finding(document, "exact", first)
        near = self._find_near(words, document)
        return None if near is None else Finding(document, "near", near)

    def overlap(self, text: str) -> str | None:
        """`near FILE:LINE`, the evaluation document that shares a run of `ngram` words with a text; None without."""
        found = self._overlap(_words(text))
        return None if found is None else f"near {found.location}"

    def _overlap(self, words: Sequence[str]) -> Document | None:
        return next((self._evaluated[gram] for gram in _grams(words, self._ngram) if gram in self._evaluated), None)


def text_of(document: Document) -> str:
    """The text of a document; for a chat, the contents and thoughts of its messages.

    Raises:
      ValueError: `file:line: reason` for a document without text.
    """
    if document.form == "tokens":
        raise ValueError(f"{document.location}: token ids; use the documents before tokenising")
    try:
        return read_record(document).words()
    except ValueError as error:
        raise ValueError(f"{document.location}: {error}") from None


def write_without(sources: Iterable[DocumentSource], findings: Iterable[Finding], directory: Path) -> int:
    """Writes the documents without findings to .jsonl files named after their files. Returns the number of documents.

    Raises:
      ValueError: two files have the same name, or one exists in the directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    dropped = {(finding.document.path, finding.document.start) for finding in findings}
    targets: dict[str, Any] = {}
    written = 0
    with contextlib.ExitStack() as files:
        for document in itertools.chain.from_iterable(sources):
            if document.path not in targets:
                target = directory / f"{Path(document.path).stem}.jsonl"
                if target.exists():
                    raise ValueError(
                        f"drop: {str(target)!r} exists; use an empty directory, and source files with different names"
                    )
                targets[document.path] = files.enter_context(target.open("x", encoding="utf-8"))
            if (document.path, document.start) not in dropped:
                line = document.content.decode("utf-8")
                if document.form == "text":
                    line = json.dumps({"text": line.rstrip("\r\n")}, ensure_ascii=False)
                targets[document.path].write(line.strip() + "\n")
                written += 1
    return written


def _without_content(document: Document) -> Document:
    return dataclasses.replace(document, content=b"")


def _near_finder(threshold: float) -> Callable[[Sequence[str], Document], Document | None]:
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        raise ValueError(
            f"near: {threshold}, but datasketch is not installed; pip install -e '.[data]', or use 0 (off)"
        ) from None
    index = MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS)
    before: list[tuple[Any, Document]] = []  # the index stores positions in this list

    def find(words: Sequence[str], document: Document) -> Document | None:
        """An earlier near duplicate of the document. Without one, the document is added to the index."""
        signature = MinHash(num_perm=_PERMUTATIONS, seed=1)
        size = min(_SHINGLE, len(words))
        signature.update_batch([" ".join(words[i : i + size]).encode() for i in range(len(words) - size + 1)])
        # The index returns candidates only: documents that share a bucket.
        for other in sorted(index.query(signature)):
            if signature.jaccard(before[other][0]) >= threshold:
                return before[other][1]
        index.insert(len(before), signature)
        before.append((signature, document))
        return None

    return find


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def _evaluated_text(document: Document) -> str:
    """The text of a training record, read as in `text_of`, so that the same record has the same words on both sides;
    else every string of the record."""
    try:
        return text_of(document)
    except ValueError:
        if document.form != "json":
            raise
    try:
        values: list[Any] = [parse_record(document.content)]
    except ValueError as error:
        raise ValueError(f"{document.location}: {error}") from None
    found = []
    while values:
        value = values.pop(0)
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict | list):
            values = [*(value.values() if isinstance(value, dict) else value), *values]
    return " ".join(found)


def _grams(words: Sequence[str], size: int) -> Iterator[bytes]:
    return (_digest(words[i : i + size]) for i in range(len(words) - size + 1))


def _digest(words: Sequence[str]) -> bytes:
    return hashlib.blake2b(" ".join(words).encode(), digest_size=12).digest()
