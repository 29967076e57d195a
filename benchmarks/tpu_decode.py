"""Bytes that one decoding step moves on a TPU, against the bytes it must read; no TPU needed.

    pip install -e '.[tpu]'
    JAX_PLATFORMS=cpu python benchmarks/tpu_decode.py [--layers N] [--save DIR]

XLA's TPU compiler, which comes with libtpu, compiles the decoding loop ahead of time for a named topology. The
scheduled program says what each instruction reads from and writes to HBM; the instructions of the loop's body are
added up, those of a nested loop times its trips. Nothing is timed.

Must be read, per chip and step: the weights in use once (of E experts those that a batch of n tokens with k choices
each is expected to use, 1 - (1 - k/E)^n), and the cache once. Of conditionals the dearer branch counts (sampling, not
greedy). A batch smaller than the mesh's batch axes is padded with rows that are not active.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU machine to ask for its metadata
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental import topologies

from qwen3_jax.config import ModelConfig
from qwen3_jax.decode.batch import resume, start
from qwen3_jax.decode.budget import ThinkingTokens
from qwen3_jax.decode.pack import pack, pack_markers
from qwen3_jax.decode.request import Request
from qwen3_jax.model import Qwen3
from sharding import MeshConfig, make_mesh, named_shardings, num_parts, partition_spec

PROMPT, NEW = 1024, 1024
ONE = MeshConfig(fsdp=1)
RUNS = [
    *(("qwen3-8b", "v5p:2x2x1", ONE, batch) for batch in (1, 32, 128)),
    ("qwen3-8b", "v5e:2x4", MeshConfig(fsdp=1, tensor=8), 1),
    *(("qwen3-8b", "v5e:4x4", MeshConfig(data=2, fsdp=1, tensor=8), batch) for batch in (32, 128)),
    *(("qwen3-30b-a3b", "v5p:2x2x1", ONE, batch) for batch in (1, 32, 128)),
    # 768 columns of an expert over 2, not 4: parts that are no multiple of 128 are laid out anew before the loop.
    *(("qwen3-30b-a3b", "v5e:4x4", MeshConfig(fsdp=1, expert=8, tensor=2), batch) for batch in (1, 32, 128)),
]
TOKENS = ThinkingTokens(think=0, end_think=1, eos=(2,), stop_ids=(1,), empty_block=(0, 1))


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled loop.

    must_read: bytes per chip and step. used: experts of a layer expected to be used, per chip.
    cache_axes: of one layer's keys, per chip, in order of size.
    """

    text: str
    must_read: float
    used: float
    cache_axes: tuple[int, ...]


def compile_step(config: ModelConfig, topology: str, sizes: MeshConfig, batch: int) -> Step:
    """The loop of `resume` with bfloat16 weights and cache, PROMPT + NEW slots, on the topology's first devices."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(sizes, devices[: math.prod(dataclasses.asdict(sizes).values())])
    model = Qwen3(config, dtype=jnp.bfloat16, stacked=False)
    axes_by_size = {config.num_key_value_heads: "act_kv_heads", config.vocab_size: "act_vocab"}
    with jax.set_mesh(mesh):
        rows = -(-batch // num_parts("batch")) * num_parts("batch")

        def abstract(tree: Any) -> Any:
            """Shapes and shardings: what has rows is split by rows, heads and vocabulary, the rest is replicated."""

            def leaf(x: Any) -> jax.ShapeDtypeStruct:
                shape = np.shape(x)
                split = shape[:1] == (rows,)
                names = ["batch", *map(axes_by_size.get, shape[1:])] if split else [None] * len(shape)
                sharding = jax.NamedSharding(mesh, partition_spec(names, mesh, shape))
                return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

            return jax.tree.map(leaf, tree)

        boxed: Any = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((rows, 1), jnp.int32))["params"])
        params = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=sharding),
            nn.unbox(boxed),
            named_shardings(boxed, mesh),
        )
        request = Request(prompt_ids=[3] * PROMPT, max_new_tokens=NEW)
        packed = abstract(pack([request] * rows, [NEW] * rows, config, TOKENS, prompt_slots=PROMPT))
        markers, steps = abstract((pack_markers(TOKENS, config.vocab_size), np.int32(0)))
        begin = functools.partial(start, model=model, max_new=NEW)
        state = abstract(jax.eval_shape(begin, params, packed, markers, steps))
        text = resume.lower(params, state, packed.rows, markers, steps, model=model).compile().as_text()
        tokens = max(1, batch // num_parts("routed_group"))
    assert text is not None

    def shard(x: Any) -> tuple[int, ...]:
        return x.sharding.shard_shape(x.shape)

    share = 1 - (1 - config.num_experts_per_tok / config.num_experts) ** tokens if config.num_experts else 1.0
    must_read = 0.0
    for path, x in jax.tree_util.tree_leaves_with_path((params, state.cache.keys, state.cache.values)):
        name = jax.tree_util.keystr(path)
        if "embed_tokens" in name and not config.tie_word_embeddings:
            continue  # a few rows of it
        is_expert = config.num_experts and "mlp" in name and "router" not in name
        must_read += math.prod(shard(x)) * x.dtype.itemsize * (share if is_expert else 1)
    used = config.num_experts / mesh.shape["expert"] * share
    return Step(text, must_read, used, tuple(sorted(size for size in shard(state.cache.keys[0]) if size > 1)))


# ----------------------------------------------------------------------------------------------------------------------
# The scheduled program

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "s64": 8, "u64": 8}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_FREE = set(
    """parameter constant tuple get-tuple-element bitcast opt-barrier after-all partition-id replica-id iota
    add-dependency domain copy-done slice-done""".split()
)
_IN_PLACE = ("dynamic-update-slice", "scatter")  # operand 0 becomes the result


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a type: its axes longer than 1 in order of size, and whether it is in HBM, not in VMEM or scalar
    memory."""

    axes: tuple[int, ...]
    bytes: int
    hbm: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    op: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def computation(self, key: str) -> str:
        """The computation that attribute `key`, a regular expression, names."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        assert found is not None
        return found.group(1)


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """`(computations, name of the entry)`."""
    computations: dict[str, Computation] = {}
    entry = current = ""
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line)
        found = None if header else _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line))
        if header:
            current = header.group(2)
            computations[current] = {}
            entry = current if header.group(1) else entry
        elif found:
            root, name, kind, op, rest = found.groups()
            arrays = []
            for dtype, dims, layout in _ARRAY.findall(kind):
                if dtype in _BYTES:
                    axes = sorted(int(size) for size in dims.split(",") if size and size != "1")
                    hbm = not re.search(r"S\([1-9]\)", layout)
                    arrays.append(Array(tuple(axes), math.prod(axes) * _BYTES[dtype], hbm))
            operands, _, attributes = rest.partition(")")
            names = tuple(re.findall(r"%([\w.\-]+)", operands))
            computations[current][name] = Instruction(
                name, op, tuple(arrays), names, operands + ")" + attributes, bool(root)
            )
    return computations, entry


def parameters(computation: Computation) -> list[Instruction]:
    """Its parameters in their order."""
    found = [i for i in computation.values() if i.op == "parameter"]
    return sorted(found, key=lambda i: int(i.attributes.split(")")[0]))


class Program:
    """What the computations of a scheduled program move."""

    def __init__(self, text: str, used: float) -> None:
        self._computations, self.entry = parse(text)
        self._used = used

    def moved(self, name: str) -> float:
        """Bytes that one run of a computation reads from and writes to HBM."""
        return sum(size for _, size in self.costs(name))

    def costs(self, name: str) -> Iterator[tuple[Instruction, float]]:
        """The instructions of a computation and the bytes that each moves."""
        for instruction in self._computations[name].values():
            yield instruction, self._cost(instruction, self._computations[name])

    def loop(self) -> str:
        """The body of the decoding loop: of the entry's loops, the one that moves most."""
        whiles = [i for i in self._computations[self.entry].values() if i.op == "while"]
        return max((i.computation("body") for i in whiles), key=self.moved)

    def copies(self, name: str, axes: tuple[int, ...]) -> int:
        """How many instructions of a computation copy a whole array with these axes from HBM to HBM."""
        count = 0
        for i in self._computations[name].values():
            copied = i if i.op != "fusion" else self._root(i.computation("calls"))
            if copied.op in ("copy", "transpose", "copy-start"):
                ends = (*i.arrays[:2], *(a for o in i.operands for a in self._computations[name][o].arrays))
                count += copied.arrays[0].axes == axes and all(end.hbm for end in ends if end.axes == axes)
        return count

    def _root(self, name: str) -> Instruction:
        return next(i for i in self._computations[name].values() if i.root)

    def _cost(self, i: Instruction, scope: Computation) -> float:
        if i.op in _FREE or i.op.endswith(("-done", "-update")):
            return 0
        if i.op == "while":
            return self._trips(i) * self.moved(i.computation("body"))
        if i.op == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", i.attributes)
            names = re.findall(r"%([\w.\-]+)", branches.group(1)) if branches else []
            names = names or [i.computation("true_computation"), i.computation("false_computation")]
            return max(map(self.moved, names))
        if i.op in ("call", "call-start", "async-start"):
            return self.moved(i.computation("(?:to_apply|calls)"))
        if i.op in ("copy-start", "slice-start"):  # (destination, source, context), or for a slice the source first
            ends = i.arrays[:2]
            return min(end.bytes for end in ends) * sum(end.hbm for end in ends)
        if i.op == "custom-call" and "tpu_custom_call" not in i.attributes:
            return 0
        if i.op == "fusion":
            name = i.computation("calls")
            fused = self._computations[name]
            reads = [self._read(fused, parameter) for parameter in parameters(fused)]
            root = self._root(name)
            roots = [fused[r] for r in root.operands] if root.op == "tuple" else [root]
            writes = [self._written(fused, r) for r in roots]
        else:
            reads = [self._operand_read(i, k, scope) for k in range(len(i.operands))]
            writes = [self._written(scope, i)] if len(i.arrays) == 1 else [a.bytes for a in i.arrays]
        sources = [scope[operand].arrays for operand in i.operands]
        read = sum(size for size, arrays in zip(reads, sources, strict=True) if len(arrays) == 1 and arrays[0].hbm)
        return read + sum(size for size, array in zip(writes, i.arrays, strict=False) if array.hbm)

    def _operand_read(self, i: Instruction, k: int, scope: Computation) -> float:
        """Bytes that an instruction outside a fusion reads of operand k."""
        if k == 0 and i.op in ("slice", "dynamic-slice", "gather"):
            return i.arrays[0].bytes
        if k == 0 and i.op in _IN_PLACE:
            return 0
        return sum(array.bytes for array in scope[i.operands[k]].arrays)

    def _read(self, fused: Computation, source: Instruction) -> float:
        """Bytes that a fused computation reads of `source`: what it slices out of it, or all."""
        whole, total = source.arrays[0].bytes, 0.0
        for user in fused.values():
            for k, operand in enumerate(user.operands):
                if operand != source.name:
                    continue
                in_place = k == 0 and user.op in _IN_PLACE
                if user.op in ("bitcast", "reshape") or in_place:
                    kept = user.root and not in_place and source.op not in _IN_PLACE
                    total += whole if kept else self._read(fused, user)
                elif user.op == "fusion":
                    inner = self._computations[user.computation("calls")]
                    total += self._read(inner, parameters(inner)[k])
                elif user.op != "tuple":
                    total += self._operand_read(user, k, fused)
        return min(total, whole)

    def _written(self, scope: Computation, i: Instruction) -> float:
        """Bytes that a result writes: an update in place writes the update."""
        while i.op == "bitcast":
            i = scope[i.operands[0]]
        if i.op == "fusion":
            name = i.computation("calls")
            return self._written(self._computations[name], self._root(name))
        if i.op in _IN_PLACE:
            return scope[i.operands[1 if i.op == "dynamic-update-slice" else 2]].arrays[0].bytes
        return sum(array.bytes for array in i.arrays)

    def _trips(self, i: Instruction) -> float:
        """Trips of a nested loop: the constant that its condition compares with, else those of the experts' loop."""
        condition = self._computations[i.computation("condition")]
        constants = [c for c in condition.values() if c.op == "constant" and c.attributes.split(")")[0].isdigit()]
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', i.attributes)
        if known:
            return int(known.group(1))
        return max(int(c.attributes.split(")")[0]) for c in constants) if constants else self._used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, help="cut the models to so many layers: compiles in seconds")
    parser.add_argument("--save", type=Path, help="keep the compiled programs' texts in this directory")
    args = parser.parse_args()
    try:
        import libtpu  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        sys.exit("skipped: libtpu is not installed; `pip install -e '.[tpu]'` brings it")
    print("| model | topology | mesh | batch | must read, MB | moved, MB | ratio | cache copies: step, call |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, topology, sizes, batch in RUNS:
        config = ModelConfig.preset(name)
        if args.layers:
            config = dataclasses.replace(config, num_hidden_layers=args.layers)
        step = compile_step(config, topology, sizes, batch)
        if args.save:
            args.save.mkdir(parents=True, exist_ok=True)
            (args.save / f"{name}-{topology.replace(':', '-')}-{batch}.hlo").write_text(step.text)
        program = Program(step.text, step.used)
        body = program.loop()
        moved = program.moved(body)
        copies = [program.copies(c, step.cache_axes) for c in (body, program.entry)]
        mesh = " ".join(f"{axis} {size}" for axis, size in dataclasses.asdict(sizes).items() if size > 1) or "one chip"
        megabytes = f"{step.must_read / 1e6:,.0f} | {moved / 1e6:,.0f} | {moved / step.must_read:.2f}"
        print(f"| {name} | {topology} | {mesh} | {batch} | {megabytes} | {copies[0]}, {copies[1]} |", flush=True)


if __name__ == "__main__":
    main()
