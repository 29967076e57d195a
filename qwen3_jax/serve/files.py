"""JSONL in, JSONL out."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qwen3_jax.decode import Request
from qwen3_jax.serve.engine import Engine


def decode_file(
    engine: Engine,
    source: Path,
    target: Path,
    *,
    defaults: Mapping[str, Any],
    batch_size: int,
    strict: bool,
    progress: Callable[[int, int, int], None],
) -> dict[str, int]:
    """Answers every line of `source`, in order, in `target`, which appears when all of it is there.

    A line that cannot be answered becomes `{"id", "line", "error"}`, and the others go on.

    Args:
      strict: refuse the whole file for one such line, before anything is decoded.
      progress: called with (lines done, lines, tokens written so far).

    Returns:
      Counts: lines, errors, and tokens by kind.

    Raises:
      ValueError: for a file that is not there, or in strict mode `file:line: field: value; what would fit`.
    """
    if not source.is_file():
        raise ValueError(f"input: {str(source)!r} does not exist; a JSONL file fits")
    if not target.parent.is_dir():
        raise ValueError(f"output: {str(target.parent)!r} is not a directory; a file in one fits")
    lines = [line for line in enumerate(source.read_text(encoding="utf-8").split("\n"), 1) if line[1].strip()]
    parsed: list[tuple[Any, Request | None, dict[str, Any]]] = []
    for number, line in lines:
        record_id: Any = number
        try:
            record = _parse(line)
            record_id = record.get("id", number)
            parsed.append((record_id, engine.request(record, defaults), {}))
        except ValueError as error:
            if strict:
                raise ValueError(f"{source}:{number}: {error}") from None
            parsed.append((record_id, None, {"id": record_id, "line": number, "error": str(error)}))

    counts = dict.fromkeys(("lines", "errors", "thinking_tokens", "injected_tokens", "answer_tokens"), 0)
    counts["lines"] = len(parsed)
    written = 0
    partial = target.with_name(target.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for start in range(0, len(parsed), batch_size):
            batch = parsed[start : start + batch_size]
            requests = [request for _, request, _ in batch if request is not None]

            failed = len(batch) - len(requests)
            report = functools.partial(_report, progress, start + failed, len(parsed), written)
            results = iter(engine.generate(requests, report))
            for record_id, request, refusal in batch:
                if request is None:
                    counts["errors"] += 1
                    record = refusal
                else:
                    result = next(results)
                    record = {"id": record_id, **engine.response(result)}
                    written += len(result.token_ids)
                    for name in ("thinking_tokens", "injected_tokens", "answer_tokens"):
                        counts[name] += record[name]
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            progress(start + len(batch), len(parsed), written)
    os.replace(partial, target)
    return counts


def _report(
    progress: Callable[[int, int, int], None], before: int, lines: int, written: int, done: int, _: int, tokens: int
) -> None:
    """One batch's progress as progress over the file."""
    progress(before + done, lines, written + tokens)


def _parse(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"{line.strip()[:40]!r}: not a JSON object")
    return record
