"""Which prompts a step answers: a mixture of files of prompts, in an endless order."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3_jax.data.mixture import document_at, uniform
from qwen3_jax.data.source import Document, DocumentSource
from qwen3_jax.decode import ThinkingTokens, check_request
from qwen3_jax.request import Request
from qwen3_jax.text.chat_format import format_of
from qwen3_jax.text.prompt import read_prompt
from qwen3_jax.text.records import parse_record
from qwen3_jax.text.tokenizer import Tokenizer
from qwen3_jax.train.config import UNFILTERED, TrainConfig


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt. key: its source and its place in that source's order. index: in the source's files, from 0. record: its
    line. request: without a seed."""

    key: tuple[str, int]
    index: int
    document: Document
    record: Mapping[str, Any]
    request: Request


class Prompts:
    """Draws from each source by its weight, epoch after epoch, each epoch in a shuffled order of its own.

    drawn: how many prompts of each source; this is the whole state. form: how conversations are written.

    Raises:
      ValueError: naming the path that cannot be used.
    """

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer) -> None:
        assert config.rollouts is not None
        data, self._data, self._rollouts, self._model = config.data, config.data, config.rollouts, config.model
        self._tokenizer, self._tokens = tokenizer, ThinkingTokens.from_tokenizer(tokenizer)
        # An earlier stage may have taught the model to converse; the tokenizer may still be that of the base model.
        start = Path(config.init_from or data.tokenizer)
        self.form = format_of(start if start.is_dir() else data.tokenizer, data.chat_template)
        self._sources = {source.name: source for source in data.sources}
        self._documents = {
            source.name: DocumentSource(source.paths, f"data.sources.{source.name}.paths") for source in data.sources
        }
        self.drawn = dict.fromkeys(self._sources, 0)

    @property
    def order(self) -> dict[str, Any]:
        """What determines the order of the prompts, see `qwen3_jax.data.lanes.refuse_other_order`."""
        sources = {
            name: {"documents": len(documents), "content": documents.content, "weight": self._sources[name].weight}
            for name, documents in self._documents.items()
        }
        return {"seed": self._data.seed, "shuffle": self._data.shuffle, "sources": sources}

    def draw(self) -> Asked:
        """The next prompt.

        Raises:
          ValueError: `file:line: field: value; what to use instead`.
        """
        # The source that is furthest behind its share.
        name = min(self._sources, key=lambda name: (self.drawn[name] + 1) / self._sources[name].weight)
        position, self.drawn[name] = self.drawn[name], self.drawn[name] + 1
        documents = self._documents[name]
        salt = uniform(self._data.seed, name) if self._data.shuffle else None
        _, index = document_at(position, len(documents), salt)
        document = documents[index]
        try:
            record = parse_record(document.content)
            return Asked((name, position), index, document, record, self._request(record))
        except ValueError as error:
            raise ValueError(f"{document.location}: {error}") from None

    def _request(self, record: Mapping[str, Any]) -> Request:
        most_new = self._rollouts.max_new_tokens
        defaults = {**self._rollouts.settings, **UNFILTERED, "max_new_tokens": most_new}
        prompt = read_prompt(record, self._tokenizer, self.form, defaults)
        request, room = prompt.request, self._data.sequence_length - most_new
        for name, value in UNFILTERED.items():
            if getattr(request, name) != value:
                raise ValueError(f"{name}: {getattr(request, name)!r}; leave it out, rollouts use {value!r}")
        if prompt.stop:
            raise ValueError(f"stop: {prompt.stop!r}; leave it out, since the model is to learn where its answers end")
        if (limit := check_request(request, self._model, self._tokens)) > most_new:
            raise ValueError(f"max_new_tokens: {limit}; use at most rollouts.max_new_tokens ({most_new})")
        for budget in self._rollouts.budgets:
            try:
                check_request(dataclasses.replace(request, thinking_budget=budget), self._model, self._tokens)
            except ValueError as error:
                raise ValueError(f"rollouts.budgets: {budget}: {error}") from None
        if len(request.prompt_ids) > room:
            raise ValueError(
                f"prompt: {len(request.prompt_ids)} tokens; use at most {room}, data.sequence_length less "
                "rollouts.max_new_tokens"
            )
        return request
