"""Starting a run of several processes, and ending all of them when one fails."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed  # the coordinator's key-value store has no public name

_GOOGLE = "0x1ae0"  # PCI vendor of TPUs
_FAILURE = "qwen3_jax/failure"  # a key of the coordinator's store
_SHUTDOWN_TIMEOUT = 7 * 24 * 3600  # seconds to wait for the other processes at the end: infer.py's finish hours apart
_GRACE = 10.0  # seconds for a process to fail by itself: most errors (a bad config) occur in all processes at once


def start_processes() -> None:
    """Initialises `jax.distributed`; call it before the first use of a device.

    On a Cloud TPU slice no setting is needed. Elsewhere the environment variables JAX_COORDINATOR_ADDRESS (host:port of
    process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID describe the run; without them this is the only process.

    Raises:
      ValueError: naming the variable that is missing or not a number.
    """
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize(
            num_processes=_number("JAX_NUM_PROCESSES"),
            process_id=_number("JAX_PROCESS_ID"),
            shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT,
        )
    elif any(path.read_text().strip() == _GOOGLE for path in Path("/sys/bus/pci/devices").glob("*/vendor")):
        jax.distributed.initialize(shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT)
    else:
        return
    ending = threading.Event()
    watch = threading.Thread(target=_watch, args=(distributed.global_state, ending), daemon=True)
    watch.start()
    # atexit runs in reverse order: these two run before jax's own shutdown, which waits for the other processes.
    atexit.register(watch.join)
    atexit.register(ending.set)


def end_others(failure: str) -> None:
    """Ends the other processes with exit code 2; each prints `failure`.

    Call it when this process is about to exit by an error: the others would wait for it in their next collective.
    """
    state = distributed.global_state
    if state.client is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process set the key first
            state.client.key_value_set(_FAILURE, f"process {state.process_id}: {failure}")


def _watch(state: Any, ending: threading.Event) -> None:
    """Polls the store for a failure, and then ends this process, which may be blocked in a collective."""
    failure = None
    while failure is None:
        if ending.wait(1.0):
            return
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the key is not set
            failure = state.client.key_value_try_get(_FAILURE)
    if not ending.wait(_GRACE):
        print(f"error: {failure}", file=sys.stderr, flush=True)
        # A clean shutdown where the coordinator still answers. A dead process would block it for _SHUTDOWN_TIMEOUT.
        shutdown = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        shutdown.start()
        shutdown.join(_GRACE)
        os._exit(2)


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise ValueError(f"{name}: {value!r}; a number fits, since JAX_COORDINATOR_ADDRESS is set")
    return int(value)
