"""Judges and filters a file of answers into training records; `qwen3-jax select` and the stages of a plan."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from rich.table import Column, Table

from qwen3_jax.curate.files import complete, put
from qwen3_jax.curate.filters import FilterConfig, make_filters
from qwen3_jax.curate.responses import Response, provenance_of, read_response
from qwen3_jax.plot import png
from qwen3_jax.serve.input_file import open_lines
from qwen3_jax.tasks import deadline
from qwen3_jax.tasks.judge import Verdict, find_verifier, judge


@dataclasses.dataclass(frozen=True)
class Funnel:
    """How many responses fell at which filter, in the order of the filters.

    left: queries that had a response left after each. unanswered: lines of the input that are no answer.
    """

    read: int
    queries: int
    fell: Mapping[str, int]
    left: Mapping[str, int]
    kept: int
    unanswered: int = 0

    def responses_left(self) -> list[int]:
        """Of those that were read, after each filter; all of them first."""
        return list(itertools.accumulate(self.fell.values(), operator.sub, initial=self.read))

    def table(self) -> Table:
        """The numbers, a row for each filter."""
        table = Table("", *(Column(name, justify="right") for name in ("dropped", "responses", "queries")), box=None)
        table.add_row("read", "", f"{self.read:,}", f"{self.queries:,}")
        for (name, count), responses in zip(self.fell.items(), self.responses_left()[1:], strict=True):
            table.add_row(name, f"{count:,}", f"{responses:,}", f"{self.left[name]:,}")
        return table

    def plot(self, path: Path, title: str) -> None:
        """Responses left after each filter, as a PNG."""
        with png(path) as axes:
            left = self.responses_left()
            bars = axes.barh(["read", *self.fell], left, color="tab:blue")
            axes.bar_label(bars, [f"{value:,}" for value in left], padding=3)
            axes.invert_yaxis()
            axes.margins(x=0.12)
            axes.set(xlabel="responses left", title=title)


def select(
    source: Path,
    target: Path,
    verifier: str = "exact",
    filters: FilterConfig | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
    announce: Callable[[str], None] = lambda text: None,
) -> Funnel:
    """Writes the responses of `source` that pass to `target`, as training records in the order of their queries.

    Beside `target` are left `<target>.rejected.jsonl`, with filter and reason of each response that fell, and the
    funnel as `<target>.png`. All three appear at the end, complete. A run that was killed judges no response again.

    Args:
      source: see `read_response`.
      verifier: of records that do not name one; see `qwen3_jax.tasks.judge`.
      report: called with the responses that are done, and with all.

    Raises:
      ValueError: `file:line: reason` for what cannot be read or judged; or no response passes. Nothing is written then.
    """
    filters = filters or FilterConfig()
    find_verifier(verifier)
    if not target.parent.is_dir():
        raise ValueError(f"output: {str(target.parent)!r} is not a directory; use a file in one")
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"output: {str(target)!r} is the input; use another file")
    with _Verdicts(target.with_name(target.name + ".verdicts.jsonl"), verifier) as verdicts:
        solved = _solved(Path(filters.easy_answers), verdicts, announce) if filters.easy_answers else {}
        funnel, outcomes = _filtered(source, filters, verdicts, solved, report, announce)
        if not funnel.kept:
            worst = max(funnel.fell, key=lambda name: funnel.fell[name], default="none")
            raise ValueError(
                f"{source}: none of {funnel.read:,} responses is left, {funnel.fell.get(worst, 0):,} fell at "
                f"{worst!r}; change that filter, the verifier or the answers"
            )
        _write(source, target, outcomes, verdicts, announce)
        funnel.plot(target.with_name(target.name + ".png"), f"{source.name}: {funnel.kept:,} of {funnel.read:,} kept")
        verdicts.remove()
    return funnel


class _Verdicts:
    """The verdict on each response, in a file that only grows: a run that was killed or failed goes on with it. A
    verifier that was changed judges anew, and so does one that had no result: the next time it may have one."""

    def __init__(self, path: Path, verifier: str) -> None:
        self._path, self._verifier = path, verifier
        self._held: dict[str, Verdict] = {}
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            if not line.endswith(b"\n"):
                break
            key, score, reason = json.loads(line)
            self._held[key] = Verdict(score, reason)
            whole += len(line)
        self._file = path.open("ab")
        self._file.truncate(whole)

    def __call__(self, response: Response) -> Verdict:
        record = {"verifier": self._verifier, **response.record}
        judged = [record, response.thought, response.answer, _code_of(str(record["verifier"]))]
        key = hashlib.sha256(json.dumps(judged, sort_keys=True).encode()).hexdigest()[:24]
        if key not in self._held:
            self._held[key] = verdict = judge(record, response.thought, response.answer)
            if not verdict.reason.startswith((deadline.NO_RESULT, deadline.DIED)):
                self._file.write(json.dumps([key, *verdict]).encode() + b"\n")
                self._file.flush()
        return self._held[key]

    def remove(self) -> None:
        """Deletes the file: all that it says is in the output."""
        self._path.unlink()

    def __enter__(self) -> _Verdicts:
        return self

    def __exit__(self, *raised: Any) -> None:
        self._file.close()


@functools.cache
def _code_of(verifier: str) -> str:
    """A digest of the file that a verifier of the user's is in; empty for one of ours."""
    module, _, function = verifier.partition(":")
    try:
        spec = importlib.util.find_spec(module) if function else None
    except (ImportError, ValueError):  # its parent is not there; `judge` says so
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return ""
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()


@dataclasses.dataclass(frozen=True, order=True)
class _Outcome:
    """A response by its query's line, its sample and its own line; where that is in the file; and the filter at which
    it fell with the reason, empty if it is kept."""

    line: int
    sample: int
    number: int
    offset: int
    filter: str = ""
    reason: str = ""


def _solved(path: Path, verdicts: _Verdicts, announce: Callable[[str], None]) -> dict[str, float]:
    """By query the share of right answers."""
    scores: dict[str, list[bool]] = defaultdict(list)
    with open_lines(path, announce) as file:
        for number, _, response in _responses(path, file):
            if response is not None:
                with _named(path, number):
                    scores[response.query].append(verdicts(response).score >= 1)
    return {query: sum(right) / len(right) for query, right in scores.items()}


def _filtered(
    source: Path,
    config: FilterConfig,
    verdicts: _Verdicts,
    solved: Mapping[str, float],
    report: Callable[[int, int], None],
    announce: Callable[[str], None],
) -> tuple[Funnel, list[_Outcome]]:
    """The funnel, and what became of each response, in the order of the queries."""
    filters = make_filters(config, verdicts, solved)
    fell = Counter(dict.fromkeys(filters, 0))
    alive: dict[str, set[str]] = {"": set(), **{name: set() for name in filters}}
    outcomes, unanswered = [], 0
    with open_lines(source, announce) as file:
        total = sum(1 for line in file if line.strip())
        file.seek(0)
        for number, offset, response in _responses(source, file):
            if response is None:
                unanswered += 1
                continue
            outcome = _Outcome(response.line, response.key[1], number, offset)
            alive[""].add(response.query)
            for name, check in filters.items():
                with _named(source, number):
                    reason = check(response)
                if reason:
                    fell[name] += 1
                    outcome = dataclasses.replace(outcome, filter=name, reason=reason)
                    break
                alive[name].add(response.query)
            outcomes.append(outcome)
            report(len(outcomes) + unanswered, total)
    left = {name: len(found) for name, found in alive.items()}
    kept = len(outcomes) - fell.total()
    return Funnel(len(outcomes), left.pop(""), dict(fell), left, kept, unanswered), sorted(outcomes)


def _responses(path: Path, file: IO[bytes]) -> Iterator[tuple[int, int, Response | None]]:
    """`(line number, byte offset, response)` of each line that is not blank."""
    offset = 0
    for number, line in enumerate(file, 1):
        if line.strip():
            with _named(path, number):
                yield number, offset, read_response(line, number)
        offset += len(line)


@contextlib.contextmanager
def _named(path: Path, number: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}:{number}: {error}") from None


def _write(
    source: Path, target: Path, outcomes: list[_Outcome], verdicts: _Verdicts, announce: Callable[[str], None]
) -> None:
    """The records and the rejected, each file complete or absent."""
    made = provenance_of(source)
    rejected = target.with_name(target.name + ".rejected.jsonl")
    with open_lines(source, announce) as file, complete(rejected) as fallen, complete(target) as kept:
        for outcome in outcomes:
            file.seek(outcome.offset)
            response = read_response(file.readline(), outcome.number)
            assert response is not None
            if outcome.filter:
                key = {"id": response.key[0], "sample": response.key[1]}
                put(fallen, {**key, "filter": outcome.filter, "reason": outcome.reason})
                continue
            verdict = verdicts(response)._asdict()
            record = response.for_training()
            if "weights" in made:
                name = f"{Path(made['model']).name}@{made['weights'][:8]}"
                record["labels"] = {**(record.get("labels") or {}), "made_by": name}
            how = {"settings": response.settings, "sample": response.key[1]} if response.settings else {}
            put(kept, record | {"provenance": {**made, **how, "verdict": verdict}})
