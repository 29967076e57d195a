"""From a document to examples: token ids, and a mask of the tokens in the loss.

`records` says what a record may be.

- A text: plain language modelling. An end-of-text id is appended, and every token is in the loss. A text longer than
  T ids is split into chunks of T that overlap by one token, so that every token but the first is a target exactly once.
- A conversation, rendered by the template. The tokens that the assistant generates are in the loss. The template drops
  the thoughts of all rounds but the last (a round begins with a user's query), so such a chat gives one example for
  each round, as it stood when the round was written, with that round in the loss; see `Turns`. Tokens that overlap an
  occurrence of a string in `no_loss` are not in the loss, for text that is injected in decoding. A chat longer than T
  ids is truncated to its first T, which is logged with a running count.

A blank text is passed over, and so is an example without a token in the loss; both are logged with a running count.
`labels` may be an object of strings, such as {"domain": "math", "language": "en"}.

N: tokens of a document or an example, T: `sequence_length`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import struct
from collections import Counter
from collections.abc import Sequence

import numpy as np

from qwen3_jax.data.config import Encoding, Labels, Turns
from qwen3_jax.data.records import Record, read_record
from qwen3_jax.data.source import Document
from qwen3_jax.text import chat
from qwen3_jax.text.chat_format import ChatFormat, format_of
from qwen3_jax.text.tokenizer import Tokenizer, fingerprint, load_tokenizer

_log = logging.getLogger(__name__)

# Number of tokens; and what the document is: a chat, a text, or a chat of several examples, whose number and lengths
# then follow.
_HEADER = struct.Struct("<IB")
_CHAT, _TEXT, _ROUNDS = range(3)


@dataclasses.dataclass(frozen=True)
class Example:
    """The ids of one segment of a row, and a mask that is 1 for those in the loss."""

    tokens_N: np.ndarray  # int32
    loss_mask_N: np.ndarray  # uint8

    def __len__(self) -> int:
        return len(self.tokens_N)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A complete document: one example, or one for each round of a chat; its labels; whether it is a text."""

    examples: tuple[Example, ...]
    labels: Labels
    is_text: bool

    def __len__(self) -> int:
        """The tokens of the document: the last example of a chat has all rounds."""
        return len(self.examples[-1])

    def to_bytes(self) -> bytes:
        """The record of an ArrayRecord shard."""
        lengths = [len(example) for example in self.examples]
        several = len(lengths) > 1
        header = _HEADER.pack(sum(lengths), _ROUNDS if several else _TEXT if self.is_text else _CHAT)
        if several:
            header += np.array([len(lengths), *lengths], "<u4").tobytes()
        tokens = np.concatenate([example.tokens_N for example in self.examples]).astype("<i4")
        mask = np.packbits(np.concatenate([example.loss_mask_N for example in self.examples]))
        labels = json.dumps(self.labels, ensure_ascii=False).encode() if self.labels else b""
        return header + tokens.tobytes() + mask.tobytes() + labels

    @classmethod
    def from_bytes(cls, record: bytes) -> Encoded:
        """The inverse of `to_bytes`."""
        count, kind = _HEADER.unpack_from(record)
        start, cuts = _HEADER.size, []
        if kind == _ROUNDS:
            (number,) = np.frombuffer(record, "<u4", 1, start)
            cuts = np.frombuffer(record, "<u4", number, start + 4).cumsum()[:-1].tolist()
            start += 4 + 4 * int(number)
        tokens = np.frombuffer(record, "<i4", count, start)
        start += 4 * count
        stop = start + (count + 7) // 8
        mask = np.unpackbits(np.frombuffer(record[start:stop], np.uint8), count=count)
        examples = map(Example, np.split(tokens, cuts), np.split(mask, cuts))
        return cls(tuple(examples), json.loads(record[stop:] or b"{}"), kind == _TEXT)


class Encoder:
    """Encodes documents with one tokenizer, and chats in the format of one kind of model."""

    def __init__(self, tokenizer: Tokenizer, form: ChatFormat | None = None, turns: Turns = "auto") -> None:
        self.tokenizer, self._form, self._turns = tokenizer, form or ChatFormat(), turns
        _, self._end_of_text = tokenizer.eos_ids

    @classmethod
    def of(cls, encoding: Encoding) -> Encoder:
        """The encoder for a model's directory."""
        form = format_of(encoding.tokenizer, encoding.chat_template, teaches=True)
        return cls(load_tokenizer(encoding.tokenizer), form, encoding.turns)

    def __call__(self, document: Document) -> Encoded:
        """The document with its end-of-text id or last turn, N > 1; N = 0 for a blank text.

        Raises:
          ValueError: `file:line: reason` for a document that is malformed.
        """
        if document.form == "tokens":
            return Encoded.from_bytes(document.content)
        try:
            record = read_record(document)
            if record.text is not None:
                text_ids_N = self.tokenizer.encode(record.text) if record.text.strip() else []
                ids_N = [*text_ids_N, self._end_of_text] if text_ids_N else []
                examples = [Example(np.array(ids_N, np.int32), np.ones(len(ids_N), np.uint8))]
            else:
                examples = self._encode_chat(record)
        except ValueError as error:
            raise ValueError(f"{document.location}: {error}") from error
        return Encoded(tuple(examples), record.labels, record.text is not None)

    def _encode_chat(self, record: Record) -> list[Example]:
        messages = record.messages
        chat.validate_messages(messages)
        starts, turns = chat.round_starts(messages), self._turns
        if turns == "auto":
            turns = "each" if self._form.modes != "instruct" and chat.loses_thoughts(messages) else "all"
        if turns == "all":
            return [self._example(record, len(messages), record.given)]
        rounds = list(zip(starts, [*starts[1:], len(messages)], strict=True))
        examples = [
            self._example(record, stop, max(start, record.given))
            for start, stop in (rounds if turns == "each" else rounds[-1:])
            if any(message["role"] == "assistant" for message in messages[max(start, record.given) : stop])
        ]
        return examples or [self._example(record, len(messages), len(messages))]

    def _example(self, record: Record, stop: int, first: int) -> Example:
        """The messages before `stop`; those of the assistant from `first` on are in the loss."""
        messages = record.messages[:stop]
        rendered = self._form.render(messages, self.tokenizer, tools=record.tools, add_generation_prompt=False)
        mask_N = np.array(rendered.loss_mask(), np.uint8)
        turns = [span for span in rendered.spans if span.role == "assistant"]
        for span in turns[: sum(message["role"] == "assistant" for message in messages[:first])]:
            mask_N[span.start : span.stop] = 0
        for text in record.no_loss:
            mask_N[self._holds(text, rendered.ids)] = 0
        return Example(np.array(rendered.ids, np.int32), mask_N)

    def _holds(self, text: str, ids_N: Sequence[int]) -> np.ndarray:
        """[N] bool: whether the token overlaps an occurrence of `text`."""
        # Compare characters, not ids: within a longer text, the ends of `text` may merge with their neighbours.
        pieces, spans_N2 = [], []
        start = offset = 0
        for stop in range(1, len(ids_N) + 1):
            piece = self.tokenizer.decode(ids_N[start:stop])
            # A character may be spread over up to four tokens, which then all get its span.
            if "\ufffd" in piece and stop - start < 4 and stop < len(ids_N):
                continue
            pieces.append(piece)
            spans_N2 += [(offset, offset + len(piece))] * (stop - start)
            start, offset = stop, offset + len(piece)
        starts_N, stops_N = np.array(spans_N2).T
        literal = self.tokenizer.decode(self.tokenizer.encode(text))  # in the tokenizer's normal form
        held_N = np.zeros(len(ids_N), bool)
        for found in re.finditer(re.escape(literal), "".join(pieces)):
            held_N |= (starts_N < found.end()) & (stops_N > found.start())
        return held_N


def fingerprint_of(encoding: Encoding) -> str:
    """Of what the ids of a document depend on: the tokenizer, the format of chats, and what of them is learnt."""
    modes = format_of(encoding.tokenizer, encoding.chat_template, teaches=True).modes
    format_and_turns = [modes] * (modes != "hybrid") + [encoding.turns] * (encoding.turns != "auto")
    return "-".join([fingerprint(encoding.tokenizer), *format_and_turns])


class Cutter:
    """Cuts documents into examples of at most T tokens."""

    def __init__(self, sequence_length: int) -> None:
        self._sequence_length = sequence_length
        self.counts: Counter[str] = Counter()  # of documents by what was done with them

    def __call__(self, encoded: Encoded, document: Document) -> list[Example]:
        """The examples of a document that have a token in the loss, 1 < N <= T. `document` is used for the log only."""
        length = self._sequence_length
        if not len(encoded):
            self._log(document, "no text", "blank texts passed over")
        if (number := len(encoded.examples)) > 1:
            what = f"thoughts in earlier rounds, learnt as {number} examples (data.turns)"
            self._log(document, what, "chats learnt in rounds")
        examples = []
        for full in encoded.examples:
            if not encoded.is_text and len(full) > length:
                self._log(document, f"chat of {len(full)} tokens truncated to sequence_length {length}", "truncated")
            for i in range(0, len(full) - 1, length - 1) if encoded.is_text else range(1):
                example = Example(full.tokens_N[i : i + length], full.loss_mask_N[i : i + length])
                if example.loss_mask_N[1:].any():
                    examples.append(example)
                else:
                    self._log(document, f"none of {len(example)} tokens is in the loss", "examples dropped")
        return examples

    def _log(self, document: Document, what: str, kind: str) -> None:
        self.counts[kind] += 1
        if self.counts[kind].bit_count() == 1:  # log only counts 1, 2, 4, 8, ...
            _log.warning("%s: %s; %d %s so far", document.location, what, self.counts[kind], kind)
