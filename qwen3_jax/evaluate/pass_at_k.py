"""pass@k of a file of answers: the chance that one of k samples is right (Chen et al. 2021, section 2.1)."""

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
    """What a file of answers is worth.

    prompts: how many, refused ones included. refused: prompts that could not be answered.
    samples: least and most samples of the answered prompts.
    pass_at: for k = 1, 2, 4, ... up to the least number of samples, the mean over prompts of `pass_at_k`.
    """

    prompts: int
    refused: int
    samples: tuple[int, int]
    pass_at: dict[int, float]

    @property
    def accuracy(self) -> float:
        """Mean over prompts of the share of right samples, which is pass@1."""
        return self.pass_at[1]


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, drawn without replacement, hold one of the c right ones: unbiased for pass@k.

    Computed in whole numbers and divided once, so that no n is too large and no chance too small.

    Raises:
      ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n:
        raise ValueError(f"c: {c}; a number in 0..{n} fits")
    if not 1 <= k <= n:
        raise ValueError(f"k: {k}; a number in 1..{n} fits")
    draws = math.comb(n, k)
    return (draws - math.comb(n - c, k)) / draws


def score_file(path: Path) -> Score:
    """Scores the answers that infer.py wrote to `path`.

    A line is a JSON object with `id`, `sample`, `content` and `answer`, and right if the last two are equal but for
    white space around them; the lines of one id are the samples of one prompt. A line with `error` stands for a prompt
    that was refused: it counts as a prompt none of whose samples is right, and does not limit k.

    Raises:
      ValueError: `file:line: field: value; what would fit`, or if there is no answer in the file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a JSONL file of answers fits")
    right: dict[str | int, dict[int, bool]] = defaultdict(dict)
    refused = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = _parse(line)
                if "error" in record:
                    refused += 1
                    continue
                samples = right[record["id"]]
                if record["sample"] in samples:
                    raise ValueError(f"sample: {record['sample']} of id {record['id']!r} again; another number fits")
                samples[record["sample"]] = record["content"].strip() == record["answer"].strip()
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    if not right:
        raise ValueError(f"{path}: no answers; at least one line that is not an error fits")
    prompts = len(right) + refused
    counts = [(len(samples), sum(samples.values())) for samples in right.values()]
    least, most = min(counts)[0], max(counts)[0]
    powers = [2**i for i in range(least.bit_length())]
    pass_at = {k: math.fsum(pass_at_k(n, c, k) for n, c in counts) / prompts for k in powers}
    return Score(prompts, refused, (least, most), pass_at)


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
    """The object on a line, with the fields that scoring reads checked."""
    record = parse_record(line)
    if "error" in record:
        return record
    fields = {
        "id": (str | int, "a string or a whole number"),
        "sample": (int, "a whole number"),
        "content": (str, "a string"),
        "answer": (str, "a string, the right answer,"),
    }
    for name, (kind, fits) in fields.items():
        if name not in record:
            raise ValueError(f"{name}: missing; {fits} fits")
        if not isinstance(record[name], kind) or isinstance(record[name], bool):
            raise ValueError(f"{name}: {record[name]!r:.60}; {fits} fits")
    return record
