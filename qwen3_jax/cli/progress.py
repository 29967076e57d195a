"""The progress bar of batch decoding."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def decoding_progress(console: Console) -> Iterator[Callable[[int, int, int], None]]:
    """A bar fed by `report(rows done, rows, tokens written)`."""
    columns = (
        TextColumn("decoded"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    start = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None, status="compiling")

        def report(done: int, total: int, tokens: int) -> None:
            rate = tokens / (time.perf_counter() - start)
            progress.update(task, completed=done, total=total, status=f"{tokens:,} tokens, {rate:,.0f} tokens/s")

        yield report
