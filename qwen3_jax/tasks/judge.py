r"""How good a response is: verifiers, each named in the record that it judges.

A record has `verifier`, one of the names below or a function of yours as `module:function`, and what that one reads:

| verifier | score 1 where | reads |
|---|---|---|
| exact (the default) | the answer is the reference, white space aside | `answer` |
| choice | the letter that the answer gives is the reference | `answer`, a letter |
| number | the number that the answer gives equals the reference, as a fraction or with a `tolerance` | `answer` |
| math | math-verify finds the two expressions equal (extra `verify`) | `answer`, LaTeX or plain |
| regex | the pattern matches the complete answer | `answer`, the pattern |
| json | the answer is JSON, alone or in a code fence, and equals the reference if there is one | `answer`, optional |
| mode | there is a thought if `enable_thinking` is true, and none if it is false | `enable_thinking` |
| length | the answer has `min_words` to `max_words` words | either of the two, or both |
| language | most of its sentences of 20 letters or more are in the language (extra `verify`) | `language`, as "en" |
| arithmetic | the answer is that of a problem of `qwen3-jax tiny-data`, which is solved | the question, or `answer` |
| reasoning-gym | reasoning-gym scores it so, 0 to 1 (extra `verify`) | the question, `answer`, `metadata` |
| code | the last code block, or else the answer, passes the tests; see `tasks.code_answer` | `tests`, Python |

What an answer gives is what it boxes last (`\boxed{...}`), else what follows its last "answer is". A number is the
first one there (the last of an equation); without a box or such words, it is the last of the answer.
The question is `prompt`, or the last user's turn of `messages`. Code runs only where the environment variable
QWEN3_JAX_RUN_CODE is 1, since it can do whatever the user can do.

A function of yours, at the top of its module, takes `(record, thought, answer)`, JSON data, and returns a score or
`(score, reason)`. It is called in a process of its own and has a minute for each answer.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from qwen3_jax.tasks import arithmetic, deadline
from qwen3_jax.tasks.code_answer import run_tests
from qwen3_jax.tasks.language import is_known, language_shares

_SECONDS = 5.0  # for one answer to be parsed
_OWN_SECONDS = 60.0  # for a function of the user's
_CODE_SECONDS = 10.0
_RUN_CODE = "QWEN3_JAX_RUN_CODE"


class Verdict(NamedTuple):
    """score: 1.0 is right, 0.0 wrong; a verifier of yours may give any finite number. reason: why, in a few words."""

    score: float
    reason: str


class VerifierError(ValueError):
    """A verifier is unknown or not installed, may not run, raises, or gives no number: no record can mend that."""


Verifier = Callable[[Mapping[str, Any], str, str], Any]


def judge(record: Mapping[str, Any], thought: str, answer: str) -> Verdict:
    """Judges a response by the verifier that the record names.

    An answer that makes a verifier hang scores 0 and says so: it costs one row, never a run.

    Raises:
      ValueError: the record does not have what its verifier reads; the verifier is unknown, raises, or gives no number.
    """
    name = record.get("verifier", "exact")
    found = find_verifier(name)(record, thought, answer)
    is_pair = isinstance(found, list | tuple) and len(found) == 2 and isinstance(found[1], str)
    score, reason = found if is_pair else (found, "")
    try:
        score = float(score) if isinstance(score, bool | int) else score
    except OverflowError:
        score = math.inf
    if not isinstance(score, float) or not math.isfinite(score):
        raise VerifierError(f"verifier: {name!r} gave {found!r:.60}; use a finite number, or one with a reason")
    return Verdict(score, _plain(reason))


def find_verifier(name: Any) -> Verifier:
    """The verifier of a name.

    Raises:
      ValueError: it is unknown. A `module:function` is imported when it is called.
    """
    if isinstance(name, str) and name in VERIFIERS:
        return VERIFIERS[name]
    if not isinstance(name, str) or not all(name.partition(":")):
        raise VerifierError(f"verifier: {name!r}; use one of {', '.join(VERIFIERS)}, or module:function")
    return functools.partial(_own, name)


def contradicts(record: Mapping[str, Any], thought: str, answer: str) -> str:
    """How the result of a thought differs from that of its answer; empty where they agree, or one cannot be told."""
    verifier, first, second = record.get("verifier", "exact"), _said(thought), _said(answer)
    if verifier == "math" and first is not None:
        shown = answer if second is None else second
        try:
            verdict = _math({"answer": _first_line(shown)}, "", f"${_first_line(first)}$")
        except VerifierError:
            raise
        except ValueError:  # the answer is no expression: it is for `judge` to say so
            return ""
        return "" if verdict.score else f"the thought's {verdict.reason}"
    results: list[Any] = []
    if verifier == "choice" and first is not None and second is not None:
        results = [_first_letter(first), _first_letter(second)]
    if verifier in ("number", "arithmetic", "exact"):
        results = [_number_given(thought), _number_given(answer)]
    if None in results or len(set(results)) < 2:
        return ""
    return f"{results[0]} in the thought, {results[1]} in the answer"


def _own(name: str, record: Mapping[str, Any], thought: str, answer: str) -> Any:
    module, _, function = name.partition(":")
    try:
        return deadline.call(module, function, record, thought, answer, seconds=_OWN_SECONDS)
    except TimeoutError as error:
        return Verdict(0.0, str(error))
    except TypeError as error:
        raise ValueError(f"record: cannot be given to {name!r} ({error}); use JSON data") from None
    except ValueError as error:
        raise VerifierError(f"verifier: {name!r} {error}; mend it, or use another") from None


def _exact(record: Mapping[str, Any], thought: str, answer: str) -> Verdict:
    wanted = _reference(record)
    return _verdict(_plain(answer) == _plain(wanted), answer, wanted)


def _choice(record: Mapping[str, Any], thought: str, answer: str) -> Verdict:
    wanted = _reference(record).strip().strip("().").upper()
    if not re.fullmatch("[A-Z]", wanted):
        raise ValueError(f"answer: {record['answer']!r}; use a letter")
    said = _said(answer)
    found = _first_letter(said) if said is not None else _only_letter(answer)
    return Verdict(0.0, "no letter found") if found is None else _verdict(found == wanted, found, wanted)


def _number(record: Mapping[str, Any], thought: str, answer: str) -> Verdict:
    wanted, tolerance = _last(_numbers(_reference(record))), record.get("tolerance", 0)
    if wanted is None:
        raise ValueError(f"answer: {record['answer']!r:.60}; use a number")
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance: {tolerance!r}; use a number >= 0")
    found = _number_given(answer)
    if found is None:
        return Verdict(0.0, "no number found")
    return _verdict(abs(found - wanted) <= Fraction(tolerance), str(found), str(wanted))


def _math(record: Mapping[str, Any], thought: str, answer: str) -> Verdict:
    wanted = _reference(record)
    _require("math", "math_verify")
    if _plain(answer) == _plain(wanted):
        return Verdict(1.0, "right")
    try:
        is_equal = deadline.call("qwen3_jax.tasks.math_answer", "are_equal", wanted, answer, seconds=_SECONDS)
    except (TimeoutError, ValueError) as error:
        return Verdict(0.0, str(error))
    if is_equal is None:
        raise ValueError(f"answer: {wanted!r:.60}; use an expression that math-verify reads")
    return _verdict(is_equal, answer, wanted)


def _regex(record: Mapping[str, Any], thought: str, answer: str) -> Verdict:
    pattern = _reference(record)
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"answer: {pattern!r:.60} is no pattern ({error})") from None
    try:
        matches = deadline.call(__name__, "_matches", pattern, answer.strip(), seconds=_SECONDS)
    except TimeoutError as error:
        return Verdict(0.0, str(error))
    return _verdict(matches, answer, pattern)


def _matches(pattern: str, text: str) -> bool:
    return re.fullmatch(pattern, text, re.DOTALL) is not None


def _json(record: Mapping[str, Any], thought: str, answer: str) -> Verdict:
    fenced = re.findall(r"```(?:json)?[ \t]*\n(.*?)```", answer, re.DOTALL | re.IGNORECASE)
    try:
        found = _parsed(fenced[-1] if fenced else answer)
    except (ValueError, RecursionError):
        return Verdict(0.0, "not JSON")
    if record.get("answer") is None:
        return Verdict(1.0, "JSON")
    wanted = record["answer"]
    if isinstance(wanted, str):
        try:
            wanted = _parsed(wanted)
        except (ValueError, RecursionError):
            raise ValueError(f"answer: {wanted!r:.60}; use JSON, or leave it out") from None
    return _verdict(_are_same(found, wanted), json.dumps(found), json.dumps(wanted))


def _parsed(text: str) -> Any:
    def refuse(name: str) -> None:  # NaN and Infinity, which Python reads and JSON does not have
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


def _are_same(first: Any, second: Any) -> bool:
    """Equal as JSON: 1 is 1.0, and true is not 1, as it is in Python."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_are_same(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_are_same, first, second))
    return first == second


def _mode(record: Mapping[str, Any], thought: str, answer: str) -> Verdict:
    wanted = record.get("enable_thinking")
    if not isinstance(wanted, bool):
        raise ValueError(f"enable_thinking: {wanted!r}; use true or false")
    return _verdict(bool(thought.strip()) == wanted, "a thought" if thought.strip() else "no thought", f"{wanted}")


def _length(record: Mapping[str, Any], thought: str, answer: str) -> Verdict:
    low, high = record.get("min_words"), record.get("max_words")
    given = [limit for limit in (low, high) if limit is not None]
    if not given or not all(map(_is_count, given)) or given != sorted(given):
        raise ValueError(
            f"min_words, max_words: {low!r}, {high!r}; use whole numbers, the first not larger; one is enough"
        )
    count = len(answer.split())
    is_right = (low is None or low <= count) and (high is None or count <= high)
    return Verdict(float(is_right), f"{count} words")


def _language(record: Mapping[str, Any], thought: str, answer: str) -> Verdict:
    wanted = record.get("language")
    if not isinstance(wanted, str) or not re.fullmatch("[a-z]{2,3}", wanted):
        raise ValueError(f"language: {wanted!r}; use its code, such as en")
    _require("language", "py3langid")
    if not is_known(wanted):
        raise ValueError(f"language: {wanted!r}; use the code of a language that py3langid tells, such as en")
    found = next(iter(language_shares(answer)), "no language")
    return _verdict(found == wanted, found, wanted)


def _arithmetic(record: Mapping[str, Any], thought: str, answer: str) -> Verdict:
    if record.get("answer") is not None:
        return _exact(record, thought, answer)
    return _exact({"answer": arithmetic.solve(_question(record)).answer}, thought, answer)


def _gym(record: Mapping[str, Any], thought: str, answer: str) -> Verdict:
    metadata = record.get("metadata")
    if not isinstance(metadata, Mapping) or not isinstance(metadata.get("source_dataset"), str):
        raise ValueError(f"metadata: {metadata!r:.60}; use that of reasoning-gym's problem")
    _require("reasoning-gym", "reasoning_gym")
    name = metadata["source_dataset"]
    # All that follows "answer is" may be it, such as a grid, or its first line.
    said = _said(answer)
    readings = [answer.strip()] if said is None else list(dict.fromkeys([_first_line(said).strip(), said.strip()]))
    arguments = (metadata, _question(record), record.get("answer"), readings)
    try:
        score = deadline.call("qwen3_jax.tasks.gym_answer", "best_score", *arguments, seconds=_SECONDS)
    except (TimeoutError, ValueError) as error:
        return Verdict(0.0, str(error))
    if score is None:
        raise ValueError(f"metadata.source_dataset: {name!r:.60}; use a data set of reasoning-gym")
    return Verdict(score, name)


def _code(record: Mapping[str, Any], thought: str, answer: str) -> Verdict:
    tests = record.get("tests")
    if not isinstance(tests, str) or not tests.strip():
        raise ValueError(f"tests: {tests!r:.60}; use Python that raises where the code is wrong")
    if os.environ.get(_RUN_CODE) != "1":
        raise VerifierError(f"verifier: 'code' runs what a model wrote; set {_RUN_CODE}=1 where that may do no harm")
    blocks = re.findall(r"```(?:python3?|py)?[ \t]*\n(.*?)```", answer, re.DOTALL | re.IGNORECASE)
    problem = run_tests(blocks[-1] if blocks else answer, tests, _CODE_SECONDS)
    return Verdict(float(not problem), problem or "passed")


def _require(verifier: str, module: str) -> None:
    if importlib.util.find_spec(module) is None:
        package = module.replace("_", "-")
        raise VerifierError(f"verifier: {verifier!r} needs {package}; pip install -e '.[verify]'")


def _question(record: Mapping[str, Any]) -> str:
    """`prompt`, or what the last user's turn of `messages` says.

    Raises:
      ValueError: the record has neither.
    """
    if isinstance(record.get("prompt"), str):
        return record["prompt"]
    messages = record.get("messages")
    for message in reversed(messages) if isinstance(messages, list | tuple) else ():
        if isinstance(message, Mapping) and message.get("role") == "user" and isinstance(message.get("content"), str):
            return message["content"]
    raise ValueError("prompt: missing; use the question, or messages with a user's turn of text")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


VERIFIERS: dict[str, Verifier] = {
    "exact": _exact,
    "choice": _choice,
    "number": _number,
    "math": _math,
    "regex": _regex,
    "json": _json,
    "mode": _mode,
    "length": _length,
    "language": _language,
    "arithmetic": _arithmetic,
    "reasoning-gym": _gym,
    "code": _code,
}


def _verdict(is_right: bool, found: str, wanted: str) -> Verdict:
    if is_right:
        return Verdict(1.0, "right")
    return Verdict(0.0, f"{_plain(found)!r:.40} is not {_plain(wanted)!r:.40}")


def _first_line(text: str) -> str:
    return text.split("\n")[0]


def _plain(text: str) -> str:
    return " ".join(text.split())


def _reference(record: Mapping[str, Any]) -> str:
    answer = record.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or answer == "":
        raise ValueError(f"answer: {answer!r:.60}; use a text or a number that the response is judged by")
    return str(answer)


_SAID = re.compile(r"answer\s*(?:is|:|=)\s*:?[\s*]*", re.IGNORECASE)


def _said(answer: str) -> str | None:
    """What is boxed last, else all that follows the last "answer is"; None where there is neither."""
    if (boxed := _last_boxed(answer)) is not None:
        return boxed
    said = list(_SAID.finditer(answer))
    return answer[said[-1].end() :] if said else None


def _last_boxed(answer: str) -> str | None:
    r"""The contents of the last `\boxed{...}`, braces inside it included; in one pass, since it may be hostile."""
    opened: list[int | None] = []  # for each open brace where the contents of its box begin
    last: tuple[int, int] | None = None
    for found in re.finditer(r"\\boxed\s*\{|[{}]", answer):
        if found[0] != "}":
            opened.append(None if found[0] == "{" else found.end())
        elif opened and (start := opened.pop()) is not None and (last is None or start > last[0]):
            last = start, found.start()
    return None if last is None else answer[slice(*last)]


# A letter that is meant: not the article, nor the pronoun, of a sentence.
_LETTER = r"(?:[B-HJ-Z]|[AI](?!\s+(?!because|since|as\b|is\b)[a-z]))\b"


def _first_letter(said: str) -> str | None:
    """Of what an answer gives: the letter that it begins with."""
    found = re.match(rf"\W*(?:(?i:option|choice|letter)\W+)?({_LETTER})", said)
    return found[1] if found else _alone(said)


def _only_letter(answer: str) -> str | None:
    """The letter of an answer that does not say "answer": one that is chosen in words, that begins a line as
    "B) ...", or that is nothing else."""
    chosen = re.findall(rf"(?<!not )\b(?i:option|choice|choose|pick|select)\W+({_LETTER})", answer)
    listed = re.findall(r"^[^\w\n]*([A-Z])[).:]", answer, re.MULTILINE)
    return next(iter([*chosen[-1:], *listed[-1:]]), None) or _alone(answer)


def _alone(text: str) -> str | None:
    found = re.fullmatch(r"\W*([A-Za-z])\W*", text)
    return found[1].upper() if found else None


_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_NUMBER = re.compile(
    r"(?<![\w.])(-?\d{1,3}(?:,\d{3})+(?:\.\d+)?|-?\d*\.?\d+(?:[eE][-+]?\d{1,3})?)(?:\s*/\s*(\d+))?\s*(\\?%)?"
)


_MOST_DIGITS = 400


def _number_given(answer: str) -> Fraction | None:
    """The number that an answer gives: the first of the clause in the box or after "answer is", the last one if that
    clause has an equation. Without a box or such words, the last number of the answer."""
    said = _said(answer)
    if said is None:
        return _last(_numbers(answer))
    line = _first_line(said)
    if re.match(r"not\b", line):
        return None
    clause = re.split(r"[,;.](?:\s|$)", line)[0]
    found = _numbers(clause) or _numbers(line)[:1]
    return (found[-1] if "=" in clause else found[0]) if found else None


def _numbers(text: str) -> list[Fraction]:
    """The numbers in a text: whole, decimal, with commas in thousands, fractions, percentages. One with too many digits
    to be meant is none."""
    text, found = _FRACTION.sub(r"\1/\2", text.replace("\u2212", "-")), []
    for number, divisor, percent in _NUMBER.findall(text):
        if len(number) + len(divisor) <= _MOST_DIGITS and (not divisor or int(divisor)):
            found.append(Fraction(number.replace(",", "")) / int(divisor or 1) / (100 if percent else 1))
    return found


def _last(numbers: list[Fraction]) -> Fraction | None:
    return numbers[-1] if numbers else None
