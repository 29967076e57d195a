"""Joining the other processes of a run."""

from __future__ import annotations

import os
from pathlib import Path

import jax

_GOOGLE = "0x1ae0"  # PCI vendor of TPUs


def start_processes() -> None:
    """Makes this process one of a run's, before it first uses a device.

    On a Cloud TPU slice every worker calls this and needs nothing more. Elsewhere the environment says it:
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. Otherwise the process is
    alone.

    Raises:
      ValueError: naming the variable that is missing or not a number.
    """
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize(num_processes=_number("JAX_NUM_PROCESSES"), process_id=_number("JAX_PROCESS_ID"))
    elif any(path.read_text().strip() == _GOOGLE for path in Path("/sys/bus/pci/devices").glob("*/vendor")):
        jax.distributed.initialize()


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise ValueError(f"{name}: {value!r}; a number, beside JAX_COORDINATOR_ADDRESS, fits")
    return int(value)
