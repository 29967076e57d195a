"""Which languages a text is written in, by py3langid (extra `verify`). Code and formulas are left out."""

from __future__ import annotations

import functools
import re
from collections import Counter
from typing import Any

_NOT_PROSE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\[a-zA-Z]+(?:\{[^{}]*\})*", re.DOTALL)
_SENTENCE = re.compile(r"[^.!?\n\u3002\uff01\uff1f]+")
_LETTERS = re.compile(r"[^\W\d_]")
_LEAST_BYTES = 20  # of letters in a sentence: a shorter one could be of many languages
_LEAST_PROBABILITY = 0.75


def language_shares(text: str) -> dict[str, float]:
    """The share of a text's letters by the language of their sentence (ISO 639-1), the largest first.

    Sentences that are too short to tell are left out; a text of such sentences alone has no language.

    Raises:
      ValueError: py3langid is not installed.
    """
    found: Counter[str] = Counter()
    for sentence in _SENTENCE.findall(_NOT_PROSE.sub(" ", text)):
        letters = "".join(_LETTERS.findall(sentence))
        if len(letters.encode()) >= _LEAST_BYTES:
            language, probability = _identifier().classify(sentence)
            if probability >= _LEAST_PROBABILITY:
                found[language] += len(letters)
    return {language: count / found.total() for language, count in found.most_common()}


def is_known(language: str) -> bool:
    """Whether py3langid recognises the language of this code (ISO 639-1)."""
    return language in _identifier().nb_classes


@functools.cache
def _identifier() -> Any:
    try:
        from py3langid import langid
    except ImportError:
        raise ValueError("language: needs py3langid; pip install -e '.[verify]'") from None
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
