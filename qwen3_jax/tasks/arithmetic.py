"""Small problems with a known answer and one thought per operation, for the model that ships.

Three families. Sums can be answered at once. Chains (of operations on a last digit, of swaps of cups) are serial: the
operations do not commute, so each needs the value before it, and a model of few layers must write the values down.
In a thought each step is one token, so that a budget of B tokens buys about B operations.
"""

from __future__ import annotations

import dataclasses
import json
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen3_jax.text.chat import EMPTY_THOUGHT, STOP_TEXT
from qwen3_jax.text.tokenizer import train_sentencepiece

MAX_OPERATIONS = 10
_CUPS = 5
_STOP_SENTENCE = STOP_TEXT.removesuffix("\n</think>\n\n")  # what of it the template takes for a thought
# Pieces that the tokenizer keeps whole: one token per operation and per value.
PIECES = (
    *("user", "assistant", " /think", " /no_think", " _"),
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


def _places(operations: list[str]) -> str:
    """The operations in MAX_OPERATIONS places, the last ones blank: step k of every thought is then as far from its
    operation, which a small model learns in minutes rather than hours."""
    return "".join(operations) + " _" * (MAX_OPERATIONS - len(operations))


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
    return Problem(f"Start with {start} and keep the last digit:{_places(operations)}", tuple(steps), f"{value}")


def cup_chain(rng: random.Random, length: int) -> Problem:
    """Where a ball is after `length` swaps of cups: transpositions of five places."""
    value = start = rng.randrange(1, _CUPS + 1)
    operations, steps = [], []
    for _ in range(length):
        a, b = sorted(rng.sample(range(1, _CUPS + 1), 2))
        operations.append(f" {a}-{b}")
        value = {a: b, b: a}.get(value, value)
        steps.append(f" {value}")
    return Problem(f"The ball is under cup {start} and we swap:{_places(operations)}", tuple(steps), f"{value}")


def chain(rng: random.Random, length: int, *, held_out: bool) -> Problem:
    """A chain of either kind; one in 16 of all chains is held out, by its text, and never trained on."""
    while True:
        problem = rng.choice([digit_chain, cup_chain])(rng, length)
        if (zlib.crc32(problem.question.encode()) % 16 == 0) == held_out:
            return problem


def conversation(problem: Problem, rng: random.Random) -> dict[str, Any]:
    """One training record: thinking or not, flagged or not, and of the thoughts a quarter cut by the stop sentence.

    The stop sentence, and the empty thought where no flag asks for it, are injected when the model is used, so no loss
    is taken on them.
    """
    record: dict[str, Any] = {}
    if rng.random() < 0.6:
        flag = rng.choice(["", " /think"])
        thought = "".join(problem.steps)
        if rng.random() < 0.25:
            thought = "".join(problem.steps[: rng.randint(1, len(problem.steps))]) + _STOP_SENTENCE
            record["no_loss"] = [STOP_TEXT]
    else:
        flag, thought = " /no_think", ""
        if rng.random() < 0.25:  # enable_thinking off, or B = 0: the block is given, not written
            flag, record["no_loss"] = "", [EMPTY_THOUGHT]
    record["messages"] = [
        {"role": "user", "content": problem.question + flag},
        {"role": "assistant", "reasoning_content": thought, "content": problem.answer},
    ]
    return record


def training_records(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """`count` records: one in ten a sum, the others chains of 1 to MAX_OPERATIONS operations."""
    rng = random.Random(seed)
    for _ in range(count):
        length = rng.randint(1, MAX_OPERATIONS)
        yield conversation(sum_problem(rng) if rng.random() < 0.1 else chain(rng, length, held_out=False), rng)


def held_out_chains(count: int, seed: int) -> list[Problem]:
    """`count` chains that training never saw, with lengths spread evenly over 1 .. MAX_OPERATIONS."""
    rng = random.Random(seed)
    return [chain(rng, 1 + i * MAX_OPERATIONS // count, held_out=True) for i in range(count)]


def write_dataset(directory: Path, count: int, seed: int, vocab_size: int) -> None:
    """Writes `count` training records as `train.jsonl`, and `tokenizer.model` made for them, to `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    records = list(training_records(count, seed))
    with (directory / "train.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    texts = [
        message[key]
        for record in records[:5000]
        for message in record["messages"]
        for key in ("content", "reasoning_content")
        if message.get(key)
    ]
    train_sentencepiece([*texts, STOP_TEXT], directory / "tokenizer.model", vocab_size, PIECES)
