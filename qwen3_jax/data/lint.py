"""A look at the sources before a run: at the first document of each, or at all of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable

from qwen3_jax.data.config import DataConfig, SourceConfig
from qwen3_jax.data.counts import Counts
from qwen3_jax.data.examples import Cutter, Encoded, Encoder
from qwen3_jax.data.records import read_record
from qwen3_jax.data.source import DocumentSource, first_document
from qwen3_jax.text.chat_format import ChatFormat, format_of


@dataclasses.dataclass(frozen=True)
class Survey:
    """What the first document of each source shows.

    lines: for the user, what was concluded where it is not obvious. form: of the chats. has_chats: whether there are
      any.
    """

    lines: tuple[str, ...]
    form: ChatFormat
    has_chats: bool


def survey(config: DataConfig) -> Survey:
    """Reads the first document of each source.

    Raises:
      ValueError: `file:line: reason` for a malformed one.
    """
    form = format_of(config.tokenizer, config.chat_template, teaches=True)
    lines, has_chats = [], False
    for source in config.sources:
        document = first_document(source.paths, f"sources.{source.name}.paths")
        if document.form == "tokens":
            has_chats |= not Encoded.from_bytes(document.content).is_text
            continue
        try:
            record = read_record(document)
        except ValueError as error:
            raise ValueError(f"{document.location}: {error} (qwen3-jax data lint lists all such lines)") from None
        has_chats |= record.text is None
        if record.shape:
            lines.append(f"sources.{source.name}: taken for {record.shape}")
    if has_chats and form.conclusion:
        lines.append(form.conclusion)
    return Survey(tuple(lines), form, has_chats)


@dataclasses.dataclass
class Findings:
    """What a source holds. bad: `file:line: reason` of each malformed document. notes: how often what was passed over,
    dropped, truncated or split."""

    counts: Counts = dataclasses.field(default_factory=Counts)
    bad: list[str] = dataclasses.field(default_factory=list)
    notes: Counter[str] = dataclasses.field(default_factory=Counter)


def lint(source: SourceConfig, config: DataConfig, progress: Callable[[int, int], None]) -> Findings:
    """Reads all documents of a source as a run would, once. `progress` is called with (done, number of documents).

    Raises:
      ValueError: of `DocumentSource`.
    """
    documents = DocumentSource(source.paths, f"sources.{source.name}.paths")
    encode, cut, found = Encoder.of(config.encoding), Cutter(config.sequence_length), Findings()
    for index in range(len(documents)):
        progress(index, len(documents))
        try:
            document = documents[index]
            examples = cut(encode(document), document)
        except ValueError as error:
            found.bad.append(str(error))
            continue
        for number, example in enumerate(examples):
            found.counts = found.counts.plus(Counts.of(example, begins=number == 0))
    progress(len(documents), len(documents))
    found.notes = cut.counts
    return found
