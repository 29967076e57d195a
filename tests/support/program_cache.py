"""One cache of compiled programs for all tests, their workers and the processes that they start."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import threading
import time
from importlib.metadata import version
from pathlib import Path

# For programs that are compared with each other: with these they compile in about a third of the time.
QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
QUICK_OPTIONS = {}
if int(version("jaxlib").split(".")[1]) < 11:  # later there is one kind of emitters, and no option
    QUICK_COMPILE += " --xla_cpu_use_fusion_emitters=false"
    QUICK_OPTIONS["xla_cpu_use_fusion_emitters"] = False
_MAX_AGE = 30 * 24 * 3600  # seconds: what is older is compiled again, so that programs of old code do not pile up


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
    for entry in cache.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # another worker was faster
            if entry.stat().st_mtime < time.time() - _MAX_AGE:
                entry.unlink()
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def repair() -> None:
    """A program appears in the cache complete or not at all, and only if it can be read back.

    JAX writes in place. Several tests kill processes while they may be writing; half an entry would stay forever, and
    every later process would warn of it and compile again. A program compiled for a TPU that is not there cannot be
    read at all.
    """
    from jax._src import compilation_cache
    from jax._src.lib import _jax
    from jax._src.lru_cache import _CACHE_SUFFIX, LRUCache

    is_used = compilation_cache.is_cache_used
    compilation_cache.is_cache_used = lambda backend: (
        not isinstance(backend, _jax.CompileOnlyPyClient) and is_used(backend)
    )

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
