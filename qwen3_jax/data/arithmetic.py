"""Small problems with a known answer and one thought per operation, for the model that ships.

Three families. Sums can be answered at once. Chains (of operations on a last digit, of swaps of cups) are serial: the
operations do not commute, so each needs the value before it, and a model of few layers must write the values down.
In a thought each step is one token, so that a budget of B tokens buys about B operations.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STOP_SENTENCE = (
    "Considering the limited time by the user, I have to give the solution based on the thinking directly now."
)
MAX_OPERATIONS = 10
_CUPS = 5
# Pieces that the tokenizer keeps whole: one token per operation and per value.
PIECES = (
    *(f" {value}" for value in range(10)),
    *(f" +{value}" for value in range(1, 10)),
    *(f" *{factor}" for factor in (3, 7, 9)),
    *(f" {a}-{b}" for a in range(1, _CUPS + 1) for b in range(a + 1, _CUPS + 1)),
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question, the thought that solves it cut into steps of one token, and the answer."""

    question: str
    steps: tuple[str, ...]
    answer: str


def sum_problem(rng: random.Random) -> Problem:
    """A sum of two digits, in words or signs."""
    a, b = rng.randrange(10), rng.randrange(10)
    sign = rng.choice(["+", "plus"])
    question = rng.choice([f"What is {a} {sign} {b}?", f"How much is {a} {sign} {b}?"])
    return Problem(question, (f"{a}", " plus", f" {b}", " equals", f" {a + b}"), f"{a + b}")


def digit_chain(rng: random.Random, length: int) -> Problem:
    """`length` additions and multiplications of which only the last digit is kept: affine maps modulo 10."""
    value = start = rng.randrange(10)
    operations, steps = [], []
    for _ in range(length):
        if rng.random() < 0.5:
            operand = rng.randrange(1, 10)
            operations.append(f" +{operand}")
            value = (value + operand) % 10
        else:
            factor = rng.choice([3, 7, 9])
            operations.append(f" *{factor}")
            value = value * factor % 10
        steps.append(f" {value}")
    return Problem(f"Start with {start} and keep the last digit:{''.join(operations)}", tuple(steps), f"{value}")


def cup_chain(rng: random.Random, length: int) -> Problem:
    """Where a ball is after `length` swaps of cups: transpositions of five places."""
    value = start = rng.randrange(1, _CUPS + 1)
    operations, steps = [], []
    for _ in range(length):
        a, b = sorted(rng.sample(range(1, _CUPS + 1), 2))
        operations.append(f" {a}-{b}")
        value = {a: b, b: a}.get(value, value)
        steps.append(f" {value}")
    return Problem(f"The ball is under cup {start} and we swap:{''.join(operations)}", tuple(steps), f"{value}")


def chain(rng: random.Random, length: int) -> Problem:
    """A chain of either kind."""
    return rng.choice([digit_chain, cup_chain])(rng, length)


def conversation(problem: Problem, rng: random.Random) -> dict[str, Any]:
    """One training record: thinking or not, flagged or not, and of the thoughts a quarter cut by the stop sentence.

    The stop sentence is injected when the model is used, so no loss is taken on it.
    """
    record: dict[str, Any] = {}
    if rng.random() < 0.6:
        flag = rng.choice(["", " /think"])
        thought = "".join(problem.steps)
        if rng.random() < 0.25:
            thought = "".join(problem.steps[: rng.randint(1, len(problem.steps))]) + f"\n\n{STOP_SENTENCE}"
            record["no_loss"] = [f"\n\n{STOP_SENTENCE}\n</think>\n\n"]
    else:
        flag, thought = " /no_think", ""
    record["messages"] = [
        {"role": "user", "content": problem.question + flag},
        {"role": "assistant", "reasoning_content": thought, "content": problem.answer},
    ]
    return record


def training_records(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """`count` records: one in ten a sum, the others chains of 1 to MAX_OPERATIONS operations."""
    rng = random.Random(seed)
    for _ in range(count):
        problem = sum_problem(rng) if rng.random() < 0.1 else chain(rng, rng.randint(1, MAX_OPERATIONS))
        yield conversation(problem, rng)


def held_out_chains(count: int, seed: int) -> list[Problem]:
    """`count` chains with lengths spread evenly over 1 .. MAX_OPERATIONS, from a seed that training does not use."""
    rng = random.Random(f"held-out {seed}")
    return [chain(rng, 1 + i * MAX_OPERATIONS // count) for i in range(count)]


def write_jsonl(path: Path, count: int, seed: int) -> None:
    """Writes `count` training records to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for record in training_records(count, seed):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
