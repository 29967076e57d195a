"""One cache of compiled programs for all tests, their workers and the processes that they start."""

from __future__ import annotations

import hashlib
import os
import platform
import threading
from pathlib import Path

# For programs whose numbers are compared within a tolerance: they compile in about half the time.
QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def set_environment() -> None:
    """Names the cache in the environment, which all child processes inherit; to be called before jax is imported.

    JAX's key holds its version and the compiler's options, but not what the processor can do, and a program compiled
    for another processor may fail. So each kind of processor has a directory.
    """
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    processor = hashlib.sha256(flags.encode()).hexdigest()[:8]
    cache = Path.home() / ".cache" / "qwen3-jax" / "tests" / f"{platform.machine()}-{processor}"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def make_writes_atomic() -> None:
    """A program appears in the cache complete or not at all.

    JAX writes in place. Several tests kill processes while they may be writing; half an entry would stay forever, and
    every later process would warn of it and compile again.
    """
    from jax._src.lru_cache import _CACHE_SUFFIX, LRUCache

    def put(self: LRUCache, key: str, value: bytes) -> None:
        entry = Path(str(self.path)) / f"{key}{_CACHE_SUFFIX}"
        if not entry.exists():
            part = entry.with_name(f"{key}.{os.getpid()}.{threading.get_ident()}")
            try:
                part.write_bytes(value)
                part.replace(entry)
            finally:
                part.unlink(missing_ok=True)

    LRUCache.put = put  # type: ignore[method-assign]
