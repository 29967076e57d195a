"""The token ids that the thinking budget's rules speak of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from qwen3_jax.text import chat
from qwen3_jax.text.tokenizer import Tokenizer, unfinished_bytes


@dataclasses.dataclass(frozen=True)
class ThinkingTokens:
    """The ids that the rules speak of.

    think, end_think: the two markers.
    eos: ids that end a sequence.
    stop_ids: the stop text, injected as ids when a budget ends; must hold `end_think`.
    empty_block: the ids of `<think>\\n\\n</think>\\n\\n`, which come before a non-thinking answer.
    tool_call, end_tool_call: markers of a tool call, None where the tokenizer has none.
    num_tokens: size of the tokenizer; ids at or above it are never sampled. None: the embedding's size.
    newlines: ids whose text ends in a newline, where `grace` may cut.
    unfinished: for ids that touch the end of a UTF-8 character, `unfinished_bytes` of their text; others are whole.
    """

    think: int
    end_think: int
    eos: tuple[int, ...]
    stop_ids: tuple[int, ...]
    empty_block: tuple[int, ...]
    tool_call: int | None = None
    end_tool_call: int | None = None
    num_tokens: int | None = None
    newlines: frozenset[int] = frozenset()
    unfinished: Mapping[int, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("eos", "stop_ids", "empty_block"):
            object.__setattr__(self, name, tuple(int(token) for token in getattr(self, name)))
        if not self.eos:
            raise ValueError("eos: (); use at least one id")
        if self.end_think not in self.stop_ids:
            raise ValueError(f"stop_ids: {self.stop_ids} never closes the thought; use ids that hold {self.end_think}")

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, stop_text: str = chat.STOP_TEXT) -> ThinkingTokens:
        """The ids in `tokenizer`, with `stop_text` encoded once."""
        pieces = tokenizer.token_bytes()
        unfinished = {token: unfinished_bytes(piece) for token, piece in enumerate(pieces)}
        return cls(
            think=tokenizer.think,
            end_think=tokenizer.end_think,
            eos=tokenizer.eos_ids,
            stop_ids=tuple(tokenizer.encode(stop_text)),
            empty_block=tuple(tokenizer.encode(chat.EMPTY_THOUGHT)),
            tool_call=tokenizer.tool_call,
            end_tool_call=tokenizer.end_tool_call,
            num_tokens=tokenizer.num_tokens,
            newlines=frozenset(token for token, piece in enumerate(pieces) if piece.endswith(b"\n")),
            unfinished={token: count for token, count in unfinished.items() if count},
        )
