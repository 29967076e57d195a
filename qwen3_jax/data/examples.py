"""From a document to examples: token ids, and which of them are in the loss.

A `.txt` document is plain text. A line of a `.jsonl` file is an object with one of two keys:

- `"text"`: plain language modelling. An end-of-text id is appended and every token is in the loss. A text longer than
  T ids is split into chunks of T that overlap in one token, so that every token but the first is a target just once.
- `"messages"`: a chat, rendered by the template; what the assistant writes is in the loss. `"tools"` are the functions
  of its system turn. `"no_loss"` is a list of strings: a token that holds a character of an occurrence of one is left
  out of the loss, for text that was injected and not written by the model. A chat longer than T ids keeps its first
  T, which is logged with a running count.

Other keys are ignored.

N: tokens of one example, T: `sequence_length`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from qwen3_jax import chat
from qwen3_jax.data.source import Document
from qwen3_jax.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class Encoder(grain.experimental.FlatMapTransform):
    """Encodes a `Document` into examples {"tokens": [N] int32, "loss_mask": [N] float32}, 1 < N <= T.

    Raises (in `flat_map`):
      ValueError: `file:line: reason` for a document that is malformed.
    """

    def __init__(self, tokenizer: Tokenizer, sequence_length: int) -> None:
        self._tokenizer = tokenizer
        _, self._end_of_text = tokenizer.eos_ids
        self._sequence_length = sequence_length
        self._num_truncated = 0

    def flat_map(self, document: Document) -> list[dict[str, np.ndarray]]:
        try:
            record = _parse(document)
            if "text" in record:
                return self._encode_text(record["text"])
            return [self._encode_chat(record, document)]
        except ValueError as error:
            raise ValueError(f"{document.place}: {error}") from error

    def _encode_text(self, text: str) -> list[dict[str, np.ndarray]]:
        ids_N = [*self._tokenizer.encode(text), self._end_of_text]
        length = self._sequence_length
        starts = range(0, len(ids_N) - 1, length - 1)
        return [_example(chunk, np.ones(len(chunk))) for chunk in (ids_N[start : start + length] for start in starts)]

    def _encode_chat(self, record: dict[str, Any], document: Document) -> dict[str, np.ndarray]:
        rendered = chat.render(
            record["messages"], self._tokenizer, tools=record.get("tools"), add_generation_prompt=False
        )
        ids_N, mask_N = rendered.ids, np.array(rendered.loss_mask())
        for text in record.get("no_loss", []):
            mask_N[self._holds(text, ids_N)] = 0
        length = self._sequence_length
        if len(ids_N) > length:
            self._num_truncated += 1
            if self._num_truncated.bit_count() == 1:  # 1, 2, 4, 8, ...: the log stays short.
                _log.warning(
                    "%s: chat of %d tokens truncated to sequence_length %d; %d truncated so far",
                    *(document.place, len(ids_N), length, self._num_truncated),
                )
        return _example(ids_N[:length], mask_N[:length])

    def _holds(self, text: str, ids_N: Sequence[int]) -> np.ndarray:
        """[N] bool: the token holds a character of an occurrence of `text`."""
        # By characters, as the ids of `text` alone differ from those in context, where its ends merge with neighbours.
        pieces, spans_N2, offset = [], [], 0
        start = 0
        for stop in range(1, len(ids_N) + 1):
            piece = self._tokenizer.decode(ids_N[start:stop])
            # A character may be spread over up to four tokens, which then share its span.
            if "\ufffd" in piece and stop - start < 4 and stop < len(ids_N):
                continue
            pieces.append(piece)
            spans_N2 += [(offset, offset + len(piece))] * (stop - start)
            start, offset = stop, offset + len(piece)
        starts_N, stops_N = np.array(spans_N2).T
        rendered = "".join(pieces)
        literal = self._tokenizer.decode(self._tokenizer.encode(text))  # in the tokenizer's normal form
        held_N = np.zeros(len(ids_N), bool)
        found = rendered.find(literal)
        while found >= 0:
            end = found + len(literal)
            held_N |= (starts_N < end) & (stops_N > found)
            found = rendered.find(literal, end)
        return held_N


def _example(ids_N: Sequence[int], mask_N: np.ndarray) -> dict[str, np.ndarray]:
    return {"tokens": np.array(ids_N, np.int32), "loss_mask": mask_N.astype(np.float32)}


def _parse(document: Document) -> dict[str, Any]:
    """The record of a document, checked as far as rendering does not check it."""
    text = document.content.decode("utf-8")
    if document.path.endswith(".txt"):
        return {"text": text.rstrip("\r\n")}
    record = json.loads(text)
    if not isinstance(record, dict) or ("text" in record) == ("messages" in record):
        raise ValueError('not an object with one of the keys "text" and "messages"')
    # An escaped half of a surrogate pair is JSON, but no text; tokenizers fail on it with a TypeError.
    json.dumps(record, ensure_ascii=False).encode("utf-8")
    if "text" in record:
        if not isinstance(record["text"], str) or not record["text"].strip():
            raise ValueError(f"text: {record['text']!r}; a string that is not blank fits")
        return record
    for key in ("messages", "tools", "no_loss"):
        if not isinstance(record.get(key, []), list):
            raise ValueError(f"{key}: {record[key]!r}; a list fits")
    if not all(isinstance(literal, str) and literal for literal in record.get("no_loss", [])):
        raise ValueError(f"no_loss: {record['no_loss']!r}; strings that are not empty fit")
    if not any(isinstance(message, dict) and message.get("role") == "assistant" for message in record["messages"]):
        raise ValueError("messages: no assistant turn; at least one fits")
    return record
