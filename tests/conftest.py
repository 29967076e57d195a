"""What every test shares: eight virtual CPU devices, the reference's import path, and the table of parity errors."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Read when jax starts its backend, so before anything imports it.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

# What several test files import: the PyTorch reference, the rules in plain Python, a server that stands for gs://.
sys.path.insert(0, str(Path(__file__).parent / "support"))

import hypothesis
import program_cache

program_cache.set_environment()
program_cache.repair()
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")

# `make test-quick`: parity of layers and model, the rules of the budget, the pool, train steps and
# their resumption, one mesh and its traffic, checkpoints both ways, the chat template, refusals of configs, compiled
# text, private parts of other packages.
QUICK = (
    "tests/aot/test_hlo.py",
    "tests/aot/test_cost.py",
    "tests/data/test_data_packing.py",
    "tests/decode/test_decode_pool.py",
    "tests/decode/test_decode_rules.py",
    "tests/hf/",
    "tests/ops/test_loss.py",
    "tests/ops/test_moe.py",
    "tests/ops/test_moe_mesh.py::test_traffic",
    "tests/parity/",
    "tests/sharding/test_sharding.py",
    "tests/test_config.py",
    "tests/test_private_parts.py",
    "tests/text/test_chat.py",
    "tests/train/test_mesh_matrix.py::test_the_mesh_changes_nothing[experts, with drops-fsdp 2, expert 2, tensor 2-4]",
    "tests/train/test_train.py",
    "tests/train/test_train_checkpoint.py",
    "tests/train/test_train_guard.py",
)

Check = Callable[[str, float, float], None]


@pytest.fixture
def check_error(record_property: Callable[[str, object], None]) -> Check:
    """`check_error(name, error, tolerance)`: fails above the tolerance (or at NaN) and adds a line to the table."""

    def check(name: str, error: float, tolerance: float) -> None:
        record_property("parity", (name, float(error), float(tolerance)))
        assert error <= tolerance, f"{name}: error {error:.3g} exceeds {tolerance:.3g}"

    return check


@pytest.fixture
def coordinator_address() -> Iterator[str]:
    """Where processes of one `jax.distributed` run can meet. The port stays bound to a socket that does not listen:
    gRPC, which asks for SO_REUSEPORT too, can listen there, and the kernel gives the port to nobody else."""
    with socket.socket(socket.AF_INET6) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("::", 0))
        yield f"127.0.0.1:{holder.getsockname()[1]}"


@pytest.fixture(scope="module")
def quick_compile() -> Iterator[None]:
    """For modules that compare programs of ours with each other: XLA compiles in a third of the time what runs slower.

    Parity and bit-identity tests keep the optimisation that users run with, so what was compiled here is forgotten.
    """
    import jax
    from jax._src import compiler

    original = compiler.get_compile_options

    def without_fusion_emitters(*args: Any, env_options_overrides: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        return original(
            *args, env_options_overrides={**(env_options_overrides or {}), **program_cache.QUICK_OPTIONS}, **kwargs
        )

    jax.config.update("jax_disable_most_optimizations", True)
    compiler.get_compile_options = without_fusion_emitters
    yield
    compiler.get_compile_options = original
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


@pytest.fixture
def tpu_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For tests that compile for TPUs in their own process: takes back what `use_compiler` changes there."""
    pytest.importorskip("libtpu", reason="libtpu is for Linux x86-64 only")
    import jax

    from qwen3_jax.aot.programs import use_compiler

    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.setenv(name, "")
    use_compiler()
    yield
    jax.config.update("jax_enable_compilation_cache", True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(QUICK):
            item.add_marker("quick")


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
