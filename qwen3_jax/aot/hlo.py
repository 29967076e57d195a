"""Reads the text of a scheduled HLO module as XLA:TPU writes it, `compiled.as_text()`.

A module is a set of computations; a computation is a list of instructions in the order in which they run:

    %y = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%w, %x), kind=kOutput, calls=%fused, backend_config={...}

The name, the type (element type, dimensions, and the layout with its tiles and memory space), the operation, its
operands, its attributes. Nothing here knows what an instruction costs.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Sequence

HBM, VMEM = 0, 1  # memory spaces; others are the host's memory, scalar memory and flags

_HEADER = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"  (ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a type; `bytes` are those of its elements, without what tiles pad."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @functools.cached_property
    def bytes(self) -> float:
        return math.prod(self.dims) * _bits(self.dtype) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """operands: names of instructions of the same computation. arguments: the text between the parentheses, a
    constant's value and a parameter's number. root: whether it is the result of its computation."""

    name: str
    op: str
    type: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of its type, those of nested tuples in their order."""
        found = []
        for dtype, dims, layout in _ARRAY.findall(self.type):
            space = re.search(r"S\((\d+)\)", layout)
            found.append(Array(dtype, _ints(dims), int(space[1]) if space else HBM))
        return tuple(found)

    @functools.cached_property
    def bytes(self) -> float:
        return sum(array.bytes for array in self.arrays)

    @property
    def dims(self) -> tuple[int, ...]:
        """Those of its first array."""
        return self.arrays[0].dims

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression, where it is found in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    def computation(self, *keys: str) -> str:
        """The name of the computation that the attribute of one of these names gives."""
        name = self.attribute(rf"\b(?:{'|'.join(keys)})=%?([\w.\-]+)")
        assert name is not None, f"{self.name} has none of {keys}"
        return name

    @property
    def branches(self) -> list[str]:
        """The computations of a conditional."""
        listed = self.attribute(r"\bbranch_computations=\{([^}]*)\}")
        if listed is not None:
            return _NAME.findall(listed)
        return [self.computation("true_computation"), self.computation("false_computation")]

    @property
    def op_name(self) -> str:
        """Where in the Python program it comes from, such as jit(step)/transpose(jvp(Qwen3))/dot_general; or empty."""
        return self.attribute(r'\bop_name="([^"]*)"') or ""

    def replica_group(self) -> list[int]:
        """The devices of a collective's first group; none are listed where all are one group.

        ValueError for a spelling other than these three.
        {{0,1},{2,3}}; [2,2]<=[4], groups by devices of range(4) reshaped (and transposed, T(1,0)); and
        mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'y'}, the named axes of a mesh of devices.
        """
        listed = self.attribute(r"\breplica_groups=\{\{([\d,]*)\}")
        if listed is not None:
            return list(_ints(listed))
        iota = re.search(r"\breplica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", self.attributes)
        if iota:
            return _iota(iota[2], iota[3])[: _ints(iota[1])[-1]]
        mesh = re.search(
            r"\breplica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}",
            self.attributes,
        )
        if not mesh:
            if self.attribute(r"\breplica_groups=(?!\{\})(.{,80})"):
                raise ValueError(
                    f"replica_groups: {self.attributes[:200]!r} cannot be read; lists, iotas or meshes fit"
                )
            return []
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        strides = dict(zip(sizes, _strides(list(sizes.values())), strict=True))
        steps = []
        for axis, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh[4]):
            size = int(part) if part else sizes[axis]  # 'x':(2)4 is the 4 of 'x' split into 2 x 4 x rest
            rest = sizes[axis] // (size * int(before or 1))
            steps.append(range(0, size * rest * strides[axis], rest * strides[axis]))
        places = [sum(place) for place in itertools.product(*steps)]
        if mesh[2] is None:
            return places
        devices = _iota(mesh[2], mesh[3])
        return [devices[place] for place in places]


class Computation(dict[str, Instruction]):
    """Instructions by name, in the order in which they run."""

    @functools.cached_property
    def root(self) -> Instruction:
        return next(i for i in self.values() if i.root)

    @functools.cached_property
    def results(self) -> list[Instruction]:
        """The root, or what its tuple is made of."""
        return [self[name] for name in self.root.operands] if self.root.op == "tuple" else [self.root]

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        return sorted((i for i in self.values() if i.op == "parameter"), key=lambda i: int(i.arguments))

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """For each instruction those that use it, and as which operand."""
        found: dict[str, list[tuple[Instruction, int]]] = {name: [] for name in self}
        for i in self.values():
            for k, name in enumerate(i.operands):
                found[name].append((i, k))
        return found


@dataclasses.dataclass(frozen=True)
class Program:
    """entry: the name of the computation that runs first. partitions: the devices that it runs on."""

    computations: dict[str, Computation]
    entry: str
    partitions: int

    def trip_count(self, scope: Computation, loop: Instruction) -> int | None:
        """How often a `while` of computation `scope` runs its body; None where data decides it.

        The condition compares an element of the loop's state, which the body adds a constant to, with a constant or
        with another element. Where it starts is read from the operand, and taken as 0 where that is out of sight.
        """
        condition = self.computations[loop.computation("condition")]
        body = self.computations[loop.computation("body")]
        test, arguments = condition.root, None
        if test.op == "fusion":
            arguments = [self._trace(condition, name) for name in test.operands]
            condition = self.computations[test.computation("calls")]
            test = condition.root
        if test.op != "compare":
            return None
        left, right = (self._trace(condition, name, arguments) for name in test.operands)
        direction = test.attribute(r"direction=(\w+)")
        if left is not None and left.element is None:
            left, right = right, left
            direction = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}.get(direction or "", direction)
        if left is None or left.element is None or right is None:
            return None

        def initial(element: int) -> int | None:
            state = scope[loop.operands[0]]
            value = self._trace(scope, state.operands[element]) if state.op == "tuple" else None
            return value.constant if value is not None and value.element is None else None

        limit = right.constant
        if right.element is not None:
            carried = initial(right.element)
            if carried is None:
                return None
            limit += carried
        step = self._trace(body, body.results[left.element].name) if body.root.op == "tuple" else None
        if step is None or step.element != left.element or step.constant == 0:
            return None
        distance = limit - left.constant - (initial(left.element) or 0)
        if direction in ("LE", "GE"):
            distance += 1 if direction == "LE" else -1
        return max(0, math.ceil(distance / step.constant))

    def _trace(
        self, scope: Computation, name: str, arguments: Sequence[_Linear | None] | None = None
    ) -> _Linear | None:
        """An integer of a computation as a constant, or as an element of its one parameter, a tuple, plus a constant;
        `arguments` stand for the parameters of a fused computation. None where it is neither."""
        i = scope[name]
        if i.op == "constant":
            return _Linear(None, int(i.arguments)) if re.fullmatch(r"-?\d+", i.arguments) else None
        if i.op == "parameter":
            return arguments[int(i.arguments)] if arguments is not None else None
        if i.op == "get-tuple-element":
            index, source = int(i.attribute(r"\bindex=(\d+)") or 0), scope[i.operands[0]]
            if source.op == "parameter" and arguments is None:
                return _Linear(index, 0)
            return self._trace_fusion(scope, source, index, arguments)
        if i.op in ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done"):
            return self._trace(scope, i.operands[0], arguments)
        if i.op == "add":
            a, b = (self._trace(scope, operand, arguments) for operand in i.operands)
            if a is None or b is None or None not in (a.element, b.element):
                return None
            return _Linear(b.element if a.element is None else a.element, a.constant + b.constant)
        return self._trace_fusion(scope, i, 0, arguments)

    def _trace_fusion(
        self, scope: Computation, i: Instruction, index: int, arguments: Sequence[_Linear | None] | None
    ) -> _Linear | None:
        """A result of a fusion."""
        if i.op != "fusion":
            return None
        fused = self.computations[i.computation("calls")]
        given = [self._trace(scope, operand, arguments) for operand in i.operands]
        return self._trace(fused, fused.results[index].name, given) if index < len(fused.results) else None


@dataclasses.dataclass(frozen=True)
class _Linear:
    """`constant`, plus an element of a loop's state."""

    element: int | None
    constant: int


def read_program(text: str) -> Program:
    """Raises ValueError where the text has no entry computation."""
    computations: dict[str, Computation] = {}
    entry, current = "", Computation()
    pieces: list[str] = []  # of the instruction being read: attributes may hold line breaks

    def finish() -> None:
        line = "\n".join(pieces)
        pieces.clear()
        found = _INSTRUCTION.match(line)
        if found:
            root, name, kind, op = found.groups()
            arguments, _, attributes = line[found.end() :].partition(")")
            operands = tuple(_NAME.findall(arguments))
            current[name] = Instruction(name, op, kind, operands, arguments, attributes, bool(root))

    for line in text.splitlines():
        if line.startswith(("  %", "  ROOT %")):
            finish()
            pieces.append(line)
        elif header := _HEADER.match(line):
            finish()
            current = computations[header[2]] = Computation()
            entry = header[2] if header[1] else entry
        elif pieces:
            pieces.append(line)
    finish()
    if not entry:
        raise ValueError("text: it has no ENTRY computation; the text of a compiled program fits")
    partitions = re.search(r"\bnum_partitions=(\d+)", text[: text.index("\n")])
    return Program(computations, entry, int(partitions[1]) if partitions else 1)


@functools.cache
def _bits(dtype: str) -> int:
    """Of an element; its name holds them, as in f8e4m3fn."""
    size = re.search(r"\d+", dtype)
    return 8 if dtype == "pred" else int(size[0]) if size else 0


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def _strides(sizes: Sequence[int]) -> list[int]:
    """Of a row-major array."""
    return [math.prod(sizes[k + 1 :]) for k in range(len(sizes))]


def _iota(sizes: str, order: str | None) -> list[int]:
    """range(n) as an array of these sizes, its axes put in this order, flattened."""
    shape = _ints(sizes)
    strides = _strides(shape)
    axes = _ints(order) if order else range(len(shape))
    steps = (range(0, shape[axis] * strides[axis], strides[axis]) for axis in axes)
    return [sum(place) for place in itertools.product(*steps)]
