"""Starting a run of several processes, and ending all of them when one fails or dies."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import selectors
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the coordinator's key-value store has no public name
from jax.experimental import multihost_utils

_GOOGLE = "0x1ae0"  # PCI vendor of TPUs
_FAILURE, _DEATH, _PORT = (f"qwen3_jax/{name}" for name in ("failure", "death", "port"))  # keys of that store
_TIMEOUT_MS = 300_000  # of jax's own initialisation
_SHUTDOWN_TIMEOUT = 7 * 24 * 3600  # seconds to wait for the other processes at the end: infer.py's finish hours apart
_GRACE = 10.0  # seconds for a process to fail by itself: most errors (a bad config) occur in all processes at once
_GOODBYE = b"\x00"

_watch_thread: threading.Thread | None = None


def skip_absent_tpu() -> None:
    """Keeps libtpu, where it is installed for planning, from looking for a TPU that is not there: it prints a page."""
    plugins = importlib.util.find_spec("jax_plugins")  # other accelerators
    if not _has_tpu() and plugins is None and "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")


def _has_tpu() -> bool:
    return any(path.read_text().strip() == _GOOGLE for path in Path("/sys/bus/pci/devices").glob("*/vendor"))


def start_processes() -> None:
    """Initialises `jax.distributed`; call it before the first use of a device.

    On a Cloud TPU slice no setting is needed. Elsewhere the environment variables JAX_COORDINATOR_ADDRESS (host:port of
    process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID describe the run; without them this is the only process.

    Process 0 holds a connection to each other process, on a port that the system chooses. The system closes it when a
    process dies, however that happens, so all end within seconds; jax's heartbeat would take minutes.

    Raises:
      ValueError: naming the variable that is missing or not a number.
    """
    global _watch_thread
    skip_absent_tpu()
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize(
            num_processes=_number("JAX_NUM_PROCESSES"),
            process_id=_number("JAX_PROCESS_ID"),
            shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT,
        )
    elif _has_tpu():
        jax.distributed.initialize(shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT)
    else:
        return
    state, ending = distributed.global_state, threading.Event()
    peers = _connect(state)
    _watch_thread = threading.Thread(target=_watch, args=(state, peers, ending), daemon=True)
    _watch_thread.start()
    # atexit runs in reverse order: these two run before jax's own shutdown, which waits for the other processes.
    atexit.register(_watch_thread.join)
    atexit.register(ending.set)


def end_others(failure: str) -> None:
    """Ends the other processes with exit code 2; each prints `failure`.

    Call it when this process is about to exit by an error: the others would wait for it in their next collective.
    """
    state = distributed.global_state
    if state.client is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process set the key first
            state.client.key_value_set(_FAILURE, f"process {state.process_id}: {failure}")


def end_if_another_died() -> None:
    """Call it before an unexpected error is reported: where it is the consequence of another process's death, this does
    not return, and the death is what is printed."""
    if _watch_thread is not None:
        _watch_thread.join(3.0)  # which ends this process as soon as it hears of a death


def from_first_process(value: np.ndarray) -> np.ndarray:
    """Process 0's value, on every process; its shape is the same everywhere."""
    if jax.process_count() == 1:
        return value
    return np.asarray(multihost_utils.broadcast_one_to_all(value))


def _connect(state: Any) -> dict[socket.socket, int]:
    """Connections to other processes, by their number: from process 0 to all, from the others to it."""
    if state.process_id > 0:
        host = state.coordinator_address.rpartition(":")[0].strip("[]")
        port = int(state.client.blocking_key_value_get(_PORT, _TIMEOUT_MS))
        connection = socket.create_connection((host, port))
        connection.sendall(state.process_id.to_bytes(4))
        return {connection: 0}
    with socket.create_server(("", 0)) as server:
        state.client.key_value_set(_PORT, str(server.getsockname()[1]))
        connections = [server.accept()[0] for _ in range(state.num_processes - 1)]
    return {connection: int.from_bytes(connection.recv(4, socket.MSG_WAITALL)) for connection in connections}


def _watch(state: Any, peers: dict[socket.socket, int], ending: threading.Event) -> None:
    """Looks for a failure or a death, and then ends this process, which may be blocked in a collective."""
    with selectors.DefaultSelector() as selector:
        for peer in peers:
            selector.register(peer, selectors.EVENT_READ)
        while not ending.is_set():
            for key, _ in selector.select(timeout=0.5) if peers else []:
                connection: Any = key.fileobj
                selector.unregister(connection)
                with contextlib.suppress(OSError):
                    if connection.recv(1) == _GOODBYE:
                        continue
                death = f"process {peers[connection]}: died without reporting an error"
                with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is dead, or another was first
                    state.client.key_value_set(_DEATH, death)
                _end(death)
            if not selector.get_map():
                ending.wait(0.5)  # every peer has ended well: nothing to select
            if elsewhere := _lookup(state, _DEATH):
                _end(elsewhere)
            if (failure := _lookup(state, _FAILURE)) and not ending.wait(_GRACE):
                _end(failure)
    for peer in peers:
        with contextlib.suppress(OSError):
            peer.sendall(_GOODBYE)


def _lookup(state: Any, key: str) -> str | None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the key is not set
        return str(state.client.key_value_try_get(key))
    return None


def _end(reason: str) -> None:
    print(f"error: {reason}", file=sys.stderr, flush=True)
    # A clean shutdown where the coordinator still answers. A dead process would block it for _SHUTDOWN_TIMEOUT.
    shutdown = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    shutdown.start()
    shutdown.join(1.0)
    os._exit(2)


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise ValueError(f"{name}: {value!r}; use a number, since JAX_COORDINATOR_ADDRESS is set")
    return int(value)
