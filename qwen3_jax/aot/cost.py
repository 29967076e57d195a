"""How long a step of a compiled program takes, what it multiplies, moves and sends, by an account of its schedule.

Read from the scheduled HLO of XLA:TPU, nothing is timed. An estimate for comparing programs that leans low: see
`read_cost` for the model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Literal

from qwen3_jax.aot.hlo import HBM, VMEM, Array, Computation, Instruction, Program, read_program
from qwen3_jax.chips import CHIPS, Chip

Kind = Literal["matmul", "kernel", "other", "copy", "offload", "collective"]

_VMEM_SPEED = 20  # times HBM's bandwidth
_FREE = frozenset(
    """parameter constant tuple get-tuple-element bitcast opt-barrier after-all partition-id replica-id iota
    add-dependency domain""".split()
)
_SLICES = ("slice", "dynamic-slice", "gather")  # read of operand 0 no more than they return
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # operand 0 becomes the result; the operand that is written
_VIEWS = ("bitcast", "reshape", "get-tuple-element")
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction of the schedule with all its runs in a step.

    kind: "copy" is between HBM and VMEM beside the computation, "offload" on SparseCore beside it.
    op: of HLO; of a collective without -start. op_name: where in the Python program it comes from. shape: its type.
    count: runs. seconds, flops, bytes: of all runs; bytes of HBM, of a collective those that it gathers or reduces.
    group_size, synchronous, exposed_s: of a collective: its devices; whether nothing can run beside it; for how long
      the chip waits for it, and for others before it on the links.
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
        return dataclasses.replace(
            self,
            count=self.count * n,
            seconds=self.seconds * n,
            flops=self.flops * n,
            bytes=self.bytes * n,
            exposed_s=self.exposed_s * n,
        )


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one sort added up; fields as in `Operation`."""

    kind: str
    group_size: int
    synchronous: bool
    count: float
    bytes: float
    seconds: float
    exposed_s: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a step costs one device.

    operations: those that cost anything, the dearest first. timeline_s: how long the schedule takes.
    unknown_loops: `while` instructions whose trips data decides.
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
        """No schedule moves the HBM bytes in less."""
        return self.hbm_bytes / self.chip.hbm_bandwidth

    @property
    def hbm_bytes(self) -> float:
        return sum(o.bytes for o in self.operations if o.kind != "collective")

    @property
    def matmul_s(self) -> float:
        return self._seconds("matmul")

    @property
    def kernel_s(self) -> float:
        return self._seconds("kernel")

    @property
    def other_s(self) -> float:
        return self._seconds("other")

    @property
    def collective_s(self) -> float:
        return self._seconds("collective")

    @property
    def exposed_s(self) -> float:
        """Of the collectives' seconds those that no computation hides."""
        return sum(o.exposed_s for o in self.operations)

    @property
    def matmul_flops(self) -> float:
        return sum(o.flops for o in self.operations if o.kind == "matmul")

    @property
    def kernel_flops(self) -> float:
        return sum(o.flops for o in self.operations if o.kind == "kernel")

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """By operation, group size, and whether they are synchronous; the dearest first."""
        sums: dict[tuple[str, int, bool], Collective] = {}
        for o in self.operations:
            if o.kind == "collective":
                key = (o.op, o.group_size, o.synchronous)
                c = sums.get(key) or Collective(*key, 0, 0, 0, 0)
                sums[key] = Collective(
                    *key, c.count + o.count, c.bytes + o.bytes, c.seconds + o.seconds, c.exposed_s + o.exposed_s
                )
        return tuple(sorted(sums.values(), key=lambda c: -c.seconds))

    def _seconds(self, kind: Kind) -> float:
        return sum(o.seconds for o in self.operations if o.kind == kind)


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

    - Matrix products, and what is fused with them: the compiler's own `estimated_cycles`, at the chip's clock.
    - Pallas kernels: their roofline, FLOPs at the chip's peak or bytes at its bandwidth.
    - Everything else: the bytes that it moves, at HBM's bandwidth, or at VMEM's, 20 times that.
    - Collectives: the bytes that a ring sends over the links of the torus axes that the group spans; hidden under what
      the schedule puts between their start and their end. They share the links.
    - Loops run as often as their condition says; of a conditional the branch that takes longest runs.
    - A step never takes less than all its HBM bytes at HBM's bandwidth; copies between HBM and VMEM beside the
      computation count there alone.

    Not in it: transfers to the host and between slices, launches, gathers and sorts at less than HBM's bandwidth,
    imbalance, what collectives read and write in HBM. Of a fused computation each parameter is read once, or what is
    sliced out of it; updates in place write the update; what it carries of a collective in flight stays where it is.
    Bytes are those of elements, without what tiles pad.

    Args:
      coords: of the devices in the order of the mesh, to tell the torus axes of a collective; without, one ring.
      computation: to cost instead of the entry, such as a loop's body.
      kernel_share: the share of its roofline that a kernel reaches.
      unknown_trips: of loops whose trips data decides.
    """
    program = read_program(text) if isinstance(text, str) else text
    reader = _Reader(program, chip, coords, kernel_share, unknown_trips)
    run = reader.run(computation or program.entry)
    operations = sorted(run.operations, key=lambda o: (-o.seconds, -o.bytes))
    return Cost(chip, tuple(operations), run.now, tuple(reader.unknown_loops))


def dearest_loop(program: Program) -> str:
    """The body of the entry's loop that moves most HBM bytes in one trip: of a decoding program, the step.

    ValueError where the entry has no loop.
    """
    bodies = [i.computation("body") for i in program.computations[program.entry].values() if i.op == "while"]
    if not bodies:
        raise ValueError("program: its entry has no loop; a program that decodes fits")
    any_chip = next(iter(CHIPS.values()))  # bytes are the same on all
    return max(bodies, key=lambda body: read_cost(program, any_chip, computation=body).hbm_bytes)


class _Run:
    """One run of a computation while it unfolds: the time, what has run, and what is in flight beside it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.operations: list[Operation] = []
        self._links_free = [0.0, 0.0]  # from when on, in either direction
        self._flights: dict[str, list[tuple[float, int | None]]] = {}  # when it lands, and its place in operations

    def do(self, operation: Operation) -> None:
        """What holds the chip up."""
        self.operations.append(operation)
        self.now += operation.seconds

    def call(self, run: _Run, times: float = 1.0) -> None:
        self.operations += [operation.times(times) for operation in run.operations]
        self.now += run.now * times

    def send(self, key: str, collective: Operation) -> None:
        """Starts a collective: a permutation in the direction that is free first, others in both."""
        first = min(self._links_free)
        directions = [self._links_free.index(first)] if collective.op == "collective-permute" else [0, 1]
        lands = max(self.now, *(self._links_free[k] for k in directions)) + collective.seconds
        for k in directions:
            self._links_free[k] = lands
        self._flights.setdefault(key, []).append((lands, len(self.operations)))
        self.operations.append(collective)

    def offload(self, key: str, run: _Run) -> None:
        """Starts a computation on SparseCore."""
        self.operations += [dataclasses.replace(operation, kind="offload") for operation in run.operations]
        self._flights.setdefault(key, []).append((self.now + run.now, None))

    def flies(self, key: str) -> bool:
        return key in self._flights

    def wait(self, key: str) -> None:
        """Until what was started has landed."""
        for lands, place in self._flights.pop(key, []):
            idle = max(0.0, lands - self.now)
            if place is not None:
                sent = self.operations[place]
                self.operations[place] = dataclasses.replace(sent, exposed_s=sent.exposed_s + idle)
            self.now += idle

    def wait_all(self) -> None:
        for key in list(self._flights):
            self.wait(key)


class _Reader:
    def __init__(
        self,
        program: Program,
        chip: Chip,
        coords: Sequence[Sequence[int]] | None,
        kernel_share: float,
        unknown_trips: float,
    ) -> None:
        self._computations = program.computations
        self._program, self._chip, self._coords = program, chip, coords
        self._kernel_share, self._unknown_trips = kernel_share, unknown_trips
        self._flops_of: dict[str, float] = {}
        self.unknown_loops: list[str] = []

    def run(self, name: str) -> _Run:
        """One run of a computation of the schedule."""
        run, scope = _Run(), self._computations[name]
        for i in scope.values():
            if i.op == "while":
                run.call(self.run(i.computation("body")), self._trips(scope, i))
            elif i.op == "conditional":
                run.call(max(map(self.run, i.branches), key=lambda branch: branch.now))
            elif i.op == "call":
                run.call(self.run(_callee(i)))
            elif i.op.endswith("-done"):
                run.wait(i.operands[0])
            elif i.op in ("copy-start", "slice-start"):
                run.do(self._operation("copy", i, bytes=_copied(i)))
            elif i.op in ("async-start", "call-start"):
                sent = list(self._collectives(self._computations[_callee(i)]))
                for collective in sent:
                    run.send(i.name, dataclasses.replace(collective, synchronous=False))
                if not sent:
                    run.offload(i.name, self.run(_callee(i)))
            elif i.op.removesuffix("-start") in _COLLECTIVES:
                run.send(i.name, self._collective(scope, i))
                if not i.op.endswith("-start"):
                    run.wait(i.name)
            elif i.op == "fusion":
                self._fusion(run, scope, i)
            elif i.op not in _FREE:
                self._compute(run, scope, i)
        run.wait_all()
        return run

    def _trips(self, scope: Computation, loop: Instruction) -> float:
        trips = self._program.trip_count(scope, loop)
        if trips is None:
            self.unknown_loops.append(loop.name)
            return self._unknown_trips
        return trips

    def _fusion(self, run: _Run, scope: Computation, i: Instruction) -> None:
        """A fusion may hold a collective: start it, carry it along in the air, land it (all with one channel), or run
        it beside its own computation."""
        fused = self._computations[i.computation("calls")]
        sent = list(self._collectives(fused))
        if not sent:
            return self._compute(run, scope, i)
        if "AllReduceScatterFusion" in i.attributes:  # an all-reduce of which a device keeps its slice: half the way
            for collective in sent:
                half = dataclasses.replace(
                    collective, op="reduce-scatter", op_name=i.op_name, seconds=collective.seconds / 2
                )
                run.send(i.name, half)
            return run.wait(i.name)
        channels = (inner.attribute(r"\bchannel_id=(\d+)") for inner in fused.values())
        channel = next(filter(None, channels), i.name)
        targets = {inner.attribute(r'custom_call_target="(\w+)"') for inner in fused.values()}
        if "AsyncCollectiveDone" in targets:
            return run.wait(channel)
        starts = "AsyncCollectiveStart" in targets
        alone = not starts and not run.flies(channel)
        if starts or alone:
            for collective in sent:
                run.send(channel, dataclasses.replace(collective, synchronous=False))
        if not starts:
            self._compute(run, scope, i)
        if alone:
            run.wait(channel)

    def _compute(self, run: _Run, scope: Computation, i: Instruction) -> None:
        """A matrix product, a kernel, or anything else that only moves bytes."""
        if i.op == "custom-call" and "tpu_custom_call" not in i.attributes:
            return  # bookkeeping such as AllocateBuffer
        moved = [0.0, 0.0]
        for space, size in self._moved(scope, i):
            if space in (HBM, VMEM):
                moved[space] += size
        chip = self._chip
        seconds = max(moved[HBM], moved[VMEM] / _VMEM_SPEED) / chip.hbm_bandwidth
        kind: Kind = "other"
        flops = 0.0
        if i.op == "custom-call":
            kind, flops = "kernel", _kernel_flops(scope, i)
            seconds = max(seconds, flops / chip.peak_flops) / self._kernel_share
        elif i.op in ("dot", "convolution", "fusion"):
            flops = self._flops(i.computation("calls")) if i.op == "fusion" else _dot_flops(scope, i)
            if flops:
                kind = "matmul"
                cycles = i.attribute(r'"estimated_cycles":"(\d{1,18})"')  # unknown ones are the largest int64
                seconds = int(cycles) / chip.clock_hz if cycles else max(seconds, flops / chip.peak_flops)
        run.do(self._operation(kind, i, seconds=seconds, flops=flops, bytes=moved[HBM]))

    @staticmethod
    def _operation(kind: Kind, i: Instruction, *, seconds: float = 0, flops: float = 0, bytes: float = 0) -> Operation:
        return Operation(kind, i.name, i.op, i.op_name, i.type, 1, seconds, flops, bytes)

    # ------------------------------------------------------------------------------------------------------------------
    # FLOPs

    def _flops(self, name: str) -> float:
        """Of the matrix products in a fused computation."""
        if name not in self._flops_of:
            scope, flops = self._computations[name], 0.0
            for i in scope.values():
                if i.op in ("dot", "convolution"):
                    flops += _dot_flops(scope, i)
                elif i.op == "fusion":
                    flops += self._flops(i.computation("calls"))
            self._flops_of[name] = flops
        return self._flops_of[name]

    # ------------------------------------------------------------------------------------------------------------------
    # Bytes

    def _moved(self, scope: Computation, i: Instruction) -> Iterator[tuple[int, float]]:
        """`(memory space, bytes)` of what an instruction reads and writes."""
        sources = [scope[name].arrays for name in i.operands]
        if i.op == "fusion":
            fused = self._computations[i.computation("calls")]
            for arrays, parameter in zip(sources, fused.parameters, strict=True):
                yield _space(arrays), self._read(fused, parameter)
            if len(fused.results) == len(i.arrays):
                for array, result in zip(i.arrays, fused.results, strict=True):
                    yield array.space, self._written(fused, result)
                return
        elif i.op in _SLICES:
            yield _space(sources[0]), i.bytes
        elif i.op in _IN_PLACE:
            for array in (array for arrays in sources[1:] for array in arrays):
                yield array.space, array.bytes
            yield _space(i.arrays), scope[i.operands[_IN_PLACE[i.op]]].bytes
            return
        else:
            for array in (array for arrays in sources for array in arrays):
                yield array.space, array.bytes
        for array in i.arrays:
            yield array.space, array.bytes

    def _read(self, fused: Computation, source: Instruction, updated: bool = False) -> float:
        """Bytes that a fused computation reads of `source`: what it slices out of it, or all.

        updated: `source` is what an update in place has made of it; to be the result then costs no read.
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
                inner = self._computations[user.computation("calls")]
                read += self._read(inner, inner.parameters[k], updated)
            elif user.op != "tuple" and user.op not in _COLLECTIVES:  # handed on where it lies, or in flight
                return whole
        return min(read, whole)

    def _written(self, fused: Computation, result: Instruction) -> float:
        """Bytes that a result of a fused computation writes: of a parameter updated in place the updates, else all."""
        if result.op == "parameter" or result.op in _COLLECTIVES:  # of a collective that is carried along
            return 0.0
        base, updates = self._updates(fused, result)
        return min(updates, result.bytes) if base is not None and updates else result.bytes

    def _updates(self, fused: Computation, i: Instruction) -> tuple[Instruction | None, float]:
        """The parameter that becomes `i` by updates in place alone, where there is one, and the updates' bytes."""
        if i.op == "parameter":
            return i, 0.0
        written, base = 0.0, i.operands[0] if i.operands else None
        if i.op in _IN_PLACE:
            written = fused[i.operands[_IN_PLACE[i.op]]].bytes
        elif i.op == "fusion" and len(i.arrays) == 1 and not _is_view(i):
            inner = self._computations[i.computation("calls")]
            parameter, written = self._updates(inner, inner.root)
            base = i.operands[int(parameter.arguments)] if parameter is not None else None
        elif not _is_view(i):
            base = None
        if base is None:
            return None, 0.0
        source, earlier = self._updates(fused, fused[base])
        return source, earlier + written

    # ------------------------------------------------------------------------------------------------------------------
    # Collectives

    def _collectives(self, scope: Computation) -> Iterator[Operation]:
        """Those in a computation that a fusion or an asynchronous call runs."""
        for i in scope.values():
            if i.op.removesuffix("-start") in _COLLECTIVES:
                yield self._collective(scope, i)
            elif i.op in ("fusion", "call", "async-start", "call-start"):
                yield from self._collectives(self._computations[_callee(i)])

    def _collective(self, scope: Computation, i: Instruction) -> Operation:
        """A ring over a torus axis sends in both directions where it closes; several axes share the bytes. Of an
        all-to-all half crosses the middle of the axis, where its links are the fewest."""
        op = i.op.removesuffix("-start")
        given = sum(scope[name].bytes for name in i.operands)
        if op == "collective-permute":
            group, size = 2, given
            seconds = size / self._chip.ici_bandwidth
        else:
            devices = i.replica_group() or list(range(self._program.partitions))
            group, axes = len(devices), self._torus_axes(devices)
            size = given
            if op in ("all-gather", "ragged-all-to-all"):  # a start's type lists what it is given and what it returns
                size = i.bytes - given if i.op.endswith("-start") else i.bytes
            if op in ("all-to-all", "ragged-all-to-all"):
                size = max(size, given)
                seconds = max(extent * size / (4 * bandwidth) for extent, bandwidth in axes)
            else:
                rounds = 2 if op == "all-reduce" else 1  # a reduce-scatter and an all-gather
                seconds = rounds * size * (group - 1) / group / sum(bandwidth for _, bandwidth in axes)
        synchronous = not i.op.endswith("-start")
        return Operation(
            "collective", i.name, op, i.op_name, i.type, 1, seconds, 0, size, group_size=group, synchronous=synchronous
        )

    def _torus_axes(self, devices: Sequence[int]) -> list[tuple[int, float]]:
        """`(devices along it, bytes/s that one of them sends)` of the torus axes that a group spans."""
        link = self._chip.ici_bandwidth
        if self._coords is None:
            return [(len(devices), 2 * link)]
        shape = [max(c[axis] for c in self._coords) + 1 for axis in range(3)]
        axes = []
        for axis in range(3):
            extent = len({self._coords[device][axis] for device in devices})
            if extent > 1:
                closed = extent == shape[axis] and self._chip.wraps(shape, axis)
                axes.append((extent, (2 if closed else 1) * link))
        return axes or [(len(devices), 2 * link)]  # the cores of one chip


def _callee(i: Instruction) -> str:
    return i.computation("calls", "to_apply")


def _is_view(i: Instruction) -> bool:
    """Whether an instruction of a fused computation is its operand, moved nowhere; some fusions change tiles alone."""
    return i.op in _VIEWS or "output_to_operand_aliasing={{}: (0, {})}" in i.attributes


def _space(arrays: Sequence[Array]) -> int:
    return arrays[0].space if arrays else HBM


def _copied(i: Instruction) -> float:
    """HBM bytes of an asynchronous copy or slice, whose type is (destination, source, context), a slice's the source
    first."""
    ends = i.arrays[:2]
    return min(end.bytes for end in ends) * sum(end.space == HBM for end in ends)


def _dot_flops(scope: Computation, i: Instruction) -> float:
    """2 for each multiplication of a matrix product, which XLA:TPU writes as a convolution; what is padded is none."""
    left, right = (scope[name].dims for name in i.operands[:2])
    if i.op == "dot":
        contracted = i.attribute(r"\blhs_contracting_dims=\{([\d,]*)\}") or ""
        return 2.0 * math.prod(i.dims) * math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
    labels = re.search(r"\bdim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    assert labels is not None, f"{i.name} has no dim_labels"
    data, kernel, out = labels.groups()
    window = dict(part.split("=") for part in (i.attribute(r"\bwindow=\{([^}]*)\}") or "").split())
    flops = 2.0 * i.dims[out.index("b")] * i.dims[out.index("f")] * right[kernel.index("i")]
    for k, axis in enumerate(sorted(label for label in kernel if label.isdigit())):

        def of(key: str, default: str, k: int = k) -> int:
            return int(window[key].split("x")[k].split("_")[0]) if key in window else int(default)

        flops *= _products(
            left[data.index(axis)],
            i.dims[out.index(axis)],
            of("size", "1"),
            stride=of("stride", "1"),
            pad=of("pad", "0"),
            left_dilation=of("lhs_dilate", "1"),
            right_dilation=of("rhs_dilate", "1"),
        )
    return flops


@functools.cache
def _products(
    data: int, out: int, window: int, *, stride: int, pad: int, left_dilation: int, right_dilation: int
) -> int:
    """Pairs of an output's and a window's place, along one axis, that fall on an element of the data."""
    total = 0
    for place in range(window):
        shift = pad - place * right_dilation
        wanted = range(0, out * stride, stride)
        present = range(shift, shift + data * left_dilation, left_dilation)
        total += _common(wanted, present)
    return total


def _common(a: range, b: range) -> int:
    """How many numbers two rising ranges have in common."""
    divisor = math.gcd(a.step, b.step)
    if not a or not b or (b.start - a.start) % divisor:
        return 0
    # a.start + a.step * k is in the progression of b for one k in each b.step / divisor.
    k = (b.start - a.start) // divisor * pow(a.step // divisor, -1, b.step // divisor) % (b.step // divisor)
    period = a.step // divisor * b.step
    first = a.start + a.step * k
    low, high = max(a.start, b.start), min(a[-1], b[-1])
    first += max(0, -(-(low - first) // period)) * period
    return max(0, (high - first) // period + 1)


def _kernel_flops(scope: Computation, i: Instruction) -> float:
    """Of a Pallas kernel: as its author states them, or of attention; 0 of others, whose bytes alone count."""
    stated = i.attribute(r'"cost_estimate":\{[^}]*"flops":"?(\d+)')
    if stated is not None:
        return float(stated)
    if "splash_mha" in i.name:
        return _attention_flops(i, [array for operand in i.operands for array in scope[operand].arrays])
    return 0.0


def _attention_flops(i: Instruction, given: Sequence[Array]) -> float:
    """Causal attention: scores and values forward; backward the scores again, the gradient of the weights, and one
    product for each gradient that is returned. Half of each is masked."""
    q, k = [array for array in given if array.dtype in ("bf16", "f32")][:2]
    product = 2.0 * math.prod(q.dims) * k.dims[-2] / 2
    ends = {q.dims[-2:], k.dims[-2:]}
    gradients = [array for array in i.arrays if array.dtype == q.dtype and array.dims[-2:] in ends]
    return product * (2 if "fwd" in i.name else 2 + len(gradients))
