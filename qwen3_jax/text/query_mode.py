r"""Thinking on or off by the wording of a question: a look-up needs no thought, a question with several steps does.

The first of the `RULES` whose pattern occurs in a question of at most `max_words` words decides:

| Rule        | Mode         | Decides for                                                                      |
|-------------|--------------|----------------------------------------------------------------------------------|
| code        | thinking     | code in fences or backticks, calls, words of programming                         |
| arithmetic  | thinking     | digits with an operator, operations in words, words of mathematics               |
| proof       | thinking     | prove, derive, show that, theorem, ...                                           |
| steps       | thinking     | solve, how many, why, compare, step by step, if ... then, ...                    |
| translation | non-thinking | translate up to three words to German, what is ... in German                     |
| definition  | non-thinking | define, meaning of, what does ... mean, synonym of                               |
| search      | non-thinking | find, look up, search for, ... as the first words                                |
| look-up     | non-thinking | one sentence with who, when is, where is, which city, what is the name of, ...   |
| noun phrase | non-thinking | up to six words without a sentence's marks, verbs or pronouns: "weather in Oslo" |
| default     | thinking     | everything else                                                                  |

In doubt the answer is thinking, which costs tokens and not correctness. The rules are for English and match words, not
meaning: a request whose verb is not listed counts as a noun phrase, and so do a few words of another language in Latin
letters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from qwen3_jax.text.chat import Message


class Rule(NamedTuple):
    """Applies to a question of at most `max_words` words in which `pattern` occurs."""

    name: str
    thinking: bool
    pattern: re.Pattern[str]
    max_words: float


def _words(entries: str) -> str:
    """A pattern for any of the entries; `_` stands for white space inside an entry."""
    return r"\b(?:" + "|".join(entries.split()).replace("_", r"\s") + r")\b"


def _rule(name: str, thinking: bool, *patterns: str, max_words: float = math.inf) -> Rule:
    return Rule(name, thinking, re.compile("|".join(patterns), re.IGNORECASE), max_words)


_ORDER = r"^\W*(?:please\s|(?:can|could|would)\syou\s(?:please\s)?)?"
_IS = r"(?:'s|\s(?:is|are|was|were))"
_UP_TO_THREE = r"\s\S+(?:\s\S+){0,2}?\s"
_LANGUAGE = _words("""english french german spanish italian portuguese dutch swedish polish russian turkish arabic hindi
    chinese japanese korean latin greek hebrew""")
_PLACE_OR_TIME = _words("capital city country state continent river ocean planet year day month century")
_FACT = _words("name capital population currency area height age birthday author date address")

RULES = (
    _rule(
        "code",
        True,
        r"```|~~~|`[^`\n]+`|\w\([^()\n]{0,80}\)|[{};] ?(?:\n|$)",
        _words("""code functions? algorithms? program script regex sql bugs? debug implement refactor compilers?
            unit_tests? stack_trace exception"""),
    ),
    _rule(
        "arithmetic",
        True,
        r"\d\s?[-+*/^=<>\u00d7\u00f7\u2212]\s?[\d(]|\d\s?%|(?<!\w)[-+*/^]\d|=\s?-?\w|\b[a-z]\s?[-+*/^]\s?\d",
        r"\d\stimes\b",
        _words("""plus minus multiplied_by divided_by percent square_root modulo sum product average number_of value_of
            prime integers? equations? probability maximum minimum largest smallest"""),
    ),
    _rule("proof", True, _words("prove[sdn]? proofs? disprove show_that derive theorem lemma verify_that deduce")),
    _rule(
        "steps",
        True,
        _words("""solve calculate compute evaluate simplify estimate how_many how_much how_long how_far why explain
            step_by_step steps? plan compare contrast versus vs difference_between pros_and_cons trade-?offs?
            and_then after_that optimal puzzle suppose assume given_that reasons? if_.{0,200}_then"""),
    ),
    _rule(
        "translation",
        False,
        rf"{_ORDER}translate(?:\sthe\sword)?{_UP_TO_THREE}(?:in)?to\s{_LANGUAGE}",
        rf"^\W*(?:what{_IS}|how\sdo\s(?:you|i)\ssay){_UP_TO_THREE}in\s{_LANGUAGE}",
        max_words=12,
    ),
    _rule(
        "definition",
        False,
        _ORDER + _words("define spell"),
        _words("definition_of meaning_of what_(?:does|do)_.*_mean (?:synonyms?|antonyms?)_(?:of|for)"),
        max_words=12,
    ),
    _rule("search", False, _ORDER + _words("find look_up look_for search google fetch retrieve locate"), max_words=12),
    _rule(
        "look-up",
        False,
        r"^\W*(?:who(?:'s|se|m)?\b|(?:when|where)(?:'s|\s(?:is|are|was|were|do|does|did|will|has|have|had|can))\b"
        rf"|(?:which|what)\s{_PLACE_OR_TIME}|what{_IS}\s(?:the\s)?(?:{_FACT}|{_PLACE_OR_TIME}))[^.?!]*(?:[.?!]\W*)?$",
        max_words=12,
    ),
    _rule(
        "noun phrase",
        False,
        r"^(?!.*"
        + _words("""i you he she it we they me us my your this these those who what when where which how
            is are was were be am do does did have has had can could will would should shall may might must let
            add answer analy[sz]e ask begin build check choose classify come continue correct create decide
            describe design discuss draft draw edit fix generate get give go guess help imagine improve invent
            keep list make move name order pick play pretend put rank read recommend repeat rephrase rewrite say
            sort start stop suggest summari[sz]e take tell test think translate try turn use write
            hello hi hey thanks yes no not ok okay""")
        + r")\s?[a-z\u00c0-\u024f0-9][\w ,'&-]*$",
        max_words=6,
    ),
    _rule("default", True, ""),
)


def query_mode(messages: Sequence[Message]) -> tuple[bool, str]:
    """`(whether to think, name of the rule)` for the last user turn; other turns are ignored."""
    question = next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")
    length = len(question.split())
    # Each run of white space becomes one character. Otherwise `\s` patterns take quadratic time on long runs.
    question = re.sub(r"\s+", lambda run: "\n" if "\n" in run[0] else " ", question).strip()
    rule = next(rule for rule in RULES if length <= rule.max_words and rule.pattern.search(question))
    return rule.thinking, rule.name
