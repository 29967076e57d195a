"""Training checkpoints by Orbax: asynchronous, atomic, kept by policy, and used only where every bit is as written.

A checkpoint is a directory named by its step, with the items `params` and `optimizer` (arrays, sharded over the
hosts), `data` (where every process is in the documents) and `run` (JSON: all else that a run must know to go on).
It appears whole, under that name, or not at all; `digests.json` in it holds the SHA-256 of all its other files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any

import fsspec
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

CHECKPOINTS = "checkpoints"  # in a run's output_dir
DIGESTS = "digests.json"
PARAMS = "params"
_TIMES = "_CHECKPOINT_METADATA"  # when it was saved, which Orbax writes last of all and needs for nothing here
_IN_PROGRESS = ".orbax-checkpoint-tmp"  # Orbax's name for a checkpoint that is being written


class Checkpointer:
    """The checkpoints of one run. As a context manager it waits, on leaving, until all is on disk.

    Args:
      directory: made if it is not there; what a killed process left half written in it is deleted.
      keep: how many of the newest stay. keep_every: those of every so many steps stay for good.

    Raises:
      OSError: in one line, naming step and directory, for a checkpoint that cannot be written. Saving goes on in the
        background, so the next `save`, or leaving, may be what raises it.
    """

    def __init__(self, directory: str | Path, keep: int, keep_every: int | None = None) -> None:
        self.directory = absolute(directory)
        policies: list[Any] = [ocp.checkpoint_managers.LatestN(keep)]
        if keep_every is not None:
            policies.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
        self._manager = _Manager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(
                    post_finalization_callback=self._write_digests, barrier_sync_fn=_wait_for_all
                ),
            ),
        )
        self._saving = -1
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax would trace what is raised here in one line

    def newest_whole(self, announce: Callable[[str], None]) -> int | None:
        """The newest step that is as it was written, None where there are no checkpoints.

        Damaged ones that are newer are renamed to `<step>.damaged`, which nothing here touches again; `announce` is
        told of each.

        Raises:
          ValueError: there are checkpoints, and every one is damaged; all stay where they are.
        """
        found = find_whole(self.directory, announce)
        if found is None:
            return None
        newer = [step for step in self._manager.all_steps() if step > int(found.name)]
        if newer and jax.process_index() == 0:
            for step in newer:
                _set_aside(self.directory / str(step))
        if newer:
            _barrier("damaged checkpoints set aside")
            self._manager.reload()
        return int(found.name)

    def save(self, step: int, params: Any, optimizer: Any, data: dict[str, Any], run: dict[str, Any]) -> None:
        """Starts saving; the arrays may be donated as soon as this returns.

        Args:
          data: this process's part; see `Checkpointer.restore`. run: the same on every process.
        """
        self._wait()
        self._saving = step
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            optimizer=ocp.args.StandardSave(optimizer),
            data=_SavePart(data),
            run=ocp.args.JsonSave(run),
        )
        try:
            self._manager.save(step, args=args)
        except Exception as error:
            raise self._refusal(error) from error

    def restore(self, step: int, params: Any, optimizer: Any) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
        """`(params, optimizer, data, run)`, the arrays shaped and sharded as the abstract ones given are.

        Neither the mesh nor the number of processes need be those that saved: `data` is the union of all their parts.

        Raises:
          ValueError: it holds other arrays, of a model or an optimiser of another kind.
          OSError: it cannot be read.
        """
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(params),
            optimizer=ocp.args.StandardRestore(optimizer),
            data=_RestoreParts(),
            run=ocp.args.JsonRestore(),
        )
        try:
            restored = self._manager.restore(step, args=args)
        except (ValueError, KeyError) as error:  # a page, with both trees in it
            reason = reason_of(error)
            if not re.search("do not match|not compatible", reason):
                raise OSError(f"checkpoint {step}: {str(self.directory)!r}: {reason}") from error
            raise ValueError(
                f"checkpoint {step}: {str(self.directory)!r} holds other arrays than this run has ({reason}); the "
                "model, optimizer and release that wrote it, or another output_dir, fit"
            ) from error
        return restored["params"], restored["optimizer"], restored["data"], restored["run"]

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._wait()
        except OSError:
            if error is None:
                raise
        self._manager.close()

    def _wait(self) -> None:
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # tensorstore, Orbax and the system each raise their own
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> OSError:
        return OSError(f"checkpoint {self._saving}: {str(self.directory)!r}: {reason_of(error)}; nothing of it counts")

    def _write_digests(self) -> None:
        """Called when all processes have written all files, before the checkpoint gets its name."""
        building = self.directory / f"{self._saving}{_IN_PROGRESS}"
        path = building if building.exists() else self.directory / str(self._saving)  # object stores cannot rename
        fs, inside = fsspec.core.url_to_fs(str(path))
        names = sorted(str(PurePath(file).relative_to(inside)) for file in fs.find(inside))
        names = [name for name in names if PurePath(name).name != _TIMES]
        with ThreadPoolExecutor() as pool:
            digests = dict(zip(names, pool.map(lambda name: _digest(path / name), names), strict=True))
        (path / DIGESTS).write_text(json.dumps(digests, indent=1))


def find_whole(directory: str | Path | epath.Path, announce: Callable[[str], None]) -> epath.Path | None:
    """The newest checkpoint in `directory` that is as it was written, None where there is none at all.

    All processes of a run call it together: each reads its share of the files.

    Args:
      announce: told in one line of each damaged one that is newer.

    Raises:
      ValueError: there are checkpoints, and every one is damaged.
    """
    directory = absolute(directory)
    steps = ocp.utils.checkpoint_steps(directory) if directory.exists() else []
    problems = []
    for step in sorted(steps, reverse=True):
        path = directory / str(step)
        problem = _damage(path)
        if problem is None:
            return path
        problems.append(f"checkpoint {step} is damaged: {problem}")
        announce(problems[-1])
    if problems:
        raise ValueError(f"{str(directory)!r}: no whole checkpoint; {problems[0]}")
    return None


def restore_params(path: epath.Path, params: Any) -> Any:
    """The weights of the checkpoint in `path`, shaped and sharded as the abstract ones given are."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path / PARAMS, params)


def absolute(directory: str | Path | epath.Path) -> epath.Path:
    """As Orbax wants paths; those in a bucket are so already."""
    path = epath.Path(directory)
    return path if "://" in str(path) else path.absolute()


def reason_of(error: Exception) -> str:
    """Why something could not be read or written, in one line: each kind of storage has its own exceptions."""
    number = re.search(r"(?:os_error_code='|Errno )(\d+)", str(error))  # as tensorstore says it, and the system
    if number:
        return os.strerror(int(number[1]))
    return str(error).partition("\n")[0].partition(". ")[0].rstrip(":")[:200] or type(error).__name__


def _damage(path: epath.Path) -> str | None:
    """What is wrong with a checkpoint, None if nothing is; the same on every process."""
    try:
        digests = json.loads((path / DIGESTS).read_text())
        names = sorted(digests)[jax.process_index() :: jax.process_count()]
        with ThreadPoolExecutor() as pool:
            damaged = pool.map(lambda name: _digest_or_none(path / name) != digests[name], names)
            problem = next((name for name, bad in zip(names, damaged, strict=True) if bad), None)
        problem = problem and f"{problem} is not as it was written"
    except (OSError, ValueError, TypeError):
        problem = f"{DIGESTS} cannot be read"
    if jax.process_count() > 1 and multihost_utils.process_allgather(np.array(problem is not None)).any():
        return problem or "another process found a file that is not as it was written"
    return problem


def _digest(path: epath.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_or_none(path: epath.Path) -> str | None:
    try:
        return _digest(path)
    except OSError:
        return None


def _set_aside(path: epath.Path) -> None:
    target, number = path.with_name(f"{path.name}.damaged"), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.damaged-{number}")
    path.rename(target)


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _wait_for_all(*, key: str, timeout_ms: int) -> None:
    """Orbax's barrier, except after a failure in its own thread: it then comes to another one than the processes that
    had none."""
    failure = sys.exception()
    if failure is not None and threading.current_thread() is not threading.main_thread():
        raise failure
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        return False  # the run asks itself; Orbax would ask again in the background, with a step long gone


class _PartsHandler(ocp.CheckpointHandler):
    """One JSON file for each process; read as the union of their dicts."""

    def save(self, directory: epath.Path, args: _SavePart) -> None:
        (directory / f"process_{jax.process_index():05d}.json").write_text(json.dumps(args.part))

    def restore(self, directory: epath.Path, args: _RestoreParts) -> dict[str, Any]:
        files = sorted(directory.glob("process_*.json"))
        return {key: value for file in files for key, value in json.loads(file.read_text()).items()}


@ocp.args.register_with_handler(_PartsHandler, for_save=True)
@dataclasses.dataclass
class _SavePart(ocp.args.CheckpointArgs):
    part: dict[str, Any]


@ocp.args.register_with_handler(_PartsHandler, for_restore=True)
@dataclasses.dataclass
class _RestoreParts(ocp.args.CheckpointArgs):
    pass
