"""What is dropped of a model's answers before they are learnt (report, section 4.1).

Each filter is a function that says why a response falls, or nothing. Their order is that of the report: first queries,
then responses; a response falls at the first filter that it does not pass.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping

from qwen3_jax.curate.responses import Response
from qwen3_jax.data.duplicates import NGRAM, Checker
from qwen3_jax.tasks.judge import Verdict, VerifierError, contradicts
from qwen3_jax.tasks.language import language_shares

Verdicts = Callable[[Response], Verdict]
Filter = Callable[[Response], str]

_RUN = 8  # words
_PARTS = re.compile(r"^[^\S\n]*(?:\(?[a-h]\)|\(?[1-9]\)|\(?(?:i|ii|iii|iv|v)\))\s", re.MULTILINE)
_GUESS = re.compile(r"\b(?:(?:just|random|wild|lucky|educated) guess|i(?:'ll| will)? (?:just )?guess)\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    """What is dropped, in this order.

    unverifiable: queries without what their verifier reads; if false, such a query is an error.
    max_questions: queries that ask more than this many things, by question marks and numbered parts.
    easy_answers: a file of answers to the same queries by a model that did not think; queries of which it solved
      `easy_rate` or more are dropped.
    incomplete: answers that did not end by themselves, and those whose thought was cut.
    mode: answers with a thought where none was asked for, or without one where it was.
    min_score: answers whose verdict is lower.
    max_repetition: responses of whose runs of eight words a larger share stands in them before.
    min_thinking_words: thoughts with fewer words, and those that say that they guess.
    agreement: thoughts whose result is another than the answer's, where both can be told.
    max_other_languages: responses with a larger share of letters outside their main language.
    validation: files of validation items; responses and queries that share `ngram` words in a row with one.
    """

    unverifiable: bool = False
    max_questions: int | None = None
    easy_answers: str | None = None
    easy_rate: float = 1.0
    incomplete: bool = True
    mode: bool = False
    min_score: float = 1.0
    max_repetition: float | None = None
    min_thinking_words: int | None = None
    agreement: bool = False
    max_other_languages: float | None = None
    validation: tuple[str, ...] = ()
    ngram: int = NGRAM

    def __post_init__(self) -> None:
        for name in ("max_questions", "min_thinking_words", "ngram"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value!r}; use a number >= 1")
        for name in ("easy_rate", "max_repetition", "max_other_languages"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}: {value!r}; use a share from 0 to 1")
        if self.easy_rate == 0:
            raise ValueError("easy_rate: 0 drops every query; use a share above 0")


def make_filters(config: FilterConfig, verdict: Verdicts, solved: Mapping[str, float]) -> dict[str, Filter]:
    """The filters that `config` asks for, by the names of its fields.

    verdict: judges a response. solved: by query the share that was right without thinking.

    Raises:
      ValueError: a file of `validation` cannot be read.
    """
    filters: dict[str, Filter] = {}
    if config.unverifiable:
        filters["unverifiable"] = lambda response: _unverifiable(response, verdict)
    if (most := config.max_questions) is not None:
        filters["max_questions"] = lambda response: _over(questions(response), most, "questions")
    if config.easy_answers is not None:
        filters["easy_answers"] = lambda response: _easy(solved.get(response.query, 0.0), config.easy_rate)
    if config.incomplete:
        filters["incomplete"] = lambda response: "" if response.is_complete else "cut before its end"
    if config.mode:
        filters["mode"] = _mode
    filters["min_score"] = lambda response: _wrong(verdict(response), config.min_score)
    if (share := config.max_repetition) is not None:
        filters["max_repetition"] = lambda response: _over(repetition(response.text), share, "of it repeated")
    if (words := config.min_thinking_words) is not None:
        filters["min_thinking_words"] = lambda response: _guesses(response, words)
    if config.agreement:
        filters["agreement"] = _disagrees
    if (others := config.max_other_languages) is not None:
        filters["max_other_languages"] = lambda response: _mixes(response, others)
    if config.validation:
        checker = Checker(config.validation, config.ngram, threshold=0)
        filters["validation"] = lambda response: checker.overlap(_all_text(response)) or ""
    return filters


def _unverifiable(response: Response, verdict: Verdicts) -> str:
    try:
        verdict(response)
    except VerifierError:
        raise
    except ValueError as error:
        return str(error)
    return ""


def questions(response: Response) -> int:
    """How many things the last user's turn asks: its question marks, or its numbered parts, whichever are more."""
    asked = next((message["content"] for message in reversed(response.messages) if message["role"] == "user"), "")
    return max(len(re.findall(r"[?\uff1f]+", asked)), len(_PARTS.findall(asked)))


def repetition(text: str) -> float:
    """The share of runs of eight words that stand in the text before, 0 to 1."""
    words = text.split()
    runs = Counter(tuple(words[i : i + _RUN]) for i in range(len(words) - _RUN + 1))
    return 1 - len(runs) / runs.total() if runs else 0.0


def _easy(rate: float, limit: float) -> str:
    return f"solved without thinking in {rate:.0%} of the samples" if rate >= limit else ""


def _mode(response: Response) -> str:
    thinks, wanted = bool(response.thought.strip()), response.record["enable_thinking"]
    return "" if thinks == wanted else f"{'a' if thinks else 'no'} thought, with enable_thinking {wanted}"


def _wrong(verdict: Verdict, least: float) -> str:
    return "" if verdict.score >= least else f"score {verdict.score:g}: {verdict.reason}"


def _guesses(response: Response, least: int) -> str:
    if not response.record["enable_thinking"]:
        return ""
    if (count := len(response.thought.split())) < least:
        return f"a thought of {count} words"
    found = _GUESS.search(response.thought)
    return f"says {found[0]!r}" if found else ""


def _disagrees(response: Response) -> str:
    return contradicts(response.record, response.thought, response.answer)


def _mixes(response: Response, limit: float) -> str:
    shares = language_shares(response.text)
    return _over(1 - max(shares.values(), default=1.0), limit, f"outside {next(iter(shares), '')}")


def _over(value: float, limit: float, what: str) -> str:
    shown = f"{value}" if isinstance(value, int) else f"{value:.0%}"
    return f"{shown} {what}" if value > limit else ""


def _all_text(response: Response) -> str:
    return "\n".join([*(message["content"] or "" for message in response.messages), response.text])
