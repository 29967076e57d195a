"""Calls that may hang, in a process that can be killed.

A verifier reads what a model wrote. Some of that makes a parser run for hours, and a thread cannot be stopped: the call
runs in a process of its own, which is killed at the deadline and started again for the next call.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import resource
import select
import subprocess
import sys
import threading
from typing import Any

_START_SECONDS = 60.0  # for the process to start, and to import a function's module
_MEMORY = 4 * 2**30  # bytes of the process
# Not multiprocessing: it runs the user's script again in each process that it starts.
_COMMAND = [sys.executable, "-c", "from qwen3_jax.tasks.deadline import serve; serve()"]


class _Worker:
    """A process that answers one call at a time, by lines of JSON."""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(_COMMAND, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        self._imported: set[str] = set()

    def call(self, module: str, function: str, arguments: tuple[Any, ...], seconds: float) -> Any:
        if module not in self._imported:
            self._ask([module, sys.path], _START_SECONDS)
            self._imported.add(module)
        return self._ask([module, function, arguments], seconds)

    def _ask(self, question: list[Any], seconds: float) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            raise TimeoutError
        line = self._process.stdout.readline()
        if not line:
            raise BrokenPipeError
        is_good, value = json.loads(line)
        if not is_good:
            raise ValueError(value)
        return value

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what could not be written is lost with the process
                if pipe is not None:
                    pipe.close()


_worker: _Worker | None = None
_lock = threading.Lock()


def call(module: str, function: str, *arguments: Any, seconds: float) -> Any:
    """A module's function in another process; arguments and result are JSON data. Its import does not count.

    Raises:
      TimeoutError: it took longer, or its process died. The next call starts another.
      ValueError: the function raised, or cannot be imported; the message is that of its exception.
    """
    global _worker
    with _lock:
        if _worker is None:
            _worker = _Worker()
        try:
            return _worker.call(module, function, arguments, seconds)
        except TimeoutError:
            _end()
            raise TimeoutError(f"no result in {seconds:g} s") from None
        except OSError:  # of a pipe whose other end is gone
            _end()
            raise TimeoutError("its process died") from None


def _end() -> None:
    global _worker
    if _worker is not None:
        _worker.end()
        _worker = None


atexit.register(_end)


def serve() -> None:
    """Answers the lines of standard input, until there are no more."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    answers, sys.stdout = sys.stdout, sys.stderr  # what a function prints is no answer
    for line in sys.stdin:
        module, *call = json.loads(line)
        try:
            if len(call) == 1:
                sys.path[:] = call[0]
                importlib.import_module(module)
                answer = "[true, null]"
            else:
                answer = json.dumps([True, getattr(sys.modules[module], call[0])(*call[1])], default=float)
        except Exception as error:
            answer = json.dumps([False, " ".join(f"{type(error).__name__}: {error}".split())[:200]])
        print(answer, file=answers, flush=True)
