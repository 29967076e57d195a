"""Meshes, logical axes, and the tables that map the second to the first.

Nothing here knows Qwen3. Every weight and activation names its dims by what they mean ("heads", "batch"). `AXIS_RULES`
maps these logical axes to mesh axes for training and prefill, `DECODE_RULES` for steps of decoding. Meshes have
`AxisType.Auto` axes: XLA's partitioner propagates the shardings and inserts the collectives.
"""

from sharding.axes import (
    AXIS_RULES,
    DECODE_RULES,
    AxisRules,
    axis_rules,
    constrain,
    named_shardings,
    num_parts,
    partition_spec,
    spec_axes,
    split_axes,
    split_over_replicas,
)
from sharding.mesh import MeshConfig, make_mesh
from sharding.processes import end_if_another_died, end_others, from_first_process, skip_absent_tpu, start_processes

__all__ = [
    "AXIS_RULES",
    "DECODE_RULES",
    "AxisRules",
    "MeshConfig",
    "axis_rules",
    "constrain",
    "end_if_another_died",
    "end_others",
    "from_first_process",
    "make_mesh",
    "named_shardings",
    "num_parts",
    "partition_spec",
    "skip_absent_tpu",
    "spec_axes",
    "split_axes",
    "split_over_replicas",
    "start_processes",
]
