"""Calls that may hang, in a process that can be killed.

A verifier reads what a model wrote. Some of that makes a parser run for hours, and a thread cannot be stopped: the call
runs in a process of its own, which is killed at the deadline and started again for the next call.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import resource
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

NO_RESULT, DIED = "no result in", "its process died"  # how the message of a TimeoutError begins

_START_SECONDS = 60.0  # for the process to start, and to import a function's module
_MEMORY = 4 * 2**30  # bytes of the process
# Not multiprocessing: it runs the user's script again in each process that it starts.
_COMMAND = [sys.executable, "-c", "from qwen3_jax.tasks.deadline import serve; serve()"]


class _Late(Exception):
    """The deadline has passed. Not a TimeoutError: a signal handler of the caller's may raise one."""


class _Worker:
    """A process that answers one call at a time, by lines of JSON."""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(_COMMAND, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        self._imported: set[str] = set()

    def call(self, module: str, function: str, arguments: tuple[Any, ...], seconds: float) -> Any:
        question = json.dumps([module, function, arguments])
        if module not in self._imported:
            self._ask(json.dumps([module, sys.path]), _START_SECONDS)
            self._imported.add(module)
        return self._ask(question, seconds)

    def _ask(self, question: str, seconds: float) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(question.encode() + b"\n")
        self._process.stdin.flush()
        is_good, value = json.loads(self._line(time.monotonic() + seconds))
        if not is_good:
            raise ValueError(value)
        return value

    def _line(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        pipe, read = self._process.stdout.fileno(), b""
        while not read.endswith(b"\n"):
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise _Late
            part = os.read(pipe, 2**16)
            if not part:
                raise BrokenPipeError
            read += part
        return read

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
      ValueError: the function raised, is not there, or cannot be imported, as the message says.
      TypeError: the arguments are no JSON data.
    """
    global _worker
    with _lock:
        if _worker is None:
            _worker = _Worker()
        is_whole = False
        try:
            result = _worker.call(module, function, arguments, seconds)
            is_whole = True
            return result
        except _Late:
            raise TimeoutError(f"{NO_RESULT} {seconds:g} s") from None
        except (OSError, json.JSONDecodeError):  # a pipe whose other end is gone, or that something else wrote to
            raise TimeoutError(DIED) from None
        except (TypeError, ValueError):
            is_whole = True
            raise
        finally:
            # After anything else, the next line of the pipe may be the answer to this call.
            if not is_whole:
                _end()


def _end() -> None:
    global _worker
    if _worker is not None:
        _worker.end()
        _worker = None


atexit.register(_end)


def serve() -> None:
    """Answers the lines of standard input, until there are no more."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    # A function may read, print, and run programs that do: the two pipes get other numbers, which none inherits.
    calls, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):
        os.dup2(nothing, number)
    for line in calls:
        module, *call = json.loads(line)
        print(_answer(module, call), file=answers, flush=True)


def _answer(module: str, call: list[Any]) -> str:
    if len(call) == 1:
        sys.path[:] = call[0]
        try:
            importlib.import_module(module)
        except Exception as error:
            return json.dumps([False, f"cannot be imported ({_said(error)})"])
        return "[true, null]"
    name, arguments = call
    function: Callable[..., Any] | None = getattr(sys.modules[module], name, None)
    if not callable(function):
        return json.dumps([False, f"is no function of {module}"])
    try:
        return json.dumps([True, function(*arguments)], default=float)
    except Exception as error:
        return json.dumps([False, f"raised {_said(error)}"])


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
