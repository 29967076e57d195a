"""From what the decoder wrote to text: thought and answer, stop texts, pieces of a stream.

Thought and answer are split on ids, never on text.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from qwen3_jax.request import Result
from qwen3_jax.text import chat
from qwen3_jax.text.prompt import Prompt
from qwen3_jax.text.thinking import ThinkingTokens
from qwen3_jax.text.tokenizer import TextStream, Tokenizer


@dataclasses.dataclass(frozen=True)
class AnswerReader:
    """Reads results with one tokenizer."""

    tokenizer: Tokenizer
    tokens: ThinkingTokens

    def record(self, result: Result, prompt: Prompt | None = None) -> dict[str, Any]:
        """A result as a record: thought and answer as text, the counts, and the rule that chose the prompt's mode."""
        thought, _ = self._split(result)
        _, answer = self.texts(result, prompt.stop if prompt else ())
        return {
            "thinking": self.tokenizer.decode(thought).strip("\n"),
            "content": answer if prompt and prompt.raw else answer.lstrip("\n"),
            "token_ids": result.token_ids,
            "thinking_tokens": result.thinking_tokens,
            "injected_tokens": result.injected_tokens,
            "answer_tokens": result.answer_tokens,
            "thinking_end": result.thinking_end,
            "finish_reason": result.finish_reason,
            **({"mode_rule": prompt.rule} if prompt and prompt.rule else {}),
        }

    def texts(self, result: Result, stop: Sequence[str] = ()) -> tuple[str, str]:
        """The thought with its markers, and the answer up to a stop text."""
        answer_at = self.answer_at(result)
        thought, answer = (
            self.tokenizer.decode(ids, skip_special=True)
            for ids in (result.token_ids[:answer_at], result.token_ids[answer_at:])
        )
        found = self._find_stop(result, stop)
        return thought, answer if found is None else found[1]

    def answer_at(self, result: Result) -> int:
        """Place of the answer's first token."""
        return len(result.token_ids) - len(self._split(result)[1])

    def is_stopped(self, result: Result, stop: Sequence[str]) -> bool:
        """Whether the answer holds a stop text."""
        return self._find_stop(result, stop) is not None

    def trim(self, result: Result, stop: Sequence[str]) -> Result:
        """The result up to the token that completes its first stop text; all of it where there is none."""
        found = self._find_stop(result, stop)
        if found is None:
            return result
        end, _ = found
        return dataclasses.replace(
            result,
            token_ids=result.token_ids[:end],
            logprobs=result.logprobs[:end],
            forced=result.forced[:end],
            answer_tokens=result.answer_tokens - (len(result.token_ids) - end),
            finish_reason="stop",
        )

    def _split(self, result: Result) -> tuple[list[int], list[int]]:
        """Ids of the thought and of the answer."""
        # A thought that the prompt opened has no opening marker in the ids.
        opened = result.thinking_end not in ("off", "none")
        return chat.split_ids(
            result.token_ids,
            think=self.tokens.think,
            end_think=self.tokens.end_think,
            in_think=opened and result.token_ids[0] != self.tokens.think,
        )

    def _find_stop(self, result: Result, stop: Sequence[str]) -> tuple[int, str] | None:
        """Where the answer's first stop text is: the place after the token that completes it, and the answer before it.

        Neither forced tokens nor the newlines before an answer are looked at.
        """
        if not stop:
            return None
        answer_at = self.answer_at(result)
        pieces = [self._pieces[token] for token in result.token_ids[answer_at:]]
        lengths = [0, *itertools.accumulate(map(len, pieces))]
        written = b"".join(pieces)
        forced = [i for i, was_forced in enumerate(result.forced[answer_at:], 1) if was_forced]
        sampled = written[lengths[max(forced, default=0)] :]
        begins = len(written) - len(sampled.lstrip(b"\n"))
        spans = [(at + len(text), at) for text in map(str.encode, stop) if (at := written.find(text, begins)) >= 0]
        if not spans:
            return None
        kept = next(i for i, length in enumerate(lengths) if length >= min(spans)[0])
        start = min(at for end, at in spans if end <= lengths[kept])
        return answer_at + kept, written[:start].decode(errors="replace")

    @functools.cached_property
    def _pieces(self) -> list[bytes]:
        """What each id adds to an answer's text."""
        return self.tokenizer.token_bytes(skip_special=True)


class AnswerStream:
    """The text of one row as it comes. All pieces together are the texts of its result."""

    def __init__(self, reader: AnswerReader, stop: Sequence[str]) -> None:
        self._reader, self._stop = reader, stop
        self._stream = TextStream(reader.tokenizer, skip_special=True)
        self._texts = {True: "", False: ""}  # of the thought and of the answer
        self._shown = {True: 0, False: 0}
        self._seen = 0

    def push(self, so_far: Result) -> Iterator[tuple[str, bool]]:
        """Pieces `(text, whether it is of the thought)` that are new; what might begin a stop text is held back."""
        answer_at = max(self._reader.answer_at(so_far), self._seen)
        self._texts[True] += self._stream.push(so_far.token_ids[self._seen : answer_at])
        self._texts[False] += self._stream.push(so_far.token_ids[answer_at:])
        self._seen = len(so_far.token_ids)
        held_back = max(map(len, self._stop), default=1) - 1
        answer = self._texts[False]
        return self._new(self._texts[True], answer[: len(answer) - held_back])

    def finish(self, result: Result) -> Iterator[tuple[str, bool]]:
        """The rest, of the trimmed result."""
        return self._new(*self._reader.texts(result, self._stop))

    def _new(self, thought: str, answer: str) -> Iterator[tuple[str, bool]]:
        for in_thought, text in ((True, thought), (False, answer)):
            if piece := text[self._shown[in_thought] :]:
                self._shown[in_thought] = len(text)
                yield piece, in_thought
