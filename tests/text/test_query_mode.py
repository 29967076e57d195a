"""The mode by type of query: a table of questions, and that every rule decides some of them."""

from __future__ import annotations

import pytest

from qwen3_jax.tasks.arithmetic import held_out_chains
from qwen3_jax.text import query_mode as module
from qwen3_jax.text.query_mode import RULES, query_mode

QUESTIONS = [
    # code
    ("```python\nprint(1)\n```\nWhat does this print?", True, "code"),
    ("Who calls `main`?", True, "code"),
    ("what is f(x)", True, "code"),
    ("Find the bug", True, "code"),
    ("Write a regex for dates", True, "code"),
    ("int a;\nint b", True, "code"),
    # arithmetic
    ("What is 2 + 3?", True, "arithmetic"),
    ("7*8", True, "arithmetic"),
    ("How much is 4 plus 5?", True, "arithmetic"),
    ("Start with 3 and keep the last digit: +4 *3 _ _", True, "arithmetic"),
    ("The ball is under cup 2 and we swap: 1-3 2-5", True, "arithmetic"),
    ("Find x where x=7", True, "arithmetic"),
    ("What is 15% off fifty?", True, "arithmetic"),
    ("6 times seven", True, "arithmetic"),
    ("Find the largest prime below a hundred", True, "arithmetic"),
    # proof
    ("Prove that root two is irrational", True, "proof"),
    ("Show that every tree is bipartite", True, "proof"),
    ("Who needs a proof of this?", True, "proof"),
    # steps
    ("How many moons has Mars?", True, "steps"),
    ("Why is the sky blue?", True, "steps"),
    ("Compare Rome and Athens", True, "steps"),
    ("Who should speak first? Solve it step by step.", True, "steps"),
    ("If it rains then where is the cat?", True, "steps"),
    # translation
    ("Translate 'good morning' to German", False, "translation"),
    ("Please translate the word cat into French.", False, "translation"),
    ("How do you say thank you in Korean?", False, "translation"),
    ("what's dog in Spanish", False, "translation"),
    ("Translate this letter, which my grandmother wrote, to German", True, "default"),
    # definition
    ("Define entropy", False, "definition"),
    ("What does laconic mean?", False, "definition"),
    ("synonym for happy", False, "definition"),
    ("meaning of serendipity", False, "definition"),
    # search
    ("Find the address of the Louvre", False, "search"),
    ("look up Marie Curie", False, "search"),
    ("Could you please search for red shoes?", False, "search"),
    ("I cannot find the words", True, "default"),
    # look-up
    ("Who wrote Hamlet?", False, "look-up"),
    ("When did the Berlin Wall fall?", False, "look-up"),
    ("Where is Timbuktu?", False, "look-up"),
    ("Which city is the capital of Peru?", False, "look-up"),
    ("which capital lies on the Danube", False, "look-up"),
    ("What is the capital of France?", False, "look-up"),
    ("What's the population of Oslo?", False, "look-up"),
    ("Who's the mayor of London?", False, "look-up"),
    ("When I drop a ball, does it bounce?", True, "default"),
    ("Who is right? I say Tom. Ann says Jim.", True, "default"),
    ("Who among the nine people that I told you of yesterday evening has the key?", True, "default"),
    # noun phrase
    ("weather in Oslo", False, "noun phrase"),
    ("World Cup 2018 winner", False, "noun phrase"),
    ("COVID-19 symptoms", False, "noun phrase"),
    ("Marie Curie's birthplace", False, "noun phrase"),
    ("Write a poem", True, "default"),
    ("the old man and the sea by Hemingway", True, "default"),
    # default
    ("", True, "default"),
    ("Hello", True, "default"),
    ("Is it better to rent or to buy?", True, "default"),
    ("法国的首都", True, "default"),
]


@pytest.mark.parametrize(("question", "thinking", "rule"), QUESTIONS)
def test_questions(question: str, thinking: bool, rule: str) -> None:
    assert query_mode([{"role": "user", "content": question}]) == (thinking, rule)


def test_every_rule_decides_some_question_with_its_mode() -> None:
    decided = {(name, thinking) for _, thinking, name in QUESTIONS}
    assert decided == {(rule.name, rule.thinking) for rule in RULES}


def test_every_rule_is_documented() -> None:
    rows = [line.strip("| \n").split("|") for line in (module.__doc__ or "").splitlines() if line.startswith("| ")]
    assert [(row[0].strip(), row[1].strip() == "thinking") for row in rows[1:]] == [
        (rule.name, rule.thinking) for rule in RULES
    ]


def test_problems_of_the_model_that_ships_are_thought_about() -> None:
    for problem in held_out_chains(50, seed=0):
        assert query_mode([{"role": "user", "content": problem.question}]) == (True, "arithmetic")


def test_the_last_user_turn_alone_counts() -> None:
    first, last = {"role": "user", "content": "What is 2 + 3?"}, {"role": "user", "content": "Who wrote Hamlet?"}
    others = [{"role": "assistant", "content": "1 + 1"}, {"role": "tool", "content": "why"}]
    assert query_mode([first, others[0], last, *others]) == (False, "look-up")
    assert query_mode([last, others[0], first]) == (True, "arithmetic")
    assert query_mode([{"role": "system", "content": "Who wrote Hamlet?"}]) == (True, "default")


@pytest.mark.parametrize(
    "question",
    [
        *(unit * 100_000 for unit in ("x(", "if ", "1 ", "; ", "what do ", "who ", "translate a b ")),
        *(f"{start}{filler * 100_000}.x" for start in ("who", "if", "what do") for filler in (" ", ",", " ,", "a")),
    ],
    ids=lambda question: question[:10],
)
def test_a_long_question_is_decided_all_the_same(question: str) -> None:
    """In time linear in its length: with a pattern that is not, this test does not end."""
    assert query_mode([{"role": "user", "content": question}]) in [(rule.thinking, rule.name) for rule in RULES]


def test_white_space_does_not_matter() -> None:
    for question in ("What is the\tcapital  of\nFrance?", "  find\u00a0 a  pen", "if\n\nso\n\nthen what"):
        plain = query_mode([{"role": "user", "content": " ".join(question.split())}])
        assert query_mode([{"role": "user", "content": question}]) == plain
