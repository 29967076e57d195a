"""A loaded model that takes and gives records, the lines of infer.py's files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3_jax import chat, hf
from qwen3_jax.config import ModelConfig
from qwen3_jax.decode import Request, Result, ThinkingTokens, check_request, generate
from qwen3_jax.tokenizer import Tokenizer, load_tokenizer

# Qwen3's own settings by mode (model cards and report, section 4.7).
THINKING_SAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0}
NON_THINKING_SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0}

# Fields of a record that are fields of a Request under the same name.
_REQUEST_FIELDS = (
    "thinking_budget",
    "max_new_tokens",
    "answer_reserve",
    "eos_while_thinking",
    *THINKING_SAMPLING,
    "seed",
    "sample",
)
_RECORD_FIELDS = ("id", "messages", "prompt", "tools", "enable_thinking", *_REQUEST_FIELDS)


def shipped_model() -> Path:
    """Directory of `qwen3-tiny`, the model in the package."""
    return Path(__file__).parent.parent / "assets" / "qwen3-tiny"


@dataclasses.dataclass(frozen=True)
class Engine:
    """A model and its tokenizer."""

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer
    tokens: ThinkingTokens

    @classmethod
    def load(cls, directory: str | Path, dtype: str = "float32") -> Engine:
        """From a directory in Hugging Face's layout.

        Raises:
          ValueError: one line that says what the directory lacks.
        """
        tokenizer = load_tokenizer(directory)
        config, params = hf.load_checkpoint(directory, dtype=dtype)
        return cls(config, params, tokenizer, ThinkingTokens.from_tokenizer(tokenizer))

    def request(self, record: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> Request:
        """The request that a record asks for.

        Args:
          record: `prompt` (one user turn) or `messages` (a conversation, with `tools`), and any field of `Request`;
            `enable_thinking` false puts the empty block into the prompt. Flags in the text follow `chat.flag_mode`.
          defaults: fields for records that do not have them; sampling is by mode where neither says.

        Raises:
          ValueError: `field: value; what would fit`.
        """
        unknown = [name for name in record if name not in _RECORD_FIELDS]
        if unknown:
            raise ValueError(f"{unknown[0]}: unknown field; one of {', '.join(_RECORD_FIELDS)} fits")
        if ("prompt" in record) == ("messages" in record):
            raise ValueError("prompt, messages: exactly one of the two fits")
        if "prompt" in record and not isinstance(record["prompt"], str):
            raise ValueError(f"prompt: {record['prompt']!r}; a string fits")
        messages = record.get("messages", [{"role": "user", "content": record.get("prompt")}])
        if not isinstance(messages, list) or not messages:
            raise ValueError(f"messages: {messages!r}; a list of at least one message fits")
        fields = {**(defaults or {}), **record}
        enable_thinking = fields.get("enable_thinking", True)
        rendered = chat.render(messages, self.tokenizer, tools=record.get("tools"), enable_thinking=enable_thinking)
        # The flag is acted on here, and the decoder writes the empty block; enable_thinking=False put it in the prompt.
        thinking = enable_thinking and chat.flag_mode(messages) is not False
        on = thinking and fields.get("thinking_budget") != 0
        chosen = {name: fields[name] for name in _REQUEST_FIELDS if name in fields}
        sampling = THINKING_SAMPLING if on else NON_THINKING_SAMPLING
        request = Request(rendered.ids, thinking=thinking, **{**sampling, **chosen})
        check_request(request, self.config, self.tokens)
        return request

    def generate(
        self, requests: Sequence[Request], progress: Callable[[int, int, int], None] | None = None
    ) -> list[Result]:
        """All requests in one batch; see `qwen3_jax.decode.generate`."""
        return generate(self.config, self.params, requests, tokens=self.tokens, progress=progress)

    def response(self, result: Result) -> dict[str, Any]:
        """A result as a record: thought and answer as text, and the counts."""
        # Split on ids, never on text. A thought that the prompt opened has no opening marker in the ids.
        opened = result.thinking_end not in ("off", "none")
        thought, answer = chat.split_ids(
            result.token_ids,
            think=self.tokens.think,
            end_think=self.tokens.end_think,
            in_think=opened and result.token_ids[0] != self.tokens.think,
        )
        return {
            "thinking": self.tokenizer.decode(thought).strip("\n"),
            "content": self.tokenizer.decode(answer, skip_special=True).lstrip("\n"),
            "token_ids": result.token_ids,
            "thinking_tokens": result.thinking_tokens,
            "injected_tokens": result.injected_tokens,
            "answer_tokens": result.answer_tokens,
            "thinking_end": result.thinking_end,
            "finish_reason": result.finish_reason,
        }

    def text(self, result: Result) -> str:
        """All that was written, markers of the thought included."""
        return self.tokenizer.decode(result.token_ids, skip_special=True)
