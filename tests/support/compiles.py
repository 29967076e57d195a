"""How many programs XLA was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax

_COMPILE = "/jax/core/compile/backend_compile_duration"  # a program found in the persistent cache counts too
_count = 0


def _listen(event: str, duration: float, **_: Any) -> None:
    global _count
    _count += event == _COMPILE


jax.monitoring.register_event_duration_secs_listener(_listen)


@contextmanager
def count_compiles() -> Iterator[Callable[[], int]]:
    """Gives a function that says how many programs were compiled since the block began."""
    before = _count
    yield lambda: _count - before
