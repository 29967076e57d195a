"""Parts of other packages that the project uses and that are private or experimental there: a release may drop them."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# By distribution: module, `:`, the part, and in parentheses parameters that are passed by name.
PARTS = {
    "jax": """
        jax._src.distributed:global_state.client
        jax._src.distributed:global_state.process_id
        jax._src.lib:_jax.DistributedRuntimeClient.key_value_set
        jax._src.lib:_jax.DistributedRuntimeClient.key_value_try_get
        jax.experimental.mesh_utils:create_device_mesh(allow_split_physical_axes)
        jax.experimental.mesh_utils:create_hybrid_device_mesh(allow_split_physical_axes)
        jax.experimental.multihost_utils:process_allgather(tiled)
        jax.experimental.multihost_utils:reached_preemption_sync_point
        jax.experimental.multihost_utils:sync_global_devices
        jax.experimental.pallas.ops.tpu.megablox.gmm:gmm(transpose_rhs)
        jax.experimental.pallas.ops.tpu.megablox.gmm:tgmm(num_actual_groups)
        jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel:BlockSizes(block_q, block_kv)
        jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel:BlockSizes(block_q_dkv, block_kv_dkv)
        jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel:BlockSizes(use_fused_bwd_kernel)
        jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel:SegmentIds
        jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel:SplashAttentionKernel
        jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel:make_splash_mha(block_sizes)
        jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel:make_splash_mha(head_shards)
        jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel:make_splash_mha(q_seq_shards)
        jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel:make_splash_mha(residual_checkpoint_name)
        jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask:CausalMask
        jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask:MultiHeadMask
        jax.experimental.topologies:get_topology_desc(platform, topology_name)
    """,
    "orbax-checkpoint": """
        orbax.checkpoint:AsyncOptions(post_finalization_callback, barrier_sync_fn)
        orbax.checkpoint:CheckpointManager.reached_preemption
        orbax.checkpoint:CheckpointManagerOptions(preservation_policy, cleanup_tmp_directories, async_options)
        orbax.checkpoint:StandardCheckpointHandler.metadata
        orbax.checkpoint:args.register_with_handler(for_save, for_restore)
        orbax.checkpoint:checkpoint_managers.AnyPreservationPolicy
        orbax.checkpoint:checkpoint_managers.EveryNSteps
        orbax.checkpoint:checkpoint_managers.LatestN
        orbax.checkpoint:multihost.get_barrier_sync_fn
        orbax.checkpoint:utils.checkpoint_steps
    """,
    "grain": "grain:experimental.ThreadPrefetchDatasetIterator",
    "optax": """
        optax.contrib:MuonDimensionNumbers(output_axis, reduction_axis)
        optax.contrib:scale_by_muon(beta, weight_dimension_numbers)
    """,
    "tensorboardX": """
        tensorboardX.event_file_writer:EventsWriter
        tensorboardX.proto.event_pb2:Event
        tensorboardX.proto.event_pb2:SessionLog.START
        tensorboardX.proto.summary_pb2:Summary.Value
        tensorboardX.summary:image(dataformats)
    """,
    "draccus": """
        draccus:cfgparsing.load_config(file)
        draccus:cfgparsing.parse_string
        draccus:decode
        draccus:utils.DraccusException
        draccus:utils.deflatten(sep)
    """,
    "array-record": """
        array_record.python.array_record_module:ArrayRecordReader
        array_record.python.array_record_module:ArrayRecordWriter
    """,
}
LISTED = [(package, part.strip()) for package, parts in PARTS.items() for part in parts.strip().splitlines()]


def missing(part: str) -> str | None:
    """Why a part cannot be used, None where it can."""
    found = re.fullmatch(r"([\w.]+):([\w.]+)(?:\(([\w, ]+)\))?", part)
    assert found is not None, part
    module, path, parameters = found.groups()
    try:
        value = importlib.import_module(module)
        for name in path.split("."):
            value = getattr(value, name)
    except (ImportError, AttributeError) as error:
        return str(error)
    accepted = inspect.signature(value).parameters if parameters else {}
    absent = [name for name in (parameters or "").replace(" ", "").split(",") if name and name not in accepted]
    return f"it has no parameter {', '.join(absent)}" if absent else None


def test_private_parts_are_there() -> None:
    problems = [
        f"{package} {version(package)}: {part}: {problem}" for package, part in LISTED if (problem := missing(part))
    ]
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        ("jax._src.gone:x", "No module named 'jax._src.gone'"),
        ("jax.experimental.topologies:gone", "has no attribute 'gone'"),
        ("jax.experimental.topologies:get_topology_desc(platform, gone)", "it has no parameter gone"),
    ],
)
def test_what_is_missing_is_named(part: str, problem: str) -> None:
    assert problem in str(missing(part))


def test_every_private_import_is_in_the_table() -> None:
    listed = [part.partition("(")[0].replace(":", ".") for _, part in LISTED]
    private = re.compile(r"\b(_src|experimental|contrib)\b")
    for package in ("qwen3_jax", "sharding"):
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if not (isinstance(node, ast.ImportFrom) and private.search(node.module or "")):
                    continue
                for alias in node.names:
                    used = f"{node.module}.{alias.name}"
                    assert any(f"{part}.".startswith(f"{used}.") for part in listed), f"{file}: {used}"
