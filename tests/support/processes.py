"""The project's commands as processes, forked from one that has imported them: an import costs seconds a start."""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TextIO

import program_cache

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["qwen3_jax.cli.train", "qwen3_jax.cli.infer", "qwen3_jax.cli.main", "gcsfs"])


class Command:
    """`target(words)` in a process of its own, with the methods and pipes of `subprocess.Popen` that tests use.

    The process differs from `python -c "from MODULE import FUNCTION; FUNCTION(WORDS)"` in its start alone. JAX's own
    variables have been read by then: a test that changes one of them starts an interpreter.

    Args:
      target: "module:function", for instance "qwen3_jax.cli.train:main".
      env: the whole environment.
      max_file_bytes: no file that it writes may become longer.
    """

    def __init__(
        self, target: str, *words: str, env: Mapping[str, str], cwd: Path, max_file_bytes: int | None = None
    ) -> None:
        pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(2)]
        args = (target, words, dict(env), cwd, max_file_bytes, *(theirs for _, theirs in pipes))
        self._process = _CONTEXT.Process(target=_serve, args=args, daemon=True)
        self._process.start()
        self.stdout, self.stderr = (_text(ours) for ours, _ in pipes)
        for pipe in pipes:
            for end in pipe:
                end.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait_for_exit(self, timeout: float) -> None:
        """Waits so many seconds at most."""
        self._process.join(timeout)

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and waits for its end."""
        self._process.kill()
        self._process.join()

    def wait_for(self, text: str) -> str:
        """Reads stdout to the line that holds `text`; fails where the process ends before."""
        said = ""
        while text not in (line := self.stdout.readline()):
            assert line, said + self.stderr.read()
            said += line
        return said + line

    def communicate(self, timeout: float = 1200.0) -> tuple[str, str]:
        """What it prints on stdout and on stderr, but for what was read before."""
        said = ["", ""]

        def read(number: int, stream: TextIO) -> None:
            said[number] = stream.read()
            stream.close()

        readers = [threading.Thread(target=read, args=item) for item in enumerate((self.stdout, self.stderr))]
        for reader in readers:
            reader.start()
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        for reader in readers:
            reader.join()
        return said[0], said[1]


def _text(end: Connection) -> TextIO:
    return os.fdopen(os.dup(end.fileno()), encoding="utf-8")


def _serve(
    target: str,
    words: tuple[str, ...],
    env: dict[str, str],
    cwd: Path,
    max_file_bytes: int | None,
    out: Connection,
    err: Connection,
) -> None:
    os.chdir(cwd)
    if max_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    os.environ.clear()
    os.environ.update(env)
    for action in filter(None, env.get("PYTHONWARNINGS", "").split(",")):
        warnings.simplefilter(action)  # type: ignore[arg-type]
    for number, end in ((1, out), (2, err)):
        os.dup2(end.fileno(), number)
        end.close()
    program_cache.repair()
    module, _, function = target.partition(":")
    code: object = 0
    try:
        getattr(importlib.import_module(module), function)(words)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    # An interpreter's own end, in its order; multiprocessing would leave the functions of `atexit` out.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)
