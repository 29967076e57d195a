"""What one decoding step costs on TPUs, against the least that it could; no TPU needed.

    pip install -e '.[tpu]'
    python benchmarks/tpu_decode.py [--layers N] [--only TEXT]

What `qwen3-jax plan --infer` compiles and reads, for a few models, slices and batches, with the cache's copies counted.
Nothing is timed, and estimates tend to be too low. Of a conditional, the more expensive branch counts (sampling, not
greedy).
"""

from __future__ import annotations

import argparse
import dataclasses

from qwen3_jax.aot import Program, costliest_loop, read_program
from qwen3_jax.aot.hlo import HBM, Array
from qwen3_jax.aot.programs import DecodeConfig, decode_shapes, decode_step, use_compiler
from qwen3_jax.aot.report import compile_report
from qwen3_jax.config import ModelConfig
from sharding import MeshConfig

CONTEXT = 2048
MESHES = {
    "one chip": MeshConfig(fsdp=1, topology="v5p:1x1x1"),
    "fsdp 2 tensor 8": MeshConfig(fsdp=2, tensor=8, topology="v5e:4x4"),
    "fsdp 4 tensor 4": MeshConfig(fsdp=4, tensor=4, topology="v5e:4x4"),
}
RUNS = [
    ("qwen3-8b", "one chip"),
    ("qwen3-8b", "fsdp 2 tensor 8"),
    ("qwen3-30b-a3b", "one chip"),
    ("qwen3-30b-a3b", "fsdp 4 tensor 4"),
]


def cache_copies(program: Program, name: str, axes: tuple[int, ...]) -> int:
    """How many instructions of a computation copy a whole array with these axes, in order of size, from HBM to HBM."""
    scope, count = program.computations[name], 0
    for i in scope.values():
        copied = i if i.op != "fusion" else program.computations[i.computation("calls")].root
        if copied.op in ("copy", "transpose", "copy-start"):
            ends = (*i.arrays[:2], *(array for operand in i.operands for array in scope[operand].arrays))
            spaces = {end.space for end in ends if _axes(end) == axes}
            count += _axes(copied.arrays[0]) == axes and spaces == {HBM}
    return count


def _axes(array: Array) -> tuple[int, ...]:
    return tuple(sorted(size for size in array.dims if size > 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, help="cut the models to so many layers: compiles in seconds")
    parser.add_argument("--only", default="", help="runs whose row begins with this, such as 'qwen3-8b | v5e:4x4'")
    args = parser.parse_args()
    use_compiler()
    print("| model | slice | mesh | batch | floor, ms | step, ms | ratio | collectives, ms | MB | cache copies |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, sizes in RUNS:
        for batch in (1, 32, 128):
            mesh, model = MESHES[sizes], ModelConfig.preset(name)
            row = f"{name} | {mesh.topology} | {sizes} | {batch}"
            if not row.startswith(args.only):
                continue
            if args.layers:
                model = dataclasses.replace(model, num_hidden_layers=args.layers)
            print(f"| {row} | {measure(DecodeConfig(model, mesh, batch, CONTEXT))} |", flush=True)


def measure(config: DecodeConfig) -> str:
    """The figures of a row; of the cache's copies those in the step and those around the loop."""
    assert config.mesh.topology is not None
    work = decode_step(config)
    report, text = compile_report(work, config.mesh.topology)
    assert report.step_s is not None
    assert report.floor_s is not None
    program = read_program(text)
    key = decode_shapes(config, work.mesh).state.cache.keys[0]
    axes = tuple(sorted(size for size in key.sharding.shard_shape(key.shape) if size > 1))
    copies = [cache_copies(program, name, axes) for name in (costliest_loop(program), program.entry)]
    times = [1e3 * seconds for seconds in (report.floor_s, report.step_s, report.seconds["collectives"])]
    floor, step, exposed = (f"{time:.2f}" for time in times)
    moved = f"{report.work['hbm'] / 1e6:,.0f}"
    return f"{floor} | {step} | {times[1] / times[0]:.2f} | {exposed} | {moved} | {copies[0]}, {copies[1]}"


if __name__ == "__main__":
    main()
