"""JSONL in, JSONL out, for runs of millions of lines: rows are refilled, and a run that dies goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from qwen3_jax.decode import Result
from qwen3_jax.serve.answer_file import AnswerFile
from qwen3_jax.serve.engine import Engine
from qwen3_jax.serve.input_file import STDIN, open_lines, read_record
from qwen3_jax.text.prompt import CARRIED, Prompt
from sharding import from_first_process, num_parts


@dataclasses.dataclass
class Tally:
    """What a run has done.

    prompts: lines to be answered. samples: answers asked for. resumed: answers an earlier run had written.
    done: answers written now. errors: lines that could not be answered. tokens: written now, rows in flight included.
    thinking_tokens, injected_tokens, answer_tokens: of the answers written now.
    thinking_ends: how the thoughts of these answers ended, and how many each way.
    seconds: since decoding began, and of these `compile_seconds` for `compilations` programs.
    slot_utilisation: share of the places of all steps that held a running row, 0 to 1.
    """

    prompts: int = 0
    samples: int = 0
    resumed: int = 0
    done: int = 0
    errors: int = 0
    tokens: int = 0
    thinking_tokens: int = 0
    injected_tokens: int = 0
    answer_tokens: int = 0
    thinking_ends: Counter[str] = dataclasses.field(default_factory=Counter)
    seconds: float = 0.0
    compilations: int = 0
    compile_seconds: float = 0.0
    slot_utilisation: float = 1.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens written for each second not spent compiling."""
        return self.tokens / max(self.seconds - self.compile_seconds, 1e-9)

    @property
    def thinking_share(self) -> float:
        """Thinking tokens among those of the answers written."""
        return self.thinking_tokens / max(self.thinking_tokens + self.injected_tokens + self.answer_tokens, 1)

    @property
    def cut(self) -> int:
        """Thoughts that ended for want of budget or room."""
        return self.thinking_ends["budget"] + self.thinking_ends["room"]

    def add(self, result: Result) -> None:
        """Counts one answer."""
        self.done += 1
        self.thinking_tokens += result.thinking_tokens
        self.injected_tokens += result.injected_tokens
        self.answer_tokens += result.answer_tokens
        self.thinking_ends[result.thinking_end] += 1

    def summary(self) -> dict[str, Any]:
        """All of it as JSON."""
        values = {**vars(self), "thinking_share": self.thinking_share, "tokens_per_second": self.tokens_per_second}
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}


@dataclasses.dataclass(frozen=True)
class _Line:
    """Where a line stands in the file; its id as JSON, a digest of its record, its prompt's tokens and the most that it
    may write."""

    number: int
    offset: int
    key: str
    digest: str
    prompt: int
    limit: int


@dataclasses.dataclass(frozen=True)
class _Sample:
    """Which answer to which line; what of the line's record is carried into the output."""

    line: _Line
    sample: int
    carried: Mapping[str, Any] = dataclasses.field(compare=False)


def decode_file(
    engine: Engine,
    source: Path,
    target: Path,
    *,
    settings: Mapping[str, Any],
    defaults: Mapping[str, Any],
    rows: int,
    samples: int = 1,
    logprobs: bool = False,
    strict: bool = False,
    part: tuple[int, int] = (0, 1),
    writes: bool = True,
    report: Callable[[Tally], None] = lambda tally: None,
    announce: Callable[[str], None] = lambda text: None,
) -> Tally:
    """Answers every line of `source` in `target`, each as it is done, long prompts first.

    Answers that `target` holds already are kept and not decoded again: a line is known by its id and its record, so
    that lines may be added, and lines that could not be answered be mended. A line that cannot be answered becomes
    `{"id", "line", "error"}`, with id null where none could be read, and the others go on; the first one is announced.

    Where one model spans several processes, all of them call this alike, and `source` is the same file for each.

    Args:
      source: of any kind that `open_lines` reads.
      settings: what the answers depend on besides the input file and the weights, see `AnswerFile`.
      rows: places that decode together.
      samples: answers to each line, numbered from the line's `sample` on.
      logprobs: adds `logprobs` and `forced` to each answer.
      strict: refuse the whole file for one bad line, before anything is decoded.
      part: `(i, n)` answers the i-th of n shares of the lines.
      writes: whether this process writes `target`; if not, it takes from process 0 which answers are there.
      report: called whenever the loop is left. announce: called with lines for the log.

    Raises:
      ValueError: for a file that is missing or not ours, or without a line that can be answered, or with a line that
        has changed since it was answered; in strict mode `file:line: field: value; what to use instead`.
    """
    if writes and source != STDIN and source.exists() and target.exists() and target.samefile(source):
        raise ValueError(f"output: {str(target)!r} is the input; use another file")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_lines(source, announce))
        lines, errors, digest = _index(engine, file, source, defaults, samples, strict, part)
        if errors:
            first = f"{source}:{errors[0]['line']}: {errors[0]['error']}"
            if not lines and part == (0, 1):
                raise ValueError(f"{first}; none of the {len(errors)} lines can be answered")
            announce(f"{first}; {len(errors)} of {len(errors) + len(lines)} lines cannot be answered")
        tally = Tally(prompts=len(lines), samples=len(lines) * samples, errors=len(errors))
        asked = [(line, sample) for line in lines for sample in range(samples)]
        output, settings = None, {**settings, "weights": engine.weights_digest, "samples": samples}
        if writes:
            output = stack.enter_context(AnswerFile(target, settings))
            output.write_errors(errors)
        done = [output is not None and output.holds(line.key, sample, line.digest) for line, sample in asked]
        if part == (0, 1):
            done = _agree(source, digest, done)
        waiting = [item for item, is_done in zip(asked, done, strict=True) if not is_done]
        tally.resumed = tally.samples - len(waiting)
        if not waiting:
            return tally
        # Long prompts first: what does not fit fails at once, and the cache's prompt slots only ever shrink.
        waiting.sort(key=lambda item: -item[0].prompt)

        def compiled(what: str, seconds: float) -> None:
            tally.compilations += 1
            tally.compile_seconds += seconds
            announce(f"compiled {what} in {seconds:.1f} s")

        parts = num_parts("attention_batch")
        while rows >= 2 * max(len(waiting), parts) and rows % (2 * parts) == 0:
            rows //= 2  # a short file does not need all the places
        pool = engine.pool(rows, max(line.limit for line, _ in waiting), announce=compiled)
        start = time.perf_counter()
        for finished in engine.run(pool, _prompts(engine, file, waiting, defaults)):
            for key, prompt, result in finished:
                assert isinstance(key, _Sample)
                if output is not None:
                    output.write(_record(engine, key, prompt, result, logprobs))
                tally.add(result)
            tally.seconds = time.perf_counter() - start
            tally.slot_utilisation = pool.load.utilisation
            tally.tokens = pool.load.tokens
            report(tally)
    return tally


def _agree(source: Path, digest: str, done: list[bool]) -> list[bool]:
    """Which answers process 0 holds, on every process of one model; refuses another input than that of process 0."""
    if from_first_process(np.frombuffer(bytes.fromhex(digest), np.uint8)).tobytes().hex() != digest:
        raise ValueError(f"input: {str(source)!r} is another file than that of process 0; use the same on all of them")
    return [bool(value) for value in from_first_process(np.array(done, np.bool_))]


def _record(engine: Engine, key: _Sample, prompt: Prompt, result: Result, logprobs: bool) -> dict[str, Any]:
    record = {"id": json.loads(key.line.key), "line": key.line.number, "sample": key.sample, "record": key.line.digest}
    record |= {"settings": prompt.request.settings(), **engine.reader.record(result, prompt)}
    record |= key.carried
    if logprobs:
        record["logprobs"] = [round(value, 6) for value in result.logprobs]
        record["forced"] = [int(value) for value in result.forced]
    return record


def _prompts(
    engine: Engine, file: Any, waiting: list[tuple[_Line, int]], defaults: Mapping[str, Any]
) -> Iterator[tuple[Hashable, Prompt]]:
    """Reads each line again when its turn comes, once for all its samples: the file's requests need not fit into
    memory."""
    for line, items in itertools.groupby(waiting, key=lambda item: item[0]):
        file.seek(line.offset)
        record = read_record(file.readline())
        prompt = engine.prompt(record, defaults)
        carried = {name: record[name] for name in CARRIED if record.get(name) is not None}
        for _, sample in items:
            yield _Sample(line, sample, carried), prompt.with_sample(sample)


def _index(
    engine: Engine,
    file: IO[bytes],
    source: Path,
    defaults: Mapping[str, Any],
    samples: int,
    strict: bool,
    part: tuple[int, int],
) -> tuple[list[_Line], list[dict[str, Any]], str]:
    """The lines of this part that can be answered, error records for those that cannot, and the file's SHA-256."""
    lines, errors = [], []
    ids: dict[str, int] = {}
    digest, offset, count = hashlib.sha256(), 0, 0
    for number, line in enumerate(file, 1):
        digest.update(line)
        start, offset = offset, offset + len(line)
        if not line.strip():
            continue
        ours, count = count % part[1] == part[0], count + 1
        record_id: Any = None
        try:
            record = read_record(line)
            record_id = record.get("id", number)
            key = json.dumps(record_id)
            if key in ids:
                raise ValueError(f"id: {key} stands on line {ids[key]} too; use another one")
            ids[key] = number
            if not ours:
                continue
            request = engine.prompt(record, defaults).with_sample(samples - 1).request  # refuses too large a number
            content = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
            lines.append(_Line(number, start, key, content, len(request.prompt_ids), engine.limit(request)))
        except ValueError as error:
            if strict:
                raise ValueError(f"{source}:{number}: {error}") from None
            if ours:
                errors.append({"id": record_id, "line": number, "error": str(error)})
    return lines, errors, digest.hexdigest()
