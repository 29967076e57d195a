"""A loaded model that takes and gives records, the lines of infer.py's files."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from qwen3_jax import hf
from qwen3_jax.config import ModelConfig
from qwen3_jax.decode import Pool, Request, Result, ThinkingTokens, check_request, generate
from qwen3_jax.text import chat
from qwen3_jax.text.query_mode import query_mode
from qwen3_jax.text.tokenizer import TextStream, Tokenizer, load_tokenizer
from sharding import DECODE_RULES, axis_rules

# Qwen3's own settings by mode (model cards and report, section 4.7).
THINKING_SAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0}
NON_THINKING_SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0, "presence_penalty": 1.5}

# Fields of a record that are fields of a Request under the same name.
_REQUEST_FIELDS = (
    *("thinking_budget", "auto_threshold", "auto_cap", "grace", "count_think_marker"),
    *("max_new_tokens", "answer_reserve", "eos_while_thinking", "allow_empty_answer"),
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
    *("seed", "sample"),
)
_RECORD_FIELDS = (
    *("id", "messages", "prompt", "tools", "answer", "enable_thinking", "mode_by_query", "stop"),
    *_REQUEST_FIELDS,
)
_STREAM_STEPS = 4


def shipped_model() -> Path:
    """Directory of `qwen3-tiny`, the model in the package."""
    return Path(__file__).parent.parent / "assets" / "qwen3-tiny"


@dataclasses.dataclass(frozen=True)
class Job:
    """What one record asks for.

    limit: most tokens that the request may write, see `check_request`.
    stop: texts that end the answer, and are not part of it; they are looked for in the answer alone, never in a
      thought or in forced text.
    rule: of `query_mode`, that chose the mode; None where it was not asked.
    """

    request: Request
    limit: int
    stop: tuple[str, ...] = ()
    rule: str | None = None


@dataclasses.dataclass(frozen=True)
class Engine:
    """A model and its tokenizer."""

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer
    tokens: ThinkingTokens
    modes: chat.Modes = "hybrid"

    @classmethod
    def load(cls, directory: str | Path, dtype: str = "float32", mesh: Mesh | None = None) -> Engine:
        """From a directory in Hugging Face's layout, to the default device or over a mesh.

        Raises:
          ValueError: one line that says what the directory lacks.
        """
        tokenizer = load_tokenizer(directory)
        with axis_rules(DECODE_RULES):
            config, params = hf.load_checkpoint(directory, dtype=dtype, mesh=mesh)
        if tokenizer.num_tokens > config.vocab_size:
            raise ValueError(
                f"vocab_size: {config.vocab_size} in {str(directory)!r}, whose tokenizer has {tokenizer.num_tokens} "
                "tokens; an embedding for each of them fits"
            )
        return cls(config, params, tokenizer, ThinkingTokens.from_tokenizer(tokenizer), chat.modes_of(directory))

    def job(self, record: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> Job:
        """What a record asks for.

        Args:
          record: `prompt` (one user turn) or `messages` (a conversation, with `tools`), and any field of `Request`;
            `enable_thinking` false puts the empty block into the prompt; `stop`, a text or a list of them;
            `mode_by_query` true leaves the mode to `query_mode` where neither a flag nor `enable_thinking` says it.
            Flags in the text follow `chat.flag_mode`. A model with one mode only knows no flags: see `chat`.
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
        fields = {**(defaults or {}), **record}
        enable_thinking = fields.get("enable_thinking", True)
        rendered = chat.render(
            messages, self.tokenizer, tools=record.get("tools"), enable_thinking=enable_thinking, modes=self.modes
        )
        budget = fields.get("thinking_budget")
        if self.modes == "instruct" and budget not in (None, -1):
            raise ValueError(f"thinking_budget: {budget!r}, but this model never thinks; none fits")
        if self.modes == "thinking" and budget == 0:
            raise ValueError("thinking_budget: 0, but this model has no non-thinking mode; a number >= 1 fits")
        # A flag is acted on here, and the decoder writes the empty block; enable_thinking=False put it in the prompt.
        flag, rule = (chat.flag_mode(messages) if self.modes == "hybrid" else None), None
        unsaid = flag is None and "enable_thinking" not in fields and self.modes == "hybrid"
        if _flag("mode_by_query", fields) and unsaid:
            flag, rule = query_mode(messages)
        thinking = self.modes != "hybrid" or (enable_thinking and flag is not False)
        on = thinking and budget != 0 and self.modes != "instruct"
        chosen = {name: fields[name] for name in _REQUEST_FIELDS if name in fields}
        if budget != "auto":  # a record with a budget of its own has no use for what was said of automatic ones
            chosen = {name: chosen[name] for name in chosen if not name.startswith("auto_") or name in record}
        sampling = THINKING_SAMPLING if on else NON_THINKING_SAMPLING
        request = Request(rendered.ids, thinking=thinking, **{**sampling, **chosen})
        limit = check_request(request, self.config, self.tokens)
        return Job(request, limit, _stop_texts(fields.get("stop", ())), rule)

    def request(self, record: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> Request:
        """The request alone of `job`."""
        return self.job(record, defaults).request

    def generate(
        self, requests: Sequence[Request], progress: Callable[[int, int, int], None] | None = None
    ) -> list[Result]:
        """All requests in one batch and one program; see `qwen3_jax.decode.generate`."""
        return generate(self.config, self.params, requests, tokens=self.tokens, progress=progress)

    def pool(self, rows: int, max_new: int, **options: Any) -> Pool:
        """Places to decode in; see `qwen3_jax.decode.Pool`."""
        return Pool(self.config, self.params, tokens=self.tokens, rows=rows, max_new=max_new, **options)

    def run(self, pool: Pool, jobs: Iterable[tuple[Hashable, Job]]) -> Iterator[list[tuple[Hashable, Job, Result]]]:
        """Decodes jobs in `pool`: a list of those that finished, empty or not, each time that the loop is left."""
        running: dict[Hashable, Job] = {}

        def requests() -> Iterator[tuple[Hashable, Request]]:
            for key, job in jobs:
                running[key] = job
                yield key, job.request

        def stopped(key: Hashable, so_far: Callable[[], Result]) -> bool:
            stop = running[key].stop
            return bool(stop) and self._find_stop(so_far(), stop) is not None

        for finished in pool.run(requests(), stopped):
            yield [(key, running[key], self._trim(result, running.pop(key).stop)) for key, result in finished]

    def stream(self, job: Job, emit: Callable[[str, bool], None]) -> Result:
        """Decodes one job and gives its text away as it comes: `emit(text, whether it is of the thought)`.

        All the texts together are `text` of the result. What might begin a stop text is held back.
        """
        pool = self.pool(1, job.limit, steps=_STREAM_STEPS)
        stream = TextStream(self.tokenizer, skip_special=True)
        texts = {True: "", False: ""}  # of the thought and of the answer
        shown = {True: 0, False: 0}
        seen = 0

        def show(in_thought: bool, text: str) -> None:
            if text[shown[in_thought] :]:
                emit(text[shown[in_thought] :], in_thought)
                shown[in_thought] = len(text)

        def on_leave(_: Hashable, so_far: Callable[[], Result]) -> bool:
            nonlocal seen
            written = so_far()
            if self._find_stop(written, job.stop) is not None:
                return True
            answer_at = max(self._answer_at(written), seen)
            texts[True] += stream.push(written.token_ids[seen:answer_at])
            texts[False] += stream.push(written.token_ids[answer_at:])
            seen = len(written.token_ids)
            show(True, texts[True])
            show(False, texts[False][: len(texts[False]) - max(map(len, job.stop), default=1) + 1])
            return False

        (result,) = (result for finished in pool.run([(0, job.request)], on_leave) for _, result in finished)
        result = self._trim(result, job.stop)
        for in_thought, text in zip((True, False), self._texts(result, job.stop), strict=True):
            show(in_thought, text)
        return result

    def response(self, result: Result, job: Job | None = None) -> dict[str, Any]:
        """A result as a record: thought and answer as text, the counts, and the rule that chose the job's mode."""
        thought, _ = self._split(result)
        _, answer = self._texts(result, job.stop if job else ())
        return {
            "thinking": self.tokenizer.decode(thought).strip("\n"),
            "content": answer.lstrip("\n"),
            "token_ids": result.token_ids,
            "thinking_tokens": result.thinking_tokens,
            "injected_tokens": result.injected_tokens,
            "answer_tokens": result.answer_tokens,
            "thinking_end": result.thinking_end,
            "finish_reason": result.finish_reason,
            **({"mode_rule": job.rule} if job and job.rule else {}),
        }

    def text(self, result: Result, stop: Sequence[str] = ()) -> str:
        """All that was written, markers of the thought included, up to a stop text."""
        return "".join(self._texts(result, stop))

    def _split(self, result: Result) -> tuple[list[int], list[int]]:
        """Ids of the thought and of the answer: split on ids, never on text."""
        # A thought that the prompt opened has no opening marker in the ids.
        opened = result.thinking_end not in ("off", "none")
        return chat.split_ids(
            result.token_ids,
            think=self.tokens.think,
            end_think=self.tokens.end_think,
            in_think=opened and result.token_ids[0] != self.tokens.think,
        )

    def _answer_at(self, result: Result) -> int:
        """Place of the answer's first token."""
        return len(result.token_ids) - len(self._split(result)[1])

    def _texts(self, result: Result, stop: Sequence[str]) -> tuple[str, str]:
        """The thought with its markers, and the answer up to a stop text."""
        answer_at = self._answer_at(result)
        thought, answer = (
            self.tokenizer.decode(ids, skip_special=True)
            for ids in (result.token_ids[:answer_at], result.token_ids[answer_at:])
        )
        found = self._find_stop(result, stop)
        return thought, answer if found is None else found[1]

    def _trim(self, result: Result, stop: Sequence[str]) -> Result:
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

    def _find_stop(self, result: Result, stop: Sequence[str]) -> tuple[int, str] | None:
        """Where the answer's first stop text is: the place after the token that completes it, and the answer before it.

        Neither forced tokens nor the newlines before an answer are looked at.
        """
        if not stop:
            return None
        answer_at = self._answer_at(result)
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


def _flag(name: str, fields: Mapping[str, Any]) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"{name}: {value!r}; true or false fits")
    return value


def _stop_texts(stop: Any) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else stop
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"stop: {stop!r}; a text that is not empty, or a list of them, fits")
    return tuple(texts)
