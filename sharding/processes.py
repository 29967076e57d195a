"""Joining the other processes of a run, and ending with them."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed  # the store that the processes share has no public name

_GOOGLE = "0x1ae0"  # PCI vendor of TPUs
_FAILURE = "qwen3_jax/failure"  # its key in the store
_FAREWELL = 7 * 24 * 3600  # seconds that a process which is done waits for the others; those of infer.py end apart
_GRACE = 10.0  # seconds to end by itself: what one process refuses, the others mostly refuse too


def start_processes() -> None:
    """Makes this process one of a run's, before it first uses a device.

    On a Cloud TPU slice every worker calls this and needs nothing more. Elsewhere the environment says it:
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. Otherwise the process is
    alone.

    Raises:
      ValueError: naming the variable that is missing or not a number.
    """
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize(
            num_processes=_number("JAX_NUM_PROCESSES"),
            process_id=_number("JAX_PROCESS_ID"),
            shutdown_timeout_seconds=_FAREWELL,
        )
    elif any(path.read_text().strip() == _GOOGLE for path in Path("/sys/bus/pci/devices").glob("*/vendor")):
        jax.distributed.initialize(shutdown_timeout_seconds=_FAREWELL)
    else:
        return
    ending = threading.Event()
    watch = threading.Thread(target=_watch, args=(distributed.global_state, ending), daemon=True)
    watch.start()
    # The last to be registered comes first: jax's own farewell, which waits for the other processes, after these.
    atexit.register(watch.join)
    atexit.register(ending.set)


def end_others(failure: str) -> None:
    """To be called before this process ends by a failure: the others, which would wait for it in their next collective,
    print it and exit with code 2."""
    state = distributed.global_state
    if state.client is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another failed first
            state.client.key_value_set(_FAILURE, f"process {state.process_id}: {failure}")


def _watch(state: Any, ending: threading.Event) -> None:
    """Looks for the failure of a process, and ends this one wherever it stands."""
    failure = None
    while failure is None:
        if ending.wait(1.0):
            return
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # there is none
            failure = state.client.key_value_try_get(_FAILURE)
    if not ending.wait(_GRACE):
        print(f"error: {failure}", file=sys.stderr, flush=True)
        farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        farewell.start()
        farewell.join(_GRACE)  # who is gone without one is not waited for
        os._exit(2)


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise ValueError(f"{name}: {value!r}; a number, beside JAX_COORDINATOR_ADDRESS, fits")
    return int(value)
