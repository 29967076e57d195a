"""TPU chips, one JAX device each: the figures of the vendor's data sheets that estimates need."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX lists as one device (of a TPU7x, half a chip).

    device_kinds: how `jax.Device.device_kind` calls it.
    peak_flops: dense bfloat16 FLOP/s.
    clock_hz: at which the matrix units' FLOPs per cycle come to `peak_flops`.
    hbm_bandwidth, hbm_bytes: of its memory, bytes/s and bytes.
    ici_bandwidth: bytes/s of one link to a neighbour, one way.
    torus_axes: of its network, 2 or 3.
    sparse_cores: whether it has SparseCores that the compiler was seen to run collectives on, beside the matrix units.
    """

    name: str
    device_kinds: tuple[str, ...]
    peak_flops: float
    clock_hz: float
    hbm_bandwidth: float
    hbm_bytes: int
    ici_bandwidth: float
    torus_axes: int
    sparse_cores: bool

    def wraps(self, slice_shape: Sequence[int], axis: int) -> bool:
        """Whether an axis of a slice of this shape closes to a ring: in two dimensions where it is a whole pod's side
        of 16, in three where the slice is made of whole cubes of 4 x 4 x 4."""
        if self.torus_axes == 2:
            return slice_shape[axis] == 16
        return all(size % 4 == 0 for size in slice_shape)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", ("TPU v4",), 275e12, 1.05e9, 1.2e12, 32 * _GIB, 45e9, 3, False),
        Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 1.5e9, 0.82e12, 16 * _GIB, 45e9, 2, False),
        Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 1.75e9, 2.765e12, 95 * _GIB, 90e9, 3, True),
        Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 1.75e9, 1.64e12, 32 * _GIB, 90e9, 2, True),
        Chip("tpu7x", ("TPU7x", "TPU v7x"), 1153.5e12, 2.2e9, 3.69e12, 96 * _GIB, 90e9, 3, True),
    )
}
BY_DEVICE_KIND = {kind: chip for chip in CHIPS.values() for kind in chip.device_kinds}


def find_chip(name: str) -> Chip:
    """The chip of a name ("v5p"), of a topology ("v5p:4x4x4") or of a device's `device_kind` ("TPU v5").

    Raises:
      ValueError: there is none of that name.
    """
    chip = BY_DEVICE_KIND.get(name) or CHIPS.get(name.partition(":")[0])
    if chip is None:
        kinds = ", ".join(map(repr, BY_DEVICE_KIND))
        raise ValueError(f"chip: {name!r} is unknown; one of {', '.join(CHIPS)} fits, or a device kind: {kinds}")
    return chip
