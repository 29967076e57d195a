"""Meshes, logical axes, and the one table that maps the second to the first.

Knows nothing of Qwen3. Every weight and activation names its axes by what they mean ("heads", "batch"); `AXIS_RULES`
says over which mesh axes each meaning is split. Meshes have `AxisType.Auto` axes: XLA's partitioner propagates the
shardings and inserts the collectives.
"""

from sharding.axes import AXIS_RULES, constrain, named_shardings, num_parts, partition_spec, split_axes
from sharding.mesh import MeshConfig, make_mesh
from sharding.processes import start_processes

__all__ = [
    "AXIS_RULES",
    "MeshConfig",
    "constrain",
    "make_mesh",
    "named_shardings",
    "num_parts",
    "partition_spec",
    "split_axes",
    "start_processes",
]
