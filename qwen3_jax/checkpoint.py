"""Training checkpoints by Orbax: written asynchronously and atomically, and verified by checksums before use.

A checkpoint is a directory named by its step. Its items are `params` and `optimizer` (arrays, sharded over the hosts),
`data` (the position of every process in the documents) and `run` (JSON: everything else that a resumed run needs).
`digests.json` holds the SHA-256 of all other files. The directory gets its name when all files are written.
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
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

CHECKPOINTS = "checkpoints"  # in a run's output_dir
DIGESTS = "digests.json"
PARAMS = "params"
_TIMES = "_CHECKPOINT_METADATA"  # time stamps: Orbax rewrites this file after the digests, and nothing here reads it
_IN_PROGRESS = ".orbax-checkpoint-tmp"  # Orbax's name for a checkpoint that is being written


class Checkpointer:
    """The checkpoints of one run. Leaving its `with` block waits until the last save is finished.

    Args:
      directory: created if it does not exist. Partly written checkpoints of a killed process are deleted.
      keep: number of newest checkpoints that are preserved.
      keep_every: checkpoints of steps that this divides are preserved forever.

    Raises:
      OSError: one line with step and directory, where a checkpoint cannot be written. Since saving runs in the
        background, the next `save` or leaving the `with` block raises it.
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
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs a traceback of errors that are raised here

    def newest_verified(self, announce: Callable[[str], None]) -> int | None:
        """The newest step whose files match their digests, None where there are no checkpoints.

        Newer, damaged checkpoints are renamed to `<step>.damaged` and ignored from then on.

        Args:
          announce: called with one line for each damaged checkpoint.

        Raises:
          ValueError: all checkpoints are damaged. None is renamed then.
        """
        found = find_verified(self.directory, announce)
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
        """Starts saving in the background. The arrays may be donated once this returns.

        Args:
          data: the part of this process, see `restore`. run: the same on every process.
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
        """`(params, optimizer, data, run)` of a step. `data` is the union of all processes' parts.

        The mesh and the number of processes may differ from those that saved.

        Args:
          params, optimizer: abstract arrays with the shapes and shardings to restore to.

        Raises:
          ValueError: the checkpoint holds other arrays, of another model or optimiser.
          OSError: the checkpoint cannot be read.
        """
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(params),
            optimizer=ocp.args.StandardRestore(optimizer),
            data=_RestoreParts(),
            run=ocp.args.JsonRestore(),
        )
        try:
            restored = self._manager.restore(step, args=args)
        except (ValueError, KeyError) as error:  # Orbax's message prints both trees, over a page
            reason = reason_of(error)
            if not re.search("do not match|not compatible", reason):
                raise OSError(f"checkpoint {step}: {str(self.directory)!r}: {reason}") from error
            raise ValueError(
                f"checkpoint {step}: {str(self.directory)!r} holds other arrays than this run has ({reason}); use "
                "the model, optimizer and release that wrote it, or another output_dir"
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
        except Exception as error:  # tensorstore, Orbax and the operating system have no common exception
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> OSError:
        return OSError(f"checkpoint {self._saving}: {str(self.directory)!r}: {reason_of(error)}; it was not saved")

    def _write_digests(self) -> None:
        """Orbax calls this after all processes have written all files, before the checkpoint gets its name."""
        building = self.directory / f"{self._saving}{_IN_PROGRESS}"
        # Object stores cannot rename: there, Orbax writes to the final name and marks it as complete at the end.
        path = building if building.exists() else self.directory / str(self._saving)
        fs, inside = fsspec.core.url_to_fs(str(path))
        names = sorted(str(PurePath(file).relative_to(inside)) for file in fs.find(inside))
        names = [name for name in names if PurePath(name).name != _TIMES]
        with ThreadPoolExecutor() as pool:
            digests = dict(zip(names, pool.map(lambda name: _digest(path / name), names), strict=True))
        (path / DIGESTS).write_text(json.dumps(digests, indent=1))


def find_verified(directory: str | Path | epath.Path, announce: Callable[[str], None]) -> epath.Path | None:
    """The newest checkpoint in `directory` whose files match their digests, None where there are no checkpoints.

    A collective: all processes of a run must call it, and each reads a share of the files.

    Args:
      announce: called with one line for each newer, damaged checkpoint.

    Raises:
      ValueError: all checkpoints are damaged.
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
        raise ValueError(f"{str(directory)!r}: no verified checkpoint; {problems[0]}")
    return None


def find_params(directory: str | Path | epath.Path, announce: Callable[[str], None]) -> epath.Path | None:
    """Where the Orbax weights of a directory are: those that `qwen3-jax convert` wrote, or those of a training run's
    newest verified checkpoint, which is announced. None where the directory is neither's.

    Raises:
      ValueError: the run has no checkpoint that is whole.
    """
    directory = epath.Path(directory)
    if (directory / PARAMS).is_dir():
        return absolute(directory / PARAMS)
    if not (directory / CHECKPOINTS).is_dir():
        return None
    newest = find_verified(directory / CHECKPOINTS, announce)
    if newest is None:
        raise ValueError(f"{str(directory)!r} holds no checkpoint; use a run that has saved one")
    announce(f"{directory}: weights of step {newest.name}")
    return newest / PARAMS


def restore_params(path: epath.Path, params: Any) -> Any:
    """The weights that `find_params` found, with the shapes, dtypes and shardings of the abstract arrays `params`."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, params)


def weights_digest(params: Any) -> str:
    """16 hexadecimal digits that depend on every weight and on its dtype, and not on how weights are sharded."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sums = jax.device_get([_mixed_sum(leaf) for _, leaf in leaves])
    names = (f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}" for path, leaf in leaves)
    held = json.dumps([[name, int(value)] for name, value in zip(names, sums, strict=True)])
    return hashlib.sha256(held.encode()).hexdigest()[:16]


@jax.jit
def _mixed_sum(x: jax.Array) -> jax.Array:
    """The sum of a hash of each element's bits and place, uint32; integers add up alike in every order."""
    bits = jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]).astype(jnp.uint32)
    for dim, odd in enumerate((0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)[: x.ndim]):
        bits ^= jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim) * jnp.uint32(odd)
        bits = (bits ^ (bits >> 15)) * jnp.uint32(0x2C1B3C6D)  # so that two dims' places cannot cancel out
    bits = (bits ^ (bits >> 12)) * jnp.uint32(0x297A2D39)
    return (bits ^ (bits >> 15)).sum(dtype=jnp.uint32)


def absolute(directory: str | Path | epath.Path) -> epath.Path:
    """An absolute path, which Orbax requires; a path in a bucket is returned as it is."""
    path = epath.Path(directory)
    return path if "://" in str(path) else path.absolute()


def reason_of(error: Exception) -> str:
    """The cause of a failed read or write in one line, for the exceptions of all kinds of storage."""
    number = re.search(r"(?:os_error_code='|Errno )(\d+)", str(error))  # of tensorstore, of the operating system
    if number:
        return os.strerror(int(number[1]))
    return str(error).partition("\n")[0].partition(". ")[0].rstrip(":")[:200] or type(error).__name__


def _damage(path: epath.Path) -> str | None:
    """What is wrong with a checkpoint, None if it is verified. None on every process or on no process."""
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
    """Orbax's barrier, except after a failure in Orbax's background thread.

    There, Orbax would wait at a barrier that the processes without a failure never reach.
    """
    failure = sys.exception()
    if failure is not None and threading.current_thread() is not threading.main_thread():
        raise failure
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        # The train loop handles preemption. Orbax would poll in the background too, with a step that is over.
        return False


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
