"""What worker processes have in common."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def end_with_parent(*_: object) -> None:
    """Makes a child process ignore Ctrl-C, which its parent handles, and exit when the parent exits, even by SIGKILL.

    To be called first in the child; takes the arguments of any worker initialiser.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
