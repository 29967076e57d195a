"""Estimates the time, FLOPs, HBM traffic and collectives of one step of a compiled program from its schedule.

The scheduled HLO of XLA:TPU is read; nothing is timed. The estimate is for comparing programs, and it tends to be too
low. `read_cost` describes the model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

from qwen3_jax.aot.hlo import HBM, VMEM, Computation, Instruction, Program, read_program
from qwen3_jax.chips import CHIPS, Chip

Kind = Literal["matmul", "kernel", "other", "copy", "offload", "collective"]

_VMEM_SPEED = 20  # VMEM's bandwidth over HBM's
_FREE = frozenset(
    """parameter constant tuple get-tuple-element bitcast opt-barrier after-all partition-id replica-id iota
    add-dependency domain""".split()
)
_SLICES = ("slice", "dynamic-slice", "gather")  # read from operand 0 only what they return
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # update operand 0 in place: which operand is the update
_WINDOW = {"size": 1, "stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}  # of a convolution, with XLA's defaults
_VIEWS = ("bitcast", "reshape", "get-tuple-element")
_COLLECTIVES = frozenset("all-gather all-reduce all-to-all collective-permute ragged-all-to-all reduce-scatter".split())


@dataclasses.dataclass
class Operation:
    """An instruction of the schedule, with all its runs in one step.

    kind: "copy" is an asynchronous copy between HBM and VMEM, "offload" an asynchronous computation on SparseCores.
    op: the HLO operation without "-start". op_name: its place in the Python program. shape: its type.
    count: number of runs. seconds, flops, bytes: totals over all runs. bytes: HBM traffic; for a collective, the bytes
      that are gathered or reduced.
    group_size, synchronous, exposed_s: for a collective, its number of devices, whether nothing runs beside it, and the
      seconds that the chip waits for it and for earlier collectives on the same links.
    """

    kind: Kind
    name: str
    op: str
    op_name: str
    shape: str
    count: float
    seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    group_size: int = 0
    synchronous: bool = False
    exposed_s: float = 0.0

    def times(self, n: float) -> Operation:
        totals = ("count", "seconds", "flops", "bytes", "exposed_s")
        return dataclasses.replace(self, **{name: getattr(self, name) * n for name in totals})


@dataclasses.dataclass(frozen=True)
class Collective:
    """The sum over collectives of one kind; the fields are those of `Operation`."""

    kind: str
    group_size: int
    synchronous: bool
    count: float
    bytes: float
    seconds: float
    exposed_s: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a step on one device.

    operations: those that cost anything, in order of their time. timeline_s: duration of the schedule.
    unknown_loops: `while` instructions whose number of trips depends on data.
    """

    chip: Chip
    operations: tuple[Operation, ...]
    timeline_s: float
    unknown_loops: tuple[str, ...]

    @property
    def step_s(self) -> float:
        return max(self.timeline_s, self.hbm_floor_s)

    @property
    def hbm_floor_s(self) -> float:
        """Seconds that the HBM traffic takes at full bandwidth: no schedule is faster."""
        return self.hbm_bytes / self.chip.hbm_bandwidth

    @property
    def hbm_bytes(self) -> float:
        return sum(o.bytes for o in self.operations if o.kind != "collective")

    @property
    def exposed_s(self) -> float:
        """Seconds of collectives that no computation hides."""
        return sum(o.exposed_s for o in self.operations)

    def seconds(self, kind: Kind) -> float:
        return sum(o.seconds for o in self.operations if o.kind == kind)

    def flops(self, kind: Kind) -> float:
        return sum(o.flops for o in self.operations if o.kind == kind)

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """Summed by operation, group size and whether they are synchronous; in order of their time."""
        sums: dict[tuple[str, int, bool], tuple[float, ...]] = {}
        for o in self.operations:
            if o.kind == "collective":
                key, numbers = (o.op, o.group_size, o.synchronous), (o.count, o.bytes, o.seconds, o.exposed_s)
                sums[key] = tuple(map(sum, zip(sums.get(key, (0, 0, 0, 0)), numbers, strict=True)))
        return tuple(sorted((Collective(*key, *total) for key, total in sums.items()), key=lambda c: -c.seconds))


def read_cost(
    text: str | Program,
    chip: Chip,
    coords: Sequence[Sequence[int]] | None = None,
    *,
    computation: str | None = None,
    kernel_share: float = 1.0,
    unknown_trips: float = 1.0,
) -> Cost:
    """The cost of a scheduled program, `compiled.as_text()`.

    - Matrix products, and what is fused with them, take the compiler's own `estimated_cycles` at the chip's clock.
    - Pallas kernels take their roofline: FLOPs at the chip's peak or bytes at its bandwidth, whichever is longer.
    - Everything else takes its bytes at the bandwidth of HBM, or of VMEM (20 times HBM's).
    - Collectives take the bytes that a ring sends, over the links of the torus axes that the group spans. They share
      the links. What the schedule puts between their start and their end hides them.
    - Loops run as often as their condition says. Of a conditional, the branch that takes longest runs.
    - A step takes at least its HBM bytes at HBM's bandwidth. Asynchronous copies between HBM and VMEM count only there.

    Not counted: transfers to the host and between slices, launches, gathers and sorts slower than HBM's bandwidth,
    imbalance, and what collectives read and write in HBM. A fused computation reads each parameter once, or only what
    it slices out of it; an update in place writes the update; a collective in flight that a fusion carries from operand
    to result moves nothing. Bytes are those of elements, without the padding of tiles.

    Args:
      coords: the devices' coordinates, in the order of the mesh; they give the torus axes of a collective. Without
        them every group is one ring.
      computation: the computation to read instead of the entry, for instance a loop's body.
      kernel_share: the share of its roofline that a kernel reaches.
      unknown_trips: the number of trips of loops whose trips depend on data.
    """
    program = read_program(text) if isinstance(text, str) else text
    reader = _Reader(program, chip, coords, kernel_share, unknown_trips)
    run = reader.run(program.computations[computation or program.entry])
    operations = sorted(run.operations, key=lambda o: (-o.seconds, -o.bytes))
    return Cost(chip, tuple(operations), run.now, tuple(reader.unknown_loops))


def costliest_loop(program: Program) -> str:
    """The body of the entry's loop that moves most HBM bytes in one trip; in a decoding program that is the step.

    Raises:
      ValueError: the entry has no loop.
    """
    bodies = [i.computation("body") for i in program.computations[program.entry].values() if i.op == "while"]
    if not bodies:
        raise ValueError("program: its entry has no loop; use a decoding program")
    any_chip = next(iter(CHIPS.values()))  # bytes are the same on all
    return max(bodies, key=lambda body: read_cost(program, any_chip, computation=body).hbm_bytes)


class _Run:
    """The state of one simulated run of a computation: the time, what has run, and what is in flight."""

    def __init__(self) -> None:
        self.now = 0.0
        self.operations: list[Operation] = []
        self._links_free = [0.0, 0.0]  # when the links are free, in each direction
        self.flights: dict[str, list[tuple[float, Operation | None]]] = defaultdict(list)  # end, and the collective

    def do(self, operation: Operation) -> None:
        """Runs an operation that blocks the chip."""
        self.operations.append(operation)
        self.now += operation.seconds

    def call(self, run: _Run, times: float = 1.0) -> None:
        self.operations += [operation.times(times) for operation in run.operations]
        self.now += run.now * times

    def send(self, key: str, collective: Operation) -> None:
        """Starts a collective: a permutation uses the direction that is free first, others use both."""
        self._links_free.sort()
        used = 1 if collective.op == "collective-permute" else 2
        end = max(self.now, self._links_free[used - 1]) + collective.seconds
        self._links_free[:used] = [end] * used
        self.flights[key].append((end, collective))
        self.operations.append(collective)

    def offload(self, key: str, run: _Run) -> None:
        """Starts a computation on the SparseCores."""
        self.operations += [dataclasses.replace(operation, kind="offload") for operation in run.operations]
        self.flights[key].append((self.now + run.now, None))

    def wait(self, key: str) -> None:
        """Waits for what was started under `key`."""
        for end, collective in self.flights.pop(key, []):
            idle = max(0.0, end - self.now)
            if collective is not None:
                collective.exposed_s += idle
            self.now += idle


@dataclasses.dataclass
class _Reader:
    """Simulates a program; the fields are the arguments of `read_cost`. unknown_loops: those that were met."""

    program: Program
    chip: Chip
    coords: Sequence[Sequence[int]] | None
    kernel_share: float
    unknown_trips: float
    unknown_loops: list[str] = dataclasses.field(default_factory=list)

    def run(self, scope: Computation) -> _Run:
        """One run of a computation of the schedule."""
        run = _Run()
        for i in scope.values():
            if i.op == "while":
                body = self.run(self.program.called(i, "body"))
                trips = self.program.trip_count(scope, i)
                if trips is None:
                    self.unknown_loops.append(i.name)
                run.call(body, self.unknown_trips if trips is None else trips)
            elif i.op == "conditional":
                branches = [self.run(self.program.computations[name]) for name in i.branches]
                run.call(max(branches, key=lambda branch: branch.now))
            elif i.op == "call":
                run.call(self.run(self.program.called(i)))
            elif i.op.endswith("-done"):
                run.wait(i.operands[0])
            elif i.op in ("copy-start", "slice-start"):
                run.do(_operation("copy", i, bytes=_copied(i)))
            elif collectives := self._collectives(scope, i):
                self._communicate(run, scope, i, collectives)
            elif i.op in ("async-start", "call-start"):
                run.offload(i.name, self.run(self.program.called(i)))
            elif i.op not in _FREE:
                self._compute(run, scope, i)
        for key in list(run.flights):
            run.wait(key)
        return run

    def _communicate(self, run: _Run, scope: Computation, i: Instruction, collectives: Sequence[Operation]) -> None:
        """An instruction that is a collective or holds some: it starts them, waits for them, or both.

        The fusions that start, carry and end a collective have one channel. One that carries it computes meanwhile; one
        that is alone does all three.
        """
        key, starts, computes, ends = i.name, True, False, not i.op.endswith("-start")
        if i.op == "fusion" and "AllReduceScatterFusion" in i.attributes:  # each device keeps its slice: half the time
            for collective in collectives:
                collective.op, collective.op_name = "reduce-scatter", i.op_name
                collective.seconds /= 2
        elif i.op == "fusion":
            held = "\n".join(inner.attributes for inner in self.program.called(i).values())
            channel = re.search(r"\bchannel_id=(\d+)", held)
            key = channel[1] if channel else i.name
            if 'custom_call_target="AsyncCollectiveDone"' in held:
                starts = False
            elif 'custom_call_target="AsyncCollectiveStart"' in held:
                ends = False
            else:
                computes, starts, ends = True, key not in run.flights, key not in run.flights
        for collective in collectives if starts else ():
            collective.synchronous = ends and not computes
            run.send(key, collective)
        if computes:
            self._compute(run, scope, i)
        if ends:
            run.wait(key)

    def _compute(self, run: _Run, scope: Computation, i: Instruction) -> None:
        """A matrix product, a kernel, or an operation whose bytes are its cost."""
        if i.op == "custom-call" and "tpu_custom_call" not in i.attributes:
            return  # bookkeeping such as AllocateBuffer
        moved: dict[int, float] = defaultdict(float)
        for space, size in self._moved(scope, i):
            moved[space] += size
        kind: Kind = "other"
        flops = self._flops(scope, i)
        hbm_s = max(moved[HBM], moved[VMEM] / _VMEM_SPEED) / self.chip.hbm_bandwidth
        seconds = max(hbm_s, flops / self.chip.peak_flops)
        if i.op == "custom-call":
            kind, seconds = "kernel", seconds / self.kernel_share
        elif flops:
            kind = "matmul"
            if cycles := i.attribute(r'"estimated_cycles":"(\d{1,18})"'):  # unknown ones are the largest int64
                seconds = int(cycles) / self.chip.clock_hz
        run.do(_operation(kind, i, seconds=seconds, flops=flops, bytes=moved[HBM]))

    def _flops(self, scope: Computation, i: Instruction) -> float:
        """FLOPs of a kernel, or of the matrix products in an instruction."""
        if i.op == "fusion":
            fused = self.program.called(i)
            return sum(self._flops(fused, inner) for inner in fused.values())
        if i.op in ("dot", "convolution"):
            return _dot_flops(scope, i)
        return _kernel_flops(scope, i) if i.op == "custom-call" else 0.0

    # ------------------------------------------------------------------------------------------------------------------
    # Bytes

    def _moved(self, scope: Computation, i: Instruction) -> list[tuple[int, float]]:
        """`(memory space, bytes)` of everything that an instruction reads and writes."""
        sources = [scope[name] for name in i.operands]
        read = [(array.space, array.bytes) for source in sources for array in source.arrays]
        written = [(array.space, array.bytes) for array in i.arrays]
        if i.op == "fusion":
            fused = self.program.called(i)
            pairs = zip(sources, fused.parameters, strict=True)
            read = [(source.space, self._read(fused, parameter)) for source, parameter in pairs]
            if len(fused.results) == len(i.arrays):
                results = zip(i.arrays, fused.results, strict=True)
                written = [(array.space, self._written(fused, result)) for array, result in results]
        elif i.op in _SLICES:
            read = [(sources[0].space, i.bytes)]
        elif i.op in _IN_PLACE:
            del read[: len(sources[0].arrays)]
            written = [(i.space, sources[_IN_PLACE[i.op]].bytes)]
        return read + written

    def _read(self, fused: Computation, source: Instruction, updated: bool = False) -> float:
        """Bytes that a fused computation reads of `source`: only what it slices out of it, or all.

        updated: `source` has been updated in place; returning it then costs no read.
        """
        whole, read = source.bytes, 0.0
        if source.root and not updated:
            return whole
        for user, k in fused.users[source.name]:
            if user.op in _SLICES and k == 0:
                read += user.bytes
            elif user.op in _IN_PLACE and k == 0:
                read += self._read(fused, user, updated=True)
            elif _is_view(user):
                read += self._read(fused, user, updated)
            elif user.op == "fusion":
                inner = self.program.called(user)
                read += self._read(inner, inner.parameters[k], updated)
            elif user.op != "tuple" and user.op not in _COLLECTIVES:  # a tuple and a collective in flight read nothing
                return whole
        return min(read, whole)

    def _written(self, fused: Computation, result: Instruction) -> float:
        """Bytes that a result of a fused computation writes: the updates if it is a parameter updated in place, else
        all."""
        if result.op == "parameter" or result.op in _COLLECTIVES:  # part of a collective that the fusion carries
            return 0.0
        return min(self._updates(fused, result)[1] or math.inf, result.bytes)

    def _updates(self, fused: Computation, i: Instruction) -> tuple[Instruction | None, float]:
        """The parameter that becomes `i` by updates in place alone (None: there is none), and the updates' bytes."""
        if i.op == "parameter":
            return i, 0.0
        if i.op in _IN_PLACE:
            base, written = i.operands[0], fused[i.operands[_IN_PLACE[i.op]]].bytes
        elif _is_view(i):
            base, written = i.operands[0], 0.0
        elif i.op == "fusion" and len(i.arrays) == 1:
            inner = self.program.called(i)
            parameter, written = self._updates(inner, inner.root)
            if parameter is None:
                return None, 0.0
            base = i.operands[int(parameter.arguments)]
        else:
            return None, 0.0
        source, earlier = self._updates(fused, fused[base])
        return source, earlier + written if source is not None else 0.0

    # ------------------------------------------------------------------------------------------------------------------
    # Collectives

    def _collectives(self, scope: Computation, i: Instruction) -> list[Operation]:
        """The collectives that an instruction is, or that it holds in the computation it calls."""
        if i.op.removesuffix("-start") in _COLLECTIVES:
            return [self._collective(scope, i)]
        if i.op not in ("fusion", "call", "async-start", "call-start"):
            return []
        called = self.program.called(i)
        return [collective for inner in called.values() for collective in self._collectives(called, inner)]

    def _collective(self, scope: Computation, i: Instruction) -> Operation:
        """A ring over a torus axis sends in both directions if it closes; several axes share the bytes. Half of an
        all-to-all crosses the middle of the axis, which has the fewest links."""
        op, size = i.op.removesuffix("-start"), sum(scope[name].bytes for name in i.operands)
        if op == "collective-permute":
            return _operation("collective", i, seconds=size / self.chip.ici_bandwidth, bytes=size, group_size=2)
        devices = i.replica_group() or range(self.program.partitions)
        group, axes = len(devices), self._torus_axes(devices)
        # What it is given, or returns if that is more. The type of a start has operands and results.
        size = max(size, i.bytes - size if i.op.endswith("-start") else i.bytes)
        if op in ("all-to-all", "ragged-all-to-all"):
            seconds = max(extent * size / (4 * bandwidth) for extent, bandwidth in axes)
        else:
            rounds = 2 if op == "all-reduce" else 1  # a reduce-scatter and an all-gather
            seconds = rounds * size * (group - 1) / group / sum(bandwidth for _, bandwidth in axes)
        return _operation("collective", i, seconds=seconds, bytes=size, group_size=group)

    def _torus_axes(self, devices: Sequence[int]) -> list[tuple[int, float]]:
        """`(devices along the axis, bytes/s that each of them sends)` for each torus axis that a group spans."""
        link = self.chip.ici_bandwidth
        if self.coords is None:
            return [(len(devices), 2 * link)]
        shape = [max(c[axis] for c in self.coords) + 1 for axis in range(3)]
        axes = []
        for axis in range(3):
            extent = len({self.coords[device][axis] for device in devices})
            if extent > 1:
                closed = extent == shape[axis] and self.chip.wraps(shape, axis)
                axes.append((extent, (2 if closed else 1) * link))
        return axes or [(len(devices), 2 * link)]  # the cores of one chip


def _operation(kind: Kind, i: Instruction, **figures: Any) -> Operation:
    return Operation(kind, i.name, i.op.removesuffix("-start"), i.op_name, i.type, 1, **figures)


def _is_view(i: Instruction) -> bool:
    """Whether an instruction of a fused computation moves nothing; some fusions only change tiles."""
    return i.op in _VIEWS or "output_to_operand_aliasing={{}: (0, {})}" in i.attributes


def _copied(i: Instruction) -> float:
    """HBM bytes of an asynchronous copy or slice. The type of a copy is (destination, source, context), that of a slice
    (source, destination, context)."""
    ends = i.arrays[:2]
    return min(end.bytes for end in ends) * sum(end.space == HBM for end in ends)


def _dot_flops(scope: Computation, i: Instruction) -> float:
    """2 for each multiplication of a matrix product. XLA:TPU writes it as a convolution; its padding is not counted."""
    left, right = (scope[name].dims for name in i.operands[:2])
    if i.op == "dot":
        contracted = i.attribute(r"\blhs_contracting_dims=\{([\d,]*)\}") or ""
        return 2.0 * math.prod(i.dims) * math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
    labels = re.search(r"\bdim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    assert labels is not None, f"{i.name} has no dim_labels"
    data, kernel, out = labels.groups()
    axes = sorted(filter(str.isdigit, kernel))

    def given(key: str, default: int) -> list[int]:
        """A value for each axis; of a padding "low_high" the low one."""
        values = i.attribute(rf"\bwindow=\{{[^}}]*\b{key}=([\w\-]+)")
        return [int(value.split("_")[0]) for value in values.split("x")] if values else [default] * len(axes)

    windows = zip(*(given(key, default) for key, default in _WINDOW.items()), strict=True)
    flops = 2.0 * i.dims[out.index("b")] * i.dims[out.index("f")] * right[kernel.index("i")]
    for axis, values in zip(axes, windows, strict=True):
        flops *= _products(left[data.index(axis)], i.dims[out.index(axis)], *values)
    return flops


@functools.cache
def _products(data: int, out: int, size: int, stride: int, pad: int, left_dilation: int, right_dilation: int) -> int:
    """Pairs of a position in the output and one in the window, along one axis, that meet an element of the data."""
    firsts = (pad - position * right_dilation for position in range(size))
    spans = [range(first, first + data * left_dilation, left_dilation) for first in firsts]
    return sum(position in span for span in spans for position in range(0, out * stride, stride))


def _kernel_flops(scope: Computation, i: Instruction) -> float:
    """FLOPs of a Pallas kernel: those that it states, or those of causal attention, half of which is masked; 0 for
    others, whose bytes alone count.

    Attention forward: scores and values. Backward: the scores again, the gradient of the attention weights, and one
    product for each gradient that is returned.
    """
    stated = i.attribute(r'"cost_estimate":\{[^}]*"flops":"?(\d+)')
    if stated is not None or "splash_mha" not in i.name:
        return float(stated or 0)
    given = [array for operand in i.operands for array in scope[operand].arrays]
    q, k = [array for array in given if array.dtype in ("bf16", "f32")][:2]
    product = 2.0 * math.prod(q.dims) * k.dims[-2] / 2
    ends = {q.dims[-2:], k.dims[-2:]}
    gradients = [array for array in i.arrays if array.dtype == q.dtype and array.dims[-2:] in ends]
    return product * (2 if "fwd" in i.name else 2 + len(gradients))
