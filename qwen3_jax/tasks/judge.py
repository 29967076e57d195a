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

What an answer gives is what it boxes (`\boxed{...}`), else what follows its last "answer is", else its last candidate.
A function of yours takes `(record, thought, answer)` and returns a score, `(score, reason)` or a `Verdict`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from qwen3_jax.tasks import deadline

_SECONDS = 5.0  # for one answer to be parsed


class Verdict(NamedTuple):
    """score: 1.0 is right, 0.0 wrong; a verifier of yours may give any finite number. reason: why, in a few words."""

    score: float
    reason: str


Verifier = Callable[[Mapping[str, Any], str, str], Any]


def judge(record: Mapping[str, Any], thought: str, answer: str) -> Verdict:
    """Judges a response by the verifier that the record names.

    An answer that makes a verifier hang or fail scores 0 and says so: it costs one row, never a run.

    Raises:
      ValueError: the record does not have what its verifier reads, or the verifier is unknown or gives no number.
    """
    name = record.get("verifier", "exact")
    found = find_verifier(name)(record, thought, answer)
    score, reason = found if isinstance(found, tuple) and len(found) == 2 else (found, "")
    if isinstance(score, bool | int):
        score = float(score)
    if not isinstance(score, float) or not math.isfinite(score):
        raise ValueError(f"verifier: {name!r} gave {found!r:.60}; use a finite number, or one with a reason")
    return Verdict(score, str(reason))


def find_verifier(name: Any) -> Verifier:
    """The verifier of a name.

    Raises:
      ValueError: it is unknown, or a `module:function` that cannot be imported.
    """
    if isinstance(name, str) and name in VERIFIERS:
        return VERIFIERS[name]
    if not isinstance(name, str) or ":" not in name:
        raise ValueError(f"verifier: {name!r}; use one of {', '.join(VERIFIERS)}, or module:function")
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"verifier: {name!r} cannot be imported ({error})") from None
    if not callable(found):
        raise ValueError(f"verifier: {name!r} is no function; use one that takes (record, thought, answer)")
    return found


def _exact(record: Mapping[str, Any], thought: str, answer: str) -> Verdict:
    wanted = _reference(record)
    return _verdict(" ".join(answer.split()) == " ".join(wanted.split()), answer, wanted)


def _choice(record: Mapping[str, Any], thought: str, answer: str) -> Verdict:
    wanted = _reference(record).strip().strip("().").upper()
    if not re.fullmatch("[A-Z]", wanted):
        raise ValueError(f"answer: {record['answer']!r}; use a letter")
    letter = r"\(?\b([A-Z])\b\)?"
    found = [
        # What the answer gives; a letter at the start of a line ("B) ..."); or the answer is nothing else.
        *re.findall(letter, _given(answer) if _is_said(answer) else ""),
        *re.findall(r"^\W*([A-Z])[).:]", answer, re.MULTILINE)[-1:],
        *re.findall(rf"\A\W*{letter}\W*\Z", answer),
    ]
    return _verdict(found[0] == wanted, found[0], wanted) if found else Verdict(0.0, "no letter found")


def _number(record: Mapping[str, Any], thought: str, answer: str) -> Verdict:
    wanted, tolerance = _last_number(_reference(record)), record.get("tolerance", 0)
    if wanted is None:
        raise ValueError(f"answer: {record['answer']!r:.60}; use a number")
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance: {tolerance!r}; use a number >= 0")
    found = _last_number(_given(answer))
    if found is None:
        return Verdict(0.0, "no number found")
    return _verdict(abs(found - wanted) <= Fraction(tolerance), str(found), str(wanted))


def _math(record: Mapping[str, Any], thought: str, answer: str) -> Verdict:
    wanted = _reference(record)
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("verifier: 'math' needs math-verify; pip install -e '.[verify]'")
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
    except (TimeoutError, ValueError) as error:
        return Verdict(0.0, str(error))
    return _verdict(matches, answer, pattern)


def _matches(pattern: str, text: str) -> bool:
    return re.fullmatch(pattern, text, re.DOTALL) is not None


def _json(record: Mapping[str, Any], thought: str, answer: str) -> Verdict:
    fenced = re.findall(r"```(?:json)?\s*\n(.*?)```", answer, re.DOTALL)
    try:
        found = json.loads(fenced[-1] if fenced else answer)
    except (ValueError, RecursionError):
        return Verdict(0.0, "not JSON")
    if record.get("answer") is None:
        return Verdict(1.0, "JSON")
    wanted = record["answer"]
    if isinstance(wanted, str):
        try:
            wanted = json.loads(wanted)
        except ValueError:
            raise ValueError(f"answer: {wanted!r:.60}; use JSON, or leave it out") from None
    return _verdict(found == wanted, json.dumps(found), json.dumps(wanted))


def _mode(record: Mapping[str, Any], thought: str, answer: str) -> Verdict:
    wanted = record.get("enable_thinking")
    if not isinstance(wanted, bool):
        raise ValueError(f"enable_thinking: {wanted!r}; use true or false")
    return _verdict(bool(thought.strip()) == wanted, "a thought" if thought.strip() else "no thought", f"{wanted}")


def _length(record: Mapping[str, Any], thought: str, answer: str) -> Verdict:
    low, high = record.get("min_words", 0), record.get("max_words", math.inf)
    if ("min_words" not in record and "max_words" not in record) or not _is_count(low) or not _is_count(high):
        raise ValueError(f"min_words, max_words: {low!r}, {high!r}; use whole numbers, one of the two or both")
    count = len(answer.split())
    return Verdict(float(low <= count <= high), f"{count} words")


def _is_count(value: Any) -> bool:
    return value == math.inf or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)


VERIFIERS: dict[str, Verifier] = {
    "exact": _exact,
    "choice": _choice,
    "number": _number,
    "math": _math,
    "regex": _regex,
    "json": _json,
    "mode": _mode,
    "length": _length,
}


def _verdict(is_right: bool, found: str, wanted: str) -> Verdict:
    if is_right:
        return Verdict(1.0, "right")
    return Verdict(0.0, f"{' '.join(found.split())!r:.40} is not {' '.join(wanted.split())!r:.40}")


def _reference(record: Mapping[str, Any]) -> str:
    answer = record.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or answer == "":
        raise ValueError(f"answer: {answer!r:.60}; use a text or a number that the response is judged by")
    return str(answer)


_SAID = re.compile(r"answer\s*(?:is|:|=)\s*", re.IGNORECASE)


def _is_said(answer: str) -> bool:
    return bool(_boxed(answer) or _SAID.search(answer))


def _given(answer: str) -> str:
    """What is boxed last, else the rest of the line after the last "answer is", else all of it."""
    if boxed := _boxed(answer):
        return boxed[-1]
    said = list(_SAID.finditer(answer))
    return answer[said[-1].end() :].split("\n")[0] if said else answer


def _boxed(answer: str) -> list[str]:
    r"""The contents of each `\boxed{...}`, braces inside it included."""
    found = []
    for match in re.finditer(r"\\boxed\s*\{", answer):
        depth, at = 1, match.end()
        while at < len(answer) and depth:
            depth += {"{": 1, "}": -1}.get(answer[at], 0)
            at += 1
        if not depth:
            found.append(answer[match.end() : at - 1])
    return found


_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_NUMBER = re.compile(
    r"(?<![\w.])(-?\d{1,3}(?:,\d{3})+(?:\.\d+)?|-?\d*\.?\d+(?:[eE][-+]?\d{1,3})?)(?:\s*/\s*(\d+))?\s*(\\?%)?"
)


def _last_number(text: str) -> Fraction | None:
    """The last number in a text: whole, decimal, with commas in thousands, a fraction, a percentage."""
    text = _FRACTION.sub(r"\1/\2", text.replace("\u2212", "-"))
    found = list(_NUMBER.finditer(text))
    if not found:
        return None
    number, divisor, percent = found[-1].groups()
    value = Fraction(number.replace(",", "")) / (100 if percent else 1)
    return None if divisor and not int(divisor) else value / int(divisor or 1)
