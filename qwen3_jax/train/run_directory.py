"""Where a run writes: a directory that all its processes see, on a disk or in a bucket."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import re
import shutil
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

import jax
from etils import epath

from qwen3_jax.checkpoint import CHECKPOINTS, reason_of

METRICS = "metrics.jsonl"
_LOCK = ".lock"
_EVERY = 60.0  # seconds between copies to a bucket


def check_writable(output_dir: str) -> None:
    """ValueError unless files can be made in `output_dir`, which is made itself if it is on a disk."""
    if re.match(r"\w+:/(?!/)", output_dir):
        raise ValueError(f"output_dir: {output_dir!r}; use {output_dir.replace(':/', '://', 1)}")
    # It would print a traceback for what is raised below in one line.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    try:
        directory = epath.Path(output_dir)
        if "://" not in output_dir:  # a bucket has no directories, and gcsfs would make the bucket
            directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".writable-{jax.process_index()}"
        probe.write_text("")
        probe.unlink()
    except Exception as error:  # each kind of storage has its own
        raise ValueError(
            f"output_dir: {output_dir!r}: {reason_of(error)}; use a directory that can be written"
        ) from None


class RunDirectory:
    """A run's output_dir. Checkpoints are written to it directly, and so are all other files if it is on a disk.

    Objects in a bucket cannot be appended to: other files are written to a directory of this machine and copied every
    minute, before each checkpoint, and on leaving the context.

    Attributes:
      directory: output_dir itself. checkpoints: in it. files: where this process writes everything else.

    Raises:
      ValueError: nothing can be written there, or another run is writing there.
    """

    def __init__(self, output_dir: str) -> None:
        check_writable(output_dir)
        self.directory = epath.Path(output_dir)
        self.checkpoints = self.directory / CHECKPOINTS
        self._in_bucket = "://" in output_dir
        self.files = Path(tempfile.mkdtemp(prefix="qwen3-jax-") if self._in_bucket else output_dir)
        self._lock = None if self._in_bucket else _locked(self.directory / _LOCK)
        self._copied: dict[Path, tuple[int, int]] = {}  # size and time of each file when it was copied
        self._copying = threading.Lock()
        self._left = threading.Event()
        if self._in_bucket and jax.process_index() == 0 and (self.directory / METRICS).exists():
            (self.directory / METRICS).copy(self.files / METRICS)

    def check_space(self, arrays: Any) -> None:
        """ValueError unless a disk has room for a checkpoint of these."""
        if self._in_bucket:
            return
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
        free = shutil.disk_usage(self.files).free
        if free < needed:
            raise ValueError(
                f"output_dir: {str(self.directory)!r} has {free / 2**20:,.0f} MiB free; a checkpoint needs "
                f"{needed / 2**20:,.0f} MiB"
            )

    def publish(self) -> None:
        """Copies to the bucket what was written since the last time; nothing to do on a disk.

        Raises:
          OSError: naming the file.
        """
        if not self._in_bucket:
            return
        with self._copying:
            for file in sorted(path for path in self.files.rglob("*") if path.is_file()):
                stat = file.stat()
                state = (stat.st_size, stat.st_mtime_ns)
                if self._copied.get(file) == state:
                    continue
                target = self.directory / file.relative_to(self.files)
                try:
                    target.write_bytes(file.read_bytes())
                except Exception as error:  # each kind of storage has its own
                    raise OSError(f"{str(target)!r}: {reason_of(error)}") from error
                self._copied[file] = state

    def __enter__(self) -> RunDirectory:
        if self._in_bucket:
            threading.Thread(target=self._publish_regularly, daemon=True).start()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._left.set()
        try:
            self.publish()
        except OSError:
            if raised[1] is None:
                raise
        finally:
            if self._in_bucket:
                shutil.rmtree(self.files, ignore_errors=True)
            if self._lock is not None:
                self._lock.close()

    def _publish_regularly(self) -> None:
        while not self._left.wait(_EVERY):
            with contextlib.suppress(OSError):  # tried again in a minute, and before a checkpoint for good
                self.publish()


def _locked(path: epath.Path) -> IO[bytes] | None:
    """The file, held by process 0 until it is closed or the process dies."""
    if jax.process_index() > 0:
        return None
    file = open(path, "wb")  # noqa: SIM115 (it stays open)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"output_dir: {str(path.parent)!r} is in use by another run; use another directory") from None
    except OSError:  # a file system without locks
        pass
    return file
