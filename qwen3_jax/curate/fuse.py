"""The data of thinking mode fusion (report, section 4.3): two files of records to one that teaches both modes.

- A thinking record keeps its thought. Its query has the flag `/think`, or none: thinking is the default.
- A non-thinking record has the empty thought. Its query has the flag `/no_think`.
- A flag is at the end of the user's turn, or in the system turn.
- A dialogue is made of several records. A turn without a flag keeps the mode, and the last flag wins.
- Some queries come in both modes, where both files answer them.
- A share of the thoughts may be cut at a random word and closed by the stop text, which is not in the loss. The report
  trains on none.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from qwen3_jax.curate.files import complete, put
from qwen3_jax.curate.responses import query_of
from qwen3_jax.data.records import read_record
from qwen3_jax.data.source import Document, DocumentSource, expand
from qwen3_jax.text import chat
from qwen3_jax.text.records import parse_record

_FLAGS = {True: "/think", False: "/no_think"}


@dataclasses.dataclass(frozen=True)
class FuseConfig:
    """What is built of which records.

    thinking, non_thinking: files of conversations with one answer each, the first with `reasoning_content`.
    records: how many are built; none: as many as there are without using one twice.
    thinking_share: of the turns that are learnt, the share that thinks.
    unflagged: of the thinking turns that begin a record, the share without a flag.
    in_system: of the flags that begin a record, the share that is in the system turn.
    dialogues: share of the records that are dialogues. rounds: fewest and most turns of one.
    repeated: of the later turns that keep the mode, the share that repeats its flag.
    both: of the thinking records whose query has a non-thinking record too, the share that is followed by it.
    cut: share of the thinking records of one round whose thought is cut.
    seed: of all choices.
    """

    thinking: tuple[str, ...]
    non_thinking: tuple[str, ...]
    records: int | None = None
    thinking_share: float = 0.5
    unflagged: float = 0.3
    in_system: float = 0.2
    dialogues: float = 0.2
    rounds: tuple[int, int] = (2, 4)
    repeated: float = 0.3
    both: float = 0.0
    cut: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("thinking_share", "unflagged", "in_system", "dialogues", "repeated", "both", "cut"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name}: {value!r}; use a share from 0 to 1")
        if not 2 <= self.rounds[0] <= self.rounds[1]:
            raise ValueError(f"rounds: {list(self.rounds)}; use [min, max] with 2 <= min <= max")
        if self.records is not None and self.records < 1:
            raise ValueError(f"records: {self.records}; use a number >= 1")
        for name in ("thinking", "non_thinking"):
            paths = getattr(self, name)
            object.__setattr__(self, name, (paths,) if isinstance(paths, str) else tuple(paths))


@dataclasses.dataclass(frozen=True)
class _Part:
    """One question with its answer in one mode."""

    thinks: bool
    messages: tuple[dict[str, Any], ...]
    fields: dict[str, Any]
    query: str

    @property
    def is_alone(self) -> bool:
        """Whether it cannot be a round of a dialogue: it has several turns, tools or a system turn."""
        return len(self.messages) != 2 or "tools" in self.fields

    @property
    def has_flag(self) -> bool:
        return chat.flag_mode(self.messages) is not None


def fuse(
    config: FuseConfig, target: Path, report: Callable[[int, int], None] = lambda done, total: None
) -> Counter[str]:
    """Writes the records to `target`, which appears when it is complete, and returns how many there are of each kind.

    The same configuration and files give the same records. Each has the label `mode`, of its last turn.

    Raises:
      ValueError: naming the file and line of a record that is not what its list says; or a list without records.
    """
    for name in ("thinking", "non_thinking"):
        for source in (source for path in getattr(config, name) for source in expand(path, name)):
            if target.exists() and Path(source).exists() and target.samefile(source):
                raise ValueError(f"output: {str(target)!r} is an input; use another file")
    rng = random.Random(config.seed)
    sources = {
        True: _Source(config.thinking, True, "thinking", config.seed),
        False: _Source(config.non_thinking, False, "non_thinking", config.seed),
    }
    twins = {query: index for index, query in enumerate(sources[False].queries)}
    counts: Counter[str] = Counter()
    total = config.records or _without_repeats(config, sources)
    with complete(target) as file:
        while counts["records"] < total:
            for record, kinds in _built(config, rng, sources, twins):
                put(file, record)
                counts.update(["records", *kinds])
            report(min(counts["records"], total), total)
    return counts


def table(counts: Counter[str]) -> Table:
    """What `fuse` has built."""
    shown = Table("", Column("records", justify="right"), Column("share", justify="right"), box=None)
    for kind, count in sorted(counts.items(), key=lambda item: (item[0] != "records", item[0])):
        shown.add_row(kind, f"{count:,}", f"{count / counts['records']:.1%}")
    return shown


class _Source:
    """The records of one mode, in a random order, and again in another one when all were used.

    queries: of each record. All are read once, so that a bad one is found before anything is built.
    """

    def __init__(self, paths: Sequence[str], thinks: bool, name: str, seed: int) -> None:
        self._documents, self._thinks, self._name = DocumentSource(paths, name), thinks, name
        self._rng = random.Random(f"{seed} {name}")
        self._order: list[int] = []
        self.queries = [self[index].query for index in range(len(self))]

    def __len__(self) -> int:
        return len(self._documents)

    def draw(self) -> _Part:
        if not self._order:
            self._order = list(range(len(self)))
            self._rng.shuffle(self._order)
        return self[self._order.pop()]

    def __getitem__(self, index: int) -> _Part:
        document = self._documents[index]
        try:
            return _read(document, self._thinks)
        except ValueError as error:
            raise ValueError(f"{document.location}: {self._name}: {error}") from None


def _read(document: Document, thinks: bool) -> _Part:
    record, fields = read_record(document), parse_record(document.content)
    messages = tuple(record.messages)
    chat.validate_messages(messages)
    if messages[-1]["role"] != "assistant":
        raise ValueError("messages: the last turn is not the assistant's; use records that end with an answer")
    thought, answer = chat.thought_and_answer(messages[-1])
    if bool(thought.strip()) != thinks:
        wanted = "a thought in its last turn" if thinks else "no thought in its last turn"
        raise ValueError(f"reasoning_content: {thought!r:.40}; use a record with {wanted}")
    turn = {"role": "assistant", "reasoning_content": thought, "content": answer}
    kept = {name: fields[name] for name in ("id", "answer", "verifier", "provenance") if fields.get(name) is not None}
    kept |= {"labels": record.labels} | ({"tools": record.tools} if record.tools else {})
    return _Part(thinks, (*messages[:-1], turn), kept, query_of(messages[:-1]))


def _without_repeats(config: FuseConfig, sources: dict[bool, _Source]) -> int:
    """How many records there are until a source is used up, in the mean."""
    rounds = 1 + config.dialogues * (sum(config.rounds) / 2 - 1)
    shares = {True: config.thinking_share, False: 1 - config.thinking_share}
    return max(1, int(min(len(sources[mode]) / share for mode, share in shares.items() if share) / rounds))


def _built(
    config: FuseConfig, rng: random.Random, sources: dict[bool, _Source], twins: dict[str, int]
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """The next record with its kinds; two where the second answers the same query in the other mode."""
    part = sources[rng.random() < config.thinking_share].draw()
    if rng.random() < config.dialogues and not part.is_alone and not part.has_flag:
        yield _dialogue(config, rng, sources, part)
        return
    yield _single(config, rng, part)
    if part.thinks and part.query in twins and rng.random() < config.both:
        record, kinds = _single(config, rng, sources[False][twins[part.query]])
        yield record, [*kinds, "query in both modes"]


def _single(config: FuseConfig, rng: random.Random, part: _Part) -> tuple[dict[str, Any], list[str]]:
    mode = "thinking" if part.thinks else "non-thinking"
    messages, where = part.messages, "with a flag of its own"
    if not part.has_flag:
        messages, where = _opened(config, rng, part)
    record, kinds = _record(part, messages), [mode, f"{mode}, {where}"]
    if part.thinks and rng.random() < config.cut and (short := _cut(messages[-1]["reasoning_content"], rng)):
        record["messages"] = [*messages[:-1], {**messages[-1], "reasoning_content": short + chat.STOP_SENTENCE}]
        record["no_loss"] = [chat.STOP_TEXT]
        kinds.append("thinking, thought cut")
    return record, kinds


def _opened(config: FuseConfig, rng: random.Random, part: _Part) -> tuple[tuple[dict[str, Any], ...], str]:
    """The messages of a record with a flag or, where thinking needs none, without; and where the flag is."""
    messages = part.messages
    if part.thinks and rng.random() < config.unflagged:
        return messages, "without a flag"
    flag = _FLAGS[part.thinks]
    if rng.random() < config.in_system:
        if messages[0]["role"] == "system":
            return (_flagged(messages[0], flag), *messages[1:]), "flag in the system turn"
        return ({"role": "system", "content": flag}, *messages), "flag in the system turn"
    asked = max(i for i, message in enumerate(messages) if message["role"] == "user")
    return (*messages[:asked], _flagged(messages[asked], flag), *messages[asked + 1 :]), "flag in the user's turn"


def _dialogue(
    config: FuseConfig, rng: random.Random, sources: dict[bool, _Source], first: _Part
) -> tuple[dict[str, Any], list[str]]:
    """Several parts as one conversation; the flags say when the mode changes."""
    messages, _ = _opened(config, rng, first)
    mode, flags, parts = first.thinks, int(chat.flag_mode(messages) is not None), [first]
    for _ in range(rng.randint(*config.rounds) - 1):
        wanted = rng.random() < config.thinking_share
        part = next((found for found in _some(sources[wanted]) if not found.is_alone and not found.has_flag), None)
        if part is None:
            break
        question, answer = part.messages
        if wanted != mode or rng.random() < config.repeated:
            question, flags = _flagged(question, _FLAGS[wanted]), flags + 1
        messages, mode, parts = (*messages, question, answer), wanted, [*parts, part]
    record = _record(parts[-1], messages)
    if made := [part.fields["provenance"] for part in parts if "provenance" in part.fields]:
        record["provenance"] = made
    name = "thinking" if mode else "non-thinking"
    return record, ["dialogue", f"dialogue, ends {name}", *(["dialogue, several flags"] if flags > 1 else [])]


def _some(source: _Source) -> Iterator[_Part]:
    """Up to a hundred of its records."""
    return (source.draw() for _ in range(100))


def _record(part: _Part, messages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    mode = "thinking" if part.thinks else "non-thinking"
    return {**part.fields, "messages": list(messages), "labels": {**part.fields["labels"], "mode": mode}}


def _flagged(message: dict[str, Any], flag: str) -> dict[str, Any]:
    return {**message, "content": f"{message['content']} {flag}".lstrip()}


def _cut(thought: str, rng: random.Random) -> str:
    """The thought up to a random word that is not the last; empty where there is one word only."""
    ends = [found.end() for found in re.finditer(r"\S+", thought)][:-1]
    return thought[: rng.choice(ends)] if ends else ""
