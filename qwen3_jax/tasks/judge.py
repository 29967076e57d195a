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
| language | most of the answer is in the language (extra `verify`) | `language`, as "en" |
| arithmetic | the answer is that of a problem of `qwen3-jax tiny-data`, which is solved | the question, or `answer` |
| reasoning-gym | reasoning-gym scores it so, 0 to 1 (extra `verify`) | the question, `answer`, `metadata` |
| code | the last code block, or else the answer, passes the tests; see `tasks.code_answer` | `tests`, Python |

What an answer gives is what it boxes (`\boxed{...}`), else what follows its last "answer is", else its last candidate.
The question is `prompt`, or the last user's turn of `messages`. Code runs only where the environment variable
QWEN3_JAX_RUN_CODE is 1, since it can do whatever the user can do.

A function of yours takes `(record, thought, answer)`, JSON data, and returns a score or `(score, reason)`. It is called
in a process of its own and has a minute for each answer.
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
from qwen3_jax.tasks.language import language_shares

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
    score, reason = found if isinstance(found, list | tuple) and len(found) == 2 else (found, "")
    if isinstance(score, bool | int):
        score = float(score)
    if not isinstance(score, float) or not math.isfinite(score):
        raise VerifierError(f"verifier: {name!r} gave {found!r:.60}; use a finite number, or one with a reason")
    return Verdict(score, str(reason))


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
    verifier, said = record.get("verifier", "exact"), _given(answer)
    if verifier == "choice":
        letters = [re.findall(r"\b([A-Z])\b", _given(text)) for text in (thought, answer) if _is_said(text)]
        first, second = (letters[0][:1], letters[1][:1]) if len(letters) == 2 else ([], [])
        return (
            f"{first[0]!r} in the thought, {second[0]!r} in the answer" if first and second and first != second else ""
        )
    if verifier == "math" and _is_said(thought):
        verdict = _math({"answer": said}, "", f"${_given(thought)}$")
        return "" if verdict.score else f"the thought's {verdict.reason}"
    if verifier in ("number", "arithmetic", "exact"):
        found, wanted = _last_number(_given(thought)), _last_number(said)
        if found is not None and wanted is not None and found != wanted:
            return f"{found} in the thought, {wanted} in the answer"
    return ""


def _own(name: str, record: Mapping[str, Any], thought: str, answer: str) -> Any:
    module, _, function = name.partition(":")
    try:
        return deadline.call(module, function, record, thought, answer, seconds=_OWN_SECONDS)
    except TimeoutError as error:
        return Verdict(0.0, str(error))
    except ValueError as error:
        raise VerifierError(f"verifier: {name!r} raised {error}; mend it, or use another") from None


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
    _require("math", "math_verify")
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


def _language(record: Mapping[str, Any], thought: str, answer: str) -> Verdict:
    wanted = record.get("language")
    if not isinstance(wanted, str) or not re.fullmatch("[a-z]{2,3}", wanted):
        raise ValueError(f"language: {wanted!r}; use its code, such as en")
    _require("language", "py3langid")
    found = next(iter(language_shares(answer)), "no language")
    return _verdict(found == wanted, found, wanted)


def _arithmetic(record: Mapping[str, Any], thought: str, answer: str) -> Verdict:
    if record.get("answer") is not None:
        return _exact(record, thought, answer)
    return _exact({"answer": arithmetic.solve(_question(record)).answer}, thought, answer)


def _gym(record: Mapping[str, Any], thought: str, answer: str) -> Verdict:
    metadata = record.get("metadata")
    if not isinstance(metadata, Mapping) or "source_dataset" not in metadata:
        raise ValueError(f"metadata: {metadata!r:.60}; use that of reasoning-gym's problem")
    _require("reasoning-gym", "reasoning_gym")
    arguments = (metadata, _question(record), record.get("answer"), _given(answer).strip())
    try:
        score = deadline.call("qwen3_jax.tasks.gym", "score", *arguments, seconds=_SECONDS)
    except (TimeoutError, ValueError) as error:
        return Verdict(0.0, str(error))
    return Verdict(score, f"{metadata['source_dataset']}")


def _code(record: Mapping[str, Any], thought: str, answer: str) -> Verdict:
    tests = record.get("tests")
    if not isinstance(tests, str) or not tests.strip():
        raise ValueError(f"tests: {tests!r:.60}; use Python that raises where the code is wrong")
    if os.environ.get(_RUN_CODE) != "1":
        raise VerifierError(f"verifier: 'code' runs what a model wrote; set {_RUN_CODE}=1 where that may do no harm")
    blocks = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)```", answer, re.DOTALL)
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
    for message in reversed(record.get("messages") or ()):
        if message.get("role") == "user":
            return message["content"]
    raise ValueError("prompt: missing; use the question, or messages with a user's turn")


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
    "language": _language,
    "arithmetic": _arithmetic,
    "reasoning-gym": _gym,
    "code": _code,
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
