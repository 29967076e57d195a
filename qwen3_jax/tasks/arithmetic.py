"""Small problems with a known answer, whose thoughts have one token per operation; the shipped model's training data.

There are three families. Sums can be answered at once. Chains (of operations on a last digit, of swaps of cups) are
serial: the operations do not commute, so each needs the value before it, and a model of few layers must write the
values down. A thinking budget of B tokens therefore allows about B operations.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen3_jax.text.chat import EMPTY_THOUGHT, STOP_SENTENCE, STOP_TEXT
from qwen3_jax.text.tokenizer import train_sentencepiece

MAX_OPERATIONS = 10
_CUPS = 5
# Entries of the tokenizer: one token per operation and per value.
PIECES = (
    *("user", "assistant", " /think", " /no_think", " _"),
    *(f" {value}" for value in range(10)),
    *(f" +{value}" for value in range(1, 10)),
    *(f" *{factor}" for factor in (3, 7, 9)),
    *(f" {a}-{b}" for a in range(1, _CUPS + 1) for b in range(a + 1, _CUPS + 1)),
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question, its solution in steps of one token each, and the answer."""

    question: str
    steps: tuple[str, ...]
    answer: str


_SUM = re.compile(r"(?:What|How much) is (\d) (?:\+|plus) (\d)\?")
_CHAIN = re.compile(
    r"(?:Start with|The ball is under cup) (\d) and (?:keep the last digit|we swap):((?: (?:[+*]\d|\d-\d))+)"
)
_REST = re.compile(r"(?: _)*(?:\s*/(?:no_)?think)?\s*")


def solve(question: str) -> Problem:
    """The problem of a question in the words of this module; a flag after it is left out.

    Raises:
      ValueError: it is no such question.
    """
    if (found := _SUM.match(question)) and _REST.fullmatch(question, found.end()):
        a, b = map(int, found.groups())
        return Problem(found[0], (f"{a}", " plus", f" {b}", " equals", f" {a + b}"), f"{a + b}")
    if not (found := _CHAIN.match(question)) or not _REST.fullmatch(question, found.end()):
        raise ValueError(f"{question!r:.60} is no problem of qwen3-jax tiny-data")
    value, steps = int(found[1]), []
    for operation in found[2].split():
        left, sign, right = re.split("([-+*])", operation)
        if sign == "-":
            value = {int(left): int(right), int(right): int(left)}.get(value, value)
        else:
            value = (value + int(right) if sign == "+" else value * int(right)) % 10
        steps.append(f" {value}")
    padding = " _" * (MAX_OPERATIONS - len(steps))
    return Problem(found[0] + padding, tuple(steps), f"{value}")


def sum_problem(rng: random.Random) -> Problem:
    """A sum of two digits, in words or signs."""
    a, b = rng.randrange(10), rng.randrange(10)
    sign = rng.choice(["+", "plus"])
    return solve(rng.choice([f"What is {a} {sign} {b}?", f"How much is {a} {sign} {b}?"]))


def _places(operations: list[str]) -> str:
    """The operations, padded to MAX_OPERATIONS entries. Step k of a thought then has the same distance to its operation
    in every problem, which a small model learns in minutes instead of hours."""
    return "".join(operations) + " _" * (MAX_OPERATIONS - len(operations))


def digit_chain(rng: random.Random, length: int) -> Problem:
    """`length` additions and multiplications modulo 10."""
    start, operations = rng.randrange(10), []
    for _ in range(length):
        adds = rng.random() < 0.5
        operations.append(f" +{rng.randrange(1, 10)}" if adds else f" *{rng.choice([3, 7, 9])}")
    return solve(f"Start with {start} and keep the last digit:{_places(operations)}")


def cup_chain(rng: random.Random, length: int) -> Problem:
    """The position of a ball after `length` swaps of two of five cups."""
    start, cups = rng.randrange(1, _CUPS + 1), range(1, _CUPS + 1)
    operations = [" {}-{}".format(*sorted(rng.sample(cups, 2))) for _ in range(length)]
    return solve(f"The ball is under cup {start} and we swap:{_places(operations)}")


def chain(rng: random.Random, length: int, *, held_out: bool) -> Problem:
    """A chain of either kind. A hash of its text decides whether it is held out of training: one chain in 16 is."""
    while True:
        problem = rng.choice([digit_chain, cup_chain])(rng, length)
        if (zlib.crc32(problem.question.encode()) % 16 == 0) == held_out:
            return problem


def conversation(problem: Problem, rng: random.Random) -> dict[str, Any]:
    """One training record, in either mode, with or without a flag. A quarter of the thoughts are cut by the stop text.

    The stop text, and the empty thought where no flag asks for it, are injected in decoding, not generated. They are
    therefore not in the loss.
    """
    record: dict[str, Any] = {}
    if rng.random() < 0.6:
        flag = rng.choice(["", " /think"])
        thought = "".join(problem.steps)
        if rng.random() < 0.25:
            thought = "".join(problem.steps[: rng.randint(1, len(problem.steps))]) + STOP_SENTENCE
            record["no_loss"] = [STOP_TEXT]
    else:
        flag, thought = " /no_think", ""
        if rng.random() < 0.25:  # enable_thinking off, or B = 0: the empty block is part of the prompt
            flag, record["no_loss"] = "", [EMPTY_THOUGHT]
    record["messages"] = [
        {"role": "user", "content": problem.question + flag},
        {"role": "assistant", "reasoning_content": thought, "content": problem.answer},
    ]
    return record


def training_records(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """`count` conversations of training problems."""
    rng = random.Random(seed)
    return (conversation(_training_problem(rng), rng) for _ in range(count))


def _training_problem(rng: random.Random) -> Problem:
    """One in ten is a sum, the others are chains of 1 to MAX_OPERATIONS operations."""
    length = rng.randint(1, MAX_OPERATIONS)
    return sum_problem(rng) if rng.random() < 0.1 else chain(rng, length, held_out=False)


def texts(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """`count` records of plain text, to pretrain on: one to four problems with their answers, most of them with the
    steps. The labels say how many problems there are, and whether all of them have steps (`worked`)."""
    rng = random.Random(seed)
    for _ in range(count):
        worked = [rng.random() < 0.8 for _ in range(rng.choice([1, 1, 2, 3, 4]))]
        parts = [_exercise(_training_problem(rng), with_steps, rng) for with_steps in worked]
        labels = {"problems": f"{len(worked)}", "worked": "yes" if all(worked) else "no"}
        yield {"text": rng.choice(["\n", "\n\n"]).join(parts), "labels": labels}


def _exercise(problem: Problem, with_steps: bool, rng: random.Random) -> str:
    """Question, steps if they are wanted, and answer. A rule of 7 or 8 tokens divides question and steps: in a
    conversation, as many tokens are between question and thought, without and with a flag."""
    steps = ["\n" + "-" * rng.choice([5, 6]) + "\n" + "".join(problem.steps)] if with_steps else []
    return "".join([problem.question, *steps, rng.choice(["\n", "\n\n"]), problem.answer])


def post_training_records(count: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """What post-training begins with: `count` queries with their answers, for sampling; `count` conversations that
    think, of other problems, as a larger model would have written them; and `count` without thoughts. Half of those are
    of problems that can be answered at once (sums, and up to three operations). The others are of the queries: without
    long ones, the length of a problem would tell the mode, and the flag would not be learnt."""
    rng = random.Random(seed)
    cold_start, asked = ([_training_problem(rng) for _ in range(count)] for _ in range(2))
    direct = asked[: count // 2]
    while len(direct) < count:
        problem = _training_problem(rng)
        direct += [problem] if _is_short(problem) else []
    return {
        "queries": [{"id": i, "prompt": problem.question, "answer": problem.answer} for i, problem in enumerate(asked)],
        "cold_start": [_chat(problem, {"reasoning_content": "".join(problem.steps)}) for problem in cold_start],
        "non_thinking": [_chat(problem, {}) for problem in direct],
    }


def _is_short(problem: Problem) -> bool:
    return len(problem.steps) <= 3 or " equals" in problem.steps


def _chat(problem: Problem, thought: dict[str, str]) -> dict[str, Any]:
    turn = {"role": "assistant", **thought, "content": problem.answer}
    return {"messages": [{"role": "user", "content": problem.question}, turn]}


def held_out_chains(count: int, seed: int) -> list[Problem]:
    """`count` held-out chains, with lengths spread evenly over 1 .. MAX_OPERATIONS."""
    rng = random.Random(seed)
    return [chain(rng, 1 + i * MAX_OPERATIONS // count, held_out=True) for i in range(count)]


def write_dataset(directory: Path, count: int, seed: int, vocab_size: int) -> None:
    """Writes `count` training records as `train.jsonl`, and `tokenizer.model` made for them, to `directory`; and for a
    recipe in stages `count` records as `text.jsonl`, and one for each 30 of `post_training_records`."""
    directory.mkdir(parents=True, exist_ok=True)
    records = list(training_records(count, seed))
    files = {"train": records, "text": list(texts(count, seed + 1)), **post_training_records(count // 30, seed + 2)}
    for name, found in files.items():
        with (directory / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in found)
    written = [
        message[key]
        for record in records[:5000]
        for message in record["messages"]
        for key in ("content", "reasoning_content")
        if message.get(key)
    ]
    train_sentencepiece([*written, STOP_TEXT], directory / "tokenizer.model", vocab_size, PIECES)
