"""Errors of a command: one line and exit code 2, in all of its processes."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from sharding import end_if_another_died, end_others

P = ParamSpec("P")
T = TypeVar("T")


def exits_cleanly(main: Callable[P, T]) -> Callable[P, T]:
    """Wraps a command's main function. A ValueError, FloatingPointError or OSError is printed in one line, without a
    traceback; Ctrl-C and a closed pipe print nothing. Other processes of the run are ended too."""

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            result = main(*args, **kwargs)
            sys.stdout.flush()
            return result
        except BrokenPipeError:  # whoever read the output has gone, as in `... | head`
            # Python flushes stdout once more at its exit, which must not fail.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            end_others("broken pipe")
            sys.exit(128 + signal.SIGPIPE)
        except (ValueError, FloatingPointError, OSError) as error:
            print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
            end_others(str(error))
            sys.exit(2)
        except KeyboardInterrupt:
            end_others("Ctrl-C")
            sys.exit(130)
        except Exception as error:
            end_if_another_died()  # a collective that lost a process raises here
            end_others(repr(error))
            raise

    return wrapped
