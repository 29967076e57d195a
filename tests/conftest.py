"""What every test shares: eight virtual CPU devices, the reference's import path, and the table of parity errors."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Read when jax starts its backend, so before anything imports it.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

# What several test files import: the PyTorch reference, the rules in plain Python, a server that stands for gs://.
sys.path.insert(0, str(Path(__file__).parent / "support"))

Check = Callable[[str, float, float], None]


@pytest.fixture
def check_error(record_property: Callable[[str, object], None]) -> Check:
    """`check_error(name, error, tolerance)`: fails above the tolerance (or at NaN) and adds a line to the table."""

    def check(name: str, error: float, tolerance: float) -> None:
        record_property("parity", (name, float(error), float(tolerance)))
        assert error <= tolerance, f"{name}: error {error:.3g} exceeds {tolerance:.3g}"

    return check


@pytest.fixture
def coordinator_address() -> str:
    """Where processes of one `jax.distributed` run can meet. Below the ports that the kernel gives to outgoing
    connections, one of which could take it before the first process listens there."""
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return f"127.0.0.1:{port}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = [
        value
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        for key, value in report.user_properties
        if key == "parity" and report.when == "call"
    ]
    if not rows:
        return
    width = max(len(name) for name, _, _ in rows)
    terminalreporter.section("parity: largest errors")
    terminalreporter.write_line(f"{'name':{width}}  {'max error':>9}  tolerance")
    for name, error, tolerance in sorted(rows):
        terminalreporter.write_line(f"{name:{width}}  {error:9.1e}  {tolerance:9.1e}")
