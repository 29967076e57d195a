"""The one place where meshes are made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The number of devices along each mesh axis. One axis may be -1: all devices that the other axes leave.

    data: replicates the weights; shards the batch and the optimiser's state (ZeRO-1). The axis that spans slices.
    fsdp: shards the batch, and the weights along their embedding dim (ZeRO-3).
    expert: shards the batch and the experts; tokens move by all-to-all.
    context: shards the sequence; queries stay on their device, keys and values are all-gathered.
    tensor: shards heads, MLP columns and vocabulary (Megatron).
    topology: the slice that the sizes are meant for, such as `v5p:4x4x4`. `qwen3-jax plan` compiles for it; a run
      ignores it and uses the devices of the machine.
    """

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    topology: str | None = None

    def __post_init__(self) -> None:
        for name, size in self.axes.items():
            if size != -1 and size < 1:
                raise ValueError(f"mesh.{name}: {size}; use a number >= 1, or -1 for all remaining devices")
        if list(self.axes.values()).count(-1) > 1:
            raise ValueError(f"mesh: {self}; at most one axis may be -1")

    @property
    def axes(self) -> dict[str, int]:
        """The number of devices along each axis, as configured, by the axis's name."""
        return {name: getattr(self, name) for name in ("data", "fsdp", "expert", "context", "tensor")}

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Axis sizes on `num_devices` devices, with -1 resolved; ValueError unless their product is `num_devices`."""
        sizes = self.axes
        fixed = math.prod(size for size in sizes.values() if size != -1)
        for name, size in sizes.items():
            if size == -1:
                if num_devices % fixed:
                    raise ValueError(
                        f"mesh.{name}: -1, but the other axes ({fixed}) do not divide {num_devices} devices"
                    )
                sizes[name] = num_devices // fixed
                return sizes
        if fixed != num_devices:
            raise ValueError(f"mesh: {sizes} needs {fixed} devices, there are {num_devices}")
        return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all) with the axes of `MeshConfig`, in an order that suits the hardware.

    On several slices, `data` spans the slow network between them and every other axis stays within a slice.

    Raises:
      ValueError: the product of the sizes is not the number of devices, or the slices do not divide the `data` axis.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    auto = (AxisType.Auto,) * len(sizes)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # allow_split_physical_axes: two mesh axes may share a dimension of the torus where there is no other assignment.
    if slices == 1:
        grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
        return Mesh(grid, tuple(sizes), axis_types=auto)
    if sizes["data"] % slices:
        raise ValueError(f"mesh.data: {sizes['data']} on {slices} slices; use a multiple of {slices}")
    within = {**sizes, "data": sizes["data"] // slices}
    between = {**dict.fromkeys(sizes, 1), "data": slices}
    grid = mesh_utils.create_hybrid_device_mesh(
        tuple(within.values()), tuple(between.values()), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, tuple(sizes), axis_types=auto)
