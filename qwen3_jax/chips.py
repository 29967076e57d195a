"""TPU chips: the figures of the vendor's data sheets that estimates need."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX lists as one device: a chip, or half a chip of a TPU7x.

    device_kinds: values of `jax.Device.device_kind`.
    peak_flops: dense bfloat16 FLOP/s.
    clock_hz: the clock at which the matrix units reach `peak_flops`.
    hbm_bandwidth, hbm_bytes: bytes/s and bytes of the memory.
    ici_bandwidth: bytes/s of one link to a neighbour, in one direction.
    torus_axes: dimensions of the network, 2 or 3.
    sparse_cores: whether the compiler was seen to run collectives on SparseCores, beside the matrix units.
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
        """Whether a dimension of a slice has wrap-around links, so that it forms a ring.

        In a 2D torus: if it spans a full pod (16 chips). In a 3D torus: if the slice consists of 4 x 4 x 4 cubes.
        """
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


def slice_name(name: str) -> str:
    """The topology of a slice, such as "v5p:4x4x4", from that or from an accelerator type, such as "v5p-128".

    Accelerator types count cores, of which chips with a 3D network have two.

    Raises:
      ValueError: the chip is unknown, or has a network of other dimensions.
    """
    kind, _, shape = name.partition(":")
    if found := re.fullmatch(r"(\w+?)(litepod)?-(\d+)", name):
        kind, count = found[1] + "e" * bool(found[2]), int(found[3])
        axes = find_chip(kind).torus_axes
        chips, rest = divmod(count, 2 if axes == 3 else 1)
        if rest or chips.bit_count() != 1:
            raise ValueError(f"topology: {name!r}; use a power of two of cores, or the shape of the slice")
        sizes = [2 ** ((chips.bit_length() - 1 + axis) // axes) for axis in range(axes)]
        shape = "x".join(map(str, sizes if chips > 4 else sorted(sizes, reverse=True)))  # 2x2x1 is one host
    chip = find_chip(f"{kind}:{shape}" if shape else kind)
    if not re.fullmatch(r"\d+(x\d+)*", shape) or shape.count("x") + 1 != chip.torus_axes:
        example = "4x4x4" if chip.torus_axes == 3 else "4x4"
        raise ValueError(f"topology: {name!r}; use {chip.torus_axes} sizes, such as {chip.name}:{example}")
    return f"{kind}:{shape}"


def find_chip(name: str) -> Chip:
    """The chip by its name ("v5p"), by a topology ("v5p:4x4x4"), or by a `device_kind` ("TPU v5").

    Raises:
      ValueError: the name is unknown.
    """
    chip = BY_DEVICE_KIND.get(name) or CHIPS.get(name.partition(":")[0])
    if chip is None:
        kinds = ", ".join(map(repr, BY_DEVICE_KIND))
        raise ValueError(f"chip: {name!r} is unknown; use one of {', '.join(CHIPS)}, or a device kind: {kinds}")
    return chip
