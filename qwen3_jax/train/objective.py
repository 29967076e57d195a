"""What a run is trained on: the arrays of a batch, and what of them is a loss.

A step cuts its batch into micro-batches, and the mesh cuts each of them over its devices. The loss must not depend on
either, so it is never a mean of means: each micro-batch gives its part of the loss of the step, and the denominators
are sums over the step, taken first.

    totals  = objective.totals(params, micro-batches)                    sums over all devices and micro-batches
    loss_m, sums_m = objective.loss(params, micro-batch m, totals, sums_0 + ... + sums_(m-1))
    the step's loss, gradient, sums = the sums over m of loss_m, of its gradient, of sums_m
    metrics = objective.metrics(sums, totals)

A step may have several updates, each on its part of the batch; all of this is then done for each of them, and the
metrics are means over them.

Arrays are global: a sum over rows or tokens in these functions is over all devices, and XLA makes it an all-reduce.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from sharding import partition_spec

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Sums = dict[str, Any]  # trees of arrays, put together over micro-batches and over batches by `add_sums`


@dataclasses.dataclass(frozen=True)
class BatchArray:
    """An array of a step's batch, on all devices together.

    axes: the logical axis (see `sharding`) of each dim. An array that begins with "batch" is cut into micro-batches;
      another one, such as a table that all rows read, goes to each of them as it is.
    """

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...]


class Objective(Protocol):
    """What a batch holds and what its loss is. All functions are traced; `params` are the float32 weights.

    arrays: a step's batch, by name. tokens: of a step, for rates. flops: that a step needs, for its MFU.
    updates: of the weights in a step. may_be_empty: whether the last micro-batches may be padding alone (`segment_ids`
      of 0); they are then left out. limits: metrics that a run warns of when they are above the number.
    """

    arrays: Mapping[str, BatchArray]
    tokens: int
    flops: float
    updates: int
    may_be_empty: bool
    limits: Mapping[str, float]

    def before(self, params: Any, micro_batches: Batch) -> Batch:
        """Further arrays [micro-batches, ...] that depend on the weights before the step's first update.

        `micro_batches` are those of the whole step, as in `totals`.
        """

    def totals(self, params: Any, micro_batches: Batch) -> Sums:
        """Sums over an update that the loss of each micro-batch needs, above all its denominators.

        `micro_batches` are the arrays cut into [micro-batches, rows, ...]. What only the network can count is counted
        here, by a forward pass over them: `NextToken` does so for the exact balance loss.
        """

    def loss(self, params: Any, batch: Batch, totals: Sums, earlier: Sums | None) -> tuple[jax.Array, Sums]:
        """`(part of the update's loss, sums for metrics)` of one micro-batch.

        `earlier` is the sum of the micro-batches before this one, zeros or None for the first.
        """

    def metrics(self, sums: Sums, totals: Sums) -> Metrics:
        """Scalars, [L] and [L, E] (L layers, E experts) by name. The guard and the progress bar read `loss`; an
        evaluation reports it, and what else begins with `loss`. Both arguments may be added up over several batches."""


def add_sums(one: Sums, other: Sums) -> Sums:
    """Of both together: sums add up, and of what is under "largest" the larger one counts."""
    return {name: jax.tree.map(jnp.maximum if name == "largest" else jnp.add, one[name], other[name]) for name in one}


def batch_structs(
    arrays: Mapping[str, BatchArray], mesh: Mesh, accumulation: int = 1
) -> dict[str, jax.ShapeDtypeStruct]:
    """A step's batch as shapes and shardings.

    Raises:
      ValueError: the rows of a micro-batch, or their tokens, do not divide over the mesh.
    """
    structs, context = {}, mesh.shape["context"]
    for name, array in arrays.items():
        length = dict(zip(array.axes, array.shape, strict=True)).get("length", 0)
        if context > 1 and length % (2 * context):
            raise ValueError(
                f"sequence_length: {length} on mesh.context {context}, two chunks a device; use a multiple "
                f"of {2 * context}"
            )
        micro = [n // accumulation if axis == "batch" else n for n, axis in zip(array.shape, array.axes, strict=True)]
        # Checked here for an error in one line; XLA's has fifty.
        try:
            sharding = NamedSharding(mesh, partition_spec(array.axes, mesh, micro))
        except ValueError as error:
            if "batch" not in array.axes:
                raise ValueError(f"{name}: {error}") from None
            sizes = f"{array.shape[array.axes.index('batch')]} in {accumulation} micro-batches"
            raise ValueError(f"data.batch_size: {sizes}; {error}") from None
        structs[name] = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
    return structs
