"""Training checkpoints: weights, optimiser and data position, by Orbax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grain
import orbax.checkpoint as ocp


class Checkpointer:
    """Numbered checkpoints in one directory; the newest `keep` stay.

    Saving is asynchronous and atomic: a checkpoint that a crash cut short is not there. Each holds `params` and
    `optimizer` (with the step's count in it), sharded over the hosts, and `data`, each process's place in its own
    share of the documents.
    """

    def __init__(self, directory: str | Path, keep: int) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(Path(directory).absolute(), options=options)

    def latest_step(self) -> int | None:
        """The newest step saved, None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, params: Any, optimizer: Any, data: grain.DatasetIterator) -> None:
        """Starts saving; the arrays may be donated as soon as this returns."""
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            optimizer=ocp.args.StandardSave(optimizer),
            data=grain.checkpoint.CheckpointSave(data),
        )
        self._manager.save(step, args=args)

    def restore(self, step: int, params: Any, optimizer: Any, data: grain.DatasetIterator) -> tuple[Any, Any]:
        """`(params, optimizer)` as those given (abstract ones) are shaped and sharded; moves `data` too."""
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(params),
            optimizer=ocp.args.StandardRestore(optimizer),
            data=grain.checkpoint.CheckpointRestore(data),
        )
        restored = self._manager.restore(step, args=args)
        return restored["params"], restored["optimizer"]

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
