"""The progress bars of decoding and planning."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from qwen3_jax.serve.files import Tally

_SECONDS_PER_LINE = 30


@contextmanager
def bar(console: Console, label: str, status: str = "", total: int | None = None) -> Iterator[Callable[..., None]]:
    """A progress bar, and its `update(completed=, total=, status=)`."""
    progress, update = _bar(console, label, status, total)
    with progress:
        yield update


def _bar(console: Console, label: str, status: str, total: int | None) -> tuple[Progress, Callable[..., None]]:
    columns = (
        TextColumn(label),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=console)
    return progress, functools.partial(progress.update, progress.add_task("", total=total, status=status))


@contextmanager
def decoding_progress(console: Console) -> Iterator[Callable[[int, int, int], None]]:
    """A bar for one batch, fed by `report(rows done, rows, tokens written)`."""
    start = time.perf_counter()
    with bar(console, "decoded", "compiling") as update:

        def report(done: int, total: int, tokens: int) -> None:
            rate = tokens / (time.perf_counter() - start)
            update(completed=done, total=total, status=f"{tokens:,} tokens, {rate:,.0f} tokens/s")

        yield report


@contextmanager
def file_progress(console: Console) -> Iterator[Callable[[Tally], None]]:
    """A bar for a file of prompts, and below it what the rows do; without a terminal a line now and then."""
    (progress, update), status = _bar(console, "decoded", "", None), Text("reading", style="dim")
    told = time.perf_counter()
    with Live(Group(progress, status), console=console) if console.is_terminal else nullcontext():

        def report(tally: Tally) -> None:
            nonlocal told
            done = tally.resumed + tally.done
            update(completed=done, total=tally.samples)
            status.plain = (
                f"{tally.tokens:,} tokens, {tally.tokens_per_second:,.0f}/s, {tally.thinking_share:.0%} thinking, "
                f"{tally.cut} cut, {tally.slot_utilisation:.0%} of slots in use"
            )
            if not console.is_terminal and time.perf_counter() - told >= _SECONDS_PER_LINE:
                told = time.perf_counter()
                console.print(f"decoded {done}/{tally.samples}: {status.plain}", highlight=False, soft_wrap=True)

        yield report


@contextmanager
def planning_progress(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """A bar of programs compiled; `begin(what)` as each begins. Without a terminal a line for each."""
    with bar(console, "compiled", total=total) as update:
        begun = 0

        def begin(what: str) -> None:
            nonlocal begun
            update(completed=begun, status=what, refresh=True)
            begun += 1
            if not console.is_terminal:
                console.print(f"compiling {begun}/{total} {what}", highlight=False, markup=False, soft_wrap=True)

        yield begin
        update(completed=total)
