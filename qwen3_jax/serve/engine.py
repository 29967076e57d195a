"""A loaded model that takes and gives records, the lines of infer.py's files."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from qwen3_jax import hf
from qwen3_jax.checkpoint import find_params, restore_params, weights_digest
from qwen3_jax.config import ModelConfig, refuse_other_than_directory
from qwen3_jax.decode import Pool, Request, Result, ThinkingTokens, check_request, generate
from qwen3_jax.decode.weights import decoding_weights, weight_shapes
from qwen3_jax.text.answer import AnswerReader, AnswerStream
from qwen3_jax.text.chat_format import ChatFormat, TemplateChoice, format_of
from qwen3_jax.text.prompt import Prompt, read_prompt
from qwen3_jax.text.tokenizer import Tokenizer, load_tokenizer
from sharding import DECODE_RULES, axis_rules

_STREAM_STEPS = 4


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
    form: ChatFormat

    @classmethod
    def load(
        cls,
        directory: str | Path,
        dtype: str = "float32",
        mesh: Mesh | None = None,
        chat_template: TemplateChoice = "own",
        announce: Callable[[str], None] = lambda text: None,
    ) -> Engine:
        """From a directory in Hugging Face's layout or one of `find_params`, to the default device or over a mesh.

        The weights of a training run are float32; while they are cast, both are in memory.

        chat_template: whether conversations are written as the directory's template says; see `format_of`.
        announce: called with what was found and concluded.

        Raises:
          ValueError: one line that says what the directory lacks.
        """
        refuse_other_than_directory(directory, "model")
        tokenizer = load_tokenizer(directory)
        found = find_params(directory, announce)
        if found is None:
            with axis_rules(DECODE_RULES):
                config, params = hf.load_checkpoint(directory, dtype=dtype, mesh=mesh)
        else:
            config = ModelConfig.from_hf(directory)
            held = restore_params(found, weight_shapes(config, mesh, "float32", stacked=True))
            params = decoding_weights(config, held, dtype)
        if tokenizer.num_tokens > config.vocab_size:
            raise ValueError(
                f"vocab_size: {config.vocab_size} in {str(directory)!r}, whose tokenizer has {tokenizer.num_tokens} "
                "tokens; use an embedding with a row for each of them"
            )
        tokens, form = ThinkingTokens.from_tokenizer(tokenizer), format_of(directory, chat_template)
        if form.conclusion and not form.refusal:  # a refusal says it again
            announce(form.conclusion)
        return cls(config, params, tokenizer, tokens, form)

    @functools.cached_property
    def reader(self) -> AnswerReader:
        """Turns results into text."""
        return AnswerReader(self.tokenizer, self.tokens)

    @functools.cached_property
    def weights_digest(self) -> str:
        """Tells the weights from others, on any mesh; all processes of a mesh ask for it alike."""
        return weights_digest(self.params)

    def prompt(self, record: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> Prompt:
        """What a record asks for; see `read_prompt`. What only this model can refuse is refused by `limit`."""
        return read_prompt(record, self.tokenizer, self.form, defaults)

    def limit(self, request: Request) -> int:
        """The most tokens that a request may write; see `qwen3_jax.decode.check_request`."""
        return check_request(request, self.config, self.tokens)

    def generate(
        self, requests: Sequence[Request], progress: Callable[[int, int, int], None] | None = None
    ) -> list[Result]:
        """All requests in one batch and one program; see `qwen3_jax.decode.generate`."""
        return generate(self.config, self.params, requests, tokens=self.tokens, progress=progress)

    def pool(self, rows: int, max_new: int, **options: Any) -> Pool:
        """Places to decode in; see `qwen3_jax.decode.Pool`."""
        return Pool(self.config, self.params, tokens=self.tokens, rows=rows, max_new=max_new, **options)

    def run(
        self, pool: Pool, prompts: Iterable[tuple[Hashable, Prompt]]
    ) -> Iterator[list[tuple[Hashable, Prompt, Result]]]:
        """Decodes prompts in `pool`: a list of those that finished, empty or not, after each step."""
        waiting, running = iter(prompts), dict[Hashable, Prompt]()
        while True:
            # As many wait as there are places: samples of one prompt that follow each other share its prefill.
            while len(pool) < 2 * pool.load.rows and (item := next(waiting, None)) is not None:
                running[item[0]] = item[1]
                pool.submit(item[0], item[1].request)
            events = pool.step()
            if not events:
                return
            finished = []
            for event in events:
                prompt, result = running[event.key], event.result
                if result is None and prompt.stop and self.reader.is_stopped(event.so_far(), prompt.stop):
                    result = pool.cancel(event.key)
                if result is not None:
                    finished.append((event.key, running.pop(event.key), self.reader.trim(result, prompt.stop)))
            yield finished

    def stream(
        self,
        prompt: Prompt,
        emit: Callable[[str, bool], None],
        announce: Callable[[str, float], None] | None = None,
    ) -> Result:
        """Decodes one prompt and gives its text away as it comes: `emit(text, whether it is of the thought)`.

        All the texts together are `text` of the result. What might begin a stop text is held back. `announce` is called
        with each program that is compiled.
        """
        pool = self.pool(1, self.limit(prompt.request), steps=_STREAM_STEPS, announce=announce)
        pool.submit(0, prompt.request)
        stream = AnswerStream(self.reader, prompt.stop)
        while True:
            (event,) = pool.step()
            so_far = event.so_far()
            if event.result is not None or self.reader.is_stopped(so_far, prompt.stop):
                break
            for piece in stream.push(so_far):
                emit(*piece)
        result = self.reader.trim(so_far, prompt.stop)
        for piece in stream.finish(result):
            emit(*piece)
        return result

    def text(self, result: Result, stop: Sequence[str] = ()) -> str:
        """All that was written, markers of the thought included, up to a stop text."""
        return "".join(self.reader.texts(result, stop))
