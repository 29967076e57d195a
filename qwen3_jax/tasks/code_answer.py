"""Runs code that a model wrote, with the tests that it must pass. THIS IS NOT A SECURITY BOUNDARY.

The code runs in a process of its own: without site packages, in an empty directory, with limits on time, memory, files
and processes, and without a network where the kernel grants a namespace. It can still read what the user can read, and
change what the user can change. Run it in a container or a virtual machine that holds nothing of value.
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

# Reads the program from standard input. The last line of what it prints says that the tests were reached and passed:
# a program that ends itself before them does not know the word.
_LAUNCHER = f"""
import ctypes, os, resource, sys
word, source = sys.stdin.readline().strip(), sys.stdin.read()
seconds = int(sys.argv[1])
for limit, value in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, {_MEMORY}), (resource.RLIMIT_FSIZE, {_FILE}),
                     (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(limit, (value, value))
ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)  # a user namespace, and a network of nothing; refused in some places
answers = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
exec(compile(source, "answer", "exec"), {{"__name__": "__main__"}})
os.write(answers, word.encode())
"""


def run_tests(code: str, tests: str, seconds: float) -> str:
    """Why the tests did not pass after `code`, in one line; empty where they did."""
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as directory:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(max(1, round(seconds)))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=directory,
            env={},
            start_new_session=True,
        )
        try:
            out, errors = process.communicate(f"{word}\n{code}\n{tests}\n".encode("utf-8", "replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"no result in {seconds:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # what it started too
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if out.decode(errors="replace") == word:
        return ""
    lines = errors.decode(errors="replace").strip().splitlines()
    return lines[-1][:_OUTPUT] if lines else "ended before its tests"
