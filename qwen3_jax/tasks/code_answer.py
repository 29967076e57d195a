"""Runs code that a model wrote, with the tests that it must pass. THIS IS NOT A SECURITY BOUNDARY.

The code runs in a process of its own: without site packages, in an empty directory, with limits on time, memory and
files. Where the kernel grants namespaces it has no network, and all that it started ends with it. It can still read
what the user can read, and change what the user can change. Run it in a container or a virtual machine that holds
nothing of value.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile

_MEMORY = 2**30  # bytes
_FILE = 2**24  # bytes of a file that it writes
_OUTPUT = 400  # characters of an error that are read

_PROCESSES = 64  # of a namespace of its own

# Reads the program from standard input. The last thing that it writes says that the tests were reached and passed: code
# that only ends itself before them does not write it. Code that looks for the word in its own process finds it.
_LAUNCHER = f"""
import ctypes, os, resource, signal, sys
word, source = sys.stdin.readline().strip(), sys.stdin.read()
seconds = int(sys.argv[1])
for limit, value in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, {_MEMORY}), (resource.RLIMIT_FSIZE, {_FILE}),
                     (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(limit, (value, value))
libc = ctypes.CDLL(None)
# Users, processes, and a network of nothing; refused in some places.
if libc.unshare(0x10000000 | 0x20000000 | 0x40000000) == 0:
    resource.setrlimit(resource.RLIMIT_NPROC, ({_PROCESSES}, {_PROCESSES}))
    child = os.fork()
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0)
    libc.prctl(1, signal.SIGKILL)  # it ends with its parent, and with it all of the namespace
answers = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
exec(compile(source, "answer", "exec"), {{"__name__": "__main__"}})
os.write(answers, word.encode())
"""


def run_tests(code: str, tests: str, seconds: float) -> str:
    """Why the tests did not pass after `code`, in one line; empty where they did."""
    word = secrets.token_hex(16)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        # Files, not pipes: a process that the code started may hold a pipe open for as long as it likes.
        program, out, errors = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        program.write(f"{word}\n{code}\n{tests}\n".encode("utf-8", "replace"))
        program.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(max(1, round(seconds)))],
            stdin=program,
            stdout=out,
            stderr=errors,
            cwd=directory,
            env={},
            start_new_session=True,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"no result in {seconds:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # what it started too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for file in (out, errors):
            file.seek(0)
        if out.read(len(word) + 1) == word.encode():
            return ""
        lines = errors.read(_FILE).decode(errors="replace").strip().splitlines()
    return lines[-1][:_OUTPUT] if lines else "ended before its tests"
