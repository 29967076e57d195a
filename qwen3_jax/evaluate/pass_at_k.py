"""pass@k of a file of answers: the probability that one of k samples is correct (Chen et al. 2021, section 2.1)."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from qwen3_jax.plot import png
from qwen3_jax.text.records import parse_record


@dataclasses.dataclass(frozen=True)
class Score:
    """The score of a file of answers.

    prompts: number of prompts, including refused ones. refused: number of prompts with an error record.
    samples: minimum and maximum number of samples per answered prompt.
    pass_at: mean of `pass_at_k` over prompts, for k = 1, 2, 4, ... up to the minimum number of samples.
    unanswered: lines without `answer`, which were passed over.
    """

    prompts: int
    refused: int
    samples: tuple[int, int]
    pass_at: dict[int, float]
    unanswered: int = 0

    @property
    def accuracy(self) -> float:
        """Mean over prompts of the share of correct samples, which is pass@1."""
        return self.pass_at[1]


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate of pass@k: the probability that k of n samples, drawn without replacement, include one of
    the c correct ones. Computed in integers with one division, so that large n neither overflow nor lose precision.

    Raises:
      ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n:
        raise ValueError(f"c: {c}; use a number in 0..{n}")
    if not 1 <= k <= n:
        raise ValueError(f"k: {k}; use a number in 1..{n}")
    draws = math.comb(n, k)
    return (draws - math.comb(n - c, k)) / draws


def score_file(path: Path) -> Score:
    """Scores the answers that infer.py wrote to `path`.

    A line is a JSON object with `id`, `sample`, `content` and `answer`. It is correct if content and answer are equal,
    apart from white space around them. The lines of one id are the samples of one prompt. A line with `error` is a
    refused prompt: it counts as a prompt without a correct sample, and does not limit k. A line without `answer`, of an
    input line without one, is passed over.

    Raises:
      ValueError: `file:line: field: value; what to use instead`, or the file has no answer.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; use a JSONL file of answers")
    correct: dict[str | int, dict[int, bool]] = defaultdict(dict)
    refused = unanswered = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = _parse(line)
                if "error" in record:
                    refused += 1
                    continue
                if record.get("answer") is None:
                    unanswered += 1
                    continue
                samples = correct[record["id"]]
                if record["sample"] in samples:
                    raise ValueError(f"sample: {record['sample']} of id {record['id']!r} again; use another number")
                samples[record["sample"]] = record["content"].strip() == record["answer"].strip()
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    if not correct:
        raise ValueError(
            f"{path}: nothing to score, {refused} errors and {unanswered} lines without an `answer`; give the right "
            "answer as `answer` in the input"
        )
    prompts = len(correct) + refused
    counts = [(len(samples), sum(samples.values())) for samples in correct.values()]
    fewest, most = min(counts)[0], max(counts)[0]
    powers = [2**i for i in range(fewest.bit_length())]
    pass_at = {k: math.fsum(pass_at_k(n, c, k) for n, c in counts) / prompts for k in powers}
    return Score(prompts, refused, (fewest, most), pass_at, unanswered)


def plot_pass_at_k(score: Score, path: Path, title: str) -> None:
    """pass@k over k, as a PNG."""
    with png(path) as axes:
        axes.plot(list(score.pass_at), list(score.pass_at.values()), "o-", color="tab:blue")
        for k, value in score.pass_at.items():
            axes.annotate(f"{value:.2f}", (k, value), (0, -15), textcoords="offset points", ha="center")
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(score.pass_at), [str(k) for k in score.pass_at])
        axes.set(xlabel="k (samples)", ylabel="pass@k", title=title, ylim=(0, 1.08))


def _parse(line: bytes) -> dict[str, Any]:
    """The JSON object on a line, after a check of the fields that scoring reads."""
    record = parse_record(line)
    if "error" in record or record.get("answer") is None:
        return record
    fields = {
        "id": (str | int, "a string or a whole number"),
        "sample": (int, "a whole number"),
        "content": (str, "a string"),
        "answer": (str, "a string"),
    }
    for name, (kind, expected) in fields.items():
        if name not in record:
            raise ValueError(f"{name}: missing; use {expected}")
        if not isinstance(record[name], kind) or isinstance(record[name], bool):
            raise ValueError(f"{name}: {record[name]!r:.60}; use {expected}")
    return record
